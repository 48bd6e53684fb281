"""Parameter groups, clipping, the three optimizers of the original, and what a step does with them.

An `Update` is what follows the backward pass: clip, freeze, optimizer, EMA of the teacher, low-precision copies.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fastdino.train.precision import Networks
from fastdino.train.schedules import Row, ScheduleTable
from fastdino.train.sharding import is_in_parts, is_sharded, local
from fastdino.train.tuning import DINOS_TUNING, Tuning, column_names
from fastdino_kernels import ClipAdamWEMA, ema_update_


@torch.no_grad()
def gradient_norms(model: nn.Module) -> Tensor:
    """(number of gradients,) the norm of each parameter's gradient, on the device."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return _lengths(grads) if grads else torch.zeros(0)


def _lengths(grads: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """(len(grads),) their norms, computed in dtype; of gradients in parts, over the parts of all processes."""
    lengths = torch.stack(torch._foreach_norm([local(grad) for grad in grads], 2, dtype))
    if not is_in_parts(grads[0]):
        return lengths
    squares = lengths.square_()
    dist.all_reduce(squares)
    return squares.sqrt_()


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float) -> Tensor:
    """Scale each parameter's gradient to at most the norm `clip`, tensor by tensor (not over the whole model).

    Returns the norms before clipping, (number of gradients,), on the device: nothing waits for it.
    """
    norms = gradient_norms(model)
    if len(norms):
        grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, list((clip / (norms + 1e-6)).clamp(max=1.0).unbind()))
    return norms


@torch.no_grad()
def clip_modules(modules: Sequence[Sequence[Tensor]], clip: float) -> Tensor:
    """Scale the gradients of each module to at most the norm `clip`, all of them together, as DINOv2 does.

    modules: the gradients of each. Returns the norms before clipping, (modules,) fp32 or more, on the device.
    """
    full = torch.promote_types(modules[0][0].dtype, torch.float32)
    norms = [_lengths(grads, full).norm() for grads in modules]
    for grads, norm in zip(modules, norms) if clip else ():
        torch._foreach_mul_([local(grad) for grad in grads], (clip / (norm + 1e-6)).clamp(max=1.0))
    return torch.stack(norms)


def gradients_by_module(model: nn.Module) -> list[list[Tensor]]:
    """Of each direct child of the model: the gradients of its parameters."""
    found = ([p.grad for p in child.parameters() if p.grad is not None] for child in model.children())
    return [grads for grads in found if grads]


def cancel_last_layer_gradients(model: nn.Module) -> None:
    """Drop (set to None) the gradients of the head's last layer: no step, no decay, no optimizer state."""
    for name, param in model.named_parameters():
        if "last_layer" in name:
            param.grad = None


def cancel_backbone_gradients(model: nn.Module) -> None:
    """Drop the gradients of the backbone, so that the heads alone move."""
    for name, param in model.named_parameters():
        if name.startswith("backbone."):
            param.grad = None


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888), as in the original: vectors neither decay nor adapt.

    lr, weight_decay: per group. momentum: of the velocity. eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim != 1:
                    update = update.add(param, alpha=group["weight_decay"])
                    param_norm, update_norm = param.norm(), update.norm()
                    trust = group["eta"] * param_norm / update_norm
                    update = update * torch.where((param_norm > 0) & (update_norm > 0), trust, 1.0)
                state = self.state[param]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(param)
                velocity = state["mu"]
                velocity.mul_(group["momentum"]).add_(update)
                param.add_(velocity, alpha=-group["lr"])
        return loss


class Update(Protocol):
    """Changes the weights of student and teacher once their gradients are there."""

    @property
    def optimizer(self) -> Optimizer:
        """What checkpoints keep."""

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16's loss scale, where there is one."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it, because it asks the host nothing."""

    def __call__(self, row: Row) -> Tensor:
        """One update with what the schedules say of this iteration; the norm of all gradients, () on the device."""


