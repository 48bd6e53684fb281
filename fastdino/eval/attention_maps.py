"""Where the CLS token looks: attention of the last block over sample images, DINO (arXiv:2104.14294), figure 1."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastdino import files
from fastdino.data.augment import center_view, normalize
from fastdino.data.decode import BadImage, decode
from fastdino.data.sources import ImageSource
from fastdino.model import VisionTransformer

PANEL = 1.6  # inches of a picture's panel


@torch.no_grad()
def cls_attention(
    backbone: VisionTransformer, image: Image.Image, resize: int, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(the view (size, size, 3) uint8, attention from CLS to the patches (heads, rows, cols))."""
    view = center_view(image, resize, size)
    param = next(backbone.parameters())
    pixels = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].to(param.device)
    was_training = backbone.training
    backbone.eval()
    try:
        maps = backbone.get_last_selfattention(normalize(pixels).to(param.dtype))[0, :, 0, 1:]
    finally:
        backbone.train(was_training)
    side = size // backbone.patch_embed.patch_size
    return view, maps.unflatten(1, (side, side)).float().cpu().numpy()


def draw_attention(
    backbone: VisionTransformer, images: Sequence[Image.Image], path: Path, resize: int, size: int
) -> None:
    """Write a picture: a row per image, the image first, then the mean over the heads, then each head."""
    from matplotlib.figure import Figure

    rows = [cls_attention(backbone, image, resize, size) for image in images]
    n_heads = len(rows[0][1])
    figure = Figure(figsize=(PANEL * (2 + n_heads), PANEL * len(rows) + 0.5), layout="constrained", dpi=120)
    axes = figure.subplots(len(rows), 2 + n_heads, squeeze=False)
    titles = ["image", "mean", *(f"head {h + 1}" for h in range(n_heads))]
    for row, (view, maps) in zip(axes, rows):
        row[0].imshow(view)
        for ax, attention in zip(row[1:], [maps.mean(0), *maps]):
            ax.imshow(attention, cmap="inferno", interpolation="nearest")
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.suptitle("attention of the CLS token, last block", fontsize=10)
    files.replace(path, lambda file: figure.savefig(file, format=path.suffix[1:]))


def draw_samples(backbone: Any, source: ImageSource, n_images: int, path: Path, resize: int, size: int) -> str | None:
    """`draw_attention` of images spread evenly over a source; why there is no picture, where there is none."""
    if not hasattr(backbone, "get_last_selfattention"):
        return f"{type(backbone).__name__} has no attention of a CLS token"
    images = []
    for index in np.linspace(0, len(source) - 1, min(n_images, len(source))).astype(int):
        try:
            images.append(decode(source[int(index)]))
        except (BadImage, OSError):
            continue
    if not images:
        return "none of the sample images can be read" if n_images else None
    draw_attention(backbone, images, path, resize, size)
    return None
