"""Multi-crop augmentation with Pillow's pixels: crop, bicubic resize, flip, colour, blur, solarize, normalise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdino_kernels.augment.tables import CropTable, PackedImages, check_crops, check_images

__all__ = ["CropTable", "PackedImages", "multi_crop_augment"]


def multi_crop_augment(
    images: PackedImages,
    crops: CropTable,
    size: int,
    *,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: torch.dtype = torch.float32,
    exact: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Crops of one size, (n, 3, size, size)."""
    check_images(images)
    check_crops(crops)
    raise NotImplementedError("the kernels follow")
