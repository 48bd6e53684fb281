"""What changes per iteration: learning rate, weight decay, teacher momentum and temperature, freezing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """By the names of a step's row."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "momentum": self.momentum_teacher}

    @classmethod
    def of(cls, config: TrainConfig, niter_per_ep: int, world_size: int) -> "Schedules":
        """The run's schedules; learning rates are given for 256 images a step and scale with the batch."""
        scale = config.batch_size_per_gpu * world_size / 256
        return cls(
            lr=cosine_schedule(config.lr * scale, config.min_lr, config.epochs, niter_per_ep, config.warmup_epochs),
            weight_decay=cosine_schedule(config.weight_decay, config.weight_decay_end, config.epochs, niter_per_ep),
            momentum_teacher=cosine_schedule(config.momentum_teacher, 1, config.epochs, niter_per_ep),
        )


Row = Mapping[str, Tensor]  # what the schedules say of one iteration: 0-D tensors on the device, by name


class ScheduleTable:
    """All rows of a run on the device, which counts its own iterations: nothing is copied from the host in a step.

    columns: a value per iteration for each name. Attribute: row, the current one; `advance` writes into it.
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]], device: torch.device, dtype: torch.dtype) -> None:
        self._columns = columns
        values = torch.from_numpy(np.stack(list(columns.values()), axis=1).astype(np.float64))
        # 16 bytes for each number: at any other address the compiler would take it for unaligned.
        padded = values[:, :, None].expand(-1, -1, 16 // dtype.itemsize)
        self._rows = self._on_device(padded, device, dtype)
        self._current = self._rows[0].clone()
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._next = 0  # where the device's counter stands
        self.row: Row = dict(zip(columns, self._current[:, 0].unbind()))

    @staticmethod
    def _on_device(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        return values.to(device, dtype).contiguous()

    def seek(self, iteration: int) -> None:
        """The next `advance` gives this iteration's row. Writes to the device only where that is not the next one."""
        if iteration != self._next:
            self._counter.fill_(iteration)
        self._next = iteration + 1

    def on_host(self) -> dict[str, float]:
        """The row that `seek` asked for, for optimizers that live on the host."""
        return {name: float(column[self._next - 1]) for name, column in self._columns.items()}

    def rewind(self) -> None:
        """Back to the row before: after an iteration that came to nothing."""
        self._counter.fill_(self._next - 1)

    def advance(self) -> None:
        """Make the next row the current one. A captured graph does this at each replay."""
        self._current.copy_(self._rows.index_select(0, self._counter)[0])
        self._counter += 1
