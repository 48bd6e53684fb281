"""Views of many images, in batches: what features are extracted from."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.data.augment import center_view
from fastdino.data.decode import BadImage, decode
from fastdino.data.sources import ImageSource

Show = Callable[[Image.Image], NDArray[np.uint8]]  # RGB image -> (H, W, 3); may raise BadImage


def center_views(
    source: ImageSource,
    indices: NDArray[np.int64],
    resize: int,
    size: int,
    batch_size: int,
    num_workers: int,
    bad: Callable[[int, str], object],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """`views` of side `size`: the crops of `augment.center_view`."""
    return views(source, indices, partial(center_view, resize=resize, size=size), batch_size, num_workers, bad)


def views(
    source: ImageSource,
    indices: NDArray[np.int64],
    show: Show,
    batch_size: int,
    num_workers: int,
    bad: Callable[[int, str], object],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Batches ((b, 3, H, W) uint8, indices (b,)) of the readable images among `indices`, as `show` makes them.

    They come in order; where sizes differ, those of one size come together, of each `batch_size` images.
    num_workers: threads, 0 for the caller's. bad: is told index and reason of each image that cannot be read.
    """

    def view(index: int) -> Tensor | str:
        try:
            pixels = show(decode(source[index]))
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
