"""The schedules of DINOv2 and DINOv3, which change at every iteration and not by epochs.

DINOv2 (arXiv:2304.07193), appendix B; DINOv3 (arXiv:2508.10104), section 3 and its appendix. Arrays are float64, a
value per iteration of the run; `Schedules.columns` gives them the names of a step's row.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastdino.train.schedules import Schedules

Curve = NDArray[np.float64]
# How a learning rate follows the batch, the images of a step over all processes. DINOv3 gives the square root's rate
# for a batch of 64: four times as much.
LR_SCALES = {
    "sqrt_wrt_1024": lambda batch: math.sqrt(batch / 1024),
    "linear_wrt_256": lambda batch: batch / 256,
}


def warmup_cosine(
    base: float,
    final: float,
    iterations: int,
    *,
    warmup: int = 0,
    start: float = 0.0,
    trunc_extra: float = 0.0,
    n: int | None = None,
) -> Curve:
    """Linear from start to base over `warmup`, both included; half a cosine towards final; then final. (n,) values.

    iterations: warm-up and cosine together. trunc_extra: the cosine is as of that share more iterations, cut, and
    stretched so that its last value is final. n: iterations if not given.
    Raises ValueError where the warm-up is longer than the run.
    """
    if warmup > iterations:
        raise ValueError(f"warmup: expected at most iterations={iterations}, got {warmup}")
    n_cosine = iterations - warmup
    if trunc_extra:
        shape = (1 + np.cos(np.linspace(0, np.pi, int((1 + trunc_extra) * n_cosine))[:n_cosine])) / 2
        shape = (shape - shape[-1]) / (1 - shape[-1])
    else:
        shape = (1 + np.cos(np.pi * np.arange(n_cosine) / max(n_cosine, 1))) / 2
    values = np.concatenate([np.linspace(start, base, warmup), final + (base - final) * shape])
    return padded(values, final, iterations if n is None else n)


def warmup_cosine_constant(
    start: float,
    peak: float,
    end: float,
    warmup_iterations: int,
    total_iterations: int,
    cosine_iterations: int | None = None,
) -> Curve:
    """DINOv3's other curve: linear from start up to, not including, peak; a cosine from peak to end; then end.

    cosine_iterations: all that the warm-up leaves, if not given.
    """
    rest = total_iterations - warmup_iterations
    n_cosine = rest if cosine_iterations is None else cosine_iterations
    shape = (1 + np.cos(np.linspace(0, np.pi, n_cosine))) / 2
    values = np.concatenate([np.linspace(start, peak, warmup_iterations, endpoint=False), end + (peak - end) * shape])
    return padded(values, end, total_iterations)


def padded(values: Curve, last: float, n: int) -> Curve:
    """The first n, with `last` where there are fewer."""
    return np.append(values, np.full(max(n - len(values), 0), last))[:n]


@dataclass(frozen=True, kw_only=True)
class IterationSchedules(Schedules):
    """One value per iteration of the run, float64."""

    last_layer_lr: Curve
    """Of the heads' last layers: 0 while they are frozen. Gradients are kept, so moments and steps move on."""
    teacher_temp: Curve

    def columns(self) -> dict[str, Curve]:
        """By the names of a step's row."""
        return super().columns() | {"last_layer_lr": self.last_layer_lr, "teacher_temp": self.teacher_temp}

    @classmethod
    def from_settings(
        cls,
        *,
        epochs: int,
        epoch_length: int,
        lr: float,
        min_lr: float,
        warmup_epochs: int,
        weight_decay: float,
        weight_decay_end: float,
        momentum_teacher: float,
        final_momentum_teacher: float,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        freeze_last_layer_epochs: int,
        trunc_extra: float = 0.0,
        n: int | None = None,
    ) -> "IterationSchedules":
        """By the original's settings. lr: the peak, scaled with the batch already. n: iterations, if not all."""
        total = epochs * epoch_length
        length = total if n is None else n
        n_temps = warmup_teacher_temp_epochs * epoch_length

        def cosine(base: float, final: float, warmup: int = 0) -> Curve:
            return warmup_cosine(base, final, total, warmup=warmup, trunc_extra=trunc_extra, n=length)

        rates = cosine(lr, min_lr, warmup_epochs * epoch_length)
        return cls(
            lr=rates,
            last_layer_lr=np.where(np.arange(length) < freeze_last_layer_epochs * epoch_length, 0.0, rates),
            weight_decay=cosine(weight_decay, weight_decay_end),
            momentum_teacher=cosine(momentum_teacher, final_momentum_teacher),
            teacher_temp=padded(np.linspace(warmup_teacher_temp, teacher_temp, n_temps), teacher_temp, length),
        )
