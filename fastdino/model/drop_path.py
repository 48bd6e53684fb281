"""Stochastic depth (arXiv:1603.09382): in training, a residual branch leaves out a random part of the images.

The stream is (M, D), packed, or (B, N, D), of one resolution, which has no packing: its rows are then images.
Axes: B images of one resolution, N their tokens, M tokens of all images, D channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdino.model.attention import Packing
from fastdino_kernels.rows import spread_rows, take_rows


class Rows(NamedTuple):
    """Some rows of a matrix, or images of a group, in some order, and the way back. rows: (m,) which. at: (M,) where
    among them each row of the matrix is, -1 where it is not.
    """

    rows: Tensor
    at: Tensor

    @classmethod
    def among(cls, n: int, rows: Tensor) -> "Rows":
        """These rows of n."""
        at = rows.new_full((n,), -1).scatter(0, rows, torch.arange(len(rows), device=rows.device))
        return cls(rows, at)


class Path(NamedTuple):
    """Which tokens a residual branch computes, and how what it makes of them is added to the stream.

    packing: of the tokens it computes. taken: which these are, None for all. added: what its output is added to, None
    for all. scale: (k, 1) or (M, 1) factors of its output, or (m, 1, 1) of images; None for 1.
    """

    packing: Packing | None
    taken: Rows | None = None
    added: Rows | None = None
    scale: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """(M, D) -> (m, D), or (B, N, D) -> (m, N, D)."""
        if self.taken is None:
            return x
        # Eagerly, PyTorch's own passes are fewer than those of an operation that is meant to be joined with others.
        return take_rows(x, *self.taken) if torch.compiler.is_compiling() else x.index_select(0, self.taken.rows)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream with the branch's output (k, D), or (m, N, D), added."""
        y = y if self.scale is None else y * self.scale
        if self.added is None:
            return x + y
        if torch.compiler.is_compiling():
            return x + spread_rows(y.to(x.dtype), *self.added)
        return x.index_add(0, self.added.rows, y.to(x.dtype))


def draw_orders(n_branches: int, sizes: Sequence[int], device: torch.device) -> list[list[Rows]]:
    """Of each branch: all images of each group, so many, in a random order. One launch draws for all branches."""
    # argsort of noise, because randperm waits for the device
    orders = [torch.rand(n_branches, n, device=device).argsort(1) for n in sizes]
    both = [(order.unbind(), order.argsort(1).unbind()) for order in orders]
    return [[Rows(images[i], at[i]) for images, at in both] for i in range(n_branches)]


def _n_kept(drop_prob: float, n: int) -> int:
    return max(int(n * (1 - drop_prob)), 1)


def _kept(drop_prob: float, order: Rows) -> Rows:
    """A random (1 - p) of the images, at least one."""
    m = _n_kept(drop_prob, len(order.rows))
    return Rows(order.rows[:m], torch.where(order.at < m, order.at, -1))


def _tokens(images: Sequence[Rows], packing: Packing) -> Rows:
    """The tokens of these images of each group."""
    rows, at, start, n_taken = [], [], 0, 0
    for chosen, (n_images, n_tokens) in zip(images, packing.groups):
        tokens, place = torch.arange(n_tokens, device=chosen.at.device), chosen.at[:, None]
        rows.append((start + chosen.rows[:, None] * n_tokens + tokens).flatten())
        at.append(torch.where(place < 0, -1, n_taken + place * n_tokens + tokens).flatten())
        start, n_taken = start + n_images * n_tokens, n_taken + len(chosen.rows) * n_tokens
    return Rows(torch.cat(rows), torch.cat(at))


def _by_sample(
    drop_prob: float, takes: Packing | None, adds: Packing | None, like: Tensor, orders: Sequence[Rows] | None
) -> Path:
    """All is computed; of each image all is added, scaled by 1 / (1 - p), or nothing. No order is asked for."""
    n_images = like.shape[0] if takes is None else takes.n_images
    factors = like.new_empty(n_images).bernoulli_(1 - drop_prob) / (1 - drop_prob)
    return Path(takes, scale=factors[:, None, None] if adds is None else adds.per_token(factors))


def _by_batch(
    drop_prob: float, takes: Packing | None, adds: Packing | None, like: Tensor, orders: Sequence[Rows] | None
) -> Path:
    """Of every group a random (1 - p) of the images, at least one, is computed, and scaled up by what is left out.

    DINOv2's form (arXiv:2304.07193, section 5), which saves the work.
    """
    sizes = group_sizes(takes, like)
    kept = [_kept(drop_prob, order) for order in orders or draw_orders(1, sizes, like.device)[0]]
    if takes is None or adds is None:
        [images], [n] = kept, sizes
        return Path(None, images, images, like.new_full((len(images.rows), 1, 1), n / len(images.rows)))
    return of_images(kept, takes, adds, like)


def group_sizes(packing: Packing | None, like: Tensor) -> list[int]:
    """How many images each group has."""
    return [like.shape[0]] if packing is None else [n for n, _ in packing.groups]


def of_images(images: Sequence[Rows], takes: Packing, adds: Packing, like: Tensor) -> Path:
    """The path of these images of each group, scaled up by what is left out."""
    counts = [len(kept.rows) for kept in images]
    scale = [like.new_full((m * n_tokens, 1), n / m) for m, (n, n_tokens) in zip(counts, adds.groups)]
    packing = Packing(tuple((m, n_tokens) for m, (_, n_tokens) in zip(counts, takes.groups)))
    return Path(packing, _tokens(images, takes), _tokens(images, adds), torch.cat(scale))


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
    for order in draw_orders(1, group_sizes(packing, like), like.device)[0]:
        n, m = len(order.at), _n_kept(drop_prob, len(order.at))
        parts.append(torch.where(order.at < m, n / m, 0.0).to(like.dtype))
    return Path(packing, scale=torch.cat(parts)[images][:, None])


MODES = {"sample": _by_sample, "batch": _by_batch}


def draw(
    mode: str,
    drop_prob: float,
    takes: Packing | None,
    adds: Packing | None,
    like: Tensor,
    orders: Sequence[Rows] | None = None,
) -> Path:
    """A branch's path, drawn by a mode of MODES. takes, adds: how the tokens before and after it are packed.

    like: the stream, (M, D), or (B, N, D) where it is not packed. orders: of each group, if they are drawn already.
    """
    return MODES[mode](drop_prob, takes, adds, like, orders) if drop_prob else Path(takes)
