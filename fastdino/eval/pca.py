"""Patches in colour: the two principal component analyses of DINOv2 (arXiv:2304.07193), figure 1 and section 7.5.

The first component over the patches of all images tells foreground from background; three components over the
foreground alone are red, green and blue. So the same colour is the same part in all images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from fastdino.data.augment import normalize
from fastdino.data.channels import in_colors
from fastdino.errors import UserError
from fastdino.eval.features import backbone_features, evaluating
from fastdino.eval.pictures import LABEL, fitting

PANEL = 2.2  # inches of a picture's panel
CLIP = 1  # per cent of the values at each end that get the darkest and the brightest colour
Pixels = NDArray[np.uint8]


def patch_tokens(backbone: Any, view: Pixels) -> NDArray[np.float32]:
    """(H, W, 3) uint8 -> (rows, columns, D): the patches after the final norm."""
    param = next(backbone.parameters())
    pixels = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].to(param.device)
    with evaluating(backbone):
        return backbone_features(backbone, normalize(pixels).to(param.dtype), 1, ["patch"])["patch"][0].cpu().numpy()


def patch_colors(
    tokens: Sequence[NDArray[np.float32]], threshold: float = 0.0, flip: bool = False
) -> list[NDArray[np.float32]]:
    """[(rows, columns, D)] of several images -> [(rows, columns, 3)] in [0, 1]; the background is 0.

    threshold: patches whose first component is larger are foreground, in standard deviations from the mean. Its sign is
    arbitrary: here the side that has less of the images' borders is the foreground; flip takes the other one.
    Raises UserError where fewer than four patches are left to colour.
    """
    flat = np.concatenate([image.reshape(-1, image.shape[-1]) for image in tokens])
    first = PCA(1, svd_solver="full").fit_transform(flat)[:, 0]
    first /= max(float(first.std()), 1e-12)
    border = np.concatenate([_border(*image.shape[:2]) for image in tokens])
    if (first[border].mean() > first[~border].mean()) != flip:
        first = -first
    foreground = first > threshold
    if foreground.sum() < 4:
        raise UserError(f"--threshold: only {foreground.sum()} patches are above {threshold:g}; try a smaller one")
    parts = PCA(3, svd_solver="full").fit_transform(flat[foreground])
    low, high = np.percentile(parts, [CLIP, 100 - CLIP], axis=0)
    colors = np.zeros((len(flat), 3), np.float32)
    colors[foreground] = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    ends = np.cumsum([image.shape[0] * image.shape[1] for image in tokens])[:-1]
    return [part.reshape(*image.shape[:2], 3) for part, image in zip(np.split(colors, ends), tokens)]


def _border(rows: int, columns: int) -> NDArray[np.bool_]:
    """(rows * columns,): the outermost patches."""
    border = np.ones((rows, columns), np.bool_)
    border[1:-1, 1:-1] = False
    return border.reshape(-1)


def pca_figure(names: Sequence[str], views: Sequence[Pixels], colors: Sequence[NDArray[np.float32]]) -> Figure:
    """The images above, their patches in colour below."""
    widths = [view.shape[1] / len(view) for view in views]
    figure = Figure(figsize=(PANEL * sum(widths) + 0.2, 2 * PANEL + 0.6), layout="constrained", dpi=150)
    axes = figure.subplots(2, len(views), squeeze=False, width_ratios=widths)
    for column, name, width, view, color in zip(axes.T, names, widths, views, colors):
        column[0].imshow(in_colors(view))
        column[0].set_title(fitting(name, PANEL * width), fontsize=LABEL, loc="left")
        column[1].imshow(color, interpolation="nearest")
        for ax in column:
            ax.set_axis_off()
    figure.suptitle("principal components of the patches, over all images", fontsize=9)
    return figure
