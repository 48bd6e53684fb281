"""One training iteration: crops in, weights changed, metrics out. DINO (arXiv:2104.14294), algorithm 1.

Axes: V views (two global, then local), B images, K prototypes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdino.loss import N_TEACHER_VIEWS, DINOLoss
from fastdino.train.optim import cancel_last_layer_gradients, clip_gradients
from fastdino.train.schedules import Schedules
from fastdino_kernels import ema_update_


class StepMetrics(NamedTuple):
    """0-D tensors on the device, so that reading them can wait: loss, teacher_entropy and kl in nats."""

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor


class TrainStep:
    """Backward, clip, optimizer, EMA and center, in the original's order.

    student: a MultiCropWrapper, bare or under DDP; teacher: its frozen copy. clip_grad: largest norm of one tensor's
    gradient, 0 for none. freeze_last_layer: epochs without an update of the prototypes. amp_dtype: autocast to it,
    None for the weights' own precision; fp16 brings a GradScaler.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        loss: DINOLoss,
        optimizer: Optimizer,
        schedules: Schedules,
        niter_per_ep: int,
        clip_grad: float,
        freeze_last_layer: int,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        self.student, self.teacher, self.loss, self.optimizer = student, teacher, loss, optimizer
        self.schedules, self.niter_per_ep = schedules, niter_per_ep
        self.clip_grad, self.freeze_last_layer = clip_grad, freeze_last_layer
        self.amp_dtype = amp_dtype
        self.scaler = torch.amp.GradScaler("cuda") if amp_dtype == torch.float16 else None
        self.student_params = [p.detach() for p in student.parameters()]
        self.teacher_params = [p.detach() for p in teacher.parameters()]

    def _autocast(self) -> AbstractContextManager[object]:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.student_params[0].device.type, self.amp_dtype)

    def __call__(self, crops: Sequence[Tensor], iteration: int) -> StepMetrics:
        """V normalised crops (B, 3, H, W), and the iteration counted from 0 over the whole run."""
        epoch = iteration // self.niter_per_ep
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.schedules.lr[iteration])
            if i == 0:  # the others hold what must not decay
                group["weight_decay"] = float(self.schedules.weight_decay[iteration])

        with self._autocast():
            with torch.no_grad():
                teacher_output = self.teacher(crops[:N_TEACHER_VIEWS])
            student_output = self.student(crops)
        stats = self.loss.with_stats(student_output, teacher_output, epoch)

        self.optimizer.zero_grad()
        if self.scaler is None:
            stats.loss.backward()
        else:
            self.scaler.scale(stats.loss).backward()
            self.scaler.unscale_(self.optimizer)
        if self.clip_grad:
            clip_gradients(self.student, self.clip_grad)
        if epoch < self.freeze_last_layer:
            cancel_last_layer_gradients(self.student)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

        ema_update_(self.teacher_params, self.student_params, float(self.schedules.momentum_teacher[iteration]))
        return StepMetrics(stats.loss.detach(), stats.teacher_entropy, stats.kl)
