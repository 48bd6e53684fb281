"""A batch in parts whose loss sees the whole batch: centers, Sinkhorn and KoLeo do not depend on the parts.

Two passes: the first, without gradients, finds what all parts have to know of each other; the second computes each part
with it, and with the same random numbers. So `--accumulate 4` of 64 images has the gradient of 64 at once, for a third
more work; the parts alone would have that of four batches of 16 (gradient caching, arXiv:2101.06983, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdino.objectives import Objective
from fastdino.train.precision import Networks
from fastdino.train.schedules import Row


@dataclass(frozen=True)
class Known:
    """Before a part is computed: what the teacher made of it, and what the objective shares among the parts."""

    taught: Any
    shared: Any
    random_state: Tensor
    device: torch.device

    def replay(self) -> None:
        """The next random numbers are those of the first pass over this part."""
        _set_random_state(self.random_state, self.device)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@torch.no_grad()
def look_ahead(run: Networks, objective: Objective, parts: Sequence[Sequence[Tensor]], row: Row) -> list[Known]:
    """The first pass."""
    device, states, learned, taught = parts[0][0].device, [], [], []
    for part in parts:
        states.append(_random_state(device))
        ours, theirs = run.outputs(objective, part)
        learned.append(ours)
        taught.append(theirs)
    shares = objective.share(learned, taught, row)
    return [Known(*about, device) for about in zip(taught, shares, states)]
