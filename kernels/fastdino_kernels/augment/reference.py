"""The augmentation in plain PyTorch, crop by crop: the path of CPU tensors, and what the kernels are compared with.

Levels are integers in int32 (H, W, 3), as Pillow leaves them after each step. Where Pillow's C computes hue in fp32
and fp64, so does this; the kernels' integers are another way to the same levels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdino_kernels.augment.tables import BRIGHTNESS, CONTRAST, HUE, CropTable, PackedImages

MAX_BLUR = 2.4
fp32, fp64, int32 = torch.float32, torch.float64, torch.int32


def resize_weights(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Source pixels (S, taps) and their weights (S, taps) in 1 / 2**22; weight 0 beyond an output pixel's last tap."""
    scale = length / size
    support = 2 * max(scale, 1.0)
    center = (torch.arange(size, dtype=fp64) + 0.5) * scale
    first = (center - support + 0.5).int().clamp(min=0)
    last = (center + support + 0.5).int().clamp(max=length)
    source = first[:, None] + torch.arange(int((last - first).max()), dtype=int32)
    x = ((source - center[:, None] + 0.5) * (1 / max(scale, 1.0))).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)).masked_fill(source >= last[:, None], 0)
    weight = weight / weight.cumsum(1)[:, -1:]  # cumsum adds in Pillow's order; sum does not
    weight = weight * (1 << 22)
    return source.clamp(max=length - 1), torch.where(weight < 0, weight - 0.5, weight + 0.5).int()


def _resize_rows(image: Tensor, size: int) -> Tensor:
    """(H, W, 3) -> (size, W, 3)."""
    source, weight = resize_weights(image.shape[0], size)
    total = torch.full((size, *image.shape[1:]), 1 << 21, dtype=int32)
    for tap in range(source.shape[1]):
        total += image[source[:, tap]] * weight[:, tap, None, None]
    return (total >> 22).clamp_(0, 255)


def resize(image: Tensor, size: int) -> Tensor:
    """(H, W, 3) -> (size, size, 3): columns first, then rows."""
    rows = _resize_rows(image.transpose(0, 1).contiguous(), size)  # (size, H, 3)
    return _resize_rows(rows.transpose(0, 1).contiguous(), size)


def luma(image: Tensor) -> Tensor:
    """(H, W, 3) -> (H, W, 1)."""
    r, g, b = image.split(1, -1)
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


def blend(base: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """base + factor * (image - base) in fp32, each operation rounded; cut to 8 bits and truncated."""
    return (base.float() + factor * (image - base).float()).clamp_(0, 255).int()


def turn_hue(image: Tensor, shift: int) -> Tensor:
    """To 8-bit HSV, H turned by `shift` of 256 steps, and back."""
    r, g, b = image.unbind(-1)
    value, low = image.amax(-1), image.amin(-1)
    spread = (value - low).clamp(min=1).float()
    r_away, g_away, b_away = ((value - c).float() / spread for c in (r, g, b))
    green = (2.0 + r_away.double() - b_away).float()
    blue = (4.0 + g_away.double() - r_away).float()
    sixths = torch.where(r == value, b_away - g_away, torch.where(g == value, green, blue))
    circle = torch.fmod(sixths.double() / 6.0 + 1.0, 1.0).float()
    h = (circle.double() * 255.0).int().masked_fill_(value == low, 0)
    s = ((value - low).float() / value.clamp(min=1).float()).double().mul_(255.0).int()

    at = ((h + shift) & 255).double() * 6.0 / 255.0
    sector = at.floor().int()
    rest = (at - sector).float().double()
    v, part = value.double(), (s.double() / 255.0).float().double()
    p, q, t = ((x + 0.5).int() for x in (v * (1 - part), v * (1 - part * rest), v * (1 - part * (1 - rest))))
    sector = (sector % 6).long()[None]
    choices = ([value, q, p, p, t, value], [t, value, value, q, p, p], [p, p, t, value, value, q])
    turned = [torch.stack(choice).gather(0, sector)[0] for choice in choices]
    return torch.stack(turned, -1)


def box_weights(radius: float) -> tuple[int, int, int]:
    """Whole taps to either side, their weight and that of the two ends in 1 / 2**24; in Pillow's floats."""
    x = torch.tensor(min(radius, MAX_BLUR), dtype=fp32)
    variance = x * x / 3
    length = (12.0 * variance.double() + 1.0).sqrt().float()
    whole = ((length.double() - 1.0) / 2.0).floor().float()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    rest = rest / (6 * (variance - (whole + 1) * (whole + 1)))
    center = int(16777216 / ((whole + rest) * 2 + 1))
    reach = int(whole)
    return reach, center, ((1 << 24) - (2 * reach + 1) * center) // 2


def box_pass(image: Tensor, reach: int, center: int, end: int) -> Tensor:
    """One pass along the first axis of int64 levels; the border's pixels are repeated."""
    n = image.shape[0]
    taps = [
        image[(torch.arange(n) + i).clamp(0, n - 1)] for i in range(-reach - 1, reach + 2)
    ]  # a sum may have 32 bits
    return (center * sum(taps[1:-1]) + end * (taps[0] + taps[-1]) + (1 << 23)) >> 24


def gaussian_blur(image: Tensor, radius: float) -> Tensor:
    """Three box passes along x, then three along y."""
    weights = box_weights(radius)
    image = image.long()
    for axis in (1, 0):
        image = image.transpose(0, axis).contiguous()
        for _ in range(3):
            image = box_pass(image, *weights)
        image = image.transpose(0, axis)
    return image.int()


def augment_crop(images: PackedImages, crops: CropTable, i: int, size: int) -> Tensor:
    """Levels of crop i, (size, size, 3) int32."""
    image = int(crops.image[i])
    width, height, stride, start = (
        int(column[image]) for column in (images.width, images.height, images.stride, images.offset)
    )
    x, y, w, h = crops.box[i].tolist()
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    w, h = max(min(w, width - x), 1), max(min(h, height - y), 1)
    box = images.pixels.as_strided(
        (h, w, 3), (stride, 3, 1), images.pixels.storage_offset() + start + y * stride + x * 3
    )
    level = resize(box.int(), size)
    if crops.flip[i]:
        level = level.flip(1)
    for step in crops.order[i].tolist():
        if step == HUE:
            level = turn_hue(level, int(crops.hue[i]))
        elif step >= 0:
            base = luma(level)
            if step == BRIGHTNESS:
                base = torch.zeros_like(base)
            elif step == CONTRAST:
                base = torch.full_like(base, (2 * int(base.sum()) + size * size) // (2 * size * size))
            level = blend(base, level, crops.factor[i, step])
    if crops.gray[i]:
        level = luma(level).expand(-1, -1, 3)
    if crops.blur[i] > 0:
        level = gaussian_blur(level, float(crops.blur[i]))
    return torch.where(level < 128, level, 255 - level) if crops.solarize[i] else level


def multi_crop_augment_(
    out: Tensor, images: PackedImages, crops: CropTable, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Every crop, normalised, into out (n, 3, S, S)."""
    images = images._replace(pixels=images.pixels.contiguous())
    scale = torch.tensor([1 / (255 * s) for s in std])[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std)])[:, None, None]
    for i in range(out.shape[0]):
        level = augment_crop(images, crops, i, out.shape[-1]).permute(2, 0, 1)
        out[i] = level.float() * scale + shift
