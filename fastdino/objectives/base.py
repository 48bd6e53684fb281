"""What a training step asks of its objective."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Evaluated = tuple[Tensor, tuple[Tensor, ...], Tensor]


class Objective(nn.Module):
    """From views to a loss. A module, so that its buffers move with it and are saved.

    ncrops: V, how many of the views are crops, None for all. n_teacher_views: how many of these the teacher sees, the
    first ones. metric_names: of what `evaluate` reports. sees_whole_batch: a part of a batch cannot be evaluated by
    itself: `share` is asked first, with all parts. meets_others: with several processes, `evaluate` waits for them.
    """

    n_teacher_views: int
    ncrops: int | None = None
    metric_names: tuple[str, ...]
    sees_whole_batch = False
    meets_others = False

    def columns(self, epochs: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """What it wants to know per iteration, by name, from the epoch of each: columns of the schedules' table."""
        return {}

    def teach(self, teacher: Any, views: Sequence[Tensor]) -> Any:
        """What the teacher makes of the views, which are V crops (B, 3, H, W) and what the objective has besides."""
        return teacher(views[: self.n_teacher_views])

    def learn(self, student: Any, views: Sequence[Tensor]) -> Any:
        """What the student makes of them."""
        return student(views)

    def evaluate(self, learned: Any, taught: Any, row: Mapping[str, Tensor], shared: Any = None) -> Evaluated:
        """(loss (), the metrics (), what `after_step` wants of this part of the batch: a mean over its images).

        learned, taught: of `learn` and `teach`. row: the schedules' current values, 0-D. shared: of `share`, where a
        batch has several parts. Compiled and captured: it asks the host nothing, and changes nothing.
        """
        raise NotImplementedError

    def share(self, learned: Sequence[Any], taught: Sequence[Any], row: Mapping[str, Tensor]) -> Sequence[Any]:
        """For each part of a batch, what it has to know of all of them. learned: without gradients."""
        raise NotImplementedError

    def before_iteration(self, iteration: int) -> bool:
        """On the host, before an iteration is launched: whether it computes something else than those before it.

        Then it is captured anew, and what it is given may have other shapes.
        """
        return False

    def after_step(self, mean: Tensor) -> None:
        """Once the weights have changed. mean: over the whole batch of this process."""

    def after_iteration(self, teacher: Any, iteration: int) -> None:
        """On the host, outside of every graph, once an iteration has been launched. teacher: its master."""
