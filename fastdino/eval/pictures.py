"""Pictures as files, whole or not at all."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL = 7  # points of an image's label
EM = 0.62  # of the font's size: the mean width of a character, with a little to spare


def save_png(path: Path, pixels: NDArray[Any]) -> None:
    """(H, W, 3) uint8, or floats in [0, 1]. Raises OSError."""
    if pixels.dtype != np.uint8:
        pixels = np.round(pixels * 255).astype(np.uint8)
    files.replace(path, partial(Image.fromarray(pixels).save, format="png"))


def save_figure(path: Path, figure: "Figure") -> None:
    """In the format that the file's name ends in. Raises OSError."""
    files.replace(path, partial(figure.savefig, format=path.suffix[1:].lower()))


def row_labels(names: Sequence[str]) -> list[str]:
    """Short names of images: that of the file, with its folder's where two files have the same."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else ["/".join(Path(name).parts[-2:]) for name in names]


def fitting(label: str, inches: float) -> str:
    """The label at LABEL points in so much width: of a long one, its start and its end."""
    n = max(int(inches / (EM * LABEL / 72)), 3)
    return label if len(label) <= n else f"{label[: (n - 1) // 2]}…{label[-(n // 2) :]}"


def whole_patches(patches: Any, view: NDArray[Any]) -> NDArray[Any]:
    """(H, W, C) without what no patch of a patch embedding sees: the rest of sides that the patch does not divide."""
    stride = patches.proj.stride  # less than a patch where somebody made them overlap
    steps = (stride, stride) if isinstance(stride, int) else stride
    height, width = ((n - 1) * step + patches.patch_size for n, step in zip(patches.grid(*view.shape[:2]), steps))
    return view[:height, :width]


def enlarged(grid: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """(rows, columns, ...) -> (rows * patch_size, columns * patch_size, ...), each patch in one colour."""
    return grid.repeat(patch_size, 0).repeat(patch_size, 1)
