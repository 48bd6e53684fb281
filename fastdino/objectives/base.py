"""What a training step asks of its loss."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


class Objective(nn.Module):
    """From logits to a loss. A module, so that its buffers move with it and are saved.

    n_teacher_views: how many of the crops the teacher sees, the first ones. metric_names: of what `evaluate` reports.
    """

    n_teacher_views: int
    metric_names: tuple[str, ...]

    def columns(self, epochs: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """What it wants to know per iteration, by name, from the epoch of each: columns of the schedules' table."""
        raise NotImplementedError

    def evaluate(
        self, student: Tensor, teacher: Tensor, row: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """(loss (), the metrics (), what `after_step` wants of this part of the batch: a mean over its images).

        student: (V * B, K) logits, crop-major; teacher: (n_teacher_views * B, K). row: the schedules' current values,
        0-D. Compiled and captured: it asks the host nothing, and changes nothing.
        """
        raise NotImplementedError

    def after_step(self, mean: Tensor) -> None:
        """Once the weights have changed. mean: over the whole batch of this process."""
        raise NotImplementedError
