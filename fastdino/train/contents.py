"""What a checkpoint has to hold so that a run can go on from it: looked at as a whole, before anything is changed."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdino.errors import UserError, printable
from fastdino.train.finite import FLOATS, first_nonfinite, tensors
from fastdino.train.optim import state_names

State = dict[str, Any]


class Contents(NamedTuple):
    """Of a checkpoint, as the parts of a run take it."""

    student: State
    teacher: State
    loss: State
    optimizer: State
    scaler: State | None


def odd_tensor(content: Any) -> str | None:
    """The first tensor that is not stored number by number, in words: a few bytes may stand for gigabytes there."""
    for name, tensor in tensors(content):
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            return f"{name} is no plain tensor"
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return f"{name} is larger than what is stored of it"
    return None


def unwrapped(state: Mapping[Any, Any]) -> State:
    """A state dict without the `module.` that DDP puts before its names."""
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> str | None:
    """The first parameter in which two state dicts differ, in words; None where names, shapes and kinds agree."""
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if not isinstance(found[name], Tensor):
            return f"{name} is no tensor but {type(found[name]).__name__}"
        if value.shape != found[name].shape:
            return f"{name} is {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        if _kind(value) != _kind(found[name]):
            return f"{name} is {found[name].dtype}, expected {value.dtype}"
    extra = [name for name in found if name not in expected]
    return f"{printable(extra[0])} is not part of this model" if extra else None


def _kind(tensor: Tensor) -> str:
    """What may be loaded into what."""
    if tensor.dtype in FLOATS:
        return "floating"
    is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return "whole" if is_whole else str(tensor.dtype)


def check(
    checkpoint: Mapping[str, Any],
    *,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Optimizer,
    optimizer_name: str,
    loss: nn.Module,
    scaler: torch.amp.GradScaler | None = None,
) -> Contents:
    """A checkpoint's state for these parts of a run. `student` is the bare module, without DDP.

    optimizer_name: of OPTIMIZERS. Raises UserError, naming the first key, for a checkpoint of another model or another
    optimizer, and for numbers that are not finite.
    """
    check_counts(checkpoint)
    modules = {"student": student, "teacher": teacher, "dino_loss": loss}
    states = {key: unwrapped(_part(checkpoint, key)) for key in modules}
    for key, module in modules.items():
        if difference := first_difference(module.state_dict(), states[key]):
            raise UserError(f"the checkpoint is of another model: {key}: {difference}")
    kept = _part(checkpoint, "optimizer")
    try:
        moments, groups = _moments(kept, optimizer, optimizer_name, student), _groups(kept, optimizer)
    except ValueError as error:
        raise UserError(f"the checkpoint's optimizer does not fit this run: {error}") from error
    if checkpoint["epoch"] and not moments:
        raise UserError("the checkpoint's optimizer does not fit this run: its state is empty")
    if name := first_nonfinite({**states, "optimizer": {"state": moments}}):
        raise UserError(f"{name} holds numbers that are not finite")
    if scaler is not None and (problem := _scale_problem(checkpoint.get("fp16_scaler") or {}, scaler)):
        raise UserError(f"the checkpoint's fp16_scaler {problem}")
    state, scale = {"state": moments, "param_groups": groups}, checkpoint.get("fp16_scaler") or None
    return Contents(states["student"], states["teacher"], states["dino_loss"], state, scale)


def check_counts(checkpoint: Mapping[str, Any]) -> None:
    """Raises UserError where the numbers of epochs and iterations are none."""
    for key, number in (("epoch", checkpoint.get("epoch")), ("iteration", checkpoint.get("iteration", 0))):
        if type(number) is not int or not 0 <= number < 2**63:
            raise UserError(f"the checkpoint's {key} is {_brief(number)}, expected a whole number, 0 or more")


def _part(checkpoint: Mapping[str, Any], key: str) -> State:
    if not isinstance(checkpoint.get(key), dict):
        held = printable(", ".join(map(str, list(checkpoint)[:5]))) or "nothing"
        raise UserError(f"the checkpoint has no {key!r}: it holds {held}")
    return checkpoint[key]


def _moments(kept: State, optimizer: Optimizer, name: str, student: nn.Module) -> dict[int, dict[str, Tensor]]:
    """What an optimizer keeps of each parameter, by its number here. Raises ValueError where it is of another one.

    A parameter without state had no gradient so far: it is frozen, or nothing uses it.
    """
    groups, state = kept.get("param_groups"), kept.get("state")
    if not (isinstance(groups, list) and isinstance(state, dict) and all(isinstance(g, dict) for g in groups)):
        raise ValueError("it has no parameter groups and state")
    numbers = [group.get("params") for group in groups]
    if not all(isinstance(some, list) and all(type(i) is int for i in some) for some in numbers):
        raise ValueError("its parameter groups name no parameters")
    params = [group["params"] for group in optimizer.param_groups]
    if [len(some) for some in numbers] != [len(some) for some in params]:
        sizes = [len(some) for some in numbers], [len(some) for some in params]
        raise ValueError(f"its groups have {sizes[0]} parameters, expected {sizes[1]}")
    names = {id(param): param_name for param_name, param in student.named_parameters()}
    expected, found = state_names(name), {}
    pairs = [(number, param) for some, ours in zip(numbers, params) for number, param in zip(some, ours)]
    for index, (number, param) in enumerate(pairs):
        if number not in state:
            continue
        held, what = state[number], names[id(param)]
        if not isinstance(held, dict) or not expected <= held.keys():
            keys = printable(", ".join(map(str, held))) if isinstance(held, dict) and held else "nothing"
            raise ValueError(f"of {what} it holds {keys}, expected {', '.join(sorted(expected))}")
        found[index] = {key: _moment(held[key], key, param, what) for key in sorted(expected)}
    return found


def _groups(kept: State, optimizer: Optimizer) -> list[State]:
    """This optimizer's groups with the saved lr and weight_decay. Raises ValueError where these are no numbers."""
    groups: list[State] = optimizer.state_dict()["param_groups"]
    for ours, saved in zip(groups, kept["param_groups"]):
        for key in ("lr", "weight_decay"):
            if not (_is_number(number := _number(saved.get(key, ours[key]))) and number < 2**63):
                raise ValueError(f"its {key} is {_brief(number)}, expected a number")
            ours[key] = float(number)
        if saved.get("amsgrad") is True or saved.get("maximize") is True:
            raise ValueError("it has amsgrad or maximize, and this one has not")
    return groups


