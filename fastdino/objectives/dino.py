"""DINO's loss as a module: it owns the center and the teacher's temperature schedule, and calls the op.

Axes: V student views, B images, K prototypes; two teacher views.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastdino.objectives.base import Evaluated, Objective
from fastdino_kernels import DINOLossStats, batch_center, center_ema_, dino_loss_with_stats


class DINOLoss(Objective):
    """Cross-entropy between the teacher's centered, sharpened probabilities and the student's; updates the center.

    out_dim: K. ncrops: V, both globals first. The teacher's temperature goes linearly from warmup_teacher_temp to
    teacher_temp over the first warmup_teacher_temp_epochs of nepochs, by whole epochs.
    Buffer: center (1, K) fp32. Source: DINO (arXiv:2104.14294), section 3.1 and algorithm 1.
    """

    center: Tensor
    n_teacher_views = 2  # the global crops
    ncrops: int
    metric_names = ("teacher_entropy", "kl")

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if warmup_teacher_temp_epochs > nepochs:
            raise ValueError(
                f"warmup_teacher_temp_epochs: expected at most nepochs={nepochs}, got {warmup_teacher_temp_epochs}"
            )
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.teacher_temp_schedule = np.append(warmup, np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp))

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """(V * B, K) and (2 * B, K) logits, crop-major -> () loss; then the center moves. epoch counts from 0."""
        return self.with_stats(student_output, teacher_output, epoch).loss

    def with_stats(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> DINOLossStats:
        """`forward`, and the numbers for the log: teacher entropy, KL, per-image losses."""
        # The center moves before the caller's backward pass, which must see the one that the loss saw: a copy.
        temp = float(self.teacher_temp_schedule[epoch])
        stats = self.at_temperature(student_output, teacher_output, temp, self.center[0].clone())
        self.move_center(self.batch_center(teacher_output))
        return stats

    def at_temperature(
        self,
        student_output: Tensor,
        teacher_output: Tensor,
        teacher_temp: float | Tensor,
        center: Tensor | None = None,
    ) -> DINOLossStats:
        """The loss alone, at this center (K,) or at the module's, which must not move before the backward pass."""
        student = student_output.unflatten(0, (self.ncrops, -1))
        teacher = teacher_output.detach().unflatten(0, (self.n_teacher_views, -1))
        center = self.center[0] if center is None else center
        return dino_loss_with_stats(student, teacher, center, self.student_temp, teacher_temp)

    def batch_center(self, teacher_output: Tensor) -> Tensor:
        """Mean of teacher logits (2 * B, K) of this process: (K,)."""
        return batch_center(teacher_output.detach().unflatten(0, (self.n_teacher_views, -1)))

    def columns(self, epochs: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """The teacher's temperature, by whole epochs."""
        return {"teacher_temp": self.teacher_temp_schedule[epochs]}

    def evaluate(self, learned: Tensor, taught: Tensor, row: Mapping[str, Tensor], shared: None = None) -> Evaluated:
        """Loss; teacher entropy and KL in nats; mean teacher logits (K,)."""
        stats = self.at_temperature(learned, taught, row["teacher_temp"])
        return stats.loss, (stats.teacher_entropy, stats.kl), self.batch_center(taught)

    def after_step(self, mean: Tensor) -> None:
        """The center moves."""
        self.move_center(mean)

    @torch.no_grad()
    def move_center(self, mean: Tensor) -> None:
        """Move the center towards a mean (K,) of teacher logits, averaged over all processes first."""
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        center_ema_(self.center[0], mean, self.center_momentum)
