"""Batches of crops. What is in a batch depends on (seed, epoch, position) alone: not on workers, ranks or a resume.

Axes: B images, L local crops.
"""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastdino.data.augment import MultiCropRecipe, ViewRecipe, apply_crop, center_view, draw_crop
from fastdino.data.decode import BadImage, decode
from fastdino.data.sources import ImageSource

MAX_BAD = 0.1  # of the images: more unreadable ones than this end the run


@dataclass
class Batch:
    """global_crops: (2, B, 3, S, S) uint8. local_crops: (L, B, 3, s, s) uint8. bad: a line per image left out."""

    global_crops: Tensor
    local_crops: Tensor
    bad: list[str]

    def pin_memory(self) -> "Batch":
        """For the DataLoader: page-locked, so that the copy to the GPU overlaps."""
        return Batch(self.global_crops.pin_memory(), self.local_crops.pin_memory(), self.bad)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index): every image once per epoch, in an order of (seed, epoch), shared out over ranks.

    As DistributedSampler with drop_last in the loader: the order is padded from its own start to a multiple of the
    ranks, dealt out one by one, and a last, smaller batch is dropped. `seek` sets the epoch and the first batch.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first_batch = 0

    def seek(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration yields this epoch, from this batch on."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-self.n_images // self.world_size) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.n_images, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        order += order[: -len(order) % self.world_size]
        mine = order[self.rank :: self.world_size]
        for i in range(self.first_batch, len(self)):
            yield [(self.epoch, index) for index in mine[i * self.batch_size : (i + 1) * self.batch_size]]


def _read(source: ImageSource, index: int, bad: list[str]) -> Image.Image:
    """The first readable image from `index` on; a line for each that cannot be read is added to `bad`.

    Where more in a row are bad than a run accepts, a black pixel: the loop ends the run when it counts them.
    """
    for candidate in range(index, index + int(len(source) * MAX_BAD) + 1):
        candidate %= len(source)
        try:
            return decode(source[candidate])
        except (BadImage, OSError) as error:
            bad.append(f"{source.name(candidate)}: {error}")
    return Image.new("RGB", (1, 1))


class MultiCropDataset(Dataset[Batch]):
    """Item (epoch, index) -> the crops of one image, drawn from (seed, epoch, index). Bad images are replaced."""

    def __init__(self, source: ImageSource, recipe: MultiCropRecipe, seed: int) -> None:
        self.source, self.recipe, self.seed = source, recipe, seed

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        bad: list[str] = []
        image = _read(self.source, index, bad)
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, index]))
        return Batch(
            _crops(image, self.recipe.globals, rng),
            _crops(image, self.recipe.locals, rng),
            bad,
        )


def _crops(image: Image.Image, views: Sequence[ViewRecipe], rng: np.random.Generator) -> Tensor:
    """(n, 3, S, S) uint8."""
    if not views:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    crops = [apply_crop(image, draw_crop(rng, image.width, image.height, view)) for view in views]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def _collate(items: list[Batch]) -> Batch:
    return Batch(
        torch.stack([item.global_crops for item in items], dim=1),
        torch.stack([item.local_crops for item in items], dim=1),
        [line for item in items for line in item.bad],
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def useful_workers(asked: int, n_sharing: int) -> int:
    """Loading processes worth having where `n_sharing` training processes share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked, max(1, cores // n_sharing))


def train_loader(
    source: ImageSource, recipe: MultiCropRecipe, sampler: EpochSampler, num_workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Batches of the sampler's epoch; `sampler.seek` before each iteration over it."""
    return DataLoader(
        MultiCropDataset(source, recipe, sampler.seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        persistent_workers=num_workers > 0,
    )


class CenterViews(Dataset[tuple[Tensor | None, int]]):
    """Images as features are extracted from them: (3, size, size) uint8, and the index; bad images are left out."""

    def __init__(self, source: ImageSource, indices: NDArray[np.int64], resize: int, size: int) -> None:
        self.source, self.indices, self.resize, self.size = source, indices, resize, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor | None, int]:
        index = int(self.indices[i])
        try:
            image = decode(self.source[index])
        except (BadImage, OSError):
            return None, index
        return torch.from_numpy(center_view(image, self.resize, self.size).copy()).permute(2, 0, 1), index


def _collate_views(items: list[tuple[Tensor | None, int]]) -> tuple[Tensor, NDArray[np.int64]]:
    kept = [(view, index) for view, index in items if view is not None]
    if not kept:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), np.empty(0, np.int64)
    return torch.stack([view for view, _ in kept]), np.array([index for _, index in kept])


def center_views(
    source: ImageSource, indices: NDArray[np.int64], resize: int, size: int, batch_size: int, num_workers: int
) -> Iterable[tuple[Tensor, NDArray[np.int64]]]:
    """Batches ((b, 3, size, size) uint8, indices (b,)) of the readable images among `indices`."""
    return DataLoader(
        CenterViews(source, indices, resize, size),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate_views,
        worker_init_fn=_ignore_interrupts,
    )
