"""Sums over the first axis, which join what the programs of a kernel have summed each for itself.

A kernel that makes a gradient has the numbers whose sum is a bias's gradient, too. Its programs write what they have
summed in fp32, (P, N), and this adds it up, in the same order on every run. It is instead of a pass over (M, N).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdino_kernels.launch import LAUNCH, AotCase, tl, triton, use_triton

ROWS = 256  # that a program reads at once
AT_ONCE = 16  # tensors of a launch, for each is too small to fill a device


# A program owns BLOCK columns, 32 bytes of a row: narrow, so that there are enough programs.
@triton.jit
def _sum_columns(part_ptr, out_ptr, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if tl.program_id(0) * BLOCK < n_cols:
        for first in range(0, n_rows, ROWS):
            rows = first + tl.arange(0, ROWS)
            inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
            total += tl.load(part_ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + cols, tl.sum(total, axis=0), mask=cols < n_cols)


# Reads P*N, writes N of each.
@triton.jit
def _column_sums_kernel(
    part_ptrs,  # of each (P, N) fp32
    out_ptrs,  # of each (N,)
    n_rows,  # of each
    n_cols,  # of each
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for i in tl.static_range(len(part_ptrs)):
        if tl.program_id(1) == i:
            _sum_columns(part_ptrs[i], out_ptrs[i], n_rows[i], n_cols[i], ROWS, BLOCK)


@torch.library.custom_op("fastdino::column_sums", mutates_args=())
def _column_sums(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    outs = [torch.empty(part.shape[1:], dtype=dtype, device=part.device) for part in parts]
    launch = LAUNCH["column_sums"]
    for first in range(0, len(parts), AT_ONCE):
        some, theirs = tuple(parts[first : first + AT_ONCE]), tuple(outs[first : first + AT_ONCE])
        n_rows, n_cols = tuple(len(part) for part in some), tuple(out.numel() for out in theirs)
        if max(n_cols) > 0:
            with torch.cuda.device_of(parts[0]):  # Triton launches on the current device
                _column_sums_kernel[(triton.cdiv(max(n_cols), launch.block), len(some))](
                    some, theirs, n_rows, n_cols, ROWS, launch.block, num_warps=launch.num_warps
                )
    return outs


@_column_sums.register_fake
def _(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [part.new_empty(part.shape[1:], dtype=dtype) for part in parts]


def column_sums(part: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, ...) contiguous fp32 -> (...) in `dtype`: for the backward passes of this package."""
    return _column_sums([part], dtype)[0] if use_triton(part) else part.sum(0).to(dtype)


def aot_cases() -> Iterator[AotCase]:
    """As many as a launch takes, of the widths of ViT-S."""
    launch = LAUNCH["column_sums"]
    types = {"part_ptrs": "*fp32", "out_ptrs": "*bf16", "n_rows": "i32", "n_cols": "i32"}
    yield AotCase(
        name=f"column_sums bf16, {AT_ONCE} tensors",
        kernel=_column_sums_kernel,
        signature={name: (kind,) * AT_ONCE for name, kind in types.items()},
        constexprs={"ROWS": ROWS, "BLOCK": launch.block},
        aligned=("part_ptrs", "out_ptrs", "n_cols"),
        num_warps=launch.num_warps,
    )
