"""DINO's projection head: an MLP to a narrow bottleneck, L2 normalisation, and the prototypes.

DINO (arXiv:2104.14294), section 3.1 and appendix C. Axes: B rows, K prototypes.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.layers import init_linear, without_autocast
from fastdino_kernels import LinearLogits


def promote(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """Autocast's, where it is on, or x's."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _lengths(v: Tensor) -> Tensor:
    """(K,) lengths of the rows of v (K, D), in full precision."""
    full = promote(v[:0]).dtype
    if v.device.type != "cpu" or v.dtype == full or torch.compiler.is_compiling():
        return torch.linalg.vector_norm(v, dim=1, dtype=full)
    # On a CPU that would write all of v anew in fp32; of some rows at a time, the copy stays in the cache.
    return torch.cat([rows.to(full).norm(dim=1) for rows in v.split(1024)])


class _LinearOfDirections(torch.autograd.Function):
    """x (B, D), g (K, 1), v (K, D) -> x v^T * (g / |v|)^T (B, K).

    The few rows of the product are scaled, not the K rows of v: of `g * v / |v|`, which depends on no image, autograd
    would make six tensors of K * D and keep two. Nothing of that size is made here but the gradient.
    Lengths are in fp32 also where v is a bf16 copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
        length = _lengths(v)
        y = (F.linear(x, v) * (g[:, 0] / length)).to(v.dtype)
        ctx.save_for_backward(x, g, v, length, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, g, v, length, y = ctx.saved_tensors
        # y is of degree 1 in g and of degree 0 in |v|, so that g * dg is along_y, and v's gradient has none along v.
        along_y = (promote(grad) * y).sum(0)
        scaled = (grad * (g[:, 0] / length)).to(v.dtype)
        grad_v = (scaled.T @ x).addcmul_(v, (-along_y / length.square())[:, None].to(v.dtype))
        return scaled @ v, (along_y[:, None] / g).to(g.dtype), grad_v


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are g * v / |v| (arXiv:1602.07868), under the names `weight_g`, `weight_v`.

    The names are those that the deprecated `torch.nn.utils.weight_norm` writes, and so every DINO checkpoint.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def prototypes(self, dtype: torch.dtype) -> Tensor:
        """(K, in_features), in a dtype; their lengths in full precision."""
        v = self.weight_v.to(dtype)
        return (v * (self.weight_g / _lengths(v)[:, None])).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); under autocast in its dtype, with lengths in full precision."""
        dtype = _dtype_of_products(x)
        with without_autocast(x):
            if torch.compiler.is_compiling():
                # It fuses these operators itself, and finds them in its cache, as it would not an autograd.Function.
                # Here v is scaled, in the pass that measures its rows: 0.24 GB a step of 64 images and 65536
                # prototypes. Scaled logits, which have more rows than v has columns, would take 0.59 GB.
                return F.linear(x.to(dtype), self.prototypes(dtype))
            y: Tensor = _LinearOfDirections.apply(x.to(dtype), self.weight_g, self.weight_v.to(dtype))
            return y


class PlainPrototypes(nn.Linear):
    """A linear map without bias, as DINOv3 ends its heads."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def prototypes(self, dtype: torch.dtype) -> Tensor:
        """(K, in_features), in a dtype."""
        return self.weight.to(dtype)


class DINOHead(nn.Module):
    """Features (B, in_dim) -> logits (B, out_dim), one per prototype.

    use_bn: BatchNorm after the hidden linears. norm_last_layer: the prototypes' lengths (`weight_g`) stay 1.
    nlayers: linears before the normalisation; hidden_dim: their width; bottleneck_dim: what they end in.
    weight_norm: prototypes as DINO and DINOv2 have them; without it a plain linear map, as in DINOv3, to which
    norm_last_layer says nothing.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        self.out_dim = out_dim
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(n_in, n_out))
            if i < len(widths) - 2:
                layers += [nn.BatchNorm1d(n_out), nn.GELU()] if use_bn else [nn.GELU()]
        # The original has a bare linear, and so other names, where there is one layer.
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.mlp.apply(init_linear)
        self.last_layer: WeightNormLinear | PlainPrototypes
        if weight_norm:
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
            self.last_layer.weight_g.requires_grad = not norm_last_layer
        else:
            self.last_layer = PlainPrototypes(bottleneck_dim, out_dim)
            init_linear(self.last_layer)

    def _bottleneck(self, x: Tensor) -> Tensor:
        z = self.mlp(x)
        return F.normalize(promote(z), dim=-1).to(z.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, out_dim)."""
        logits: Tensor = self.last_layer(self._bottleneck(x))
        return logits

    def linear_logits(self, x: Tensor) -> LinearLogits:
        """(M, in_dim) -> what `forward` multiplies at its end."""
        z, layer = self._bottleneck(x), self.last_layer
        dtype = _dtype_of_products(z)
        with without_autocast(z):
            return LinearLogits(z.to(dtype), layer.prototypes(dtype))
