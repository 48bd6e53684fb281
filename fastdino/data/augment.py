"""Multi-crop augmentation with Pillow's semantics and the original's probabilities.

Two steps, so that the second can move to another device: `draw_crop` turns random numbers into a crop's parameters,
`apply_crop` turns an image and parameters into pixels. DINO (arXiv:2104.14294), section 3.1; BYOL (arXiv:2006.07733).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel, for values in [0, 1]
STD = (0.229, 0.224, 0.225)

RATIO = (3 / 4, 4 / 3)  # width / height of a crop, before it is resized to a square
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
BLUR_RADIUS = (0.1, 2.0)  # pixels


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How one crop is drawn: side in pixels, range of area, and the probability of each alteration."""

    size: int
    scale: tuple[float, float]
    flip: float = 0.5
    jitter: float = 0.8
    gray: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MultiCropRecipe:
    """The two global crops and the local ones; within each group all have one size."""

    globals: tuple[ViewRecipe, ...]
    locals: tuple[ViewRecipe, ...]

    @property
    def views(self) -> tuple[ViewRecipe, ...]:
        """Globals first, as the loss counts them."""
        return self.globals + self.locals


@dataclass(frozen=True, kw_only=True)
class CropParams:
    """One crop, drawn.

    box: x, y, width, height in the image's pixels. size: side in pixels. jitter: (step, factor) in the order of
    application, empty for none. blur: radius in pixels, 0 for none.
    """

    box: tuple[int, int, int, int]
    size: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    gray: bool
    blur: float
    solarize: bool


def draw_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """x, y, width, height of a random crop: ten tries at an area and a shape that fit, then the middle of the image."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def draw_crop(rng: np.random.Generator, width: int, height: int, recipe: ViewRecipe) -> CropParams:
    """Parameters of one crop of an image of width x height pixels."""
    box = draw_box(rng, width, height, recipe.scale)
    flip, jitter, gray, blur, solarize = rng.random(5) < (
        recipe.flip,
        recipe.jitter,
        recipe.gray,
        recipe.blur,
        recipe.solarize,
    )
    steps: tuple[tuple[str, float], ...] = ()
    if jitter:
        factors = {
            name: rng.uniform(-spread, spread) if name == "hue" else rng.uniform(1 - spread, 1 + spread)
            for name, spread in JITTER.items()
        }
        names = list(JITTER)
        steps = tuple((names[i], factors[names[i]]) for i in rng.permutation(len(names)))
    return CropParams(
        box=box,
        size=recipe.size,
        flip=bool(flip),
        jitter=steps,
        gray=bool(gray),
        blur=float(rng.uniform(*BLUR_RADIUS)) if blur else 0.0,
        solarize=bool(solarize),
    )


def _shift_hue(image: Image.Image, factor: float) -> Image.Image:
    """Turn the hue by `factor` of a full circle, in Pillow's 8-bit HSV."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(factor * 255) % 256
    turned = hue.point([(level + shift) % 256 for level in range(256)])
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


def apply_crop(image: Image.Image, params: CropParams) -> NDArray[np.uint8]:
    """RGB image, parameters -> (size, size, 3) uint8."""
    x, y, w, h = params.box
    # Crop, then resize: `resize(box=...)` would look at pixels outside the box.
    crop = image.crop((x, y, x + w, y + h)).resize((params.size, params.size), Image.Resampling.BICUBIC)
    if params.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for step, factor in params.jitter:
        crop = _jitter(crop, step, factor)
    if params.gray:
        crop = crop.convert("L").convert("RGB")
    if params.blur:
        crop = crop.filter(ImageFilter.GaussianBlur(params.blur))
    if params.solarize:
        crop = ImageOps.solarize(crop)
    return np.asarray(crop)


def center_view(image: Image.Image, resize: int, size: int) -> NDArray[np.uint8]:
    """What features are extracted from: short side to `resize`, bicubic, then the middle -> (size, size, 3) uint8."""
    width, height = image.size
    short = min(width, height)
    width, height = (int(resize * side / short) for side in (width, height))
    x, y = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((x, y, x + size, y + size)))


def normalize(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 -> floats (the default dtype), ImageNet's mean and deviation removed, on the same device."""
    mean = torch.tensor(MEAN, device=pixels.device)[:, None, None]
    std = torch.tensor(STD, device=pixels.device)[:, None, None]
    return (pixels.to(mean.dtype) / 255 - mean) / std


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
    rng = np.random.default_rng(int(torch.randint(2**62, ())))  # follows torch.manual_seed
    decoded = _as_images(images)
    crops = [
        apply_crop(image, draw_crop(rng, image.width, image.height, recipe))
        for _ in range(num_crops)
        for image in decoded
    ]
    return normalize(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)).contiguous()


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
