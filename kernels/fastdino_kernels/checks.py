"""What the public ops refuse, in one voice: a ValueError that names the expected and the got."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected floating-point values, got {x.dtype}")


def check_shape(name: str, x: Tensor, expected: Sequence[int | str]) -> None:
    """`expected` holds sizes, or names for axes that may have any size."""
    fits = x.ndim == len(expected) and all(isinstance(e, str) or e == n for e, n in zip(expected, x.shape))
    if not fits:
        wanted = ", ".join(str(e) for e in expected)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(x.shape)}")


def check_same_device(**values: Tensor | float) -> None:
    """Of the values that are tensors, the first says which device."""
    (first_name, first), *rest = [(name, x) for name, x in values.items() if isinstance(x, Tensor)]
    for name, x in rest:
        if x.device != first.device:
            raise ValueError(f"{name}: expected to be on {first.device} like {first_name}, got {x.device}")


def check_temperature(name: str, value: float | Tensor) -> None:
    """A tensor is trusted: to look at its value would stop the device."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a 0-D tensor, got shape {tuple(value.shape)}")
    elif not value > 0:
        raise ValueError(f"{name}: expected a temperature above 0, got {value}")


def check_momentum(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a 0-D tensor, got shape {tuple(value.shape)}")
    elif not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a value in [0, 1], got {value}")


def check_pairs(left_name: str, left: Sequence[Tensor], right_name: str, right: Sequence[Tensor]) -> None:
    """Two lists of tensors, equal in length, shapes and device."""
    if len(left) != len(right):
        raise ValueError(f"{right_name}: expected {len(left)} tensors like {left_name}, got {len(right)}")
    for i, (a, b) in enumerate(zip(left, right)):
        if a.shape == b.shape and a.device == b.device and a.dtype in FLOATS and b.dtype in FLOATS:
            continue  # hundreds of pairs a step: names are for what is wrong
        check_floating(f"{left_name}[{i}]", a)
        check_floating(f"{right_name}[{i}]", b)
        check_shape(f"{right_name}[{i}]", b, a.shape)
        check_same_device(**{f"{left_name}[{i}]": a, f"{right_name}[{i}]": b})
