"""Some rows of a matrix, there and back, for a compiler.

    take: y[i] = x[rows[i]]        spread: x[r] = y[at[r]], 0 where at[r] < 0        each is the other's gradient

Axes: T rows of a matrix, m of them taken: rows (m,) says which, no row twice, and at (T,) where among them each row of
the matrix is, -1 for nowhere. Both ways read from where a row lies. The gradient of PyTorch's own indexing writes a
matrix of zeros, and then each row to where it belongs, by atomics. Forward, these are single operations, which a
compiler joins with their neighbours. Backward they are operators, in which `fusion.JoinResiduals` sees what rows they
are; those that it does not join to others it takes apart.
"""

from typing import Any

import torch
from torch import Tensor


def plain_take(x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """(T, ...) -> (m, ...)."""
    return x.index_select(0, rows)


def plain_spread(x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """(m, ...) -> (T, ...)."""
    return x.index_select(0, at.clamp(min=0)).where((at >= 0).view(-1, *[1] * (x.ndim - 1)), 0)


_take = torch.library.custom_op("fastdino::take_rows", plain_take, mutates_args=())
_spread = torch.library.custom_op("fastdino::spread_rows", plain_spread, mutates_args=())
_take.register_fake(plain_take)
_spread.register_fake(plain_spread)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(rows, at)
        return plain_take(x, rows, at)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _spread(grads[0], *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(rows, at)
        return plain_spread(x, rows, at)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _take(grads[0], *ctx.saved_tensors), None, None


def take_rows(x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """x[rows]: (T, ...) to (m, ...). rows: (m,) int64, each of them once. at: (T,) int64, the way back."""
    return _Take.apply(x, rows, at)


def spread_rows(x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Zeros, but for x in `rows`: (m, ...) to (T, ...). rows: (m,) int64, each of them once. at: (T,), the way back."""
    return _Spread.apply(x, rows, at)
