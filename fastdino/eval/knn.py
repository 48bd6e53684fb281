"""Weighted k-NN classification on frozen features: DINO (arXiv:2104.14294), section 4.1; arXiv:1805.01978, 3.4.

Axes: N bank images, M query images, C classes, D features.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdino.data.augment import normalize
from fastdino.data.sources import ImageSource
from fastdino.data.views import center_views
from fastdino.errors import UserError

QUERIES_AT_ONCE = 256  # bounds the similarity matrix, (256, N)


@dataclass(frozen=True)
class Features:
    """features: (N, D) fp32, unit length. labels: (N,) int64. bad: a line for each image that could not be read."""

    features: Tensor
    labels: Tensor
    bad: tuple[str, ...] = ()


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    source: ImageSource,
    *,
    resize: int,
    size: int,
    limit: int = 0,
    batch_size: int = 128,
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
    device = next(backbone.parameters()).device
    was_training = backbone.training
    features: list[Tensor] = []
    kept: list[NDArray[np.int64]] = []
    bad: list[str] = []
    backbone.eval()
    try:  # a run that is stopped leaves this at any point
        for views, batch in center_views(source, indices, resize, size, batch_size, num_workers, bad.append):
            features.append(F.normalize(backbone(normalize(views.to(device))).float(), dim=1))
            kept.append(batch)
    finally:
        backbone.train(was_training)
    if not features:
        raise UserError(f"none of the images could be read: {source.describe()}")
    labels = torch.from_numpy(source.labels[np.concatenate(kept)]).to(device)
    return Features(torch.cat(features), labels, tuple(bad))


@torch.no_grad()
def knn_accuracy(bank: Features, queries: Features | None = None, k: int = 20, temperature: float = 0.07) -> float:
    """Share of the queries whose k nearest bank images, weighted by exp(cosine / temperature), vote for their class.

    Without queries: leave-one-out, every bank image asked of all the others. Fewer than k images vote where the bank
    has fewer. Raises ValueError where the bank is too small to vote.
    """
    leave_one_out = queries is None
    asked = bank if queries is None else queries
    k = min(k, len(bank.labels) - leave_one_out)
    if k < 1:
        raise ValueError(f"bank: expected at least {1 + leave_one_out} images, got {len(bank.labels)}")
    n_classes = int(max(bank.labels.max(), asked.labels.max())) + 1
    correct = 0
    for start in range(0, len(asked.labels), QUERIES_AT_ONCE):
        similarity = asked.features[start : start + QUERIES_AT_ONCE] @ bank.features.T
        if leave_one_out:
            similarity.diagonal(start).fill_(-torch.inf)
        nearest, index = similarity.topk(k, dim=1)
        votes = torch.zeros(len(similarity), n_classes, device=similarity.device)
        votes.scatter_add_(1, bank.labels[index], (nearest / temperature).exp())
        correct += int((votes.argmax(1) == asked.labels[start : start + QUERIES_AT_ONCE]).sum())
    return correct / len(asked.labels)
