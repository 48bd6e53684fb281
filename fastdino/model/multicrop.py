"""Backbone and head over crops of several resolutions. Axes: V views, B images, D channels, K prototypes."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.model.attention import Packing


def _features(output: Any) -> Tensor:
    """What a backbone returns, or, as of the XCiTs of torch.hub in training, the first of several things."""
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


class MultiCrop(nn.Module):
    """A backbone with what follows it, over all crops of a step. packed: whether they go through in one pass."""

    backbone: Any
    packed: bool

    @property
    def output_dim(self) -> int:
        """K, the number of prototypes."""
        raise NotImplementedError

    def packing(self, crops: Sequence[Tensor], batch_size: int) -> Packing | None:
        """How the tokens of such crops, of batch_size images each, follow one another; None where none are packed."""
        if not self.packed:
            return None
        runs = [(size, len(list(run))) for size, run in groupby(crops, key=lambda x: x.shape[-2:])]
        packing: Packing = self.backbone.packing([(n * batch_size, height, width) for (height, width), n in runs])
        return packing


def runs_of(crops: Sequence[Tensor]) -> list[Tensor]:
    """Crops (B, 3, H, W) that follow one another and are equally large, as one tensor (n * B, 3, H, W)."""
    return [torch.cat(list(run)) for _, run in groupby(crops, key=lambda x: x.shape[-2:])]


class MultiCropWrapper(MultiCrop):
    """Backbone and head over all crops at once.

    backbone: (n, 3, H, W) -> (n, D), see `archs`. head: (n, D) -> (n, K). packed: a backbone that packs takes crops of
    all resolutions in one pass; else, and with any other backbone, there is a pass per run of equally large crops.
    As in the original, a linear classifier `fc` or `head` of the backbone becomes an identity, in the backbone itself;
    but not one that makes the features which the backbone's embed_dim declares.
    """

    def __init__(self, backbone: Any, head: nn.Module, packed: bool = True) -> None:
        super().__init__()
        for name in ("fc", "head"):
            layer = getattr(backbone, name, None)
            if isinstance(layer, nn.Linear) and layer.out_features != getattr(backbone, "embed_dim", None):
                setattr(backbone, name, nn.Identity())
        self.backbone = backbone
        self.head = head
        self.packed = packed and getattr(backbone, "packs", False)

    @property
    def output_dim(self) -> int:
        """K, the number of prototypes."""
        out_dim = self.head.out_dim
        assert isinstance(out_dim, int)
        return out_dim

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """V crops (B, 3, H, W), or one tensor of them -> (V * B, K), crop-major."""
        runs = runs_of([crops] if isinstance(crops, Tensor) else crops)
        features = self.backbone(runs) if self.packed else torch.cat([_features(self.backbone(run)) for run in runs])
        if torch.is_autocast_enabled(features.device.type):  # as in the original; autocast then decides per op
            features = features.float()
        return self.head(features)
