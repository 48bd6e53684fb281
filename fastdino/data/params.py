"""Random numbers to crops: what is done to every crop of a batch, drawn at once.

Crop v of sample i in epoch e is drawn from (seed, e, i, v) and nothing else: neither threads, ranks, the rest of the
batch nor a resume change it. For that the generator is a function of a counter: Philox4x32-10 (Salmon et al., SC 2011,
"Parallel random numbers: as easy as 1, 2, 3"), the seed as key. Axes: V views, B images, n = V * B crops, crop-major.
DINO (arXiv:2104.14294), section 3.1; BYOL (arXiv:2006.07733), appendix B; boxes as torchvision's RandomResizedCrop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastdino_kernels.augment.tables import CropTable

RATIO = (3 / 4, 4 / 3)  # width / height of a crop, before it is resized to a square
STEPS = ("brightness", "contrast", "saturation", "hue")  # as CropTable.order counts them
JITTER = (0.4, 0.4, 0.2, 0.1)  # of each step: factors 1 +- this, turns of +- this part of the circle
BLUR_RADIUS = (0.1, 2.0)  # pixels
TRIES = 10  # at a box that fits
LOW32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How one crop is drawn: side in pixels, range of area, and the probability of each alteration."""

    size: int
    scale: tuple[float, float]
    flip: float = 0.5
    jitter: float = 0.8
    gray: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MultiCropRecipe:
    """The two global crops and the local ones; within each group all have one size.

    anchor_size: side in pixels of the global crops once more, for a Gram teacher that sees more of them; 0 for none.
    anchor_epoch: the first epoch, counted from 0, that has these.
    """

    globals: tuple[ViewRecipe, ...]
    locals: tuple[ViewRecipe, ...]
    anchor_size: int = 0
    anchor_epoch: int = 0

    @property
    def views(self) -> tuple[ViewRecipe, ...]:
        """Globals first, as the loss counts them."""
        return self.globals + self.locals

    @property
    def short_side(self) -> float:
        """Pixels below which the short side of an image makes the smallest box of some view smaller than its crop."""
        sizes = [(view.size, view) for view in self.views] + [(self.anchor_size, view) for view in self.globals]
        return max(size / view.scale[0] ** 0.5 for size, view in sizes)


def philox(counter: Sequence[NDArray[np.uint64]], seed: int) -> NDArray[np.uint64]:
    """Four counters of 32 bits, of shapes that broadcast to (...), and a key of 64 -> (4, ...) numbers of 32 bits."""
    a, b, c, d = np.broadcast_arrays(*counter)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint64)
    shift = np.uint64(32)
    for _ in range(10):
        left, right = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = right >> shift ^ b ^ key[0], right & LOW32, left >> shift ^ d ^ key[1], left & LOW32
        key = key + np.array([0x9E3779B9, 0xBB67AE85], np.uint64) & LOW32
    return np.stack([a, b, c, d])


