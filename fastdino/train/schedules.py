"""What changes per iteration: learning rate, weight decay, teacher momentum."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastdino.train.config import TrainConfig


def cosine_schedule(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0,
) -> NDArray[np.float64]:
    """Linear warm-up to base_value, then half a cosine towards final_value: (epochs * niter_per_ep,) float64.

    As in the original, the peak occurs twice (last of the warm-up, first of the cosine) and final_value is approached
    but never reached. Raises ValueError where the warm-up is longer than the run.
    Source: SGDR (arXiv:1608.03983), equation 5, without restarts.
    """
    if warmup_epochs > epochs:
        raise ValueError(f"warmup_epochs: expected at most epochs={epochs}, got {warmup_epochs}")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    n = epochs * niter_per_ep - len(warmup)
    # math.cos, not np.cos: the vectorised one differs from the original's in the last bit.
    cosine = [final_value + 0.5 * (base_value - final_value) * (1 + math.cos(math.pi * i / n)) for i in range(n)]
    return np.append(warmup, cosine)


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """One value per iteration of the run, float64."""

    lr: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    momentum_teacher: NDArray[np.float64]

    @classmethod
    def of(cls, config: TrainConfig, niter_per_ep: int, world_size: int) -> "Schedules":
        """The run's schedules; learning rates are given for 256 images a step and scale with the batch."""
        scale = config.batch_size_per_gpu * world_size / 256
        return cls(
            lr=cosine_schedule(config.lr * scale, config.min_lr, config.epochs, niter_per_ep, config.warmup_epochs),
            weight_decay=cosine_schedule(config.weight_decay, config.weight_decay_end, config.epochs, niter_per_ep),
            momentum_teacher=cosine_schedule(config.momentum_teacher, 1, config.epochs, niter_per_ep),
        )
