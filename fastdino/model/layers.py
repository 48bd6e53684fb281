"""Small layers of a block, and how weights start: norms, LayerScale, linear maps. Axes: D channels."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.recompute import recomputed
from fastdino_kernels.launch import use_triton
from fastdino_kernels.layer_norm import layer_norm as kernels_layer_norm


class LayerNorm(nn.LayerNorm):
    """PyTorch's, whose output is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the dtype of the weights."""
        if self._is_ours(x):
            return kernels_layer_norm(x, self.weight, self.bias, self.eps)
        # Not the module's own method: what a hook keeps of its output would hold the module, and so itself.
        function = F.layer_norm if x.dtype == self.weight.dtype else _layer_norm_of_full
        return recomputed(function, x, self.normalized_shape, self.weight, self.bias, self.eps)

    def _is_ours(self, x: Tensor) -> bool:
        """Whether our backward pass may stand in for the library's: of a block's norm, in a compiled step."""
        if not torch.compiler.is_dynamo_compiling():  # nor in an export's trace, which is none of Dynamo's
            return False
        affine = self.weight is not None and self.bias is not None and len(self.normalized_shape) == 1
        return affine and use_triton(x, self.weight) and not torch.is_autocast_enabled(x.device.type)

    def full(self, x: Tensor) -> Tensor:
        """The same in the dtype of x, where that has more digits than the weights."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _layer_norm_of_full(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Of a residual stream in full precision, for branches in half."""
    return F.layer_norm(x, shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(weight.dtype)


class RMSNorm(nn.RMSNorm):
    """PyTorch's (arXiv:1910.07467), whose output is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the dtype of the weights."""
        function = F.rms_norm if x.dtype == self.weight.dtype else _rms_norm_of_full
        return recomputed(function, x, self.normalized_shape, self.weight, self.eps)

    def full(self, x: Tensor) -> Tensor:
        """The same in the dtype of x, where that has more digits than the weights."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _rms_norm_of_full(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, shape, weight.to(x.dtype), eps).to(weight.dtype)


def in_dtype_of(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x); of x in full precision and a norm in half, in full."""
    weight = getattr(norm, "weight", None)
    if isinstance(norm, (LayerNorm, RMSNorm)) and isinstance(weight, Tensor) and weight.dtype != x.dtype:
        return norm.full(x)
    y: Tensor = norm(x)
    return y


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm with DINO's epsilon, a tenth of PyTorch's."""
    return LayerNorm(dim, eps=1e-6)


# By the names of DINOv3's configurations; its published models have "layernormbf16".
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layernorm": layer_norm,
    "layernormbf16": lambda dim: LayerNorm(dim, eps=1e-5),
    "rmsnorm": lambda dim: RMSNorm(dim, eps=1e-5),
}


class LayerScale(nn.Module):
    """x * gamma, a factor per channel (CaiT, arXiv:2103.17239, section 2.1), which starts small."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma


def layer_scale(dim: int, init: float | None) -> nn.Module:
    """LayerScale that starts at init, or nothing at all where init is None or 0."""
    return LayerScale(dim, init) if init else nn.Identity()


class QkvWithoutKeyBias(nn.Linear):
    """The joint projection to queries, keys and values; the keys' third of the bias is held at zero by a mask.

    Softmax does not see a key's bias, so that its gradient is rounding noise, which AdamW follows. DINOv3's names.
    """

    bias_mask: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim * 3)
        mask = torch.ones(dim * 3)
        mask[dim : 2 * dim] = 0
        self.register_buffer("bias_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., 3 * D)."""
        return F.linear(x, self.weight, self.masked_bias)

    @property
    def masked_bias(self) -> Tensor:
        """(3 * D,)."""
        return self.bias * self.bias_mask.to(self.bias.dtype)  # of a low-precision copy, too


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Operations on the device of x keep the dtypes they are given."""
    device_type = x.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """Weights from a normal of deviation `std` cut at +-2, biases zero, norms at one; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
