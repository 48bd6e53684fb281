"""One training iteration: crops in, weights changed, metrics out. DINO (arXiv:2104.14294), algorithm 1.

Nothing in it asks the host: what changes from iteration to iteration is a row of a table on the device. So the same
code runs eagerly, compiled, or captured in one CUDA graph: `modes` decides.
Axes: V views (two global, then local), B images, K prototypes.
"""

from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.model import MultiCropWrapper, attention_choice
from fastdino.model.attention import use_backend
from fastdino.objectives import Objective
from fastdino.train.averaging import GradientAverager
from fastdino.train.modes import Forward, Modes
from fastdino.train.optim import OPTIMIZERS, FusedUpdate, HostUpdate, Update, is_fused
from fastdino.train.precision import low_precision_twin
from fastdino.train.schedules import Row, Schedules, ScheduleTable


def _named(names: Sequence[str]) -> Any:
    """A class of tuples with these names."""
    return namedtuple("StepMetrics", names)


class TrainStep:
    """Forward, loss, backward, clip, optimizer, EMA and center, in the original's order.

    student: a MultiCropWrapper; teacher: its frozen copy; both keep full precision. optimizer: a name of OPTIMIZERS.
    clip_grad: largest norm of one tensor's gradient, 0 for none. freeze_last_layer: epochs without an update of the
    prototypes. amp_dtype: bf16 computes on copies of the weights (adamw) or under autocast (sgd, lars); fp16 under
    autocast, with a GradScaler; None in the weights' own precision.
    mode: see `modes`. accumulate: parts that a batch is computed in; one update and one center for all of them.
    attention_backend: a name of model.attention.BACKENDS, or auto. say: what is told where something falls back.
    With several processes gradients are averaged over them before the clip, by the step itself, also in a graph.
    Raises ValueError for a mode, a backend or a number of parts that cannot be.
    """

    def __init__(
        self,
        *,
        student: MultiCropWrapper,
        teacher: MultiCropWrapper,
        loss: Objective,
        optimizer: str,
        schedules: Schedules,
        niter_per_ep: int,
        clip_grad: float,
        freeze_last_layer: int,
        amp_dtype: torch.dtype | None = None,
        mode: str = "eager",
        accumulate: int = 1,
        attention_backend: str = "auto",
        say: Callable[[str], object] = print,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate: expected 1 or more, got {accumulate}")
        self.student, self.teacher, self.loss, self.schedules = student, teacher, loss, schedules
        self.accumulate, self.attention_backend = accumulate, attention_backend
        self.attention: attention_choice.Choice | None = None
        param = next(student.parameters())
        self.device, self.amp_dtype, self.dtype = param.device, amp_dtype, amp_dtype or param.dtype
        attention_choice.check(attention_backend, self.device.type, self.dtype, compiled=mode != "eager")
        fused = is_fused(optimizer, amp_dtype)

        # Networks as they are run: the masters, or their low-precision twins.
        self._student, self._teacher = student, teacher
        self._autocasts = amp_dtype is not None and not (fused and amp_dtype == torch.bfloat16)
        self._copies: list[tuple[Tensor, Tensor]] = []
        if amp_dtype is not None and not self._autocasts:
            self._student, copies = low_precision_twin(student, amp_dtype)
            self._teacher, teacher_copies = low_precision_twin(teacher, amp_dtype)
            self._copies = copies + teacher_copies
        self._masters = [(p, low) for p, low in self._copies if low.requires_grad]

        epochs = np.arange(len(schedules.lr)) // niter_per_ep
        columns = {
            "lr": schedules.lr,
            "weight_decay": schedules.weight_decay,
            "momentum": schedules.momentum_teacher,
            "frozen": epochs < freeze_last_layer,
            **loss.columns(epochs),
        }
        self.schedule = ScheduleTable(columns, self.device, param.dtype)
        self.update: Update
        if fused:
            self.update = FusedUpdate(student, teacher, row=self.schedule.row, clip_grad=clip_grad, copies=self._copies)
        else:
            self.update = HostUpdate(
                student,
                teacher,
                make=OPTIMIZERS[optimizer],
                schedule=self.schedule,
                clip_grad=clip_grad,
                scaler=torch.amp.GradScaler(param.device.type) if amp_dtype == torch.float16 else None,
            )
        # Gradients come to what is run; those of several parts are summed where the masters are.
        summed = student if accumulate > 1 else self._student
        self._averager = GradientAverager(summed.parameters(), overlap=accumulate == 1)
        # grad_norm: of all gradients together, before the clip and without fp16's loss scale.
        self.metric_names = ("loss", *loss.metric_names, "grad_norm")
        self._as_metrics = _named(self.metric_names)
        self._metrics = torch.zeros(len(self.metric_names), dtype=param.dtype, device=self.device)
        self._modes = Modes(self, mode, say)

    @property
    def mode(self) -> str:
        """As it came to be."""
        return self._modes.name

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it."""
        return self.update.capturable

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher as they are run."""
        return self._student, self._teacher

    def __call__(self, crops: Sequence[Tensor], iteration: int) -> Any:
        """V normalised crops (B, 3, H, W), and the iteration counted from 0 over the whole run.

        Returns a named tuple of `metric_names`: 0-D tensors on the device, so that reading them can wait.
        """
        self.prepare(crops)
        self.schedule.seek(iteration)
        self._modes(crops)
        return self._as_metrics(*self._metrics.clone())

    # What an iteration consists of, for the modes.

    def forward(self, crops: Sequence[Tensor], row: Row) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Both networks and the loss, the part that compiles; what the objective's `evaluate` returns."""
        if self.dtype != crops[0].dtype and not self._autocasts:
            crops = [crop.to(self.dtype) for crop in crops]
        with self._autocast():
            with torch.no_grad():
                teacher_output = self._teacher(crops[: self.loss.n_teacher_views])
            student_output = self._student(crops)
        return self.loss.evaluate(student_output, teacher_output, row)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.amp_dtype) if self._autocasts else nullcontext()

    def compute(self, forward: Forward, crops: Sequence[Tensor]) -> None:
        """Forward and backward over the parts of the batch; leaves gradients, metrics and the objective's mean."""
        n, scaler = self.accumulate, self.update.scaler
        parts = zip(*(crop.chunk(n) for crop in crops)) if n > 1 else [tuple(crops)]
        self.update.optimizer.zero_grad()
        self._metrics.zero_()
        means = []
        for part in parts:
            loss, others, mean = forward(part, self.schedule.row)
            scaled = loss / n if n > 1 else loss
            (scaled if scaler is None else scaler.scale(scaled)).backward()
            means.append(mean)
            self._metrics[:-1] += torch.stack([loss.detach(), *others]).to(self._metrics.dtype) / n
            if n > 1:
                self._sum_up()
        self._batch_mean = means[0] if n == 1 else torch.stack(means).mean(0)

    def compute_alone(self, forward: Forward, crops: Sequence[Tensor]) -> None:
        """`compute`, with no collective in it: should this process fail, no other waits for it there."""
        with self._averager.deferred():
            self.compute(forward, crops)

    def finish(self) -> None:
        """Average over processes, clip, optimizer, EMA, the objective's own state."""
        self._averager.finish()
        self._metrics[-1] = self.update(self.schedule.row)
        self.loss.after_step(self._batch_mean)

    def drop_gradients(self) -> None:
        """So that the next ones live in memory of their own: a graph's."""
        self.update.optimizer.zero_grad()

    def _sum_up(self) -> None:
        """Gradients of several parts are summed in full precision, where the masters are."""
        for master, low in self._masters:
            if low.grad is not None:
                grad = low.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                low.grad = None

    # Around the iterations.

    def prepare(self, crops: Sequence[Tensor]) -> None:
        """Once, for the crops' shapes: choose the attention, and make its masks outside of any trace."""
        if self.attention is not None:
            return
        if len(crops[0]) % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of the batch of {len(crops[0])}, got {self.accumulate}")
        student, teacher = (
            self.student.packing(crops[:n], len(crops[0]) // self.accumulate)
            for n in (len(crops), self.loss.n_teacher_views)
        )
        if student is None:
            return
        heads = self.student.backbone.num_heads
        self.attention = attention_choice.choose(
            student,
            heads,
            self.student.backbone.embed_dim // heads,
            self.device.type,
            self.dtype,
            self.attention_backend,
            teacher=teacher,
            compiled=self.mode != "eager",
        )
        use_backend(self.attention.backend)

    def refresh_copies(self) -> None:
        """Bring the low-precision copies up to date: after weights were loaded."""
        if self._copies:
            torch._foreach_copy_([low.detach() for _, low in self._copies], [p.detach() for p, _ in self._copies])

    def close(self) -> None:
        """Drop the graph; a process group must not be destroyed before it. The weights stay."""
        self._modes.close()
        self._averager.close()
