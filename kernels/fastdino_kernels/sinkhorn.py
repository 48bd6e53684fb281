"""Sinkhorn-Knopp as a center: targets that give every prototype the same share of the batch.

    center = temp * log mean_i exp(teacher[i] / temp)                              the first iteration
    center <- center + temp * log(K * mean_i softmax((teacher[i] - center) / temp))    each further one
    targets = softmax((teacher - center) / temp), as dino_loss and patch_loss take them

Scaling rows and columns of exp(teacher / temp) in turn, SwAV (arXiv:2006.09882), section 3.1, and with three iterations
DINOv2 (arXiv:2304.07193): there all probabilities are divided by each prototype's sum and then by each row's. The
divisors of prototypes are exp(center / temp), those of rows the softmax's own, so K words hold the result and the
probabilities are never written. Every exponent has its maximum subtracted: logits may be of any size.

Axes: M rows, K prototypes. Sums over prototypes and over rows alternate, each needs the whole of the one before, and a
row is too long for a program to keep: the first iteration reads the teacher once, each further one twice. Memory at
three iterations, in words of M * K: 5 read and none written, 10 bytes a logit in bf16, where the original moves over
100. A column's sum stays in its program, so there are no atomics, and a rerun gives the same bits.
Dtypes: logits in fp32, bf16 or fp16 give an fp32 center, computed in fp32; fp64 stays fp64 (no kernel's).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_same_device, check_shape, check_temperature
from fastdino_kernels.launch import LAUNCH, AotCase, device_scalar, on_host, on_own_device, tl, triton, use_triton
from fastdino_kernels.library import rows_at_once
from fastdino_kernels.softmax import LOWEST, numerators, scale_of

ROWS_OF_EXPS, DEPTH = 16, 4  # lanes of rows in a program of the first kernel, and rows a lane reads at once
ROWS_OF_NORM = 4  # that a program of the second kernel takes: they share the center
ROWS_OF_PROBS = 32  # that a program of the third reads at once


# Reads M * K, writes 2 * K. A program owns BLOCK_K columns and walks down all rows; each of its ROWS lanes keeps its
# own top and total until the end.
@triton.jit
def _column_exps_kernel(
    teacher_ptr,  # (M, K)
    weights_ptr,  # (M,) 0 where a row is padding
    temp_ptr,  # ()
    exps_ptr,  # (2, K): top, sum of exp((teacher - top) / temp)
    stride,
    n_rows,
    n_prototypes,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (cols < n_prototypes)[None, None, :]
    scale = scale_of(temp_ptr)
    top = tl.full((ROWS, BLOCK_K), LOWEST, tl.float32)
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in range(0, n_rows, DEPTH * ROWS):
        rows = first + (tl.arange(0, DEPTH)[:, None] * ROWS + tl.arange(0, ROWS)[None, :])[:, :, None]
        live = tl.load(weights_ptr + rows, mask=rows < n_rows, other=0.0).to(tl.float32) != 0.0
        at = teacher_ptr + rows.to(tl.int64) * stride + cols[None, None, :]
        x = tl.load(at, mask=live & inside, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp2((top - new_top) * scale) + tl.sum(tl.exp2((x - new_top[None, :, :]) * scale), axis=0)
        top = new_top
    column_top = tl.max(top, axis=0)
    column_total = tl.sum(total * tl.exp2((top - column_top[None, :]) * scale), axis=0)
    tl.store(exps_ptr + cols, column_top, mask=cols < n_prototypes)
    tl.store(exps_ptr + n_prototypes + cols, column_total, mask=cols < n_prototypes)


# Reads M * K, the center from L2, and writes 2 * M.
@triton.jit
def _row_norm_kernel(
    teacher_ptr,  # (M, K)
    center_ptr,  # (K,)
    weights_ptr,  # (M,)
    temp_ptr,  # ()
    norm_ptr,  # (2, M): top of teacher - center, 1 / sum of exp((teacher - center - top) / temp); 0 for padding
    stride,
    n_rows,
    n_prototypes,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,  # logits of 16 bytes
):
    rows = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), n_rows - 1)
    scale = scale_of(temp_ptr)
    teacher_ptr += (rows.to(tl.int64) * stride)[:, None, None]
    tile = (tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[None, :, :]
    top = tl.full((ROWS, LANES), LOWEST, tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for first in range(0, n_prototypes, LANES * WIDTH):
        cols = first + tile
        inside = (cols < n_prototypes) | EVEN_K
        center = tl.load(center_ptr + cols, mask=inside, other=0.0)
        row = tl.load(teacher_ptr + cols, mask=inside, other=0.0).to(tl.float32) - center
        _, exps, top, shrink = numerators(tl.where(inside, row, LOWEST), inside, scale, top)
        total = total * shrink + tl.sum(exps, axis=2)
    row_top = tl.max(top, axis=1)
    row_total = tl.sum(total * tl.exp2((top - row_top[:, None]) * scale), axis=1)
    tl.store(norm_ptr + rows, row_top)
    live = tl.load(weights_ptr + rows).to(tl.float32) != 0.0
    tl.store(norm_ptr + n_rows + rows, tl.where(live, tl.div_rn(1.0, row_total), 0.0))


# Reads M * K, writes K.
@triton.jit
def _column_probs_kernel(
    teacher_ptr,  # (M, K)
    center_ptr,  # (K,)
    temp_ptr,  # ()
    norm_ptr,  # (2, M)
    probs_ptr,  # (K,): sum over rows of softmax((teacher - center) / temp)
    stride,
    n_rows,
    n_prototypes,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (cols < n_prototypes)[None, :]
    scale = scale_of(temp_ptr)
    center = tl.load(center_ptr + cols, mask=cols < n_prototypes, other=0.0)[None, :]
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for first in range(0, n_rows, ROWS):
        rows = (first + tl.arange(0, ROWS))[:, None]
        in_rows = rows < n_rows
        top = tl.load(norm_ptr + rows, mask=in_rows, other=0.0)
        norm = tl.load(norm_ptr + n_rows + rows, mask=in_rows, other=0.0)
        at = teacher_ptr + rows.to(tl.int64) * stride + cols[None, :]
        x = tl.load(at, mask=in_rows & inside, other=0.0).to(tl.float32)
        total += tl.where(norm != 0.0, tl.exp2((x - center - top) * scale) * norm, 0.0)
    tl.store(probs_ptr + cols, tl.sum(total, axis=0), mask=cols < n_prototypes)


def _unit_stride(teacher: Tensor) -> Tensor:
    return teacher if teacher.stride(1) == 1 else teacher.contiguous()


@torch.library.custom_op("fastdino::column_exps", mutates_args=())
@on_own_device
def _column_exps(teacher: Tensor, weights: Tensor, temp: Tensor) -> Tensor:
    teacher = _unit_stride(teacher)
    n_rows, n_prototypes = teacher.shape
    launch = LAUNCH["column_exps"]
    exps = torch.empty(2, n_prototypes, dtype=torch.float32, device=teacher.device)
    _column_exps_kernel[(triton.cdiv(n_prototypes, launch.block),)](
        teacher, weights.contiguous(), temp, exps, teacher.stride(0), n_rows, n_prototypes,
        DEPTH=DEPTH, ROWS=ROWS_OF_EXPS, BLOCK_K=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return exps


@_column_exps.register_fake
def _(teacher: Tensor, weights: Tensor, temp: Tensor) -> Tensor:
    return teacher.new_empty((2, teacher.shape[1]), dtype=torch.float32)


@torch.library.custom_op("fastdino::column_probs", mutates_args=())
@on_own_device
def _column_probs(teacher: Tensor, center: Tensor, weights: Tensor, temp: Tensor) -> Tensor:
    teacher, center, weights = _unit_stride(teacher), center.contiguous(), weights.contiguous()
    n_rows, n_prototypes = teacher.shape
    launch, width = LAUNCH["row_norm"], 16 // teacher.element_size()
    n_warps = min(launch.num_warps, max(1, triton.next_power_of_2(n_prototypes) // (32 * width)))
    norm = torch.empty(2, n_rows, dtype=torch.float32, device=teacher.device)
    _row_norm_kernel[(triton.cdiv(n_rows, ROWS_OF_NORM),)](
        teacher, center, weights, temp, norm, teacher.stride(0), n_rows, n_prototypes,
        EVEN_K=n_prototypes % (32 * n_warps * width) == 0, ROWS=ROWS_OF_NORM, LANES=32 * n_warps, WIDTH=width,
        num_warps=n_warps,
    )  # fmt: skip
    launch = LAUNCH["column_probs"]
    probs = torch.empty(n_prototypes, dtype=torch.float32, device=teacher.device)
    _column_probs_kernel[(triton.cdiv(n_prototypes, launch.block),)](
        teacher, center, temp, norm, probs, teacher.stride(0), n_rows, n_prototypes,
        ROWS=ROWS_OF_PROBS, BLOCK_K=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return probs


@_column_probs.register_fake
def _(teacher: Tensor, center: Tensor, weights: Tensor, temp: Tensor) -> Tensor:
    return teacher.new_empty(teacher.shape[1], dtype=torch.float32)


def _over_group(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(x, op, group=group)
    return x


class _Library:
    """`reference.column_exps` and `column_probs` of rows that all count, in library calls, one center after another.

    The exponentials are taken once: another center scales their columns and, with that, their rows. Where a row is
    scaled so far that numbers which were rounded to 0 might count, its softmax is taken again, and kept instead.
    Speed against the textbook's three iterations, one core of an AMD EPYC, 2026-11-29, fp32 and bf16: M 236, K 65536
    2.3 and 4.5; M 500, K 4096 1.3 and 1.4; M 1000, K 512 0.9.
    """

    FAR = 1e10

    def __init__(self) -> None:
        self._kept, self._center = torch.empty(0), torch.empty(0)

    def exps(self, teacher: Tensor, weights: Tensor, temp: float | Tensor) -> Tensor:
        if not len(teacher):
            return reference.column_exps(teacher, weights, temp)
        self._center = reference.promote(teacher.amax(0))
        self._keep(teacher, temp, torch.exp)
        return torch.stack([self._center, self._kept.sum(0)])

    def probs(self, teacher: Tensor, center: Tensor, weights: Tensor, temp: float | Tensor) -> Tensor:
        if not len(teacher):
            return reference.column_probs(teacher, center, weights, temp)
        factors = ((self._center - center) / temp).exp_()
        # A product with factors would add each row up number by number: twenty times the error at K 65536.
        parts = self._kept.split(rows_at_once(teacher.shape[1]))
        norms = torch.cat([(rows * factors).sum(1) for rows in parts])
        if not 1 / self.FAR < norms.amin() <= norms.amax() < self.FAR:
            self._center = center
            self._keep(teacher, temp, partial(torch.softmax, dim=-1))
            factors, norms = torch.ones_like(factors), torch.ones_like(norms)
        return norms.reciprocal() @ self._kept * factors

    def _keep(self, teacher: Tensor, temp: float | Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """The function of (teacher - center) / temp."""
        self._kept = torch.empty(teacher.shape, dtype=self._center.dtype)
        n_at_once = rows_at_once(teacher.shape[1])
        for rows, kept in zip(teacher.split(n_at_once), self._kept.split(n_at_once)):
            kept.copy_(function((rows - self._center).div_(temp)))


@torch.no_grad()
def sinkhorn_center(
    teacher: Tensor,
    temp: float | Tensor,
    iterations: int = 3,
    weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The center with which softmax((teacher - center) / temp) is Sinkhorn-Knopp's assignment of rows to prototypes.

    teacher: (M, K) logits, all rows that share the prototypes: both crops of all images, or all masked patches. temp:
    float, or a 0-D tensor on the same device. iterations: at least 1. weights: (M,), as of `patch_loss`: rows of weight
    0 are padding and do not count, all others count alike; None counts every row.
    group: the processes whose rows make one batch (`torch.distributed.group.WORLD`: all of them), in any number each,
    0 too; it costs one all-reduce of K words per iteration and one more. None: this process alone.
    Returns (K,) fp32 (fp64 for fp64 logits), the same in every process. NaN where a logit is NaN.
    Raises ValueError where shapes, dtypes or devices do not fit, temp given as a float is not positive, iterations is
    below 1, or there are no rows and no group.
    Source: SwAV (arXiv:2006.09882), section 3.1; DINOv2 (arXiv:2304.07193), section 4.
    """
    check_floating("teacher", teacher)
    check_shape("teacher", teacher, ("M", "K"))
    check_temperature("temp", temp)
    if weights is not None:
        check_floating("weights", weights)
        check_shape("weights", weights, teacher.shape[:1])
    check_same_device(teacher=teacher, temp=temp, **({} if weights is None else {"weights": weights}))
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    if teacher.shape[1] == 0 or (group is None and teacher.shape[0] == 0):
        raise ValueError(f"teacher: expected at least one row and one prototype, got shape {tuple(teacher.shape)}")
    teacher, weights = teacher.detach(), teacher.new_ones(teacher.shape[:1]) if weights is None else weights.detach()
    column_exps: Any = reference.column_exps
    column_probs: Any = reference.column_probs
    if use_triton(teacher, weights):
        teacher, temp = _unit_stride(teacher), device_scalar(temp, teacher)
        column_exps, column_probs = _column_exps, _column_probs
    elif on_host(teacher):
        if not weights.all():
            teacher, weights = teacher[weights != 0], weights[weights != 0]
        library = _Library()
        column_exps, column_probs = library.exps, library.probs

    own_top, own_total = column_exps(teacher, weights, temp)
    top = _over_group(own_top.clone(), dist.ReduceOp.MAX, group)
    n_rows = (weights != 0).sum().to(own_total.dtype)
    sums = torch.cat([own_total * torch.exp((own_top - top) / temp), n_rows[None]])
    total, n_rows = _over_group(sums, dist.ReduceOp.SUM, group).split([teacher.shape[1], 1])
    center = top + temp * torch.log(total / n_rows)
    for _ in range(iterations - 1):
        probs = _over_group(column_probs(teacher, center, weights, temp), dist.ReduceOp.SUM, group)
        center = center + temp * torch.log(probs * (teacher.shape[1] / n_rows))
    return center


