"""Stochastic depth (arXiv:1603.09382): in training, a residual branch leaves out a random part of the images.

The stream is (M, D), packed, or (B, N, D), of one resolution, which has no packing: its rows are then images.
Axes: B images of one resolution, N their tokens, M tokens of all images, D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdino.model.attention import Packing


class Path(NamedTuple):
    """Which tokens a residual branch computes, and how what it makes of them is added to the stream.

    packing: of the tokens it computes. taken: (m,) their rows, None for all. added: (k,) rows of the stream that its
    output is added to, None for all. scale: (k, 1) or (M, 1) factors of its output, or (m, 1, 1) of images; None for 1.
    """

    packing: Packing | None
    taken: Tensor | None = None
    added: Tensor | None = None
    scale: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """(M, D) -> (m, D), or (B, N, D) -> (m, N, D)."""
        return x if self.taken is None else x[self.taken]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream with the branch's output (k, D), or (m, N, D), added."""
        y = y if self.scale is None else y * self.scale
        return x + y if self.added is None else x.index_add(0, self.added, y.to(x.dtype))


def _rows(packing: Packing, images: list[Tensor]) -> Tensor:
    """(m,) rows of the tokens of these images, of each group, counted within it."""
    rows, start = [], 0
    for chosen, (n_images, n_tokens) in zip(images, packing.groups):
        rows.append((start + chosen[:, None] * n_tokens + torch.arange(n_tokens, device=chosen.device)).flatten())
        start += n_images * n_tokens
    return torch.cat(rows)


def _by_sample(drop_prob: float, takes: Packing | None, adds: Packing | None, like: Tensor) -> Path:
    """All is computed; of each image all is added, scaled by 1 / (1 - p), or nothing."""
    n_images = like.shape[0] if takes is None else takes.n_images
    factors = like.new_empty(n_images).bernoulli_(1 - drop_prob) / (1 - drop_prob)
    return Path(takes, scale=factors[:, None, None] if adds is None else adds.per_token(factors))


def _kept(drop_prob: float, n: int, like: Tensor) -> Tensor:
    """(m,) a random (1 - p) of n images, at least one."""
    # argsort of noise, because randperm waits for the device
    return torch.rand(n, device=like.device).argsort()[: max(int(n * (1 - drop_prob)), 1)]


def _by_batch(drop_prob: float, takes: Packing | None, adds: Packing | None, like: Tensor) -> Path:
    """Of every group a random (1 - p) of the images, at least one, is computed, and scaled up by what is left out.

    DINOv2's form (arXiv:2304.07193, section 5), which saves the work.
    """
    if takes is None or adds is None:
        rows = _kept(drop_prob, like.shape[0], like)
        return Path(None, rows, rows, like.new_full((len(rows), 1, 1), like.shape[0] / len(rows)))
    return of_images([_kept(drop_prob, n, like) for n, _ in takes.groups], takes, adds, like)


def of_images(images: list[Tensor], takes: Packing, adds: Packing, like: Tensor) -> Path:
    """The path of these images of each group, (m,) numbers within it, scaled up by what is left out."""
    scale = [
        like.new_full((len(kept) * n_tokens, 1), n / len(kept)) for kept, (n, n_tokens) in zip(images, adds.groups)
    ]
    packing = Packing(tuple((len(kept), n_tokens) for kept, (_, n_tokens) in zip(images, takes.groups)))
    return Path(packing, _rows(takes, images), _rows(adds, images), torch.cat(scale))


def of_rows(mode: str, drop_prob: float, packing: Packing, images: Tensor, like: Tensor) -> Path:
    """The path of single tokens, (m,) each of one of `images`, all of which are computed: those of an image that is
    left out are added with a factor of 0. With "batch" the same number of images of each group as in its own form.
    """
    if not drop_prob:
        return Path(packing)
    if mode == "sample":
        factors = like.new_empty(packing.n_images).bernoulli_(1 - drop_prob) / (1 - drop_prob)
        return Path(packing, scale=factors[images][:, None])
    parts = []
    for n, _ in packing.groups:
        kept = _kept(drop_prob, n, like)
        parts.append(like.new_zeros(n).index_fill(0, kept, n / len(kept)))
    return Path(packing, scale=torch.cat(parts)[images][:, None])


MODES = {"sample": _by_sample, "batch": _by_batch}


def draw(mode: str, drop_prob: float, takes: Packing | None, adds: Packing | None, like: Tensor) -> Path:
    """A branch's path, drawn by a mode of MODES. takes, adds: how the tokens before and after it are packed.

    like: the stream, (M, D), or (B, N, D) where it is not packed.
    """
    return MODES[mode](drop_prob, takes, adds, like) if drop_prob else Path(takes)
