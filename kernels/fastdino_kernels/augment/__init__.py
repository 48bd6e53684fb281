"""Multi-crop augmentation with Pillow's pixels: crop, bicubic resize, flip, colour, blur, solarize, normalise.

The original (DINO, arXiv:2104.14294, section 3.1) has Pillow do this on the CPU, about 60 images a second and core
with 2 + 8 crops. Here the host decodes and draws the parameters, and one call makes all crops of one size.
Axes: B images, n crops, S pixels of a side. One crop, in this order:

    crop -> antialiased bicubic -> flip -> brightness, contrast, saturation, hue in any order -> gray -> blur
         -> solarize -> (level / 255 - mean) / std

`resize` makes the crops up to the first mean that is needed (contrast's), `color` does the rest of the colours, `blur`
the crops that are blurred; the last of them that touches a crop finishes it. Between them crops have 8 bits per
channel, as in Pillow. Memory: the boxes once, and per crop pixel 6 bytes and 3 words of the output; blurred ones move
12 bytes more. Every step is in integers, or in fp32 and fp64 operations that round as Pillow's do, so the levels are
Pillow 12's on every device and run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdino_kernels.augment import reference
from fastdino_kernels.augment.blur import blur
from fastdino_kernels.augment.color import color
from fastdino_kernels.augment.resize import resize
from fastdino_kernels.augment.tables import CropTable, PackedImages, check_crops, check_images
from fastdino_kernels.checks import check_same_device, check_shape
from fastdino_kernels.launch import use_triton

__all__ = ["CropTable", "PackedImages", "multi_crop_augment"]

MAX_SIZE = 2048  # 255 * S * S, a crop's sum of luma, has 31 bits
N_IMAGE_FIELDS = len(PackedImages._fields)


# Per channel, for values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@torch.library.custom_op("fastdino::multi_crop_augment_", mutates_args=("out",))
def _multi_crop_augment_(
    out: Tensor, tables: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], exact: bool
) -> None:
    n = out.shape[0]
    if n == 0:
        return
    tables = [x.contiguous() for x in tables]
    images, crops = PackedImages(*tables[:N_IMAGE_FIELDS]), CropTable(*tables[N_IMAGE_FIELDS:])
    target = out.contiguous()
    levels = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
    luma_sum = torch.empty(n, dtype=torch.int32, device=out.device)
    scale_and_shift = [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std)]
    with torch.cuda.device_of(out):
        resize(images, crops, levels, luma_sum)
        color(levels, target, luma_sum, crops, scale_and_shift)
        blur(levels, target, crops, scale_and_shift, exact)
    if target is not out:
        out.copy_(target)


@_multi_crop_augment_.register_fake
def _(out: Tensor, tables: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], exact: bool) -> None:
    return None


@torch.no_grad()
def multi_crop_augment(
    images: PackedImages,
    crops: CropTable,
    size: int,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    exact: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Crops of one size from the images of a batch, augmented as Pillow 12 does it, and normalised.

    images: what was decoded. crops: a row of parameters per crop; both are read on the device, which nobody waits for,
    so that they may be rewritten and the call replayed. size: S, pixels of a side, 2048 at most. mean, std: of the
    channels, for levels in [0, 1]. dtype: fp32, bf16 or fp16. exact: Pillow's levels; without it a blurred pixel may
    be off by 3 of them, where that is cheaper on a GPU. out: (n, 3, S, S), written and returned; dtype is then its own.
    Returns (n, 3, S, S), row i from row i of `crops`: crop-major tables make a view of (V, B, 3, S, S).
    Values of tables are trusted: image indices, offsets and strides must lie in the buffer.
    Raises ValueError where shapes, dtypes or devices do not fit, and for sizes, means and deviations out of range;
    nothing is written then.
    Source: DINO (arXiv:2104.14294), section 3.1; BYOL (arXiv:2006.07733), appendix B; Pillow 12.
    """
    check_images(images)
    check_crops(crops)
    check_same_device(images=images.pixels, crops=crops.image, out=0.0 if out is None else out)
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size: expected 1 to {MAX_SIZE} pixels, got {size}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: expected 3 values, got {len(values)}")
    if not all(s > 0 for s in std):
        raise ValueError(f"std: expected values above 0, got {tuple(std)}")
    dtype = dtype if out is None else out.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{'dtype' if out is None else 'out'}: expected fp32, bf16 or fp16, got {dtype}")
    shape = (crops.image.shape[0], 3, size, size)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=crops.image.device)
    check_shape("out", out, shape)
    if use_triton(out):
        _multi_crop_augment_(out, [*images, *crops], [float(m) for m in mean], [float(s) for s in std], exact)
    else:
        reference.multi_crop_augment_(out, images, crops, mean, std)
    return out
