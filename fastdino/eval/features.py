"""Features of many images, from a frozen backbone: batch by batch, so that nothing has to fit into memory at once.

Axes: B images, L layers (the last L blocks, each after the final norm), D channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdino.data.augment import normalize
from fastdino.data.sources import ImageSource
from fastdino.data.views import center_views, random_views
from fastdino.errors import UserError

TOKENS = ("cls", "avg", "patch")
Views = Iterator[tuple[Tensor, NDArray[np.int64]]]  # ((B, 3, H, W) uint8, indices (B,))
BATCH = 128  # images at once, as in the original's evaluations


@dataclass(frozen=True)
class View:
    """How an image is shown to the backbone: short side to `resize` pixels, bicubic, then the middle of side `size`."""

    resize: int
    size: int

    def views(self, source: ImageSource, indices: NDArray[np.int64], *loading: Any) -> Views:
        """As `data.views.center_views`."""
        return center_views(source, indices, self.resize, self.size, *loading)


@dataclass(frozen=True)
class RandomView:
    """A random part of 8 to 100% of an image, resized bilinearly to `size`, half of them flipped.

    Drawn from seed, epoch, and the image's index.
    """

    size: int
    seed: int
    epoch: int

    def views(self, source: ImageSource, indices: NDArray[np.int64], *loading: Any) -> Views:
        """As `data.views.random_views`."""
        return random_views(source, indices, self.size, self.seed, self.epoch, *loading)


@contextmanager
def evaluating(backbone: nn.Module) -> Iterator[None]:
    """The backbone in eval mode, without gradients; then as it was, whatever happens."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)


def backbone_features(
    backbone: nn.Module, images: Tensor, layers: int = 1, tokens: Sequence[str] = ("cls",)
) -> dict[str, Tensor]:
    """Normalised images (B, 3, H, W) -> fp32 features by name.

    cls (B, L * D): the CLS tokens, those of the last block at the end, as the original's linear evaluation joins them.
    avg (B, L * D): means of the patches, in the same order. patch (B, rows, columns, L * D).
    Any backbone gives cls of one layer, which is what it returns; the rest takes `get_intermediate_layers`.
    Raises UserError where the backbone has none, or fewer layers; ValueError for other names of tokens.
    """
    if unknown := set(tokens) - set(TOKENS):
        raise ValueError(f"tokens: expected some of {', '.join(TOKENS)}, got {', '.join(sorted(unknown))}")
    if layers == 1 and list(tokens) == ["cls"]:
        return {"cls": backbone(images).float()}
    vit: Any = backbone
    if not hasattr(backbone, "get_intermediate_layers"):
        raise UserError(f"{type(backbone).__name__} gives its output alone: one layer, tokens cls")
    if not 1 <= layers <= len(vit.blocks):
        raise UserError(f"layers: expected 1 to {len(vit.blocks)}, as many as there are blocks, got {layers}")
    joined = torch.cat(vit.get_intermediate_layers(images, layers), dim=-1).float()
    patches = joined[:, 1:]
    made = {
        "cls": lambda: joined[:, 0],
        "avg": lambda: patches.mean(1),
        "patch": lambda: patches.unflatten(1, vit.patch_embed.grid(*images.shape[2:])),
    }
    return {name: made[name]() for name in tokens}


def stream(
    backbone: nn.Module,
    source: ImageSource,
    indices: NDArray[np.int64],
    view: View | RandomView,
    *,
    layers: int = 1,
    tokens: Sequence[str] = ("cls",),
    batch_size: int = BATCH,
    num_workers: int = 0,
    bad: Callable[[int, str], object] = lambda index, line: None,
) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
    """(indices (B,), `backbone_features` of them) for the readable images among `indices`, in that order.

    num_workers: threads that decode, 0 for the caller's. bad: is told index and reason of each image that cannot be
    read. The backbone runs in eval mode, on its own device and in its own dtype, and is put back as it was.
    """
    parameter = next(backbone.parameters())
    with evaluating(backbone):
        for views, batch in view.views(source, indices, batch_size, num_workers, bad):
            images = normalize(views.to(parameter.device)).to(parameter.dtype)
            yield batch, backbone_features(backbone, images, layers, tokens)
