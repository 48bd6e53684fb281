"""Crop, antialiased bicubic resize and flip, in Pillow's integers; then the colour steps that come before contrast.

Keys' cubic with a = -0.5, whose support grows with the scale, over the pixels of the box alone: crop, then resize.
Weights are fp64 divided by their sum, times 2**22, rounded. Columns first: their sums are rounded to 8 bits, and the
rows are summed over those. (Pillow begins with the rows in one case, a box over 100 times as tall as wide that shrinks;
levels may differ there, and no recipe draws one.) A weighted sum stays below 2**31: without their signs the weights add
up to 1.3 at most. Axes: n crops, S pixels of a side, taps of an output pixel: 4 * max(scale, 1) + 1 at most.

A kernel makes the weights of all crops: 2*S sums of taps each. Another makes 8 rows by 32 columns of one crop per
program: it walks down the source rows below them, sums each along x and adds it to those of the 8 rows that it is part
of. Nothing is kept between the passes, and a source row is read by (8 + 4) / 8 programs instead of the 4 per output
row. Crops of more than 48 taps (a scale of 11.75: 2632 pixels to 224) are made by a variant that has no table: its
fp64 would cost the other half of the registers' room, hence a launch of its own, whose programs mostly return at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdino_kernels.augment.color import color_steps, contrast_position, luma
from fastdino_kernels.augment.tables import CropTable, PackedImages
from fastdino_kernels.launch import LAUNCH, AotCase, tl, triton

MAX_TAPS = 48  # that the table holds
ROWS = 8  # of a program: more would share source rows better, and add zeros to more of them


# Of 1 / 2**22, to the nearest, halves away from zero.
@triton.jit
def _fixed(weight):
    return tl.where(weight < 0, weight * 4194304.0 - 0.5, weight * 4194304.0 + 0.5).to(tl.int32)


@triton.jit
def _rounded(total):
    return tl.minimum(tl.maximum((total + 2097152) >> 22, 0), 255)


@triton.jit
def _scale(length, size):
    return length.to(tl.float64) / size


@triton.jit
def _center(at, scale):
    return (at.to(tl.float64) + 0.5) * scale


# The cubic at a source pixel, not yet divided by the sum.
@triton.jit
def _cubic(source, center, scale):
    x = tl.abs((source.to(tl.float64) - center + 0.5) * (1.0 / tl.maximum(scale, 1.0)))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


# First pixel and length of a crop along x (axis 0) or y (axis 1), cut to the image.
@triton.jit
def _side(box_ptr, crop, axis, image_length):
    start = tl.minimum(tl.maximum(tl.load(box_ptr + crop * 4 + axis), 0), image_length - 1)
    return start, tl.maximum(tl.minimum(tl.load(box_ptr + crop * 4 + 2 + axis), image_length - start), 1)


# Reads 16 bytes per crop and axis, and writes 16 + 4 * taps per output pixel.
@triton.jit
def _resize_weights_kernel(
    image_ptr,  # (n,) int32
    box_ptr,  # (n, 4) int32
    width_ptr,  # (B,) int32
    height_ptr,  # (B,) int32
    first_ptr,  # (n, 2, S) int32: first source pixel of an output pixel, along x and along y
    count_ptr,  # (n, 2, S) int32: how many
    total_ptr,  # (n, 2, S) fp64: sum of their weights
    weight_ptr,  # (n, 2, MAX_TAPS, S) int32
    luma_sum_ptr,  # (n,) int32, set to zero
    size,
    MAX_TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (size + BLOCK - 1) // BLOCK
    line = (tl.program_id(0) // blocks).to(tl.int64)  # crop * 2 + axis
    crop = line // 2
    axis = line % 2
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    if axis == 0:
        tl.store(luma_sum_ptr + crop, 0)

    image = tl.load(image_ptr + crop)
    _, length = _side(box_ptr, crop, axis, tl.load(tl.where(axis == 0, width_ptr, height_ptr) + image))
    scale = _scale(length, size)
    center = _center(at, scale)
    support = 2.0 * tl.maximum(scale, 1.0)
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int32), length) - first
    n_taps = tl.max(tl.where(mask, count, 0))
    total = tl.zeros((BLOCK,), tl.float64)
    for tap in range(0, n_taps):  # in Pillow's order
        total += tl.where(tap < count, _cubic(first + tap, center, scale), 0.0)

    tl.store(first_ptr + line * size + at, first, mask=mask)
    tl.store(count_ptr + line * size + at, count, mask=mask)
    tl.store(total_ptr + line * size + at, total, mask=mask)
    weights = weight_ptr + line * MAX_TAPS * size + at
    if n_taps <= MAX_TAPS:
        for tap in range(0, n_taps):
            weight = _fixed(_cubic(first + tap, center, scale) / total)
            tl.store(weights + tap * size, weight, mask=mask & (tap < count))


# Weights of tap number `tap` of the output pixels `at`; zero outside `mask`.
@triton.jit
def _weights(weight_ptr, at, tap, first, scale, total, size, mask, TABLE: tl.constexpr):
    if TABLE:
        return tl.load(weight_ptr + tap * size + at, mask=mask, other=0)
    else:
        return tl.where(mask, _fixed(_cubic(first + tap, _center(at, scale), scale) / total), 0)


@triton.jit
def _resized(
    pixels,
    row_bytes,
    width,
    height,
    rows,
    cols,
    first_ptr,
    count_ptr,
    total_ptr,
    weight_ptr,
    size,
    TABLE: tl.constexpr,
    MAX_TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    scale_x = _scale(width, size)
    scale_y = _scale(height, size)
    col_mask = cols < size
    row_mask = rows < size
    first_x = tl.load(first_ptr + cols, mask=col_mask, other=0)
    count_x = tl.load(count_ptr + cols, mask=col_mask, other=0)
    total_x = tl.load(total_ptr + cols, mask=col_mask, other=1.0)
    first_y = tl.load(first_ptr + size + rows, mask=row_mask, other=0)
    count_y = tl.load(count_ptr + size + rows, mask=row_mask, other=0)
    total_y = tl.load(total_ptr + size + rows, mask=row_mask, other=1.0)
    weight_y_ptr = weight_ptr + MAX_TAPS * size
    n_taps = tl.max(count_x)
    begin = tl.min(tl.where(row_mask, first_y, height))
    end = tl.max(first_y + count_y)

    r = tl.zeros((ROWS, COLS), tl.int32)
    g = tl.zeros((ROWS, COLS), tl.int32)
    b = tl.zeros((ROWS, COLS), tl.int32)
    for row in range(begin, end, 2):  # two at a time share their weights along x
        upper_r = tl.zeros((COLS,), tl.int32)
        upper_g = tl.zeros((COLS,), tl.int32)
        upper_b = tl.zeros((COLS,), tl.int32)
        lower_r = tl.zeros((COLS,), tl.int32)
        lower_g = tl.zeros((COLS,), tl.int32)
        lower_b = tl.zeros((COLS,), tl.int32)
        upper = pixels + row * row_bytes + first_x * 3
        lower = upper + row_bytes
        for tap in range(0, n_taps):
            mask = tap < count_x
            weight = _weights(weight_ptr, cols, tap, first_x, scale_x, total_x, size, mask, TABLE)
            upper_r += weight * tl.load(upper + tap * 3, mask=mask, other=0)
            upper_g += weight * tl.load(upper + tap * 3 + 1, mask=mask, other=0)
            upper_b += weight * tl.load(upper + tap * 3 + 2, mask=mask, other=0)
            mask = mask & (row + 1 < end)
            lower_r += weight * tl.load(lower + tap * 3, mask=mask, other=0)
            lower_g += weight * tl.load(lower + tap * 3 + 1, mask=mask, other=0)
            lower_b += weight * tl.load(lower + tap * 3 + 2, mask=mask, other=0)
        tap = row - first_y
        mask = (tap >= 0) & (tap < count_y)
        weight = _weights(weight_y_ptr, rows, tap, first_y, scale_y, total_y, size, mask, TABLE)[:, None]
        r += weight * _rounded(upper_r)[None, :]
        g += weight * _rounded(upper_g)[None, :]
        b += weight * _rounded(upper_b)[None, :]
        tap = row + 1 - first_y
        mask = (tap >= 0) & (tap < count_y)
        weight = _weights(weight_y_ptr, rows, tap, first_y, scale_y, total_y, size, mask, TABLE)[:, None]
        r += weight * _rounded(lower_r)[None, :]
        g += weight * _rounded(lower_g)[None, :]
        b += weight * _rounded(lower_b)[None, :]
    return _rounded(r), _rounded(g), _rounded(b)


# Reads the 3*w*h bytes of a box 1.7 times where it shrinks ((8 + 4) / 8 along y, (32 + 4) / 32 along x), mostly from
# the caches, and the weights; writes 3*S*S. The plain version writes and reads 3*h*S more between the passes, and 3*S*S
# for each step of colour.
@triton.jit
def _resize_kernel(
    pixels_ptr,  # (bytes,) uint8
    offset_ptr,  # (B,) int64
    width_ptr,  # (B,) int32
    height_ptr,  # (B,) int32
    stride_ptr,  # (B,) int32
    image_ptr,  # (n,) int32
    box_ptr,  # (n, 4) int32
    flip_ptr,  # (n,) bool
    order_ptr,  # (n, 4) int8
    factor_ptr,  # (n, 3) fp32
    hue_ptr,  # (n,) int32
    first_ptr,  # (n, 2, S) int32
    count_ptr,  # (n, 2, S) int32
    total_ptr,  # (n, 2, S) fp64
    weight_ptr,  # (n, 2, MAX_TAPS, S) int32
    levels_ptr,  # (n, 3, S, S) uint8
    luma_sum_ptr,  # (n,) int32
    size,
    TABLE: tl.constexpr,
    MAX_TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    tiles_x = (size + COLS - 1) // COLS
    tiles_y = (size + ROWS - 1) // ROWS
    program = tl.program_id(0)
    first_tile, last_tile = 0, tiles_x
    if TABLE:  # a program per tile, or else per row of tiles
        first_tile = program % tiles_x
        last_tile = first_tile + 1
        program = program // tiles_x
    crop = (program // tiles_y).to(tl.int64)
    image = tl.load(image_ptr + crop)
    x, width = _side(box_ptr, crop, 0, tl.load(width_ptr + image))
    y, height = _side(box_ptr, crop, 1, tl.load(height_ptr + image))
    # The support is 2 * scale to either side, and an output pixel has at most one tap more than that is long.
    if (4 * tl.maximum(width, height) <= (MAX_TAPS - 1) * size) == TABLE:
        row_bytes = tl.load(stride_ptr + image).to(tl.int64)
        pixels = pixels_ptr + tl.load(offset_ptr + image) + y * row_bytes + x * 3
        lines = crop * 2 * size
        n_pixels = size * size
        contrast = contrast_position(order_ptr, crop)
        rows = program % tiles_y * ROWS + tl.arange(0, ROWS)
        for tile in range(first_tile, last_tile):
            cols = tile * COLS + tl.arange(0, COLS)
            source_cols = tl.where(tl.load(flip_ptr + crop), size - 1 - cols, cols)
            source_cols = tl.where(cols < size, source_cols, size)  # beyond the crop, wherever a flip would put it
            r, g, b = _resized(
                pixels,
                row_bytes,
                width,
                height,
                rows,
                source_cols,
                first_ptr + lines,
                count_ptr + lines,
                total_ptr + lines,
                weight_ptr + lines * MAX_TAPS,
                size,
                TABLE,
                MAX_TAPS,
                ROWS,
                COLS,
            )
            r, g, b = color_steps(r, g, b, 0, contrast, order_ptr, factor_ptr, hue_ptr, crop, 0)
            mask = (rows < size)[:, None] & (cols < size)[None, :]
            if contrast < 4:
                tl.atomic_add(luma_sum_ptr + crop, tl.sum(tl.where(mask, luma(r, g, b), 0)), sem="relaxed")
            levels = levels_ptr + crop * 3 * n_pixels + rows[:, None] * size + cols[None, :]
            tl.store(levels, r.to(tl.uint8), mask=mask)
            tl.store(levels + n_pixels, g.to(tl.uint8), mask=mask)
            tl.store(levels + 2 * n_pixels, b.to(tl.uint8), mask=mask)


class ResizeWeights(NamedTuple):
    """What the first kernel leaves for the second; see its arguments."""

    first: Tensor
    taps: Tensor
    total: Tensor
    weight: Tensor


def resize(images: PackedImages, crops: CropTable, levels: Tensor, luma_sum: Tensor) -> None:
    """Crops as contrast finds them into levels (n, 3, S, S) uint8, and their sums of luma into luma_sum (n,) int32."""
    n, _, size, _ = levels.shape
    kinds = (torch.int32, torch.int32, torch.float64)
    first, taps, total = (torch.empty(n, 2, size, dtype=kind, device=levels.device) for kind in kinds)
    weight = torch.empty(n, 2, MAX_TAPS, size, dtype=torch.int32, device=levels.device)
    weights = ResizeWeights(first, taps, total, weight)
    launch = LAUNCH["resize_weights"]
    _resize_weights_kernel[(2 * n * triton.cdiv(size, launch.block),)](
        crops.image,
        crops.box,
        images.width,
        images.height,
        *weights,
        luma_sum,
        size,
        MAX_TAPS,
        launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    launch = LAUNCH["resize"]
    row_tiles = n * triton.cdiv(size, ROWS)
    for in_table, n_programs in ((True, row_tiles * triton.cdiv(size, launch.block)), (False, row_tiles)):
        _resize_kernel[(n_programs,)](
            images.pixels,
            images.offset,
            images.width,
            images.height,
            images.stride,
            crops.image,
            crops.box,
            crops.flip,
            crops.order,
            crops.factor,
            crops.hue,
            *weights,
            levels,
            luma_sum,
            size,
            in_table,
            MAX_TAPS,
            ROWS,
            launch.block,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )


def aot_cases() -> Iterator[AotCase]:
    """Crops of 224 and 96 pixels share one kernel: all that they differ by is an argument."""
    whole = dict.fromkeys(
        ("width_ptr", "height_ptr", "stride_ptr", "image_ptr", "box_ptr", "hue_ptr", "first_ptr", "count_ptr"), "*i32"
    )
    signature = {
        **whole,
        "pixels_ptr": "*u8",
        "offset_ptr": "*i64",
        "flip_ptr": "*i1",
        "order_ptr": "*i8",
        "factor_ptr": "*fp32",
        "total_ptr": "*fp64",
        "weight_ptr": "*i32",
        "levels_ptr": "*u8",
        "luma_sum_ptr": "*i32",
        "size": "i32",
    }
    pointers = ("pixels_ptr", "box_ptr", "first_ptr", "count_ptr", "total_ptr", "weight_ptr", "levels_ptr")
    tile = {"MAX_TAPS": MAX_TAPS, "ROWS": ROWS, "COLS": LAUNCH["resize"].block}
    table = {"MAX_TAPS": MAX_TAPS, "BLOCK": LAUNCH["resize_weights"].block}
    box, gathers = "reads a crop's box, five numbers", "gathers: a source pixel has 3 bytes, and begins anywhere"
    for name, kernel, launch, constexprs, narrow_load in (
        ("weights", _resize_weights_kernel, LAUNCH["resize_weights"], table, box),
        ("from the table", _resize_kernel, LAUNCH["resize"], {**tile, "TABLE": True}, gathers),
        ("of many taps", _resize_kernel, LAUNCH["resize"], {**tile, "TABLE": False}, gathers),
    ):
        yield AotCase(
            name=f"augment, resize {name}",
            kernel=kernel,
            signature=signature,
            constexprs=constexprs,
            aligned=(*pointers, "size"),
            num_warps=launch.num_warps,
            fp_fusion=False,
            narrow_load=narrow_load,
        )
