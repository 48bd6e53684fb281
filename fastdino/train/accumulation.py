"""A batch in parts whose loss sees the whole batch: centers, Sinkhorn and KoLeo do not depend on the parts.

Two passes: the first, without gradients, finds what all parts have to know of each other; the second computes each part
with it, and with the same random numbers. So `--accumulate 4` of 64 images has the gradient of 64 at once, for a third
more work; the parts alone would have that of four batches of 16 (gradient caching, arXiv:2101.06983, section 3).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdino.objectives import Objective
from fastdino.train.precision import Networks
from fastdino.train.schedules import Row


class Known(NamedTuple):
    """Before a part is computed: what the teacher made of it, and what the objective shares among the parts."""

    taught: Any
    shared: Any


Part = tuple[Sequence[Tensor], Known | None]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def in_parts(views: Sequence[Tensor], n: int, run: Networks, objective: Objective, row: Row) -> Iterator[Part]:
    """The n parts of a batch, with what is known of each before it is computed: nothing, unless the objective asks.

    The first pass is made at once, and not when the first part is asked for.
    """
    parts = list(zip(*(view.chunk(n) for view in views))) if n > 1 else [tuple(views)]
    if n == 1 or not objective.sees_whole_batch:
        return iter([(part, None) for part in parts])
    return _replayed(parts, *_first_pass(parts, run, objective, row))


@torch.no_grad()
def _first_pass(
    parts: Sequence[Sequence[Tensor]], run: Networks, objective: Objective, row: Row
) -> tuple[list[Known], list[Tensor]]:
    """What is known of the parts, and the random state before each."""
    states, learned, taught = [], [], []
    for part in parts:
        states.append(_random_state(part[0].device))
        ours, theirs = run.outputs(objective, part)
        learned.append(ours)
        taught.append(theirs)
    shares = objective.share(learned, taught, row)
    return [Known(*about) for about in zip(taught, shares)], states


def _replayed(parts: Sequence[Sequence[Tensor]], known: list[Known], states: list[Tensor]) -> Iterator[Part]:
    for part, about, state in zip(parts, known, states):
        _set_random_state(state, part[0].device)
        yield part, about
