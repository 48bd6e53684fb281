"""Where images become tokens: the projection of patches, and the table of their positions at any size.

Axes: B images, D channels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.constant import constant
from fastdino.model.layers import without_autocast


class PatchEmbed(nn.Module):
    """(B, 3, H, W) -> (B, H//p * W//p, D): one linear map per p x p patch; what is left of the sides is not read."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches in an image of this many pixels; of overlapping ones under a smaller stride."""
        stride = self.proj.stride
        down, right = (stride, stride) if isinstance(stride, int) else stride
        return (height - self.patch_size) // down + 1, (width - self.patch_size) // right + 1

    def forward(self, x: Tensor) -> Tensor:
        if self.proj.stride != self.proj.kernel_size:  # somebody made the patches overlap
            return self.proj(x).flatten(2).transpose(1, 2)
        # A convolution whose stride is its size is one matrix product over the patches, and faster as such.
        size, (height, width) = self.patch_size, x.shape[2:]
        x = x[:, :, : height // size * size, : width // size * size]
        patches = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class Interpolation(NamedTuple):
    """How a table of positions is made to fit other sizes, bicubic.

    offset: added to rows and columns before they become scale factors; with 0 they are the size itself. antialias: as
    in models with registers. in_fp32: also where the table is in half precision.
    """

    # Not `size=(rows, cols)`: the original passes scale factors with 0.1 added against rounding, and the bicubic
    # grid follows the factor. At 96 pixels the two differ by 28% RMS, and published weights were trained with this.
    offset: float = 0.1
    antialias: bool = False
    in_fp32: bool = False


DINOS_INTERPOLATION = Interpolation()


def _interpolate(positions: Tensor, rows: int, cols: int, how: Interpolation) -> Tensor:
    """(1, side * side, D) -> (1, rows * cols, D), bicubic."""
    side = math.isqrt(positions.shape[1])
    factors = ((rows + how.offset) / side, (cols + how.offset) / side)
    full = torch.promote_types(positions.dtype, torch.float32) if how.in_fp32 else positions.dtype
    resized = F.interpolate(
        positions.to(full).unflatten(1, (side, side)).permute(0, 3, 1, 2),
        size=None if how.offset else (rows, cols),
        scale_factor=factors if how.offset else None,
        mode="bicubic",
        antialias=how.antialias,
    )
    return resized.flatten(2).transpose(1, 2).to(positions.dtype)


@dataclass(frozen=True)
class _Matrix:
    """In an object: Dynamo takes several tensors that one function returned for one."""

    values: Tensor


@constant
def _matrix(side: int, rows: int, cols: int, how: Interpolation, dtype: torch.dtype, device: torch.device) -> _Matrix:
    """`_interpolate` is linear: its matrix, (rows * cols, side * side), is what it makes of the identity.

    A constant to a compiler, which runs this while it traces.
    """
    with torch.inference_mode(False):  # an inference tensor could not be kept for a backward pass
        identity = torch.eye(side * side, dtype=dtype, device=device)
        return _Matrix(_interpolate(identity[None], rows, cols, how)[0].contiguous())


def _by_matrix(positions: Tensor, rows: int, cols: int, how: Interpolation) -> Tensor:
    """`_interpolate` as one product, in fp32 where positions are half precision: for a compiler, which would make some
    25 launches of an interpolation, and add up its gradient atomically, with other bits each time.
    """
    side, full = math.isqrt(positions.shape[1]), torch.promote_types(positions.dtype, torch.float32)
    matrix = _matrix(side, rows, cols, how, full, positions.device).values
    with without_autocast(positions):
        return (matrix @ positions.to(full)).to(positions.dtype)


def resize(positions: Tensor, rows: int, cols: int, how: Interpolation = DINOS_INTERPOLATION) -> Tensor:
    """Positions of side * side patches -> of rows * cols patches, (1, rows * cols, D)."""
    interpolate = _by_matrix if torch.compiler.is_dynamo_compiling() else _interpolate
    return interpolate(positions, rows, cols, how)
