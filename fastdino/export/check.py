"""Whether a written file gives the backbone's features: on images, by the library that the file is for."""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.data.augment import center_view, normalize
from fastdino.data.views import View
from fastdino.export.kinds import Loaded, Model
from fastdino.model import VisionTransformer
from fastdino_kernels.augment import IMAGENET_STD

TOLERANCE = 1e-4  # of the largest feature; fp32 in another order of operations gives 1e-6


@dataclass(frozen=True)
class Difference:
    """Between the features of a file and the backbone's. size: of the images, in pixels.

    largest: of any feature. relative: that, over the largest feature.
    """

    size: int
    largest: float
    relative: float

    @property
    def is_small(self) -> bool:
        """Whether rounding explains it; no for NaN."""
        return self.relative <= TOLERANCE


@dataclass(frozen=True)
class Checked:
    """differences: at the size the file is laid out for, then at others. n_images: each seen as it is and mirrored.

    levels: the largest difference of the library's own preprocessing to ours, in levels of 255; None where it has none.
    """

    differences: tuple[Difference, ...]
    n_images: int
    levels: float | None


def sample_images() -> list[Image.Image]:
    """The halves of the two photographs that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return [Image.fromarray(half) for photo in photos for half in np.array_split(photo, 2, axis=1)]


def other_sizes(model: Model) -> list[int]:
    """A smaller and a larger side than the file is laid out for, in whole patches: 96 and 320 for 224 of patch 16."""
    if model.fixed:
        return []
    side = model.view.size // model.patch_size
    return [n * model.patch_size for n in (max(2, round(side * 3 / 7)), round(side * 10 / 7)) if n != side]


def _batch(images: Sequence[Image.Image], view: View) -> Tensor:
    """(2 n, 3, size, size), normalised: the images and their mirror images."""
    pixels = np.stack([center_view(image, view.resize, view.size) for image in images])
    normalised = normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return torch.cat((normalised, normalised.flip(-1)))


@torch.no_grad()
def compare(backbone: VisionTransformer, loaded: Loaded, images: Sequence[Image.Image], view: View) -> Difference:
    """Of one image alone, and of all in one batch."""
    batch = _batch(images, view)
    expected, found = (torch.cat((run(batch[:1]), run(batch))) for run in (backbone, loaded.features))
    largest = float((found - expected).abs().max())
    return Difference(view.size, largest, largest / float(expected.abs().max()))


def check(backbone: VisionTransformer, model: Model, loaded: Loaded, images: Sequence[Image.Image]) -> Checked:
    """Compare with the backbone as it was trained; model: as it was written."""
    view = model.view
    views = [view, *(View(round(view.resize * size / view.size), size) for size in other_sizes(model))]
    differences = tuple(compare(backbone, loaded, images, view) for view in views)
    levels = None
    if loaded.view is not None:
        ours = _batch(images, view)[: len(images)]
        theirs = torch.stack([loaded.view(image) for image in images])
        std = torch.tensor(IMAGENET_STD)[:, None, None]
        levels = 255 * float(((theirs - ours) * std).abs().max())
    return Checked(differences, len(images), levels)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, log lines and progress bars of libraries that talk while they export."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Not to standard error's own file, which a message of ours may need.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
