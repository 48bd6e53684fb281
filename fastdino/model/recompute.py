"""Linear maps of something that is cheaper to compute again than to keep: of a norm, of GELU, of joined parts.

Autograd keeps the input of every linear map for its backward pass. Where that is a few passes over another tensor that
is kept anyway, these keep only the other: of a block's 16 D per token, 10. `torch.utils.checkpoint` does the same for
any function, and its bookkeeping costs a tenth of a small model's step. Without gradients, under autocast, and where a
layer is not the usual one or has hooks, the modules are called as they are.
Axes: M rows, D channels in, E out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradients = tuple[Tensor | None, ...]


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients by x, weight and bias of F.linear(x, weight, bias)."""
    rows = grad.flatten(0, -2)
    return grad @ weight, rows.T @ x.flatten(0, -2), rows.sum(0) if has_bias else None


class _LinearOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, gamma.shape, gamma, beta, eps)
        ctx.save_for_backward(x, mean, rstd, gamma, beta, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return F.linear(normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, mean, rstd, gamma, beta, weight = ctx.saved_tensors
        normed = torch.native_layer_norm(x, gamma.shape, gamma, beta, ctx.eps)[0]
        grad_normed, grad_weight, grad_bias = _linear_backward(grad, normed, weight, ctx.has_bias)
        grad_x, grad_gamma, grad_beta = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, gamma.shape, mean, rstd, gamma, beta, [True, True, True]
        )
        return grad_x, grad_gamma, grad_beta, None, grad_weight, grad_bias


class _LinearOfGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        grad_gelu, grad_weight, grad_bias = _linear_backward(grad, F.gelu(x), weight, ctx.has_bias)
        return torch.ops.aten.gelu_backward(grad_gelu, x), grad_weight, grad_bias


class _LinearOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        ctx.has_bias = bias is not None
        return F.linear(torch.cat(parts), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        weight, *parts = ctx.saved_tensors
        grad_joined, grad_weight, grad_bias = _linear_backward(grad, torch.cat(parts), weight, ctx.has_bias)
        return grad_weight, grad_bias, *grad_joined.split([len(part) for part in parts])


def _as_they_are(x: Tensor, *modules: nn.Module) -> bool:
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return hooked or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)


def linear_of_norm(linear: nn.Linear, norm: nn.Module, x: Tensor) -> Tensor:
    """linear(norm(x)): (..., D) -> (..., E); keeps x."""
    if type(norm) is not nn.LayerNorm or _as_they_are(x, norm, linear):
        return linear(norm(x))
    y = _LinearOfNorm.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)
    assert isinstance(y, Tensor)
    return y


def linear_of_gelu(linear: nn.Linear, act: nn.Module, x: Tensor) -> Tensor:
    """linear(act(x)), act being GELU: (..., D) -> (..., E); keeps x."""
    if _as_they_are(x, act, linear):
        return linear(act(x))
    y = _LinearOfGelu.apply(x, linear.weight, linear.bias)
    assert isinstance(y, Tensor)
    return y


def linear_of_parts(linear: nn.Linear, parts: list[Tensor]) -> Tensor:
    """linear(cat(parts)): (M_i, D) -> (M, E); keeps the parts, which somebody else keeps, too."""
    if len(parts) == 1 or _as_they_are(parts[0], linear):
        return linear(torch.cat(parts) if len(parts) > 1 else parts[0])
    y = _LinearOfParts.apply(linear.weight, linear.bias, *parts)
    assert isinstance(y, Tensor)
    return y
