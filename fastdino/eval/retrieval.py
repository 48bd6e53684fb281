"""Image retrieval on Oxford and Paris, revisited (arXiv:1803.11285), as DINO (arXiv:2104.14294), section 4.2, does it.

Axes: N database images, Q queries, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastdino.data.decode import BadImage
from fastdino.data.plain_pickle import load_plain
from fastdino.data.sources import ImageSource
from fastdino.errors import UserError, printable
from fastdino.eval.features import image_batches

KS = (1, 5, 10)  # of precision at k
SCALES = (1.0, 2**-0.5, 0.5)
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Truth:
    """database, queries: names of images. easy, hard, junk: for each query, indices of database images."""

    database: list[str]
    queries: list[str]
    easy: list[Indices]
    hard: list[Indices]
    junk: list[Indices]

    def medium(self) -> tuple[list[Indices], list[Indices]]:
        """(images to be found, images that do not count) of each query: easy and hard ones have to be found."""
        return [np.concatenate(pair) for pair in zip(self.easy, self.hard)], self.junk

    def only_hard(self) -> tuple[list[Indices], list[Indices]]:
        """The same: hard ones have to be found, easy ones do not count."""
        return self.hard, [np.concatenate(pair) for pair in zip(self.junk, self.easy)]


def read_truth(path: Path) -> Truth:
    """The benchmark's gnd_*.pkl; the queries' boxes in it are not read, for DINO shows whole images.

    Nothing in the file is run. Raises UserError where it is missing, holds code, or something else than a benchmark.
    """
    held = load_plain(path)

    def wrong(expected: str, got: Any) -> UserError:
        return UserError(f"{printable(path)}: expected {expected}, got {printable(repr(got))[:80]}")

    if not isinstance(held, dict) or not {"imlist", "qimlist", "gnd"} <= held.keys():
        raise wrong("a dictionary with imlist, qimlist and gnd", sorted(held) if isinstance(held, dict) else held)
    lists = {}
    for key in ("imlist", "qimlist"):
        names = held[key]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise wrong(f"names of images as {key}", names)
        lists[key] = names
    queries, n = held["gnd"], len(lists["imlist"])
    if not isinstance(queries, list) or len(queries) != len(lists["qimlist"]):
        raise wrong(f"gnd to be a list of {len(lists['qimlist'])}, as qimlist", queries)
    found: dict[str, list[Indices]] = {"easy": [], "hard": [], "junk": []}
    for query in queries:
        for key, those in found.items():
            indices = query.get(key) if isinstance(query, dict) else query
            if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < n for i in indices):
                raise wrong(f"each query's {key} as numbers from 0 to {n - 1}", indices)
            those.append(np.array(indices, np.int64))
    for key in ("easy", "hard"):
        if not any(map(len, found[key])):
            raise UserError(f"{printable(path)}: no query has an image that is {key} to find")
    return Truth(lists["imlist"], lists["qimlist"], **found)


@dataclass(frozen=True)
class LongestSide:
    """Shows an image whole, its longest side shrunk to `side` pixels, never enlarged.

    least: pixels that either side needs.
    """

    side: int
    least: int

    def __call__(self, pixels: NDArray[np.uint8], index: int = 0) -> NDArray[np.uint8]:
        """(H, W, 3) -> the same, smaller. Raises BadImage where too little is left."""
        image = Image.fromarray(pixels)
        image.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        if min(image.size) < self.least:
            raise BadImage(f"has {image.width} x {image.height} pixels, less than the {self.least} of a patch")
        return np.asarray(image)


def retrieval_features(
    backbone: nn.Module,
    source: ImageSource,
    side: int,
    *,
    multiscale: bool = False,
    batch_size: int = 1,
    num_workers: int = 0,
) -> tuple[Tensor, dict[int, str]]:
    """((N, D) fp32 of unit length, {index: why} of the images that cannot be read, whose features are 0).

    side: pixels of the longest side. multiscale: the mean over `SCALES`. batch_size: images at once; only those of one
    size can be. Raises UserError where no image can be read.
    """
    bad: dict[int, str] = {}
    least = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    show = LongestSide(side, 2 * least if multiscale else least)
    batches = image_batches(
        backbone,
        source,
        np.arange(len(source)),
        show,
        batch_size=batch_size,
        num_workers=num_workers,
        bad=bad.__setitem__,
    )
    features: Tensor | None = None
    for batch, images in batches:
        found = _of_scales(backbone, images) if multiscale else backbone(images).float()
        if features is None:
            features = found.new_zeros(len(source), found.shape[1])
        features[batch] = found
    if features is None:
        raise UserError(f"none of {len(source):,} images can be read: {next(iter(bad.values()))}")
    return F.normalize(features, dim=1), bad


def _of_scales(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features of unit length: the mean over three sizes of the same images."""
    sizes = [images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear") for scale in SCALES]
    return F.normalize(torch.stack([backbone(resized).float() for resized in sizes]).mean(0), dim=1)


def ranking(database: Tensor, queries: Tensor, lost: Sequence[int] = ()) -> Indices:
    """(N, D), (Q, D), unit length -> (Q, N): for each query, database images from the most similar on.

    lost: images that could not be read; they come last.
    """
    similarity = queries @ database.T
    similarity[:, list(lost)] = -torch.inf
    return similarity.argsort(dim=1, descending=True, stable=True).cpu().numpy()


def average_precision(positions: Indices, n_relevant: int) -> float:
    """Area below the precision-recall curve of one query, by trapezoids: Holidays' (INRIA), which Oxford's equals.

    positions: where the relevant images stand in the ranking, from 0 on, rising. n_relevant: those that exist.
    """
    before = np.arange(len(positions))  # relevant images that come earlier
    left = np.where(positions == 0, 1.0, before / np.maximum(positions, 1))
    right = (before + 1) / (positions + 1)
    return float(np.sum(left + right) / (2 * n_relevant))


def mean_precision(
    ranked: Indices, relevant: Sequence[Indices], ignored: Sequence[Indices], ks: Sequence[int] = KS
) -> tuple[float, NDArray[np.float64]]:
    """(mAP, mean precision at each k), in [0, 1], over the queries that have something to find.

    ranked: (Q, N). relevant: what each query should find. ignored: what is taken out of its ranking first.
    Where the last relevant image stands before k, precision is counted up to there, as the benchmark does.
    Raises ValueError where no query has anything to find.
    """
    areas, precisions = [], []
    for order, wanted, junk in zip(ranked, relevant, ignored):
        if not len(wanted):
            continue
        positions, of_junk = (np.flatnonzero(np.isin(order, those)) for those in (wanted, junk))
        positions = positions - np.searchsorted(of_junk, positions)
        areas.append(average_precision(positions, len(wanted)))
        upto = np.minimum(positions[-1] + 1, ks)
        precisions.append((positions[:, None] < upto).sum(0) / upto)
    if not areas:
        raise ValueError("relevant: expected images to be found for at least one query, got none")
    return float(np.mean(areas)), np.mean(precisions, axis=0)
