"""Rotary positions of patches (RoFormer, arXiv:2104.09864), in two dimensions and with the training draws of DINOv3.

A pair of channels turns by an angle that is proportional to the patch's place, a quarter of the pairs' periods along
each axis (DINOv3, arXiv:2508.10104, section 3.2). Places run from -1 to 1 over an image, whatever its resolution.
Axes: N tokens of an image, H heads, D channels of a head, P = D / 4 periods.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMALIZE = ("separate", "max", "min")


class Rotation(NamedTuple):
    """sin, cos: (S, D / 2) of S places, the tokens of an image of each resolution, one resolution after another."""

    sin: Tensor
    cos: Tensor


class Draw(NamedTuple):
    """What training does to the places of patches, for each table and resolution: (tables, resolutions, 2) per axis, or
    one factor (..., 1) for both axes; None for nothing.
    """

    shift: Tensor | None = None
    jitter: Tensor | None = None
    rescale: Tensor | None = None


class RopeEmbed(nn.Module):
    """Makes the sines and cosines of a grid of patches.

    base: of the geometric row of periods, base^0 .. base^1; or min_period and max_period, its ends.
    normalize_coords: places are divided by each side's own length, or by the longer (max) or the shorter (min) side.
    shift, jitter, rescale: bounds of the draws in training, None for none. Added to places is a number of
    [-shift, shift]; the factors are log-uniform in [1/x, x], jitter's per axis, rescale's for both.
    dtype: of the periods and, at least, of the tables.
    Raises ValueError where a head cannot be cut into fours, for another normalize_coords, and unless there is either a
    base or both periods.
    """

    periods: Tensor

    def __init__(
        self,
        head_dim: int,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: str = "separate",
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim: expected a multiple of 4, got {head_dim}")
        if normalize_coords not in NORMALIZE:
            raise ValueError(f"normalize_coords: expected {', '.join(NORMALIZE)}, got {normalize_coords!r}")
        self.normalize_coords, self.dtype = normalize_coords, dtype
        self.shift, self.jitter, self.rescale = shift, jitter, rescale
        n = head_dim // 4
        if min_period is not None and max_period is not None and base is None:
            ratio = max_period / min_period
            # In bf16 each step rounds: in DINOv3's order.
            periods = ratio ** torch.linspace(0, 1, n, dtype=dtype) / ratio * max_period
        elif base is not None and min_period is None and max_period is None:
            periods = base ** (2 * torch.arange(n, dtype=dtype) / (head_dim // 2))
        else:
            raise ValueError(f"expected base, or min_period and max_period, got {base}, {min_period} and {max_period}")
        self.register_buffer("periods", periods)

    @property
    def draws(self) -> bool:
        """Whether tables differ from call to call."""
        return self.training and any(bound is not None for bound in (self.shift, self.jitter, self.rescale))

    def draw(self, n_tables: int, n_grids: int) -> Draw:
        """Anew, on the device: no number of it comes to the host."""

        def uniform(bound: float, n: int) -> Tensor:
            return self.periods.new_empty(n_tables, n_grids, n, dtype=self._dtype).uniform_(-bound, bound)

        return Draw(
            None if self.shift is None else uniform(self.shift, 2),
            None if self.jitter is None else uniform(math.log(self.jitter), 2).exp(),
            None if self.rescale is None else uniform(math.log(self.rescale), 1).exp(),
        )

    @property
    def _dtype(self) -> torch.dtype:
        # A model cast to bf16 keeps fp32 tables: in bf16 sines are off by 0.02 at 14 x 14.
        return torch.promote_types(self.periods.dtype, self.dtype)

    def _places(self, rows: int, cols: int) -> Tensor:
        """(N, 2) of patches, row by row, from -1 to 1."""
        sides = {"separate": (rows, cols), "max": (max(rows, cols),) * 2, "min": (min(rows, cols),) * 2}
        places = [
            (torch.arange(n, dtype=self._dtype, device=self.periods.device) + 0.5) / side
            for n, side in zip((rows, cols), sides[self.normalize_coords])
        ]
        return 2 * torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1).flatten(0, 1) - 1

    def forward(self, grids: Sequence[tuple[int, int]], n_before: int = 0, n_tables: int = 1) -> list[Rotation]:
        """Tables for images of every (rows, columns), whose patches come after n_before tokens that are not turned.

        So many tables: in training each is drawn anew, for every grid.
        """
        shift, jitter, rescale = self.draw(n_tables, len(grids)) if self.draws else Draw()
        angles = []
        for i, grid in enumerate(grids):
            coords = self._places(*grid)
            coords = coords if shift is None else coords + shift[:, i, None]
            coords = coords if jitter is None else coords * jitter[:, i, None]
            coords = coords if rescale is None else coords * rescale[:, i, None]
            of_grid = (2 * math.pi * coords[..., None] / self.periods).flatten(-2)  # (..., N, D / 2): rows, columns
            angles.append(F.pad(of_grid, (0, 0, n_before, 0)))
        joined = torch.cat(angles, dim=-2)
        sin, cos = joined.sin(), joined.cos()
        return [Rotation(*table) for table in zip(sin, cos)] if self.draws else [Rotation(sin, cos)] * n_tables
