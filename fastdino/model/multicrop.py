"""Backbone and head over crops of several resolutions. Axes: V views, B images, D channels, K prototypes."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


class MultiCropWrapper(nn.Module):
    """One pass of the backbone per run of equally large crops, one pass of the head over all of them.

    backbone: (n, 3, H, W) -> (n, D). head: (n, D) -> (n, K).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def output_dim(self) -> int:
        """K, the number of prototypes."""
        out_dim = self.head.out_dim
        assert isinstance(out_dim, int)
        return out_dim

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """V crops (B, 3, H, W), or one tensor of them -> (V * B, K), crop-major."""
        views = [crops] if isinstance(crops, Tensor) else crops
        features = torch.cat(
            [self.backbone(torch.cat(list(run))) for _, run in groupby(views, key=lambda x: x.shape[-2:])]
        )
        # As in the original, the head's input leaves half precision (autocast then decides per op).
        return self.head(features if features.dtype == torch.float64 else features.float())
