"""Brightness, contrast, saturation and hue in any order, and gray, in Pillow's arithmetic.

A blend is base + factor * (image - base), truncated to 8 bits: in fp32, where a fused multiply-add would round once
instead of twice and be another number, hence `enable_fp_fusion=False` wherever these functions are compiled. Luma,
contrast's mean and the whole of hue are integers. Axes: n crops, S pixels of a side.

    brightness  base 0                  contrast  base int(mean luma + 0.5), of the image as the step finds it
    saturation  base luma               hue       8-bit HSV, H turned by `hue` of 256 steps

Contrast needs the mean of the whole crop, so the steps before it run in the epilogue of the resize, which sums the
luma, and this room's kernel does the rest. The sum is one of integers: the same on every run.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from fastdino_kernels.augment.tables import CropTable
from fastdino_kernels.launch import LAUNCH, AotCase, tl, triton


@triton.jit
def luma(r, g, b):
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


@triton.jit
def _blend(base, level, factor):
    mixed = base.to(tl.float32) + factor * (level - base).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _turn_hue(r, g, b, shift):
    value = tl.maximum(tl.maximum(r, g), b)
    spread = value - tl.minimum(tl.minimum(r, g), b)
    # H = 255 * sixths / (6 * spread), where red begins at 0, green at 2 and blue at 4 sixths of the circle.
    sixths = tl.where(r == value, g - b, tl.where(g == value, 2 * spread + b - r, 4 * spread + r - g))
    sixths = 255 * tl.where(sixths < 0, sixths + 6 * spread, sixths)
    circle = 6 * tl.maximum(spread, 1)
    h = sixths // circle
    # Where that is a whole number, Pillow's mixture of fp32 and fp64 falls just below it for some H, and truncates:
    # bit H % 32 of word H // 32. With it these integers are Pillow's for all 2**24 colours.
    low = tl.where(h < 32, -2, tl.where(h < 64, 0, tl.where(h < 96, 0x11000000, 0x111)))
    high = tl.where(h < 160, 0x222AAAAA, tl.where(h < 192, 0x23232222, tl.where(h < 224, 0x22222, 0)))
    falls = (tl.where(h < 128, low, high) >> (h & 31)) & 1
    h = tl.where(sixths == h * circle, h - falls, h)
    s = 255 * spread // tl.maximum(value, 1)

    h = 6 * ((h + shift) & 255)
    sector = h // 255
    rest = h - 255 * sector
    # v * (1 - s), v * (1 - s * rest) and v * (1 - s * (1 - rest)), each rounded: no quotient lies halfway.
    p = (2 * value * (255 - s) + 255) // 510
    q = (2 * value * (65025 - s * rest) + 65025) // 130050
    t = (2 * value * (65025 - s * (255 - rest)) + 65025) // 130050
    sector = tl.where(sector == 6, 0, sector)
    r = tl.where((sector == 0) | (sector == 5), value, tl.where(sector == 1, q, tl.where(sector == 4, t, p)))
    g = tl.where((sector == 1) | (sector == 2), value, tl.where(sector == 3, q, tl.where(sector == 0, t, p)))
    b = tl.where((sector == 3) | (sector == 4), value, tl.where(sector == 5, q, tl.where(sector == 2, t, p)))
    return r, g, b


# Position of contrast among a crop's four steps; 4 where it is not among them.
@triton.jit
def contrast_position(order_ptr, crop):
    position = 4
    for i in tl.static_range(4):
        position = tl.where(tl.load(order_ptr + crop * 4 + 3 - i) == 1, 3 - i, position)
    return position


# Steps first <= i < last of a crop. `mean` is contrast's.
@triton.jit
def color_steps(r, g, b, first, last, order_ptr, factor_ptr, hue_ptr, crop, mean):
    for i in range(first, last):
        step = tl.load(order_ptr + crop * 4 + i)
        if step == 3:
            r, g, b = _turn_hue(r, g, b, tl.load(hue_ptr + crop))
        elif step >= 0:
            factor = tl.load(factor_ptr + crop * 3 + step)
            gray = luma(r, g, b)
            base = tl.where(step == 0, 0, tl.where(step == 1, mean, gray))
            r, g, b = _blend(base, r, factor), _blend(base, g, factor), _blend(base, b, factor)
    return r, g, b


# Levels to what the model sees, (level / 255 - mean) / std, as one multiplication and one addition.
@triton.jit
def finished(level, solarize, scale, shift):
    level = tl.where(solarize & (level >= 128), 255 - level, level)
    return level.to(tl.float32) * scale + shift


# Reads 3*S*S bytes per crop and writes as many words of the output, or bytes where the crop is to be blurred.
@triton.jit
def _color_kernel(
    levels_ptr,  # (n, 3, S, S) uint8: read, and written where the crop is to be blurred
    out_ptr,  # (n, 3, S, S)
    luma_sum_ptr,  # (n,) int32, of the image as contrast finds it
    order_ptr,  # (n, 4) int8
    factor_ptr,  # (n, 3) fp32
    hue_ptr,  # (n,) int32
    gray_ptr,  # (n,) bool
    blur_ptr,  # (n,) fp32
    solarize_ptr,  # (n,) bool
    size,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    BLOCK: tl.constexpr,
):
    n_pixels = size * size
    blocks = (n_pixels + BLOCK - 1) // BLOCK
    crop = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < n_pixels
    levels = levels_ptr + crop * 3 * n_pixels + at
    r = tl.load(levels, mask=mask, other=0).to(tl.int32)
    g = tl.load(levels + n_pixels, mask=mask, other=0).to(tl.int32)
    b = tl.load(levels + 2 * n_pixels, mask=mask, other=0).to(tl.int32)

    first = contrast_position(order_ptr, crop)
    mean = (2 * tl.load(luma_sum_ptr + crop).to(tl.int64) + n_pixels) // (2 * n_pixels)
    r, g, b = color_steps(r, g, b, first, 4, order_ptr, factor_ptr, hue_ptr, crop, mean.to(tl.int32))
    if tl.load(gray_ptr + crop):
        gray = luma(r, g, b)
        r, g, b = gray, gray, gray

    if tl.load(blur_ptr + crop) > 0:
        tl.store(levels, r.to(tl.uint8), mask=mask)
        tl.store(levels + n_pixels, g.to(tl.uint8), mask=mask)
        tl.store(levels + 2 * n_pixels, b.to(tl.uint8), mask=mask)
    else:
        solarize = tl.load(solarize_ptr + crop)
        out = out_ptr + crop * 3 * n_pixels + at
        kind = out_ptr.dtype.element_ty
        tl.store(out, finished(r, solarize, scale_r, shift_r).to(kind), mask=mask)
        tl.store(out + n_pixels, finished(g, solarize, scale_g, shift_g).to(kind), mask=mask)
        tl.store(out + 2 * n_pixels, finished(b, solarize, scale_b, shift_b).to(kind), mask=mask)


def color(levels: Tensor, out: Tensor, luma_sum: Tensor, crops: CropTable, scale_and_shift: Sequence[float]) -> None:
    """From contrast on: into `out`, or back into `levels` where the crop is to be blurred."""
    n, _, size, _ = levels.shape
    launch = LAUNCH["augment_color"]
    _color_kernel[(n * triton.cdiv(size * size, launch.block),)](
        levels,
        out,
        luma_sum,
        crops.order,
        crops.factor,
        crops.hue,
        crops.gray,
        crops.blur,
        crops.solarize,
        size,
        *scale_and_shift,
        launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


def aot_cases() -> Iterator[AotCase]:
    """Crops of 224 and 96 pixels share one kernel; it differs by what it stores."""
    launch = LAUNCH["augment_color"]
    constants = ("scale_r", "scale_g", "scale_b", "shift_r", "shift_g", "shift_b")
    for dtype in ("bf16", "fp32"):
        yield AotCase(
            name=f"augment, color {dtype}",
            kernel=_color_kernel,
            signature={
                "levels_ptr": "*u8",
                "out_ptr": f"*{dtype}",
                "luma_sum_ptr": "*i32",
                "order_ptr": "*i8",
                "factor_ptr": "*fp32",
                "hue_ptr": "*i32",
                "gray_ptr": "*i1",
                "blur_ptr": "*fp32",
                "solarize_ptr": "*i1",
                "size": "i32",
                **dict.fromkeys(constants, "fp32"),
            },
            constexprs={"BLOCK": launch.block},
            aligned=("levels_ptr", "out_ptr", "size"),
            num_warps=launch.num_warps,
            fp_fusion=False,
            narrow_load="a thread holds 8 pixels of each plane, 64 bits",
        )
