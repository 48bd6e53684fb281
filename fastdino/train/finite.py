"""What must not be saved: numbers that are not finite, found by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ADVICE = "Try a smaller --lr, a longer --warmup_epochs, --clip_grad 0.3, or --use_fp16 false"
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


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _tensors(inner, f"{name}.{index}")


@torch.no_grad()
def first_nonfinite(content: Mapping[str, Any]) -> str | None:
    """The name of a tensor of a checkpoint that holds NaN or infinity; None where all are finite.

    Waits for a device once.
    """
    on: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in _tensors(content, ""):
        on.setdefault(tensor.device, []).append((name, tensor))
    for pairs in on.values():
        names, tensors = zip(*pairs)
        bad = ~torch.stack([norm.float() for norm in torch._foreach_norm(tensors, torch.inf)]).isfinite()
        if index := bad.cpu().nonzero().flatten().tolist():
            return str(names[index[0]])
    return None
