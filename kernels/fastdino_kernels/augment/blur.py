"""Pillow's Gaussian blur, then solarize and normalise.

Three box blurs of a fractional radius along x, then three along y; after each of the six the image has 8 bits again,
and each repeats the border pixels of the image that it finds. (Gwosdek et al., "Theoretical foundations of Gaussian
convolution by extended box filtering", SSVM 2011: a box of 2R + 1 whole taps, and two at its ends with what is left.)

The three passes along an axis are one kernel. A thread loads the 7 (R = 0) or 13 (R = 1) source pixels of an output
pixel and keeps in registers what each pass makes of them: 5 or 9 levels, 3 or 5, and 1. Tiles that reach no border
need none of the care for it. Of those, what is not `exact` sums the three passes as one, with a quarter of the
arithmetic; what differs is the rounding to 8 bits between passes, half a level at each. At a border there is no such
shortcut: repeating its pixels once is not what repeating them at every pass makes.
Axes: n crops, S pixels of a side. DINO's radii end at 2; from 2.45 R would be 2, so they are cut to 2.4 here.
"""

# Triton adds tuples, whose length a variable may change, and does not know the star.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdino_kernels.augment.color import finished
from fastdino_kernels.augment.tables import CropTable
from fastdino_kernels.launch import LAUNCH, AotCase, tl, triton

ROWS = 8  # of a program: 2 pixels a thread; 4 would take 167 registers along x


