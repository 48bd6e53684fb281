"""What library calls share that take a kernel's place on a CPU.

They take some rows at a time, which stay in the cache, and look at values where that saves work. While a compiler
traces, the reference takes their place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdino_kernels import reference

CHUNK = 2**19  # logits at once


def rows_at_once(n_per_row: int) -> int:
    """Of rows that have so many numbers each; at least one."""
    return max(1, CHUNK // max(1, n_per_row))


def softmax(logits: Tensor, temp: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits - top) / temp, its softmax, and the logarithm of the top's, which is -log-sum-exp."""
    rows = (logits - reference.promote(logits.amax(-1, keepdim=True))).div_(temp)
    probs = rows.softmax(-1)
    return rows, probs, probs.amax(-1).log()


class WithGradient(torch.autograd.Function):
    """A loss whose gradient is made with it, and kept.

    fill(grad) fills grad, of student's shape, and returns the loss and what else there is to return without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, fill: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        # A loss scale multiplies later: fp16 would be too short until then, and is kept as fp32.
        grad = torch.empty_like(student, dtype=torch.promote_types(student.dtype, torch.bfloat16))
        outputs = fill(grad)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.dtype = student.dtype
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return (grad if grad_loss == 1 else grad * grad_loss).to(ctx.dtype), None
