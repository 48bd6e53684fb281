"""The numbers of an epoch as they come, and the entries that sinks are told of them."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdino.train.schedules import Schedules
from fastdino.train.sinks import Entry


class Meter:
    """Means of a step's metrics over an epoch, and how its time was spent.

    names: of the metrics. To add to: waited, seconds spent waiting for data; n_images, of all processes;
    bad, lines about unreadable images.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.sums, self.counts = names, np.zeros(len(names)), np.zeros(len(names))
        self.n_images = 0
        self.waited = 0.0
        self.bad: dict[str, None] = {}
        self.started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint inside of an epoch."""
        return {
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
            "n_images": self.n_images,
            "waited": self.waited,
            "seconds": self.seconds,
            "bad": list(self.bad),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the numbers of an epoch that was stopped. Raises ValueError where they are of no such epoch."""
        kinds = {"sums": list, "counts": list, "n_images": int, "waited": float, "seconds": float, "bad": list}
        if not isinstance(state, Mapping) or any(type(state.get(key)) is not kind for key, kind in kinds.items()):
            raise ValueError(f"expected {', '.join(kinds)}")
        numbers = [*state["sums"], *state["counts"], state["waited"], state["seconds"]]
        if not len(state["sums"]) == len(state["counts"]) == len(self.names):
            raise ValueError(f"expected {len(self.names)} sums and counts")
        if not all(type(x) is float and math.isfinite(x) for x in numbers):
            raise ValueError("expected finite numbers")
        if min([state["n_images"], *numbers[len(self.names) :]]) < 0 or state["n_images"] >= 2**63:
            raise ValueError("expected 0 or more steps, images and seconds")
        if not all(isinstance(line, str) for line in state["bad"]):
            raise ValueError("expected lines about unreadable images")
        self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])
        self.n_images, self.waited = state["n_images"], state["waited"]
        self.bad = dict.fromkeys(state["bad"])
        self.started = time.perf_counter() - state["seconds"]

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started

    @property
    def images_per_s(self) -> float:
        """Of all processes."""
        return self.n_images / max(self.seconds, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for data."""
        return self.waited / max(self.seconds, 1e-9)

    def step_entry(self, values: NDArray[np.float64], iteration: int, epoch: int, schedules: Schedules) -> Entry:
        """Add the metrics of some steps, (steps, names); what there is to tell of them. iteration: done so far.

        Means are of finite numbers: where fp16 skips a step, its gradients were not.
        """
        finite = np.isfinite(values)
        sums, counts = np.where(finite, values, 0).sum(0), finite.sum(0)
        self.sums += sums
        self.counts += counts
        return {
            "iteration": iteration,
            "epoch": epoch,
            **dict(zip(self.names, (sums / np.maximum(counts, 1)).tolist())),
            "lr": float(schedules.lr[iteration - 1]),
            "images_per_s": self.images_per_s,
            "data_wait": self.data_wait,
        }

    def epoch_entry(self, epoch: int, niter: int, schedules: Schedules) -> Entry:
        """The epoch's line of log.txt, evaluations apart: train_loss, train_lr, train_wd, epoch as in the original."""
        span = slice(epoch * niter, (epoch + 1) * niter)
        means = self.sums / np.maximum(self.counts, 1)
        return {
            "train_loss": means[0],
            "train_lr": float(schedules.lr[span].mean()),
            "train_wd": float(schedules.weight_decay[span].mean()),
            "epoch": epoch,
            **{f"train_{name}": mean for name, mean in zip(self.names[1:], means[1:])},
            "train_momentum": float(schedules.momentum_teacher[span].mean()),
            "images_per_s": round(self.images_per_s, 1),
            "data_wait": round(self.data_wait, 4),
        }