def _number(value: Any) -> Any:
    """What a tensor of one element holds; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _brief(value: Any) -> str:
    """A value in a few words; Python does not print numbers of thousands of digits."""
    return "a huge number" if isinstance(value, int) and abs(value) >= 2**63 else printable(repr(value)[:40])


def _is_number(value: Any) -> bool:
    """Whether it is one that is 0 or more, and finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _moment(value: Any, key: str, param: Tensor, what: str) -> Tensor:
    if key == "step":  # older versions of PyTorch save a plain number
        number = _number(value)
        if not (_is_number(number) and number < 2**63):
            raise ValueError(f"step of {what} is no count of steps")
        return torch.tensor(float(number))
    if not isinstance(value, Tensor) or value.shape != param.shape:
        raise ValueError(f"{key} of {what} is not of the shape {tuple(param.shape)}")
    if _kind(value) != _kind(param):
        raise ValueError(f"{key} of {what} is {value.dtype}, expected {param.dtype}")
    if key == "exp_avg_sq" and value.numel() and value.min() < 0:
        raise ValueError(f"{key} of {what} holds a negative number")
    return value


def _scale_problem(scale: Any, scaler: torch.amp.GradScaler) -> str | None:
    """Why a saved loss scale cannot be used, in words; none at all can: the scaler begins anew."""
    if not isinstance(scale, dict):
        return f"is no dictionary but {type(scale).__name__}"
    for key in scaler.state_dict() if scale else ():
        if not _is_number(number := scale.get(key)):
            return f"has {_brief(number)} as its {key}, expected a number"
    return None
