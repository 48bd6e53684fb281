"""Features of many images, from a frozen backbone: batch by batch, so that nothing has to fit into memory at once.

Axes: B images, L layers (the last L blocks, each after the final norm), D channels.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdino.data.augment import normalize
from fastdino.data.sources import ImageSource
from fastdino.data.views import Show, views
from fastdino.errors import UserError
from fastdino.model import VisionTransformer

TOKENS = ("cls", "avg", "patch")
BATCH = 128  # images at once, as in the original's evaluations


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


def prefix_tokens(backbone: Any) -> int:
    """Tokens before the patches: CLS, and registers where the backbone has them."""
    return int(getattr(backbone, "num_prefix_tokens", 1))


def backbone_features(
    backbone: nn.Module, images: Tensor, layers: int = 1, tokens: Sequence[str] = ("cls",)
) -> dict[str, Tensor]:
    """Normalised images (B, C, H, W) -> fp32 features by name.

    cls (B, L * D): the CLS tokens, those of the last block at the end, as the original's linear evaluation joins them.
    avg (B, L * D): means of the patches, in the same order. patch (B, rows, columns, L * D).
    Any backbone gives cls of one layer, which is what it returns; the rest takes a VisionTransformer of ours.
    Raises UserError where it is none, or has fewer layers; ValueError for other names of tokens.
    """
    if unknown := set(tokens) - set(TOKENS):
        raise ValueError(f"tokens: expected some of {', '.join(TOKENS)}, got {', '.join(sorted(unknown))}")
    if layers == 1 and list(tokens) == ["cls"]:
        return {"cls": backbone(images).float()}
    # Networks of timm's have a get_intermediate_layers, too, but what it returns is not normalised and has no CLS.
    if not isinstance(backbone, VisionTransformer):
        raise UserError(f"{type(backbone).__name__} gives its output alone: one layer, tokens cls")
    if not 1 <= layers <= len(backbone.blocks):
        raise UserError(f"layers: expected 1 to {len(backbone.blocks)}, as many as there are blocks, got {layers}")
    joined = torch.cat(backbone.get_intermediate_layers(images, layers), dim=-1).float()
    patches = joined[:, prefix_tokens(backbone) :]
    made = {
        "cls": lambda: joined[:, 0],
        "avg": lambda: patches.mean(1),
        "patch": lambda: patches.unflatten(1, backbone.patch_embed.grid(*images.shape[2:])),
    }
    return {name: made[name]() for name in tokens}


def stream(
    backbone: nn.Module,
    source: ImageSource,
    indices: NDArray[np.int64],
    view: Show,
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
    for batch, images in image_batches(
        backbone, source, indices, view, batch_size=batch_size, num_workers=num_workers, bad=bad
    ):
        yield batch, backbone_features(backbone, images, layers, tokens)


def image_batches(
    backbone: nn.Module,
    source: ImageSource,
    indices: NDArray[np.int64],
    show: Show,
    *,
    batch_size: int = BATCH,
    num_workers: int = 0,
    bad: Callable[[int, str], object] = lambda index, line: None,
    std: Sequence[float] | None = None,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(indices (B,), images (B, C, H, W)) as the backbone takes them; it is in eval mode, without gradients, meanwhile.

    show: how an image is seen, a View or another function; where sizes differ, only images of one size share a batch.
    std: the deviation by which colors are divided, if not ImageNet's.
    """
    parameter = next(backbone.parameters())
    with evaluating(backbone):
        for pixels, batch in views(source, indices, show, batch_size, num_workers, bad):
            yield batch, normalize(pixels.to(parameter.device), std).to(parameter.dtype)


def checksum(parts: Iterable[Any]) -> str:
    """Of some bytes or arrays, and of where each of them ends."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


def fingerprint(backbone: nn.Module) -> str:
    """The checksum of a network's weights: whether features that were made earlier are its own."""
    values = backbone.state_dict().values()
    return checksum(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for x in values)
