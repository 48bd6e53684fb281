"""Weighted k-NN classification on frozen features: DINO (arXiv:2104.14294), section 4.1; arXiv:1805.01978, 3.4.

Axes: N bank images, M query images, C classes, D features.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdino.data.sources import ImageSource
from fastdino.data.views import View
from fastdino.errors import UserError, some_of
from fastdino.eval.features import BATCH, stream

QUERIES_AT_ONCE = 256  # bounds the similarity matrix, (256, N)


@dataclass(frozen=True)
class Features:
    """features: (N, D) fp32, unit length. labels: (N,) int64. bad: a line for each image that could not be read."""

    features: Tensor
    labels: Tensor
    bad: tuple[str, ...] = ()


def extract_features(
    backbone: nn.Module,
    source: ImageSource,
    *,
    resize: int,
    size: int,
    limit: int = 0,
    batch_size: int = BATCH,
    num_workers: int = 0,
) -> Features:
    """Unit-length features of a labelled source's center crops.

    resize: short side in pixels before the center crop of side `size`. limit: at most this many images, drawn evenly
    and always the same; 0 for all. The backbone runs in eval mode, and is put back as it was.
    Raises UserError where the source has no labels, or no image of it can be read.
    """
    if source.labels is None:
        raise UserError(f"k-NN needs class folders: {source.describe()}")
    indices: NDArray[np.int64] = np.arange(len(source))
    if limit and limit < len(source):
        indices = np.sort(np.random.default_rng(0).permutation(indices)[:limit])
    bad: list[str] = []
    batches = stream(
        backbone,
        source,
        indices,
        View(resize, size),
        batch_size=batch_size,
        num_workers=num_workers,
        bad=lambda _, line: bad.append(line),
    )
    found = [(index, F.normalize(features["cls"], dim=1)) for index, features in batches]
    if not found:
        raise UserError(f"none of the images could be read: {source.describe()}: {some_of(bad)}")
    kept, features = zip(*found)
    labels = torch.from_numpy(source.labels[np.concatenate(kept)]).to(features[0].device)
    return Features(torch.cat(features), labels, tuple(bad))


@torch.no_grad()
def knn_votes(
    bank: Features, queries: Features | None = None, k: int = 20, temperature: float = 0.07
) -> tuple[float, float]:
    """(top-1, top-5) in per cent: queries whose class the k nearest bank images vote first, or among the first five.

    A neighbour votes with the weight exp(cosine / temperature); a class that nobody votes for is not found. Without
    queries: leave-one-out, every bank image asked of all the others. Fewer than k images vote where the bank has fewer.
    Raises ValueError where the bank is too small to vote.
    """
    leave_one_out = queries is None
    asked = bank if queries is None else queries
    k = min(k, len(bank.labels) - leave_one_out)
    if k < 1:
        raise ValueError(f"bank: expected at least {1 + leave_one_out} images, got {len(bank.labels)}")
    n_classes = int(max(bank.labels.max(), asked.labels.max())) + 1
    correct = np.zeros(2, np.int64)
    for start in range(0, len(asked.labels), QUERIES_AT_ONCE):
        similarity = asked.features[start : start + QUERIES_AT_ONCE] @ bank.features.T
        if leave_one_out:
            similarity.diagonal(start).fill_(-torch.inf)
        nearest, index = similarity.topk(k, dim=1)
        votes = torch.zeros(len(similarity), n_classes, device=similarity.device)
        votes.scatter_add_(1, bank.labels[index], (nearest / temperature).exp())
        most, first = votes.topk(min(5, n_classes), dim=1)
        hits = (first == asked.labels[start : start + QUERIES_AT_ONCE, None]) & (most > 0)
        correct += [int(hits[:, 0].sum()), int(hits.any(1).sum())]
    top1, top5 = (int(n) * 100 / len(asked.labels) for n in correct)  # in this order, as the original rounds
    return top1, top5


def knn_accuracy(bank: Features, queries: Features | None = None, k: int = 20, temperature: float = 0.07) -> float:
    """The top-1 of `knn_votes`, in [0, 1]."""
    return knn_votes(bank, queries, k, temperature)[0] / 100


def n_of_each_class(bank: Features, n: int, seed: int) -> Features:
    """A bank of n images of each class, or of all that a class has, drawn at random: DINOv2's few-shot k-NN."""
    order = torch.randperm(len(bank.labels), generator=torch.Generator().manual_seed(seed))
    labels = bank.labels.cpu()
    chosen = torch.cat([order[labels[order] == label][:n] for label in labels.unique()]).sort().values
    chosen = chosen.to(bank.labels.device)
    return Features(bank.features[chosen], bank.labels[chosen])