# Weights of a box pass in 1 / 2**24, as (R == 1, whole taps, end taps): Pillow's C, whose variables are floats.
@triton.jit
def _box(radius):
    radius = tl.minimum(radius, 2.4)
    variance = tl.div_rn(radius * radius, 3.0)
    length = tl.sqrt(12.0 * variance.to(tl.float64) + 1.0).to(tl.float32)
    whole = tl.floor((length.to(tl.float64) - 1.0) * 0.5).to(tl.float32)
    rest = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    rest = tl.div_rn(rest, 6.0 * (variance - (whole + 1.0) * (whole + 1.0)))
    center = tl.div_rn(16777216.0, (whole + rest) * 2.0 + 1.0).to(tl.int32)
    n_whole = 2 * whole.to(tl.int32) + 1
    return n_whole == 3, center.to(tl.uint32), ((16777216 - n_whole * center) // 2).to(tl.uint32)


# A window of N levels about `at`, those outside of the image replaced by the border's.
@triton.jit
def _border_repeated(window, at, size, N: tl.constexpr):
    middle: tl.constexpr = N // 2
    left = ()
    level = window[middle]
    for i in tl.static_range(1, middle + 1):
        level = tl.where(at - i < 0, level, window[middle - i])
        left = (level,) + left
    right = ()
    level = window[middle]
    for i in tl.static_range(1, middle + 1):
        level = tl.where(at + i >= size, level, window[middle + i])
        right = right + (level,)
    return left + (window[middle],) + right


# One pass: a window of N levels -> one of N - 2 * R - 2. Sums below 2**32, which unsigned numbers hold.
@triton.jit
def _box_pass(window, center, end, R: tl.constexpr, N: tl.constexpr):
    passed = ()
    for i in tl.static_range(N - 2 * R - 2):
        whole = window[i + R + 1]
        for j in tl.static_range(1, R + 1):
            whole += window[i + R + 1 - j] + window[i + R + 1 + j]
        total = center * whole + end * (window[i] + window[i + 2 * R + 2])
        passed = passed + ((total + 8388608) >> 24,)
    return passed


@triton.jit
def _convolved(a, b, N_A: tl.constexpr, N_B: tl.constexpr):
    both = ()
    for i in tl.static_range(N_A + N_B - 1):
        total = 0.0
        for j in tl.static_range(N_A):
            if i - j >= 0 and i - j < N_B:
                total += a[j] * b[i - j]
        both = both + (total,)
    return both


# The three passes as one: their weights, convolved, in 1 / 2**16.
@triton.jit
def _single_pass(window, center, end, R: tl.constexpr):
    c = center.to(tl.float32) * (1.0 / 16777216.0)
    e = end.to(tl.float32) * (1.0 / 16777216.0)
    box = (e, c, e) if R == 0 else (e, c, c, c, e)
    taps = _convolved(_convolved(box, box, 2 * R + 3, 2 * R + 3), box, 4 * R + 5, 2 * R + 3)
    middle: tl.constexpr = 3 * R + 3
    total = (taps[middle] * 65536.0 + 0.5).to(tl.uint32) * window[middle] + 32768
    for i in tl.static_range(middle):
        total += (taps[i] * 65536.0 + 0.5).to(tl.uint32) * (window[i] + window[2 * middle - i])
    return total >> 16


@triton.jit
def _blurred(
    source, pixel, at, step, size, mask, center, end, R: tl.constexpr, BORDER: tl.constexpr, EXACT: tl.constexpr
):
    reach: tl.constexpr = 3 * (R + 1)
    window = ()
    for i in tl.static_range(-reach, reach + 1):
        away = tl.minimum(tl.maximum(at + i, 0), size - 1) - at if BORDER else i
        window = window + (tl.load(source + (pixel + away * step), mask=mask, other=0).to(tl.uint32),)
    if EXACT or BORDER:
        window = _box_pass(window, center, end, R, 2 * reach + 1)
        if BORDER:
            window = _border_repeated(window, at, size, 4 * R + 5)
        window = _box_pass(window, center, end, R, 4 * R + 5)
        if BORDER:
            window = _border_repeated(window, at, size, 2 * R + 3)
        return _box_pass(window, center, end, R, 2 * R + 3)[0].to(tl.int32)
    else:
        return _single_pass(window, center, end, R).to(tl.int32)


# Of the blurred crops along x: reads 3*S*S bytes, mostly 7 or 13 times from the L1, and writes as many. Along y: the
# same, and the words of the output. Three passes of their own would read and write each of those bytes thrice.
@triton.jit
def _blur_kernel(
    source_ptr,  # (n, 3, S, S) uint8
    out_ptr,  # (n, 3, S, S): uint8 along x, the output along y
    blur_ptr,  # (n,) fp32
    solarize_ptr,  # (n,) bool
    size,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    ALONG_X: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tiles_x = (size + COLS - 1) // COLS
    tiles = tiles_x * ((size + ROWS - 1) // ROWS)
    crop = (tl.program_id(0) // tiles).to(tl.int64)
    radius = tl.load(blur_ptr + crop)
    if radius > 0:
        tile = tl.program_id(0) % tiles
        first_row, first_col = tile // tiles_x * ROWS, tile % tiles_x * COLS
        rows = (first_row + tl.arange(0, ROWS))[:, None]
        cols = (first_col + tl.arange(0, COLS))[None, :]
        mask = (rows < size) & (cols < size)
        pixel = rows * size + cols
        first, extent = (first_col, COLS) if ALONG_X else (first_row, ROWS)
        inside = (first >= 6) & (first + extent + 6 <= size)  # 6 = 3 * (R + 1) at most
        wide, center, end = _box(radius)
        solarize = tl.load(solarize_ptr + crop)
        for channel in range(3):
            plane = (crop * 3 + channel) * size * size
            source = source_ptr + plane
            at, step = (cols, 1) if ALONG_X else (rows, size)
            if inside:
                if wide:
                    level = _blurred(source, pixel, at, step, size, mask, center, end, 1, False, EXACT)
                else:
                    level = _blurred(source, pixel, at, step, size, mask, center, end, 0, False, EXACT)
            elif wide:
                level = _blurred(source, pixel, at, step, size, mask, center, end, 1, True, EXACT)
            else:
                level = _blurred(source, pixel, at, step, size, mask, center, end, 0, True, EXACT)
            if ALONG_X:
                tl.store(out_ptr + plane + pixel, level.to(tl.uint8), mask=mask)
            else:
                scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
                shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
                value = finished(level, solarize, scale, shift)
                tl.store(out_ptr + plane + pixel, value.to(out_ptr.dtype.element_ty), mask=mask)


def blur(levels: Tensor, out: Tensor, crops: CropTable, scale_and_shift: Sequence[float], exact: bool) -> None:
    """The blurred crops among levels (n, 3, S, S) uint8, finished, into `out`."""
    n, _, size, _ = levels.shape
    launch = LAUNCH["blur"]
    grid = (n * triton.cdiv(size, ROWS) * triton.cdiv(size, launch.block),)
    along_x = torch.empty_like(levels)
    for source, target in ((levels, along_x), (along_x, out)):
        _blur_kernel[grid](
            source,
            target,
            crops.blur,
            crops.solarize,
            size,
            *scale_and_shift,
            target is along_x,
            exact,
            ROWS,
            launch.block,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )


def aot_cases() -> Iterator[AotCase]:
    """Along x, and along y with what is stored."""
    constants = ("scale_r", "scale_g", "scale_b", "shift_r", "shift_g", "shift_b")
    for name, along_x, dtype, exact in (
        ("x", True, "u8", True),
        ("y bf16", False, "bf16", True),
        ("y fp32", False, "fp32", True),
        ("x, not exact", True, "u8", False),
        ("y bf16, not exact", False, "bf16", False),
    ):
        yield AotCase(
            name=f"augment, blur {name}",
            kernel=_blur_kernel,
            signature={
                "source_ptr": "*u8",
                "out_ptr": f"*{dtype}",
                "blur_ptr": "*fp32",
                "solarize_ptr": "*i1",
                "size": "i32",
                **dict.fromkeys(constants, "fp32"),
            },
            constexprs={"ALONG_X": along_x, "EXACT": exact, "ROWS": ROWS, "COLS": LAUNCH["blur"].block},
            aligned=("source_ptr", "out_ptr", "size"),
            num_warps=LAUNCH["blur"].num_warps,
            fp_fusion=False,
            narrow_load="gathers: the pixels about a pixel begin at any byte"
            if along_x
            else "2 pixels a thread, 16 bits",
        )