class FusedUpdate:
    """AdamW, the clip, freezing, the EMA and the low-precision copies, in the few launches of ClipAdamWEMA."""

    scaler = None
    capturable = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        row: Row,
        clip_grad: float,
        tuning: Tuning = DINOS_TUNING,
        copies: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        groups = tuning.groups(student)
        self.optimizer = ClipAdamWEMA(
            [{"params": group.params} for group in groups],
            lr=0.0,
            betas=tuning.betas,
            clip_grad=clip_grad,
            teacher=zip(student.parameters(), teacher.parameters()),
            copies=copies,
            track_grad_norms=True,
            clip_together=[child.parameters() for child in student.children()] if tuning.clips_modules else (),
        )
        for i, group in enumerate(self.optimizer.param_groups):  # the schedules' own tensors, which change in place
            group["lr"], group["weight_decay"] = (row[name] for name in column_names(i))
        self.optimizer.momentum = row["momentum"]
        self._last_layer = [p for name, p in student.named_parameters() if "last_layer" in name and p.requires_grad]
        self._is_backbone: Tensor | None = None  # (len(tensors),) bool, made on the device
        if "backbone_frozen" in row:
            self.optimizer.freeze_(p for name, p in student.named_parameters() if name.startswith("backbone."))
            self._is_backbone = self.optimizer.frozen.clone()

    def __call__(self, row: Row) -> Tensor:
        """One update; a graph reads the row again at each replay."""
        if self._is_backbone is not None:  # all at once: it has a hundred parameters and more
            torch.logical_and(self._is_backbone, row["backbone_frozen"] > 0, out=self.optimizer.frozen)
        if "frozen" in row:
            self.optimizer.freeze_(self._last_layer, row["frozen"] > 0)
        self.optimizer.step()
        assert self.optimizer.grad_norms is not None
        return self.optimizer.grad_norms.norm()


class HostUpdate:
    """An optimizer of PyTorch's, with numbers that the host has to know; fp16's scaler decides there, too."""

    capturable = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        optimizer: str,
        clip_grad: float,
        tuning: Tuning = DINOS_TUNING,
        schedule: ScheduleTable,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.student, self._schedule, self.scaler = student, schedule, scaler
        self._clip_grad, self._tuning = clip_grad, tuning
        self.optimizer = OPTIMIZERS[optimizer]([{"params": group.params} for group in tuning.groups(student)])
        for group in self.optimizer.param_groups if "betas" in self.optimizer.defaults else ():
            group["betas"] = tuning.betas
        self._student_params = [local(p.detach()) for p in student.parameters()]
        self._teacher_params = [local(p.detach()) for p in teacher.parameters()]

    def __call__(self, row: Row) -> Tensor:
        """One update. Gradients come in scaled, and averaged over processes: all of them skip a step, or none."""
        now = self._schedule.on_host()
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"], group["weight_decay"] = (now[name] for name in column_names(i))
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norms = self._clip()
        if now.get("frozen"):
            cancel_last_layer_gradients(self.student)
        if now.get("backbone_frozen"):
            cancel_backbone_gradients(self.student)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # Also where the scaler skipped the optimizer, as in the original.
        ema_update_(self._teacher_params, self._student_params, row["momentum"])
        return norms.norm()

    def _clip(self) -> Tensor:
        clip = self._clip_grad
        if self._tuning.clips_modules:
            return clip_modules(gradients_by_module(self.student), clip)
        return clip_gradients(self.student, clip) if clip else gradient_norms(self.student)


def _adamw(groups: list[dict[str, Any]]) -> AdamW:
    """Learning rate and weight decay come from the schedules. Of parts PyTorch would update one after another."""
    in_parts = any(is_in_parts(param) for group in groups for param in group["params"])
    return AdamW(groups, lr=0.0, fused=in_parts or None)


# What `--optimizer` accepts. adamw is made here for fp16's scaler, and for networks in parts; else the step takes
# FusedUpdate, whose state_dict is the same.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "adamw": _adamw,
    "sgd": lambda groups: SGD(groups, lr=0.0, momentum=0.9),
    "lars": LARS,
}
FUSED = {"adamw"}


def state_names(optimizer: str) -> set[str]:
    """What an optimizer keeps of each parameter, as its state_dict names it. optimizer: a name of OPTIMIZERS."""
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    made = OPTIMIZERS[optimizer]([{"params": [param]}])
    made.step()
    return set(made.state[param])


def is_fused(optimizer: str, amp_dtype: torch.dtype | None) -> bool:
    """Whether a step takes FusedUpdate: not with fp16, whose scaler may skip the optimizer but never the EMA."""
    return optimizer in FUSED and amp_dtype != torch.float16


def make_update(
    optimizer: str,
    networks: Networks,
    masters: tuple[nn.Module, nn.Module],
    schedule: ScheduleTable,
    clip_grad: float,
    tuning: Tuning = DINOS_TUNING,
) -> Update:
    """What follows the backward pass. optimizer: a name of OPTIMIZERS. masters: student and teacher.

    schedule: with the columns of `tuning.columns`. clip_grad: the largest norm of a gradient, 0 for none.
    """
    if is_fused(optimizer, networks.amp_dtype) and not is_sharded(masters[0]):
        return FusedUpdate(*masters, row=schedule.row, clip_grad=clip_grad, tuning=tuning, copies=networks.copies)
    fp16 = networks.amp_dtype == torch.float16
    scaler = torch.amp.GradScaler(networks.device_type) if fp16 else None
    return HostUpdate(
        *masters, optimizer=optimizer, clip_grad=clip_grad, tuning=tuning, schedule=schedule, scaler=scaler
    )
