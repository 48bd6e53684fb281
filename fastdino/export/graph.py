"""The backbone as a graph that takes images of any size, for torch.export and ONNX.

The original interpolates positions with scale factors of (rows + 0.1) / side (`patches`). A tracer makes constants of
such factors, and the graph is of one size. Bicubic interpolation is linear, and so it is two matrix products, of a
weight for each row and each old row, and of the same for columns; the weights are computed from the number of rows by
operations that a tracer keeps (R. Keys, Cubic convolution interpolation for digital image processing, 1981, with the
a = -0.75 that PyTorch has). Equal to `F.interpolate` up to rounding.

Axes: B images, D channels; S x S positions that were learned.
"""

from typing import cast

import torch
from torch import Tensor, nn

from fastdino.model import VisionTransformer

CUBIC = -0.75  # a, the slope of the kernel's tail


def _kernel(x: Tensor) -> Tensor:
    """The cubic kernel at distances of up to 2."""
    x = x.abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, far)


def resize_weights(index: Tensor, old: Tensor, around: Tensor) -> Tensor:
    """(n, S): what each of n rows takes of each of S old ones.

    index, old, around: arange(n), arange(S) and (-1, 0, 1, 2), in floats.
    """
    side, n_rows = len(old), index[-1] + 1  # a tensor: a tracer keeps it open
    at = (index + 0.5) * (side / (n_rows + 0.1)) - 0.5
    neighbours = at.floor()[:, None] + around  # (n, 4)
    weights = _kernel(at[:, None] - neighbours)
    # What lies outside repeats the border.
    return (weights[..., None] * (neighbours.clamp(0, side - 1)[..., None] == old)).sum(1)


class AnySize(nn.Module):
    """A backbone's forward pass, (B, 3, H, W) -> (B, D), whose positions are interpolated by the graph."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        # Buffers, and below new_ones instead of arange: a graph that names no device can be moved to another.
        side = backbone.patch_embed.img_size // backbone.patch_embed.patch_size
        self.register_buffer("old", torch.arange(float(side)))
        self.register_buffer("around", torch.arange(-1.0, 3.0))

    def positions(self, images: Tensor, rows: int, cols: int) -> Tensor:
        """(rows * cols, D) for the patches of images (B, 3, H, W)."""
        old, around = cast(Tensor, self.old), cast(Tensor, self.around)
        side = len(old)
        height, width = (images.new_ones(n).sum() for n in images.shape[2:])
        down, right = (images.new_ones(n).cumsum(0) - 1 for n in (rows, cols))
        # Positions are as they were learned where there are as many, and the image is square: a condition of the
        # original's, whose interpolation is not the identity there.
        as_learned = (down[-1] == side - 1) & (right[-1] == side - 1) & (height == width)
        to_rows, to_cols = (
            torch.where(as_learned, index[:, None].eq(old).type_as(index), resize_weights(index, old, around))
            for index in (down, right)
        )
        learned = self.backbone.pos_embed[0, 1:].unflatten(0, (side, side))
        resized = (to_rows @ learned.flatten(1)).unflatten(1, (side, -1))
        return (to_cols @ resized).flatten(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        vit = self.backbone
        patches = vit.patch_embed.proj(images)  # the convolution: it leaves out what the patch does not divide
        cls = vit.cls_token[0] + vit.pos_embed[0, :1]
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(images, *patches.shape[2:])
        tokens = torch.cat((cls.expand(images.shape[0], -1, -1), tokens), dim=1)
        *others, last = vit.blocks
        for block in others:
            tokens = block(tokens)
        return cast(Tensor, vit.norm(last(tokens, cls_only=True)))[:, 0]
