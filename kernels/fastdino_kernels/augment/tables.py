"""What the augmentation reads: the images of a batch in one buffer, and a row of parameters for every crop.

All of it lives on the device and may change from step to step: no value of it is ever looked at by the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdino_kernels.checks import check_same_device, check_shape

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the colour steps, as `CropTable.order` counts them


class PackedImages(NamedTuple):
    """The decoded images of a batch in one buffer, at any distance from each other."""

    pixels: Tensor
    """(bytes,) uint8: HWC RGB images one after another."""
    offset: Tensor
    """(B,) int64: first byte of each image."""
    width: Tensor
    """(B,) int32: pixels."""
    height: Tensor
    """(B,) int32: pixels."""
    stride: Tensor
    """(B,) int32: bytes from row to row."""


class CropTable(NamedTuple):
    """One row per crop. The steps of a crop are applied in the order of the fields."""

    image: Tensor
    """(n,) int32: index into PackedImages."""
    box: Tensor
    """(n, 4) int32: x, y, w, h in pixels; cut to the image."""
    flip: Tensor
    """(n,) bool: left and right change places."""
    order: Tensor
    """(n, 4) int8: colour steps in order of application, each at most once: 0 brightness, 1 contrast, 2 saturation,
    3 hue; -1: none."""
    factor: Tensor
    """(n, 3) fp32: of brightness, contrast and saturation."""
    hue: Tensor
    """(n,) int32: shift 0..255 of the 8-bit hue."""
    gray: Tensor
    """(n,) bool: all three channels become the luma."""
    blur: Tensor
    """(n,) fp32: Pillow's Gaussian radius in pixels, 0 for none; 2.4 at most."""
    solarize: Tensor
    """(n,) bool: levels of 128 and more are inverted."""


def check_images(images: PackedImages) -> None:
    """ValueError for another shape, dtype or a second device."""
    _check_dtypes("images", images, (torch.uint8, torch.int64, torch.int32, torch.int32, torch.int32))
    check_shape("images.pixels", images.pixels, ("bytes",))
    check_shape("images.offset", images.offset, ("B",))
    for name in ("width", "height", "stride"):
        check_shape(f"images.{name}", getattr(images, name), images.offset.shape)


def check_crops(crops: CropTable) -> None:
    """ValueError for another shape, dtype or a second device."""
    whole, flag, real = torch.int32, torch.bool, torch.float32
    _check_dtypes("crops", crops, (whole, whole, flag, torch.int8, real, whole, flag, real, flag))
    check_shape("crops.image", crops.image, ("n",))
    n = crops.image.shape[0]
    columns = {"box": (n, 4), "order": (n, 4), "factor": (n, 3)}
    for name in crops._fields:
        check_shape(f"crops.{name}", getattr(crops, name), columns.get(name, (n,)))


def _check_dtypes(name: str, table: PackedImages | CropTable, dtypes: tuple[torch.dtype, ...]) -> None:
    for field, x, dtype in zip(table._fields, table, dtypes):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}.{field}: expected a tensor, got {type(x).__name__}")
        if x.dtype != dtype:
            raise ValueError(f"{name}.{field}: expected {dtype}, got {x.dtype}")
    check_same_device(**{f"{name}.{field}": x for field, x in zip(table._fields, table)})
