"""What must not be saved: numbers that are not finite, found by name."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ADVICE = "Try a smaller --lr, a longer --warmup_epochs, --clip_grad 0.3, or --use_fp16 false"
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # that weights are saved in
WORDS = {"grad_norm": "the gradient", "state": "the objective's state (the center)"}


def nonfinite_metric(
    values: NDArray[np.float64], names: Sequence[str], exempt: Sequence[str] = ()
) -> tuple[int, str] | None:
    """The first NaN or infinity among the metrics of some steps, (steps, names): (step, "the loss became nan").

    exempt: names that may be infinite.
    """
    for step, row in enumerate(values.tolist()):
        for name, value in zip(names, row):
            if not np.isfinite(value) and name not in exempt:
                return step, f"{WORDS.get(name, f'the {name}')} became {value}"
    return None


def tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors in dictionaries, lists, tuples and namespaces, each of which is entered once."""
    seen, left = set[int](), [("", content)]
    while left:
        name, value = left.pop()
        if isinstance(value, Tensor):
            yield name, value
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        items: list[tuple[Any, Any]] = []
        if isinstance(value, Mapping):
            items = list(value.items())
        elif isinstance(value, (list, tuple)):
            items = list(enumerate(value))
        left += [(f"{name}.{key}" if name else str(key), inner) for key, inner in reversed(items)]


@torch.no_grad()
def first_nonfinite(content: Mapping[str, Any]) -> str | None:
    """The name of a tensor of a checkpoint that holds NaN or infinity; None where all are finite.

    Waits for a device once.
    """
    on: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors(content):
        if tensor.dtype in FLOATS and tensor.numel():
            on.setdefault(tensor.device, []).append((name, tensor))
    for pairs in on.values():
        names, values = zip(*pairs)
        bad = ~torch.stack([norm.float() for norm in torch._foreach_norm(values, torch.inf)]).isfinite()
        if index := bad.cpu().nonzero().flatten().tolist():
            return str(names[index[0]])
    return None
