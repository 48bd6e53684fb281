"""The ConvNeXts (arXiv:2201.03545) that DINOv3 distils its Vision Transformer into, under the originals' names.

Backbones for features: CLS is the mean over the last stage's places. Axes: B images, D channels.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.layers import init_linear, layer_norm


class _NormOfChannels(nn.LayerNorm):
    """LayerNorm over the channels of (B, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).square().mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Block(nn.Module):
    """A convolution of 7 x 7 in each channel, then an MLP at each place, added to what came in."""

    def __init__(self, dim: int, init_values: float = 1e-6) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = layer_norm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W)."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Four stages, each of half the resolution of the one before, the first of a quarter of the image's.

    depths: blocks of each stage; dims: their channels. Attributes: embed_dim (D).
    """

    def __init__(self, depths: Sequence[int], dims: Sequence[int], in_chans: int = 3) -> None:
        super().__init__()
        self.embed_dim = dims[-1]
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), _NormOfChannels(dims[0], eps=1e-6))
        halvings = [
            nn.Sequential(_NormOfChannels(wide, eps=1e-6), nn.Conv2d(wide, wider, kernel_size=2, stride=2))
            for wide, wider in pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(nn.Sequential(*(Block(dim) for _ in range(n))) for n, dim in zip(depths, dims))
        self.norm = layer_norm(dims[-1])
        # The originals' files hold the last norm twice: also as that of the last of four stages.
        self.norms = nn.ModuleList([*(nn.Identity() for _ in dims[:-1]), self.norm])
        self.apply(init_linear)

    def prepare(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last stage (B, D, H / 32, W / 32)."""
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return x

    def forward_features(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Tensors (B, 3, H, W) -> of each, after the last norm, cls (B, D), reg (B, 0, D), patch (B, places, D)."""
        found = []
        for x in images:
            places = self.prepare(x).flatten(2).transpose(1, 2)
            tokens = self.norm(torch.cat((places.mean(1, keepdim=True), places), dim=1))
            found.append({"cls": tokens[:, 0], "reg": tokens[:, 1:1], "patch": tokens[:, 1:]})
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.norm(self.prepare(x).mean((2, 3)))
