"""Where decoded images wait: a few buffers, used again and again, each with the images of one batch side by side.

A buffer is one piece of memory, so that a batch crosses to a GPU in one copy; page-locked where there is one, so that
the copy overlaps. It grows where a batch needs more than any before, and keeps at most twice what the last one needed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdino_kernels.augment.tables import PackedImages

N_BUFFERS = 3  # one that is copied to a GPU, or augmented, and two that are decoded
ALIGNMENT = 16  # bytes


class PackedBuffer:
    """The images of one batch. `reserve` places for them, fill `views`, `append` what came later, read `images`."""

    def __init__(self, pin: bool, channels: int = 3) -> None:
        self.pin, self.channels = pin, channels
        self.bytes = self._allocate(0)
        self.sizes: list[tuple[int, int]] = []
        self.offsets: list[int] = []
        self.used = 0

    def _allocate(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self.pin)

    def _place(self, sizes: Sequence[tuple[int, int]]) -> None:
        for width, height in sizes:
            self.sizes.append((width, height))
            self.offsets.append(self.used)
            self.used += -(-self.channels * width * height // ALIGNMENT) * ALIGNMENT

    def reserve(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Forget the last batch and make room for images of these (width, height)."""
        self.sizes, self.offsets, self.used = [], [], 0
        self._place(sizes)
        if not self.used <= len(self.bytes) <= 2 * self.used:
            self.bytes = self._allocate(0)  # freed before the new one is made
            self.bytes = self._allocate(self.used + self.used // 4)

    def replace(self, index: int, pixels: NDArray[np.uint8]) -> None:
        """Another image in place `index`: (H, W, channels), behind all others. No other thread may be writing."""
        place = len(self.sizes)
        self._place([(pixels.shape[1], pixels.shape[0])])
        if self.used > len(self.bytes):
            grown = self._allocate(self.used + self.used // 4)
            grown[: len(self.bytes)] = self.bytes
            self.bytes = grown
        self.view(place)[:] = pixels
        self.sizes[index], self.offsets[index] = self.sizes.pop(), self.offsets.pop()

    def view(self, index: int) -> NDArray[np.uint8]:
        """(height, width, channels), to be written or read."""
        width, height = self.sizes[index]
        start = self.offsets[index]
        return self.bytes[start : start + self.channels * width * height].numpy().reshape(height, width, -1)

    def images(self) -> PackedImages:
        """The batch as the kernels read it; tables in memory of their own."""
        width, height = (torch.tensor(column, dtype=torch.int32) for column in zip(*self.sizes))
        offset = torch.tensor(self.offsets, dtype=torch.int64)
        return PackedImages(self.bytes[: self.used], offset, width, height, self.channels * width)
