"""DINO's projection head: an MLP to a narrow bottleneck, L2 normalisation, and the prototypes.

DINO (arXiv:2104.14294), section 3.1 and appendix C. Axes: B rows, K prototypes.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.vit import init_linear


def promote(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class WeightNormLinear(nn.Module):
    """A linear map without bias whose rows are g * v / |v| (arXiv:1602.07868), under the names `weight_g`, `weight_v`.

    The names are those that the deprecated `torch.nn.utils.weight_norm` writes, and so every DINO checkpoint.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        # Lengths in fp32 also where the weights are bf16 copies; then one rounding.
        v = promote(self.weight_v)
        weight = v * (promote(self.weight_g) / v.norm(dim=1, keepdim=True))
        return F.linear(x, weight.to(self.weight_v.dtype))


class DINOHead(nn.Module):
    """Features (B, in_dim) -> logits (B, out_dim), one per prototype.

    use_bn: BatchNorm after the hidden linears. norm_last_layer: the prototypes' lengths (`weight_g`) stay 1.
    nlayers: linears before the normalisation; hidden_dim: their width; bottleneck_dim: what they end in.
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
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim) -> (B, out_dim)."""
        z = self.mlp(x)
        return self.last_layer(F.normalize(promote(z), dim=-1).to(z.dtype))
