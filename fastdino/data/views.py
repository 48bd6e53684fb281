"""Views of many images, one of each, in batches: what features are extracted from."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.data.augment import apply_crop, center_view
from fastdino.data.channels import read_pixels
from fastdino.data.decode import BadImage
from fastdino.data.params import TRIES, CropParams, draw_boxes, uniforms
from fastdino.data.sources import ImageSource

Pixels = NDArray[np.uint8]
Show = Callable[[Pixels, int], Pixels]  # ((H, W, C), the image's index in its source) -> (h, w, C); may raise BadImage

LEAST_AREA = 0.08  # part of an image's area that a random crop has: torchvision's RandomResizedCrop
DRAWN_AT_ONCE = 1024  # images; alone an image's numbers would take 1 ms, as long as a small JPEG (one core, 2026-11-28)


@dataclass(frozen=True)
class View:
    """Short side to `resize` pixels, bicubic, then the middle of side `size`: `augment.center_view`."""

    resize: int
    size: int

    def __call__(self, image: Image.Image | Pixels, index: int = 0) -> Pixels:
        """RGB image, or (H, W, C) -> (size, size, C)."""
        return center_view(image, self.resize, self.size)


@dataclass(frozen=True)
class RandomView:
    """A random part of 8 to 100% of an image's area, resized bilinearly to `size`, half of them flipped.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, on which the original trains its linear classifier.
    Drawn from seed, epoch and the image's index, and from nothing else.
    """

    size: int
    seed: int
    epoch: int

    def __call__(self, pixels: Pixels, index: int) -> Pixels:
        """(H, W, C) -> (size, size, C)."""
        block, at = divmod(index, DRAWN_AT_ONCE)
        drawn = _drawn(self.seed, self.epoch, block)[:, at : at + 1]
        height, width = (np.array([side]) for side in pixels.shape[:2])
        x, y, w, h = draw_boxes(drawn[:-1], width, height, np.array([[LEAST_AREA], [1.0]]))[0].tolist()
        flip = bool(drawn[-1, 0] < 0.5)
        params = CropParams(box=(x, y, w, h), flip=flip, jitter=(), gray=False, blur=0, solarize=False)
        return apply_crop(pixels, params, self.size, Image.Resampling.BILINEAR)


@lru_cache(maxsize=2048)  # 2 million images
def _drawn(seed: int, epoch: int, block: int) -> NDArray[np.float64]:
    """(numbers of a crop, DRAWN_AT_ONCE images)."""
    indices = np.arange(block * DRAWN_AT_ONCE, (block + 1) * DRAWN_AT_ONCE)
    return uniforms(seed, epoch, indices, np.zeros_like(indices), 2 * TRIES + 3)


def views(
    source: ImageSource,
    indices: NDArray[np.int64],
    show: Show,
    batch_size: int,
    num_workers: int,
    bad: Callable[[int, str], object],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Batches ((b, C, H, W) uint8, indices (b,)) of the readable images among `indices`, as `show` makes them.

    They come in order; where sizes differ, those of one size come together, of each `batch_size` images.
    num_workers: threads, 0 for the caller's. bad: is told index and reason of each image that cannot be read.
    """

    def view(index: int) -> Tensor | str:
        try:
            pixels = show(read_pixels(source, index), index)
        except (BadImage, OSError) as error:
            return f"{source.name(index)}: {error}"
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    starts = range(0, len(indices), batch_size)
    chunks = [[int(index) for index in indices[start : start + batch_size]] for start in starts]
    pool = ThreadPoolExecutor(max(num_workers, 1), "view")
    try:
        coming: deque[Iterator[Tensor | str]] = deque()
        for i in range(len(chunks) + 1):
            if i < len(chunks):
                coming.append(pool.map(view, chunks[i]) if num_workers else map(view, chunks[i]))
            if i == 0:
                continue
            of_size: dict[torch.Size, list[tuple[Tensor, int]]] = {}
            for seen, index in zip(coming.popleft(), chunks[i - 1]):
                if isinstance(seen, str):
                    bad(index, seen)
                else:
                    of_size.setdefault(seen.shape, []).append((seen, index))
            for batch in of_size.values():
                shown, kept = zip(*batch)
                yield torch.stack(shown), np.array(kept)
    finally:
        pool.shutdown(cancel_futures=True)  # whoever leaves early does not wait for the rest