def aot_cases() -> Iterator[AotCase]:
    """A head of 65536 prototypes; how many rows there are does not show here."""
    fp32 = dict.fromkeys(("center_ptr", "weights_ptr", "temp_ptr", "exps_ptr", "norm_ptr", "probs_ptr"), "*fp32")
    sizes = dict.fromkeys(("stride", "n_rows", "n_prototypes"), "i32")
    for dtype in ("bf16", "fp32"):
        norm, width = LAUNCH["row_norm"], {"bf16": 8, "fp32": 4}[dtype]
        chunk = {"EVEN_K": True, "ROWS": ROWS_OF_NORM, "LANES": 32 * norm.num_warps, "WIDTH": width}
        exps, probs = LAUNCH["column_exps"], LAUNCH["column_probs"]
        for name, kernel, launch, sizes_of_block in (
            ("column exps", _column_exps_kernel, exps, {"DEPTH": DEPTH, "ROWS": ROWS_OF_EXPS, "BLOCK_K": exps.block}),
            ("row norms", _row_norm_kernel, norm, chunk),
            ("column probs", _column_probs_kernel, probs, {"ROWS": ROWS_OF_PROBS, "BLOCK_K": probs.block}),
        ):
            yield AotCase(
                name=f"sinkhorn {name} {dtype}",
                kernel=kernel,
                signature=fp32 | sizes | {"teacher_ptr": f"*{dtype}"},
                constexprs=sizes_of_block,
                aligned=("teacher_ptr", "center_ptr", "exps_ptr", "probs_ptr", "stride", "n_prototypes"),
                num_warps=launch.num_warps,
            )
