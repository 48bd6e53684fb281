"""Batches of crops. What is in a batch depends on (seed, epoch, position) alone: not on threads, ranks or a resume.

Threads, because everything slow here (reading, decoding, resizing) lets go of the interpreter's lock, and what they
decode lies where it is needed; processes would have to send every image. A batch is opened (headers: where in the
buffer does each image go?), decoded, and made into crops: on a GPU by the kernels, on a side stream, and without one by
the same threads. Two batches are in the making while a third is trained on.
Axes: V views, L local crops, B images, C channels: 3, or those of a `channels.Converted` source, on the CPU.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from fastdino.data.augment import apply_crop, apply_crop_fast, normalize
from fastdino.data.channels import channels_of
from fastdino.data.decode import BadImage, Opened, decode_array, open_image
from fastdino.data.masks import BatchMasks
from fastdino.data.params import MultiCropRecipe, crop_params, draw_crops
from fastdino.data.ring import N_BUFFERS, PackedBuffer
from fastdino.data.sources import ImageSource
from fastdino_kernels.augment.tables import CropTable, PackedImages

MAX_BAD = 0.1  # of the images: more unreadable ones than this end the run
N_SAMPLED = 16  # headers read to say how much memory decoded images take
BLACK = np.zeros((1, 1, 1), np.uint8)

cv2.setNumThreads(0)  # the threads are ours; OpenCV's own would fight them for the cores


@dataclass
class Batch:
    """Crops of one step: on the host in uint8, or on the GPU and normalised once `ready` has passed.

    global_crops: (2, B, C, S, S). local_crops: (L, B, C, s, s). anchors: (2, B, C, A, A), the global ones at another
    size, or (0, ...). bad: a line per image left out. masks: of `BatchMasks`.
    """

    global_crops: Tensor
    local_crops: Tensor
    anchors: Tensor
    bad: list[str]
    ready: torch.cuda.Event | None = None
    masks: list[Tensor] = field(default_factory=list)

    def views(self, device: torch.device) -> list[Tensor]:
        """The crops, what masks them, and the anchors, on `device`."""
        masks = (x.to(device, non_blocking=True) for x in self.masks)
        return [*self.crops(device), *masks, *self._normalised(device, self.anchors)]

    def crops(self, device: torch.device) -> list[Tensor]:
        """V normalised crops (B, C, H, W) on `device`, globals first, for the current stream to use."""
        return self._normalised(device, self.global_crops, self.local_crops)

    def _normalised(self, device: torch.device, *groups_of_crops: Tensor) -> list[Tensor]:
        groups = [group for group in groups_of_crops if len(group)]
        if self.ready is None:
            groups = [normalize(group.to(device, non_blocking=True)) for group in groups]
        else:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.ready)
            for group in groups:
                group.record_stream(stream)
        return [crop for group in groups for crop in group.unbind(0)]


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
        epoch = self.epoch
        for i in range(self.first_batch, len(self)):
            yield [(epoch, index) for index in mine[i * self.batch_size : (i + 1) * self.batch_size]]


def useful_workers(asked: int, n_sharing: int) -> int:
    """Loading threads worth having where `n_sharing` training processes share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked, max(1, cores // n_sharing))


def _in_words(n_bytes: int) -> str:
    """Two digits or more, in the unit that has them."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


@dataclass
class _Item:
    """A place in a batch: which image was asked for, how many candidates were tried, and what was wrong with them."""

    index: int
    n_bad: int = 0
    bad: list[str] = field(default_factory=list)
    opened: Opened = field(default_factory=lambda: open_image(BLACK))


class CropLoader:
    """Iterates over the sampler's epoch; `sampler.seek` before each iteration.

    num_workers: threads; 0 does everything in the caller's. augment: exact (Pillow's pixels), fast (close to them), or
    auto: exact where the kernels make the crops, on a GPU, and fast elsewhere. dct_scale: decode JPEGs that are far
    larger than the crops need at a fraction of their size. dtype: of crops made on a GPU, fp32, bf16 or fp16; in the
    step's own they are written and read with half the bytes, and not cast. masks: of the global crops, drawn with them.
    """

    def __init__(
        self,
        source: ImageSource,
        recipe: MultiCropRecipe,
        sampler: EpochSampler,
        *,
        num_workers: int = 0,
        device: torch.device | None = None,
        augment: str = "auto",
        dct_scale: bool = False,
        dtype: torch.dtype = torch.float32,
        masks: BatchMasks | None = None,
    ) -> None:
        self.masks = masks
        self.source, self.recipe, self.sampler, self.num_workers = source, recipe, sampler, num_workers
        self.device = device or torch.device("cpu")
        self.channels = channels_of(source)
        self.on_gpu = self.device.type == "cuda" and self.channels == 3  # which the kernels are made for
        self.exact = self.on_gpu if augment == "auto" else augment == "exact"
        self.dtype = dtype
        # Twice what the smallest boxes need: the resize still does most of the smoothing.
        self.min_pixels = round(2 * recipe.short_side) if dct_scale else 0
        self.buffers = [PackedBuffer(self.on_gpu, self.channels) for _ in range(N_BUFFERS if num_workers else 1)]
        self._free: SimpleQueue[PackedBuffer] = SimpleQueue()
        for buffer in self.buffers:
            self._free.put(buffer)
        self._images = ThreadPoolExecutor(num_workers, "image") if num_workers else None
        self._batches = ThreadPoolExecutor(N_BUFFERS, "batch") if num_workers else None
        self._stream = torch.cuda.Stream(self.device) if self.on_gpu else None
        self._launching = threading.Lock()  # Triton compiles a kernel when it is first launched

    def __len__(self) -> int:
        return len(self.sampler)

    def memory(self) -> int:
        """About how many bytes the decoded images of all buffers take, from the headers of a few."""
        sizes = []
        for index in np.linspace(0, len(self.source) - 1, min(N_SAMPLED, len(self.source))).astype(int):
            try:
                opened = open_image(self.source[int(index)], self.min_pixels, self.channels)
            except (BadImage, OSError):
                continue
            sizes.append(self.channels * opened.width * opened.height)
        return int(np.mean(sizes or [0]) * 1.25 * self.sampler.batch_size * len(self.buffers))

    def describe(self) -> str:
        """One phrase for the log."""
        how = "Pillow's pixels" if self.exact else "close to Pillow's pixels"
        where = "on the GPU" if self.on_gpu else "on the CPU"
        if self.device.type == "cuda" and not self.on_gpu:
            where += f" (the GPU's kernels take 3 channels, these have {self.channels})"
        batches = f"{len(self.buffers)} batch{'es' if len(self.buffers) > 1 else ''} of decoded images"
        return f"crops {where}, {how}; {batches} in memory, about {_in_words(self.memory())}"

    def advice(self) -> str:
        """What to try where training waits for this loader."""
        advice = []
        if self.num_workers < useful_workers(sys.maxsize, 1):
            advice.append(f"more threads (--num_workers, now {self.num_workers})")
        if self.exact and not self.on_gpu:
            advice.append("--augment fast")
        if not self.min_pixels:
            advice.append("--dct_scale true if the images are large")
        return ", ".join([*advice, "smaller images or a faster disk"])

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            yield from map(self._make, self.sampler)
            return
        coming: deque[Future[Batch]] = deque()
        try:
            for keys in self.sampler:
                coming.append(self._batches.submit(self._make, keys))
                if len(coming) == N_BUFFERS:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for batch in coming:
                batch.cancel()

    def close(self) -> None:
        """End the threads; what they are doing is finished first."""
        for pool in (self._batches, self._images):
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _each(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        return list((self._images.map if self._images else map)(function, *arguments))

    def _make(self, keys: list[tuple[int, int]]) -> Batch:
        batch = self._cropped(keys)
        if self.masks is not None:  # an epoch has each image once: its first one names a batch
            drawn = self.masks.draw(len(keys), self.sampler.seed, *keys[0], self.sampler.rank)
            batch.masks = [x.pin_memory() for x in drawn] if self.on_gpu else drawn
        return batch

    def _cropped(self, keys: list[tuple[int, int]]) -> Batch:
        buffer = self._free.get()
        try:
            items = [_Item(index) for _, index in keys]
            self._each(self._open, items)
            buffer.reserve([(item.opened.width, item.opened.height) for item in items])
            replaced = self._each(self._decode, items, map(buffer.view, range(len(items))))
            for i, pixels in enumerate(replaced):
                if pixels is not None:
                    buffer.replace(i, pixels)
            widths, heights = zip(*buffer.sizes)
            samples = [item.index for item in items]
            tables, first = [], 0
            for views in (self.recipe.globals, self.recipe.locals):
                drawn = (samples, widths, heights, views, first)
                tables.append(draw_crops(self.sampler.seed, keys[0][0], *drawn) if views else None)
                first += len(views)
            has_anchors = self.recipe.anchor_size and keys[0][0] >= self.recipe.anchor_epoch
            tables.append(tables[0] if has_anchors else None)
            bad = [line for item in items for line in item.bad]
            if self.on_gpu:
                return self._on_gpu(buffer.images(), tables, bad)
            return self._on_cpu(buffer, tables, bad)
        finally:
            self._free.put(buffer)

    def _open(self, item: _Item) -> None:
        """The header of the first image from `index` on that has one.

        Where more in a row are bad than a run accepts, a black pixel: the loop ends the run when it counts them.
        """
        while item.n_bad <= int(len(self.source) * MAX_BAD):
            candidate = (item.index + item.n_bad) % len(self.source)
            try:
                item.opened = open_image(self.source[candidate], self.min_pixels, self.channels)
                return
            except (BadImage, OSError) as error:
                self._blame(item, error)
        item.opened = open_image(BLACK, channels=self.channels)

    def _blame(self, item: _Item, error: Exception) -> None:
        candidate = (item.index + item.n_bad) % len(self.source)
        item.bad.append(f"{self.source.name(candidate)}: {error}")
        item.n_bad += 1

    def _decode(self, item: _Item, place: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Fill the place that was reserved; where the image is broken behind its header, the pixels of another."""
        try:
            item.opened.write(place)
            return None
        except BadImage as error:
            self._blame(item, error)
        while True:
            self._open(item)
            try:
                return decode_array(item.opened)
            except BadImage as error:
                self._blame(item, error)

    def _groups(self, tables: list[CropTable | None], n_images: int) -> list[tuple[int, int]]:
        """(views, pixels of a side) of the global crops, of the local ones, and of the anchors."""
        sizes = *(v[0].size if v else 0 for v in (self.recipe.globals, self.recipe.locals)), self.recipe.anchor_size
        return [(len(table.image) // n_images if table else 0, size) for table, size in zip(tables, sizes)]

    def _on_cpu(self, buffer: PackedBuffer, tables: list[CropTable | None], bad: list[str]) -> Batch:
        n_images = len(buffer.sizes)
        sizes = self._groups(tables, n_images)
        groups = [torch.empty(n, n_images, self.channels, size, size, dtype=torch.uint8) for n, size in sizes]
        places = [group.numpy() for group in groups]
        rows = [crop_params(table) if table else [] for table in tables]
        apply = apply_crop if self.exact else apply_crop_fast

        def augment(b: int) -> None:
            pixels = buffer.view(b)
            for place, params in zip(places, rows):
                for v in range(len(place)):
                    planes = place[v, b]
                    crop = apply(pixels, params[v * n_images + b], planes.shape[-1])
                    cv2.split(crop, list(planes))

        self._each(augment, range(n_images))
        return Batch(groups[0], groups[1], groups[2], bad)

    def _on_gpu(self, images: PackedImages, tables: list[CropTable | None], bad: list[str]) -> Batch:
        from fastdino_kernels.augment import multi_crop_augment

        assert self._stream is not None
        n_images, groups = len(images.offset), []
        copied, ready = torch.cuda.Event(blocking=True), torch.cuda.Event()
        with self._launching, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            on_device = PackedImages(*(x.to(self.device, non_blocking=True) for x in images))
            crops = [table and CropTable(*(x.to(self.device, non_blocking=True) for x in table)) for table in tables]
            copied.record(self._stream)
            for (n, size), table in zip(self._groups(tables, n_images), crops):
                if table is None:
                    groups.append(torch.empty(0, n_images, 3, 0, 0, dtype=self.dtype, device=self.device))
                    continue
                made = multi_crop_augment(on_device, table, size, dtype=self.dtype, exact=self.exact)
                groups.append(made.unflatten(0, (n, n_images)))
            ready.record(self._stream)
        # The buffer is free once it is copied; crops may still be in the making. The event is a blocking one because
        # waiting for another keeps a core busy, which could decode.
        copied.synchronize()
        return Batch(groups[0], groups[1], groups[2], bad, ready)