def uniforms(
    seed: int, epoch: int, samples: NDArray[np.int64], views: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """(count, n) numbers in [0, 1), column i those of crop (seed, epoch, samples[i], views[i])."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[:, None]
    counter = [samples.astype(np.uint64) & LOW32, np.uint64(epoch), views.astype(np.uint64), blocks]
    bits = philox([np.asarray(part, np.uint64) for part in counter], seed)  # (4, blocks, n)
    return bits.swapaxes(0, 1).reshape(-1, len(samples))[:count] / 2.0**32


def draw_boxes(
    u: NDArray[np.float64], width: NDArray[np.int64], height: NDArray[np.int64], scale: NDArray[np.float64]
) -> NDArray[np.int32]:
    """(n, 4) boxes x, y, w, h: ten tries at an area and a shape that fit, then the middle of the image.

    u: (22, n) numbers in [0, 1): ten areas, ten shapes, x and y. scale: (2, n) least and greatest part of the area.
    """
    areas, shapes = u[:TRIES], u[TRIES : 2 * TRIES]
    area = width * height * (scale[0] + (scale[1] - scale[0]) * areas)
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * shapes)
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    found, first = fits.any(0), (fits.argmax(0), np.arange(len(width)))
    w = np.where(found, w[first], np.minimum(width, np.rint(height * RATIO[1]))).astype(np.int64)
    h = np.where(found, h[first], np.minimum(height, np.rint(width / RATIO[0]))).astype(np.int64)
    x = np.where(found, u[-2] * (width - w + 1), (width - w) // 2)
    y = np.where(found, u[-1] * (height - h + 1), (height - h) // 2)
    return np.stack([x, y, w, h], 1).astype(np.int32)


def draw_crops(
    seed: int,
    epoch: int,
    samples: ArrayLike,
    widths: ArrayLike,
    heights: ArrayLike,
    views: Sequence[ViewRecipe],
    first_view: int = 0,
) -> CropTable:
    """Parameters of V views of B images: a table of V * B rows, row v * B + b for view v of image b.

    samples: (B,) what each image is called in its data set, below 2**32. widths, heights: (B,) pixels.
    first_view: the number of the first of `views`, so that two calls do not draw the same crops twice.
    """
    n_views, n_images = len(views), np.size(samples)

    def per_crop(of_images: ArrayLike) -> NDArray[np.int64]:
        return np.tile(np.asarray(of_images, np.int64), n_views)

    def per_view(name: str) -> NDArray[np.float64]:
        return np.repeat(np.array([getattr(view, name) for view in views], np.float64), n_images, axis=0).T

    numbers = np.repeat(np.arange(first_view, first_view + n_views), n_images)
    u = uniforms(seed, epoch, per_crop(samples), numbers, 2 * TRIES + 2 + 5 + 4 + 4 + 1)
    of_box, of_flags, of_factors, of_order, of_radius = np.split(u, np.cumsum([2 * TRIES + 2, 5, 4, 4]))
    flip, jitter, gray, blur, solarize = (
        draw < per_view(name) for draw, name in zip(of_flags, ("flip", "jitter", "gray", "blur", "solarize"))
    )
    spread = (2 * of_factors - 1) * np.array(JITTER)[:, None]
    low, high = BLUR_RADIUS
    return CropTable(
        image=torch.from_numpy(per_crop(np.arange(n_images)).astype(np.int32)),
        box=torch.from_numpy(draw_boxes(of_box, per_crop(widths), per_crop(heights), per_view("scale"))),
        flip=torch.from_numpy(flip),
        order=torch.from_numpy(np.where(jitter, of_order.argsort(0), -1).T.astype(np.int8)),
        factor=torch.from_numpy((1 + spread[:3]).T.astype(np.float32)),
        hue=torch.from_numpy((np.trunc(spread[3] * 255) % 256).astype(np.int32)),
        gray=torch.from_numpy(gray),
        blur=torch.from_numpy(np.where(blur, low + (high - low) * of_radius[0], 0).astype(np.float32)),
        solarize=torch.from_numpy(solarize),
    )


@dataclass(frozen=True, kw_only=True)
class CropParams:
    """One row of a table, for the CPU.

    box: x, y, width, height in the image's pixels. jitter: (step, factor) in the order of application, the hue's
    factor being its shift of 0..255; empty for none. blur: radius in pixels, 0 for none.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    gray: bool
    blur: float
    solarize: bool


def crop_params(crops: CropTable) -> list[CropParams]:
    """The rows of a table."""
    values = torch.cat([crops.factor.double(), crops.hue[:, None].double()], 1).tolist()
    return [
        CropParams(
            box=(box[0], box[1], box[2], box[3]),
            flip=flip,
            jitter=tuple((STEPS[step], value[step]) for step in order if step >= 0),
            gray=gray,
            blur=blur,
            solarize=solarize,
        )
        for box, flip, order, value, gray, blur, solarize in zip(
            crops.box.tolist(),
            crops.flip.tolist(),
            crops.order.tolist(),
            values,
            crops.gray.tolist(),
            crops.blur.tolist(),
            crops.solarize.tolist(),
        )
    ]
