"""Crops from images and parameters, on the CPU, with the original's order of alterations.

`apply_crop` is Pillow itself: the pixels that DINO was trained on (arXiv:2104.14294, section 3.1). `apply_crop_fast`
does the same with PyTorch's antialiased resize and OpenCV's colours, several times as fast, and close: the resize
within 2 levels, the blur within 3, whole crops within 1.5 levels on average. On a GPU `fastdino_kernels.augment` makes
Pillow's pixels.

Images of other than 3 channels get what can be done to each channel alone, with the same parameters: crop, resize,
flip, brightness, contrast (about the channel's own mean), blur, solarize. Saturation, hue and gray need colors, and are
left out. So crops of a gray image are a channel of those of its RGB twin.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from fastdino.data.params import CropParams, ViewRecipe, crop_params, draw_crops
from fastdino_kernels.augment import IMAGENET_MEAN, IMAGENET_STD

LEVELS = np.arange(256)
TRUNCATE = -0.499  # added before OpenCV rounds: blends of Pillow's truncate, whole numbers stay
# (3, 4) from r, g, b, 1 to colors as they are, and to their luma.
COLORFUL, COLORLESS = np.eye(3, 4), np.array([[0.299, 0.587, 0.114, 0]] * 3)
COLORFUL[:, 3] = COLORLESS[:, 3] = TRUNCATE
COLORS = ("saturation", "hue")  # steps that look at three channels
NEUTRAL_MEAN, NEUTRAL_STD = 0.5, 0.25  # of each channel, for other images than ImageNet's

Pixels = NDArray[Any]  # of uint8, which OpenCV's types do not say


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift` of 256 steps, in Pillow's 8-bit HSV."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + int(shift)) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _jitter(image: Image.Image, step: str, factor: float) -> Image.Image:
    if step == "hue":
        return _shift_hue(image, factor)
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    return enhancers[step](image).enhance(factor)


def by_pillow(pixels: Pixels, alter: Callable[[Image.Image], Image.Image]) -> Pixels:
    """(H, W, C) uint8 -> what `alter` makes of it, (h, w, C): of RGB as a whole, else of each channel."""
    if pixels.shape[2] == 3:
        return np.asarray(alter(Image.fromarray(pixels)))
    return np.stack([np.asarray(alter(Image.fromarray(plane))) for plane in np.moveaxis(pixels, -1, 0)], -1)


def _for_channels(params: CropParams, n: int) -> CropParams:
    """The parameters without what needs colors, where there are not three channels."""
    if n == 3:
        return params
    jitter = tuple((step, factor) for step, factor in params.jitter if step not in COLORS)
    return replace(params, jitter=jitter, gray=False)


def apply_crop(
    pixels: Pixels, params: CropParams, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Pixels:
    """(H, W, C) uint8, parameters -> (size, size, C) uint8, by Pillow."""
    params = _for_channels(params, pixels.shape[2])
    x, y, w, h = params.box

    def alter(crop: Image.Image) -> Image.Image:
        crop = crop.resize((size, size), resample)
        if params.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for step, factor in params.jitter:
            crop = _jitter(crop, step, factor)
        if params.gray:
            crop = crop.convert("L").convert("RGB")
        if params.blur:
            crop = crop.filter(ImageFilter.GaussianBlur(params.blur))
        return ImageOps.solarize(crop) if params.solarize else crop

    # Crop, then resize: `resize(box=...)` would look at pixels outside the box.
    return by_pillow(pixels[y : y + h, x : x + w], alter)


def _gray(pixels: Pixels) -> Pixels:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _scaled(pixels: Pixels, factor: float, offset: float = 0.0) -> Pixels:
    """factor * pixels + offset, truncated. In half the time of a table of levels."""
    return cv2.addWeighted(pixels, factor, pixels, 0, offset + TRUNCATE)


def _jitter_fast(pixels: Pixels, step: str, factor: float) -> Pixels:
    if step == "brightness":
        return _scaled(pixels, factor)
    if step == "contrast":
        gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.ndim == 3 else pixels
        mean = int(cv2.mean(gray)[0] + 0.5)
        return _scaled(pixels, factor, (1 - factor) * mean)
    if step == "saturation":
        return cv2.transform(pixels, factor * COLORFUL + (1 - factor) * COLORLESS)
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(len(hsv), -1)
    shift = np.zeros(rows.shape[1], np.uint8)
    shift[::3] = factor
    np.add(rows, shift, out=rows)  # of whole rows: `hsv[..., 0] += factor` takes three times as long
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@cache
def _box_taps(hundredths: int) -> NDArray[np.float32]:
    """The box of which Pillow's GaussianBlur makes three passes. hundredths: the radius in 1/100 pixel."""
    variance = (hundredths / 100) ** 2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.full(2 * whole + 3, 1 / (2 * (whole + rest) + 1))
    box[[0, -1]] *= rest
    return box.astype(np.float32)  # OpenCV takes three times as long in fp64


