"""One training iteration: crops in, weights changed, metrics out. DINO (arXiv:2104.14294), algorithm 1.

Nothing in it asks the host: what changes from iteration to iteration is a row of a table on the device. So the same
code runs eagerly, compiled, or in one CUDA graph (`modes`). Axes: V views, globals first, B images, K prototypes.
"""

import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdino.model import MultiCrop, attention_choice, choices
from fastdino.objectives import Evaluated, Objective
from fastdino.train.accumulation import Known, in_parts
from fastdino.train.averaging import GradientAverager
from fastdino.train.modes import Forward, Modes
from fastdino.train.optim import is_fused, make_update
from fastdino.train.precision import Networks
from fastdino.train.schedules import Row, Schedules, ScheduleTable
from fastdino.train.tuning import DINOS_TUNING, Tuning, frozen_columns


class TrainStep:
    """Forward, loss, backward, clip, optimizer, EMA and center, in the original's order.

    teacher: the student's frozen copy; both keep full precision. optimizer: of OPTIMIZERS. niter_per_ep: steps of an
    epoch. clip_grad: largest norm of one tensor's gradient, 0 for none. freeze_last_layer, freeze_backbone: epochs in
    which prototypes, or backbone, have no gradient. tuning: of DINOv2's recipe. amp_dtype: bf16 computes on copies of
    the weights (adamw) or under autocast (sgd, lars), fp16 under autocast with a GradScaler. mode: see `modes`.
    accumulate: parts of a batch, one update for all. attention_backend, mlp: of attention.BACKENDS and mlp.WAYS, or
    auto. effort: of modes.EFFORTS. say: hears fallbacks. Raises ValueError for what of these cannot be.
    """

    def __init__(
        self,
        *,
        student: MultiCrop,
        teacher: MultiCrop,
        loss: Objective,
        optimizer: str,
        schedules: Schedules,
        niter_per_ep: int,
        clip_grad: float,
        freeze_last_layer: int = 0,
        freeze_backbone: int = 0,
        tuning: Tuning = DINOS_TUNING,
        amp_dtype: torch.dtype | None = None,
        mode: str = "eager",
        accumulate: int = 1,
        attention_backend: str = "auto",
        mlp: str = "auto",
        effort: str = "default",
        say: Callable[[str], object] = print,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate: expected 1 or more, got {accumulate}")
        self.student, self.teacher, self.loss, self.schedules = student, teacher, loss, schedules
        self.accumulate, self._asked = accumulate, (attention_backend, mlp)
        self.replays = accumulate > 1 and loss.sees_whole_batch
        self.kernels: dict[str, choices.Choice] | None = None  # which were chosen, once crops were seen
        self.device, full = next(student.parameters()).device, next(student.parameters()).dtype
        attention_choice.check(attention_backend, self.device.type, amp_dtype or full, compiled=mode != "eager")
        on_copies = amp_dtype == torch.bfloat16 and is_fused(optimizer, amp_dtype)
        self.run = Networks(student, teacher, amp_dtype, on_copies)
        epochs = np.arange(len(schedules.lr)) // niter_per_ep
        columns = {**schedules.columns(), **loss.columns(epochs)}
        columns |= tuning.columns(student, columns) | frozen_columns(epochs, freeze_last_layer, freeze_backbone)
        self.schedule = ScheduleTable(columns, self.device, full)
        self.update = make_update(optimizer, self.run, (student, teacher), self.schedule, clip_grad, tuning)
        summed = student if accumulate > 1 else self.run.student  # several parts' gradients, where the masters are
        self._averager = GradientAverager(summed.parameters(), overlap=accumulate == 1)
        # grad_norm: before the clip, without fp16's scale. state: the largest number of the objective's, to be checked.
        self.metric_names = ("loss", *loss.metric_names, "grad_norm")
        self._as_metrics: Any = namedtuple("StepMetrics", (*self.metric_names, "state"))  # type: ignore[misc]
        self._metrics = torch.zeros(len(self.metric_names) + 1, dtype=full, device=self.device)
        self._state = [buffer for buffer in loss.buffers() if buffer.is_floating_point()]
        self._modes = Modes(self, mode, say, effort)

    def __call__(self, views: Sequence[Tensor], iteration: int) -> Any:
        """V normalised crops (B, 3, H, W), with what the objective wants besides; the iteration, counted from 0.

        Returns a named tuple of `metric_names` and `state`: 0-D tensors on the device, so that reading them can wait.
        """
        if self.kernels is None:
            self.prepare(views[: self.loss.ncrops])
        self.schedule.seek(iteration)
        if self.loss.before_iteration(iteration):
            self._modes.restart()
        self._modes(views)
        self.loss.after_iteration(self.teacher, iteration)
        return self._as_metrics(*self._metrics.clone())

    def forward(self, views: Sequence[Tensor], row: Row, known: Known | None = None) -> Evaluated:
        """Both networks and the loss, the part that compiles; what the objective's `evaluate` returns."""
        learned, taught = self.run.outputs(self.loss, views, known and known.taught)
        return self.loss.evaluate(learned, taught, row, known and known.shared)

    def compute(self, forward: Forward, views: Sequence[Tensor]) -> None:
        """Forward and backward over the parts of the batch; leaves gradients, metrics and the objective's mean."""
        n, scaler = self.accumulate, self.update.scaler
        self.drop_gradients()
        found = []
        for part, known in in_parts(views, n, self.run, self.loss, self.schedule.row):
            loss, others, mean = forward(part, self.schedule.row, known)
            scaled = loss / n if n > 1 else loss
            (scaled if scaler is None else scaler.scale(scaled)).backward()
            found.append((loss.detach(), *others, mean))
            if n > 1:
                self.run.sum_gradients()
        *self._means, self._batch_mean = found[0] if n == 1 else [torch.stack(x).mean(0) for x in zip(*found)]

    def compute_alone(self, forward: Forward, views: Sequence[Tensor]) -> None:
        """`compute`, with no collective in it: should this process fail, no other waits for it there."""
        with self._averager.deferred():
            self.compute(forward, views)

    def finish(self) -> None:
        """Average over processes, clip, optimizer, EMA, the objective's own state."""
        self._averager.finish()
        grad_norm = self.update(self.schedule.row)
        self.loss.after_step(self._batch_mean)
        largest = [buffer.norm(math.inf) for buffer in self._state] or [torch.zeros_like(grad_norm)]
        state = largest[0] if len(largest) == 1 else torch.stack(largest).amax()
        torch.stack([*self._means, grad_norm, state], out=self._metrics)

    def drop_gradients(self) -> None:
        """So that the next ones live in memory of their own: in a capture, the graph's."""
        self.update.optimizer.zero_grad()

    def prepare(self, crops: Sequence[Tensor]) -> None:
        """Choose kernels for crops of these shapes. Raises ValueError where the parts do not divide the batch."""
        if len(crops[0]) % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of the batch of {len(crops[0])}, got {self.accumulate}")
        part = [crop[: len(crop) // self.accumulate] for crop in crops]
        of = self.student, part, self.loss.n_teacher_views, self.run.dtype, self._asked
        self.kernels = choices.choose_kernels(*of, compiled=self.mode != "eager")

    @property
    def mode(self) -> str:
        """As it came to be."""
        return self._modes.name

    def close(self) -> None:
        """Drop the graph; a process group must not be destroyed before it. The weights stay."""
        self._modes.close()
        self._averager.close()
