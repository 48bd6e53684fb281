"""AdamW that also clips each gradient, averages the teacher and keeps low-precision copies, over `clip_adamw_ema_`.

A step of it is two launches, whatever the number of tensors. What it adds to torch.optim.AdamW lives beside the
param_groups, never in them, so that the state_dict of either loads into the other.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from fastdino_kernels.checks import check_momentum, check_pairs, check_same_device, check_shape
from fastdino_kernels.clip_adamw_ema import ModelTensors, check_hyperparameters, check_per_group, update_


class ClipAdamWEMA(AdamW):
    """torch.optim.AdamW after a clip of each tensor's gradient, then the EMA of a teacher; see `clip_adamw_ema_`.

    params, lr, betas, eps, weight_decay: as AdamW's; params in fp32 (or fp64) on one device. lr and weight_decay of a
    group may be replaced by 0-D tensors on the device (`group["lr"] = torch.full(...)`): then a captured step reads
    them at each replay. clip_grad: norm to which each gradient is cut; 0 or None: none is.
    teacher: pairs (student's tensor, teacher's tensor), as `zip(student.parameters(), teacher.parameters())`; the
    student's may be frozen, or missing from params. copies: pairs (tensor of either model, its copy in bf16 or fp16);
    where a param has no gradient, its copy's is taken. clip_together: sets of params whose gradients are cut by the
    norm of all of a set, as DINOv2 does; each param is in one of them, and the groups have the same betas and eps.
    Attributes to read and to set between steps:
      momentum: of the EMA, a float in [0, 1] or a 0-D tensor on the device.
      tensors: the params in the order of the groups, then what is only averaged.
      frozen: (len(tensors),) bool on the device; see `freeze_`.
      grad_norms: (len(tensors),) in the params' dtype, the norms before the clip; None unless there is a clip or
        track_grad_norms asks for them. With clip_together (sets,), and always there.
    Raises ValueError where AdamW does, and where tensors do not fit each other.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        clip_grad: float | None = None,
        teacher: Iterable[tuple[Tensor, Tensor]] = (),
        momentum: float | Tensor = 0.996,
        copies: Iterable[tuple[Tensor, Tensor]] = (),
        track_grad_norms: bool = False,
        clip_together: Iterable[Iterable[Tensor]] = (),
    ) -> None:
        check_hyperparameters(betas, eps, clip_grad)
        check_momentum("momentum", momentum)
        self.clip_grad = clip_grad or 0.0
        self.momentum = momentum
        self._teacher_of = dict(teacher)
        self._copy_of = dict(copies)
        self._set_of = {x: number for number, together in enumerate(clip_together) for x in together}
        self._track_grad_norms = track_grad_norms or self.clip_grad > 0 or bool(self._set_of)
        check_pairs("student", list(self._teacher_of), "teacher", list(self._teacher_of.values()))
        check_pairs("tensors", list(self._copy_of), "copies", list(self._copy_of.values()))
        self.tensors: list[Tensor] = []
        self.frozen = torch.zeros(0, dtype=torch.bool)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As AdamW's. Tensors that were frozen stay so."""
        super().add_param_group(param_group)
        frozen_before = dict(zip(self.tensors, self.frozen))
        params = [param for group in self.param_groups for param in group["params"]]
        present = set(params)
        self.tensors = params + [student for student in self._teacher_of if student not in present]
        self._groups = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        self._groups += self._groups[-1:] * (len(self.tensors) - len(params))
        for i, x in enumerate(self.tensors):
            teacher = self._teacher_of.get(x, x)
            if x.dtype not in (torch.float32, torch.float64) or teacher.dtype != x.dtype:
                raise ValueError(
                    f"tensors[{i}]: expected float32 or float64 and a teacher in it, got {x.dtype} and {teacher.dtype}"
                )
            if x.device != self.tensors[0].device:
                raise ValueError(f"tensors[{i}]: expected to be on {self.tensors[0].device}, got {x.device}")
        device = self.tensors[0].device
        self.frozen = torch.zeros(len(self.tensors), dtype=torch.bool, device=device)
        for i, x in enumerate(self.tensors):
            if x in frozen_before:
                self.frozen[i].copy_(frozen_before[x])
        self._clip_sets = [self._set_of.get(x, 0) for x in self.tensors] if self._set_of else []
        if self._set_of and not self._set_of.keys() >= present:
            raise ValueError("clip_together: expected each param in one of the sets, got one in none")
        n_norms = len(self.tensors) if not self._set_of else 1 + max(self._set_of.values())
        self.grad_norms = (
            torch.zeros(n_norms, dtype=self.tensors[0].dtype, device=device) if self._track_grad_norms else None
        )

    def freeze_(self, params: Iterable[Tensor], frozen: bool | Tensor = True) -> None:
        """Leave params out of the next steps, as if their gradients were None; or take them in again.

        frozen: a bool, or a 0-D bool tensor on the device, whose value is read there (at each replay of a capture).
        """
        position = {x: i for i, x in enumerate(self.tensors)}
        for param in params:
            flag = self.frozen[position[param]]
            flag.copy_(frozen) if isinstance(frozen, Tensor) else flag.fill_(frozen)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every param that has a gradient and is not frozen, and of the whole teacher."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lrs = [group["lr"] for group in self.param_groups]
        weight_decays = [group["weight_decay"] for group in self.param_groups]
        self._check_step(lrs, weight_decays)
        n_params = sum(len(group["params"]) for group in self.param_groups)
        grads = [self.grad_of(x) if i < n_params else None for i, x in enumerate(self.tensors)]
        states: list[dict[str, Any]] = [
            {} if grad is None else self._state_of(x) for x, grad in zip(self.tensors, grads)
        ]
        teachers = [self._teacher_of.get(x) for x in self.tensors]
        everything = ModelTensors(
            params=self.tensors,
            grads=grads,
            exp_avgs=[state.get("exp_avg") for state in states],
            exp_avg_sqs=[state.get("exp_avg_sq") for state in states],
            steps=[state.get("step") for state in states],
            teachers=teachers,
            param_copies=[self._copy_of.get(x) for x in self.tensors],
            teacher_copies=[None if x is None else self._copy_of.get(x) for x in teachers],
        )
        parts = list(self._parts())
        if self._clip_sets and len(parts) > 1:
            raise ValueError("clip_together: expected the same betas and eps in all groups, got several")
        for part, betas, eps in parts:
            update_(
                everything.part(part),
                lrs,
                weight_decays,
                self._groups[part],
                betas,
                eps,
                self.clip_grad,
                self.momentum,
                self.frozen[part],
                None if self.grad_norms is None else self.grad_norms if self._clip_sets else self.grad_norms[part],
                self._clip_sets,
            )
        return loss

    def _check_step(self, lrs: list[float | Tensor], weight_decays: list[float | Tensor]) -> None:
        """What can have changed since the last step; a wrong device would make a kernel read at a wrong address."""
        check_per_group("lr", lrs, self.frozen)
        check_per_group("weight_decay", weight_decays, self.frozen)
        check_momentum("momentum", self.momentum)
        check_same_device(frozen=self.frozen, momentum=self.momentum)
        for i, x in enumerate(self.tensors):
            if x.device != self.frozen.device:
                raise ValueError(f"tensors[{i}]: expected to be on {self.frozen.device} as at first, got {x.device}")
            if x.grad is not None and x.grad.layout != torch.strided:
                raise ValueError(f"tensors[{i}]: expected a dense gradient, got {x.grad.layout}")

    def _parts(self) -> Iterator[tuple[slice, tuple[float, float], float]]:
        """Stretches of `tensors` whose groups agree in betas and eps, two launches each: as a rule, there is one."""
        constants = [(self.param_groups[i]["betas"], self.param_groups[i]["eps"]) for i in self._groups]
        first = 0
        for (betas, eps), run in groupby(constants):
            end = first + len(list(run))
            yield slice(first, end), betas, eps
            first = end

    def grad_of(self, param: Tensor) -> Tensor | None:
        """A param's gradient, or its copy's, where the copy is what the loss was computed with."""
        copy = self._copy_of.get(param)
        return param.grad if param.grad is not None or copy is None else copy.grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As AdamW's, the gradients of copies included."""
        super().zero_grad(set_to_none)
        for copy in self._copy_of.values():
            if copy.grad is not None:
                copy.grad = None if set_to_none else copy.grad.detach().zero_()

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a param, made where it has none. The step count is on the device."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def state_dict(self) -> dict[str, Any]:
        """What AdamW would have saved, had it taken the same steps: waits for the device to say how many.

        A param that was frozen from the start has no state. Step counts are on the CPU, lr and weight_decay floats.
        """
        saved = super().state_dict()
        state = {key: dict(entry) for key, entry in saved["state"].items()}
        if state:
            counts = torch.stack([entry["step"] for entry in state.values()]).cpu()
            for entry, count in zip(state.values(), counts):
                entry["step"] = count.clone()
        saved["state"] = {key: entry for key, entry in state.items() if entry["step"] > 0}
        for group in saved["param_groups"]:
            group["lr"], group["weight_decay"] = float(group["lr"]), float(group["weight_decay"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state_dict of this class or of AdamW (without amsgrad and maximize).

        State that exists is written in place, lr and weight_decay that are tensors too: a captured step goes on with
        what was loaded.
        """
        keys = []
        for i, group in enumerate(state_dict["param_groups"]):
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(f"param_groups[{i}]: expected amsgrad and maximize to be False, got True")
            keys += group["params"]
        for key, param in zip(keys, self.tensors):
            for name in ("exp_avg", "exp_avg_sq"):
                if key in state_dict["state"]:
                    check_shape(f"state[{key}][{name!r}]", state_dict["state"][key][name], param.shape)
        settings = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        buffers = dict(self.state)
        super().load_state_dict(state_dict)
        loaded = dict(self.state)
        for group, (lr, weight_decay) in zip(self.param_groups, settings):
            for name, value in (("lr", lr), ("weight_decay", weight_decay)):
                if isinstance(value, Tensor):
                    group[name] = value.fill_(group[name])
        self.state.clear()
        self.state.update(buffers)
        for param in {**buffers, **loaded}:
            for name, x in self._state_of(param).items():
                x.copy_(loaded[param][name]) if param in loaded else x.zero_()