def apply_crop_fast(pixels: Pixels, params: CropParams, size: int) -> Pixels:
    """(H, W, C) uint8, parameters -> (size, size, C) uint8, close to Pillow's."""
    params = _for_channels(params, pixels.shape[2])
    x, y, w, h = params.box
    box = torch.from_numpy(pixels[y : y + h, x : x + w]).permute(2, 0, 1)[None]
    # F.interpolate(mode="bicubic", antialias=True), whose checks take as long as a small crop's colors.
    planes = torch.ops.aten._upsample_bicubic2d_aa(box, [size, size], False)[0].numpy()
    if len(planes) == 3:
        return _altered(cv2.merge(list(planes)), params)
    return np.stack([_altered(plane, params) for plane in planes], -1)


def _altered(crop: Pixels, params: CropParams) -> Pixels:
    """All but the resize, of RGB or of one channel (S, S)."""
    if params.flip:
        crop = cv2.flip(crop, 1)
    for step, factor in params.jitter:
        crop = _jitter_fast(crop, step, factor)
    if params.gray:
        crop = _gray(crop)
    if params.blur:
        taps = _box_taps(round(params.blur * 100))
        for _ in range(3):  # the three as one filter would repeat the border once, and be up to 40 levels off there
            crop = cv2.sepFilter2D(crop, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    if params.solarize:
        crop = cv2.LUT(crop, np.where(LEVELS < 128, LEVELS, 255 - LEVELS).astype(np.uint8))
    return crop


def center_view(image: Image.Image | Pixels, resize: int, size: int) -> Pixels:
    """What features are extracted from: short side to `resize`, bicubic, then the middle -> (size, size, C) uint8.

    image: of RGB, or an array (H, W, C).
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    short = min(width, height)
    width, height = (int(resize * side / short) for side in (width, height))
    x, y = round((width - size) / 2), round((height - size) / 2)

    def alter(whole: Image.Image) -> Image.Image:
        return whole.resize((width, height), Image.Resampling.BICUBIC).crop((x, y, x + size, y + size))

    return by_pillow(pixels, alter)


def statistics(channels: int, std: Sequence[float] | None = None) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, deviation) of each channel, for values in [0, 1]: ImageNet's for 3, else the same for all."""
    if channels == 3:
        return IMAGENET_MEAN, std or IMAGENET_STD
    return [NEUTRAL_MEAN] * channels, [NEUTRAL_STD] * channels


def normalize(pixels: Tensor, std: Sequence[float] | None = None) -> Tensor:
    """(..., C, H, W) uint8 -> floats (the default dtype), `statistics` removed, on the same device.

    std: another deviation than ImageNet's, of 3 channels.
    """
    mean, deviation = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in statistics(pixels.shape[-3], std)
    )
    return (pixels.to(mean.dtype) / 255 - mean) / deviation


def _as_images(images: Sequence[Image.Image] | Tensor) -> list[Image.Image]:
    """PIL images, or tensors (3, H, W) in uint8 or in floats of [0, 1], one by one or as a batch, as RGB images."""
    converted = []
    for image in images:
        if isinstance(image, Tensor):
            if image.ndim != 3 or image.shape[0] not in (1, 3):
                raise ValueError(f"images: expected tensors (3, H, W), got {tuple(image.shape)}")
            pixels = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).byte()
            image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())
        elif not isinstance(image, Image.Image):
            raise ValueError(f"images: expected PIL images or tensors, got {type(image).__name__}")
        converted.append(image.convert("RGB"))
    if not converted:
        raise ValueError("images: expected at least one, got none")
    return converted


def _augment(images: Sequence[Image.Image] | Tensor, recipe: ViewRecipe, num_crops: int) -> Tensor:
    seed = int(torch.randint(2**62, ()))  # follows torch.manual_seed
    decoded = [np.asarray(image) for image in _as_images(images)]
    heights, widths = zip(*(pixels.shape[:2] for pixels in decoded))
    crops = draw_crops(seed, 0, range(len(decoded)), widths, heights, [recipe] * num_crops)
    made = [
        apply_crop(decoded[image], params, recipe.size)
        for image, params in zip(crops.image.tolist(), crop_params(crops))
    ]
    return normalize(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)).contiguous()


def global_augment(images: Sequence[Image.Image] | Tensor) -> Tensor:
    """One global crop of every image, as DINO's first: (B, 3, 224, 224) fp32, normalised.

    images: PIL images, or tensors (3, H, W) in uint8 or in floats of [0, 1]; a tensor (B, 3, H, W) is a list of them.
    Random numbers follow `torch.manual_seed`. Raises ValueError for anything else, and for no image at all.
    """
    return _augment(images, ViewRecipe(size=224, scale=(0.4, 1.0), blur=1.0), 1)


def multiple_local_augments(images: Sequence[Image.Image] | Tensor, num_crops: int = 6) -> Tensor:
    """num_crops local crops of every image, crop-major: (num_crops * B, 3, 96, 96) fp32, normalised.

    Row v * B + b is crop v of image b. Arguments and errors as `global_augment`.
    """
    return _augment(images, ViewRecipe(size=96, scale=(0.05, 0.4), blur=0.5), num_crops)
