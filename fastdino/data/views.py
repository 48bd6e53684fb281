"""Crops of many images, one of each, in batches: what features are extracted from."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.data.augment import apply_crop, center_view
from fastdino.data.decode import BadImage, decode, decode_array, open_image
from fastdino.data.params import TRIES, CropParams, draw_boxes, uniforms
from fastdino.data.sources import ImageSource

Pixels = NDArray[np.uint8]
Item = bytes | Pixels  # of a source

LEAST_AREA = 0.08  # part of an image's area that a random crop has: torchvision's RandomResizedCrop


def center_views(
    source: ImageSource,
    indices: NDArray[np.int64],
    resize: int,
    size: int,
    batch_size: int,
    num_workers: int,
    bad: Callable[[int, str], object],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Batches ((b, 3, size, size) uint8, indices (b,)) of the readable images among `indices`.

    num_workers: threads, 0 for the caller's. bad: is told index and reason of each image that cannot be read. The
    crops are those of `augment.center_view`.
    """
    return _views(
        source, indices, lambda _, item: center_view(decode(item), resize, size), batch_size, num_workers, bad
    )


def random_views(
    source: ImageSource,
    indices: NDArray[np.int64],
    size: int,
    seed: int,
    epoch: int,
    batch_size: int,
    num_workers: int,
    bad: Callable[[int, str], object],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """`center_views` of random parts: 8 to 100% of an image's area, resized bilinearly, half of them flipped.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, on which the original trains its linear classifier.
    Drawn from (seed, epoch, index) and nothing else.
    """
    # Per image these would take 1 ms, as long as a small JPEG (one core, 2026-11-28); only boxes need its size.
    drawn = uniforms(seed, epoch, indices, np.zeros_like(indices), 2 * TRIES + 3)
    scale = np.array([[LEAST_AREA], [1.0]])

    def crop(position: int, item: Item) -> Pixels:
        pixels = decode_array(open_image(item))
        height, width = (np.array([side]) for side in pixels.shape[:2])
        x, y, w, h = draw_boxes(drawn[:-1, position : position + 1], width, height, scale)[0].tolist()
        flip = bool(drawn[-1, position] < 0.5)
        params = CropParams(box=(x, y, w, h), flip=flip, jitter=(), gray=False, blur=0, solarize=False)
        return apply_crop(pixels, params, size, Image.Resampling.BILINEAR)

    return _views(source, indices, crop, batch_size, num_workers, bad)


def _views(
    source: ImageSource,
    indices: NDArray[np.int64],
    show: Callable[[int, Item], Pixels],
    batch_size: int,
    num_workers: int,
    bad: Callable[[int, str], object],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """show: (position in `indices`, item) -> (size, size, 3) uint8. Raises BadImage."""

    def view(position: int) -> Tensor | str:
        index = int(indices[position])
        try:
            pixels = show(position, source[index])
        except (BadImage, OSError) as error:
            return f"{source.name(index)}: {error}"
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    starts = range(0, len(indices), batch_size)
    chunks = [range(start, min(start + batch_size, len(indices))) for start in starts]
    pool = ThreadPoolExecutor(max(num_workers, 1), "view")
    try:
        coming: deque[Iterator[Tensor | str]] = deque()
        for i in range(len(chunks) + 1):
            if i < len(chunks):
                coming.append(pool.map(view, chunks[i]) if num_workers else map(view, chunks[i]))
            if i == 0:
                continue
            views, kept = [], []
            for seen, position in zip(coming.popleft(), chunks[i - 1]):
                index = int(indices[position])
                if isinstance(seen, str):
                    bad(index, seen)
                else:
                    views.append(seen)
                    kept.append(index)
            if kept:
                yield torch.stack(views), np.array(kept)
    finally:
        pool.shutdown(cancel_futures=True)  # whoever leaves early does not wait for the rest
