"""Copy detection on Copydays: DINO (arXiv:2104.14294), section 4.2.

Axes: N database images, Q queries, B images of a batch, D channels of the backbone; features have 2 * D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastdino.data.sources import ImageSource
from fastdino.errors import UserError
from fastdino.eval.features import backbone_features, image_batches
from fastdino.eval.retrieval import average_precision

BLOCKS = (
    "original",
    "strong",
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)
N_NEAREST = 20  # a copy further down counts as not found
GEM_POWER, GEM_LEAST = 4.0, 1e-6
WHITENING_POWER, SMALLEST_VARIANCE = 0.5, 1e-5  # variances are at least this share of the largest


@dataclass(frozen=True)
class Square:
    """Shows an image whole, its sides stretched to `side` pixels."""

    side: int

    def __call__(self, pixels: NDArray[np.uint8], index: int = 0) -> NDArray[np.uint8]:
        """(H, W, 3) -> (side, side, 3)."""
        return np.asarray(Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.BICUBIC))


def copy_features(
    backbone: nn.Module,
    source: ImageSource,
    side: int,
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    bad: Callable[[int, str], object] = lambda index, line: None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """(features (M, 2 * D) fp32, indices (M,)) of the M readable images: CLS, then the generalised mean of the patches.

    The generalised mean is the 4th root of the mean 4th power, negative numbers taken for 1e-6 (arXiv:1711.02512).
    side: pixels. bad: is told index and reason of each image that cannot be read. Raises UserError where none can be.
    """
    features, kept = [], []
    lines: list[str] = []

    def lose(index: int, line: str) -> None:
        lines.append(line)
        bad(index, line)

    indices = np.arange(len(source))
    for batch, images in image_batches(
        backbone, source, indices, Square(side), batch_size=batch_size, num_workers=num_workers, bad=lose
    ):
        found = backbone_features(backbone, images, tokens=("cls", "patch"))
        pooled = found["patch"].clamp(min=GEM_LEAST).pow(GEM_POWER).mean((1, 2)).pow(1 / GEM_POWER)
        features.append(torch.cat((found["cls"], pooled), dim=1))
        kept.append(batch)
    if not features:
        raise UserError(f"none of the images can be read: {source.describe()}: {lines[0]}")
    return torch.cat(features), np.concatenate(kept)


@dataclass(frozen=True)
class Whitening:
    """mean: (D,). matrix: (D, D), a principal component a row, divided by the root of its variance."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return (features - self.mean) @ self.matrix.T


def fit_whitening(features: Tensor) -> Whitening:
    """(M, D) -> what makes features of such images uncorrelated, and of equal variance.

    As in the original, components are those of the mean of f f^T, from which the mean feature is not subtracted.
    Raises ValueError where M is below D: the components would be of noise.
    """
    n, dim = features.shape
    if n < dim:
        raise ValueError(f"whitening: expected at least {dim} images, as many as features have numbers, got {n}")
    second_moment = (features.T @ features / n).cpu().numpy()
    variance, components = np.linalg.eigh(second_moment)
    variance = np.maximum(variance, SMALLEST_VARIANCE * variance.max())
    matrix = (components / variance**WHITENING_POWER).T[::-1].copy()
    return Whitening(features.mean(0), torch.from_numpy(matrix).to(features))


def nearest(queries: Tensor, database: Tensor, k: int = N_NEAREST) -> NDArray[np.int64]:
    """(Q, D), (N, D) -> (Q, k): for each query, the database images of the largest cosine, or all where N < k."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    return similarity.topk(min(k, len(database)), dim=1).indices.cpu().numpy()


def copy_map(found: NDArray[np.int64], originals: Sequence[Sequence[int]]) -> float:
    """mAP in [0, 1]. found: (Q, k) database images. originals: those that each query is a copy of, one at least."""
    areas = [average_precision(np.flatnonzero(np.isin(row, those)), len(those)) for row, those in zip(found, originals)]
    return float(np.mean(areas))


def originals_of(block: str, names: Sequence[str], originals: Sequence[str]) -> list[list[int]]:
    """For each image of a block, the originals it is a copy of, by index: Copydays' names say.

    names, originals: file names. A strong copy has the first four digits of its original; in every other block the
    i-th image is the i-th original's copy. Raises ValueError where a block has not as many images, or a strong copy
    no original.
    """
    if block == "strong":
        found = [[i for i, original in enumerate(originals) if original[:4] == name[:4]] for name in names]
        if lost := [name for name, those in zip(names, found) if not those]:
            raise ValueError(f"{block}: no original begins like {lost[0]}")
        return found
    if len(names) != len(originals):
        raise ValueError(f"{block}: expected {len(originals)} images, a copy of each original, got {len(names)}")
    return [[i] for i in range(len(names))]
