"""Where the CLS token looks: attention of the last block over images and films, DINO (arXiv:2104.14294), figure 1.

A map is drawn in multiples of the even share: 1 is what each patch would get if CLS looked at all of them alike.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastdino.data.augment import center_view, normalize
from fastdino.data.channels import in_colors, read_pixels
from fastdino.data.decode import BadImage
from fastdino.data.sources import ImageSource
from fastdino.eval.features import evaluating, prefix_tokens
from fastdino.eval.pictures import LABEL, enlarged, fitting, row_labels, save_figure, save_png, whole_patches

PANEL = 1.6  # inches of a picture's panel
OUTSIDE = 0.25  # brightness of what a mask leaves out
FOLLOW = 0.95  # of a film's scale, from one frame to the next
Pixels = NDArray[np.uint8]
Maps = NDArray[np.float32]


class Looked(NamedTuple):
    """An image and its attention. view: (H, W, C) uint8. maps: (heads, rows, columns), from CLS to the patches."""

    name: str
    view: Pixels
    maps: Maps


def cls_attention(backbone: Any, view: Pixels) -> Maps:
    """(H, W, C) uint8 -> (heads, rows, columns) probabilities; sides that the patch does not divide lose the rest."""
    param = next(backbone.parameters())
    pixels = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].to(param.device)
    with evaluating(backbone):
        maps = backbone.get_last_selfattention(normalize(pixels).to(param.dtype))[0, :, 0, prefix_tokens(backbone) :]
    return maps.unflatten(1, backbone.patch_embed.grid(*view.shape[:2])).float().cpu().numpy()


def look(backbone: Any, name: str, view: Pixels) -> Looked:
    """An image, cut to the patches that are looked at, and its attention."""
    return Looked(name, whole_patches(backbone.patch_embed, view), cls_attention(backbone, view))


def mass_masks(maps: Maps, share: float) -> NDArray[np.bool_]:
    """(heads, rows, columns): the fewest patches of each head that hold `share` of its attention to patches."""
    flat = maps.reshape(len(maps), -1)
    order = flat.argsort(1)
    rising = np.cumsum(np.take_along_axis(flat, order, 1) / flat.sum(1, keepdims=True), 1)
    masks = np.empty(flat.shape, np.bool_)
    np.put_along_axis(masks, order, rising > 1 - share, 1)
    return masks.reshape(maps.shape)


def attention_figure(looked: Sequence[Looked]) -> Figure:
    """A row per image, the image first, then the mean over the heads, then each head.

    The panels of a row share a scale, which is drawn at its end.
    """
    n_heads = len(looked[0].maps)
    heights = [1.5 * len(view) / view.shape[1] for _, view, _ in looked]
    size = (PANEL * (2.3 + n_heads), PANEL * sum(heights) / 1.5 + 0.4 * len(looked) + 0.4)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots(len(looked), 2 + n_heads, squeeze=False, height_ratios=heights)
    titles = ["", "mean", *(f"head {h}" for h in range(n_heads))]
    for row, (name, view, maps) in zip(axes, looked):
        shares = maps * maps[0].size
        row[0].imshow(in_colors(view))
        row[0].set_title(fitting(name, PANEL), fontsize=LABEL, loc="left")
        for ax, attention in zip(row[1:], [shares.mean(0), *shares]):
            drawn = ax.imshow(attention, cmap="inferno", interpolation="nearest", vmin=0, vmax=shares.max())
        bar = figure.colorbar(drawn, ax=row.tolist(), fraction=0.012, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    for ax, title in zip(axes[0][1:], titles[1:]):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.suptitle("attention of the CLS token, last block; 1 = an even share for each patch", fontsize=9)
    return figure


def save_maps(looked: Looked, folder: Path, patch_size: int, threshold: float | None) -> list[Path]:
    """Pictures under the original's names: img.png, attn-headN.png, and with a threshold mask_thX_headN.png.

    threshold: a mask shows the fewest patches that hold this share of the head's attention. Returns the files.
    """
    pictures: dict[str, Pixels] = {"img": in_colors(looked.view)}
    for head, grid in enumerate(looked.maps):
        scaled = (grid - grid.min()) / max(float(np.ptp(grid)), 1e-12)
        pictures[f"attn-head{head}"] = _colored(enlarged(scaled, patch_size), "viridis")
    if threshold is not None:
        for head, mask in enumerate(mass_masks(looked.maps, threshold)):
            shown = enlarged(mask, patch_size)
            view = looked.view[: len(shown), : shown.shape[1]]
            pictures[f"mask_th{threshold}_head{head}"] = _darkened(in_colors(view), shown)
    paths = [folder / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values()):
        save_png(path, picture)
    return paths


def _colored(values: NDArray[Any], cmap: str) -> Pixels:
    """Values in [0, 1] -> RGB."""
    return colormaps[cmap](values, bytes=True)[..., :3]


def _darkened(pixels: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """What the mask leaves out."""
    return np.where(mask[..., None], pixels, pixels * OUTSIDE).astype(np.uint8)


class FilmFrames:
    """Frames of a film, the attention beside them. The colours' scale follows the film, so that it does not flicker.

    threshold: as for `save_maps`: what does not belong to the mask of the heads' mean goes dark.
    """

    def __init__(self, patch_size: int, threshold: float | None) -> None:
        self._patch_size, self._threshold = patch_size, threshold
        self._scale = 0.0

    def __call__(self, looked: Looked) -> Pixels:
        """(H, 2 * W, 3): the frame, cut to whole patches, and the mean over its heads."""
        mean = looked.maps.mean(0)
        self._scale = max(float(mean.max()), FOLLOW * self._scale)
        attention = _colored(enlarged(mean / self._scale, self._patch_size), "inferno")
        frame = looked.view[: len(attention), : attention.shape[1]]
        if self._threshold is not None:
            mask = enlarged(mass_masks(mean[None], self._threshold)[0], self._patch_size)
            frame = _darkened(frame, mask)
        return np.concatenate([frame, attention], 1)


def draw_samples(backbone: Any, source: ImageSource, n_images: int, path: Path, resize: int, size: int) -> str | None:
    """`attention_figure` of images spread evenly over a source; why there is no picture, where there is none."""
    if not hasattr(backbone, "get_last_selfattention"):
        return f"{type(backbone).__name__} has no attention of a CLS token"
    looked = []
    for index in np.linspace(0, len(source) - 1, min(n_images, len(source))).astype(int):
        try:
            view = center_view(read_pixels(source, int(index)), resize, size)
        except (BadImage, OSError):
            continue
        looked.append(look(backbone, source.name(int(index)), view))
    if not looked:
        return "none of the sample images can be read" if n_images else None
    names = row_labels([each.name for each in looked])
    save_figure(path, attention_figure([each._replace(name=name) for each, name in zip(looked, names)]))
    return None
