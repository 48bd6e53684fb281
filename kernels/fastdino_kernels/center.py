"""The center: a running mean of the teacher's logits, which keeps one prototype from winning everywhere.

    center <- momentum * center + (1 - momentum) * mean over views and images of teacher

DINO (arXiv:2104.14294), equation 4. Axes: T teacher views, B images, K prototypes; R = T * B rows.
Memory: reads the teacher once, and reads and writes the K words of the center. One launch, no (K,) temporary.
Dtypes: any floating point; the mean is taken in fp32 (fp64 for fp64 logits), in the same order on every run.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_momentum, check_same_device, check_shape
from fastdino_kernels.launch import LAUNCH, AotCase, device_scalar, on_own_device, tl, triton, use_triton

ROWS = 64  # images a program reads at once: 4 warps of 16 rows each, so that 4 wide loads a thread are in flight


# A program owns BLOCK_K columns and walks down all rows: a column's sum needs no other program, hence no atomics. Views
# and images are loops of their own: with rows numbered through, each address would cost a division.
@triton.jit
def _column_mean(
    teacher_ptr, stride_t, stride_b, n_views, n_images, cols, col_mask, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for view in range(n_views):
        view_ptr = teacher_ptr + tl.cast(view, tl.int64) * stride_t + cols[None, :]
        for first in range(0, n_images, ROWS):
            images = first + tl.arange(0, ROWS)
            mask = (images < n_images)[:, None] & col_mask[None, :]
            starts = images.to(tl.int64) * stride_b
            total += tl.load(view_ptr + starts[:, None], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0) / (n_views * n_images)


# Reads R*K, writes K.
@triton.jit
def _batch_center_kernel(
    teacher_ptr,  # (T, B, K)
    mean_ptr,  # (K,) fp32
    stride_t,
    stride_b,
    n_views,
    n_images,
    n_prototypes,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = cols < n_prototypes
    mean = _column_mean(teacher_ptr, stride_t, stride_b, n_views, n_images, cols, mask, ROWS, BLOCK_K)
    tl.store(mean_ptr + cols, mean, mask=mask)


# Reads R*K + K, writes K; the plain version reads 3K and writes 3K more.
@triton.jit
def _center_update_kernel(
    center_ptr,  # (K,)
    teacher_ptr,  # (T, B, K)
    momentum_ptr,  # ()
    stride_t,
    stride_b,
    n_views,
    n_images,
    n_prototypes,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = cols < n_prototypes
    mean = _column_mean(teacher_ptr, stride_t, stride_b, n_views, n_images, cols, mask, ROWS, BLOCK_K)
    momentum = tl.load(momentum_ptr).to(tl.float32)
    center = tl.load(center_ptr + cols, mask=mask).to(tl.float32)
    tl.store(center_ptr + cols, center * momentum + mean * (1 - momentum), mask=mask)


# Reads 2K, writes K.
@triton.jit
def _center_ema_kernel(center_ptr, mean_ptr, momentum_ptr, n_prototypes, BLOCK_K: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = cols < n_prototypes
    momentum = tl.load(momentum_ptr).to(tl.float32)
    center = tl.load(center_ptr + cols, mask=mask).to(tl.float32)
    mean = tl.load(mean_ptr + cols, mask=mask).to(tl.float32)
    tl.store(center_ptr + cols, center * momentum + mean * (1 - momentum), mask=mask)


def _rows_of(teacher: Tensor) -> Tensor:
    """The teacher with unit stride along K, copied once where it has another."""
    return teacher if teacher.stride(2) == 1 else teacher.contiguous()


@torch.library.custom_op("fastdino::batch_center", mutates_args=())
@on_own_device
def _batch_center(teacher: Tensor) -> Tensor:
    teacher = _rows_of(teacher)
    n_prototypes = teacher.shape[2]
    launch = LAUNCH["batch_center"]
    mean = torch.empty(n_prototypes, dtype=torch.float32, device=teacher.device)
    _batch_center_kernel[(triton.cdiv(n_prototypes, launch.block),)](
        teacher, mean, *teacher.stride()[:2], *teacher.shape, ROWS, launch.block, num_warps=launch.num_warps
    )
    return mean


@_batch_center.register_fake
def _(teacher: Tensor) -> Tensor:
    return teacher.new_empty(teacher.shape[2], dtype=torch.float32)


@torch.library.custom_op("fastdino::center_update_", mutates_args=("center",))
@on_own_device
def _center_update_(center: Tensor, teacher: Tensor, momentum: Tensor) -> None:
    teacher, target = _rows_of(teacher), center.contiguous()
    launch = LAUNCH["batch_center"]
    _center_update_kernel[(triton.cdiv(center.numel(), launch.block),)](
        target, teacher, momentum, *teacher.stride()[:2], *teacher.shape, ROWS, launch.block, num_warps=launch.num_warps
    )
    if target is not center:
        center.copy_(target)


@torch.library.custom_op("fastdino::center_ema_", mutates_args=("center",))
@on_own_device
def _center_ema_(center: Tensor, batch_mean: Tensor, momentum: Tensor) -> None:
    target = center.contiguous()
    launch = LAUNCH["center_ema"]
    _center_ema_kernel[(triton.cdiv(center.numel(), launch.block),)](
        target, batch_mean.contiguous(), momentum, center.numel(), launch.block, num_warps=launch.num_warps
    )
    if target is not center:
        center.copy_(target)


@_center_update_.register_fake
@_center_ema_.register_fake
def _(center: Tensor, source: Tensor, momentum: Tensor) -> None:
    return None


def _check_teacher(teacher: Tensor) -> None:
    check_floating("teacher", teacher)
    check_shape("teacher", teacher, ("T", "B", "K"))
    if teacher.numel() == 0:  # the mean of nothing is NaN, and would stay in the center for ever
        raise ValueError(f"teacher: expected at least one row and one prototype, got shape {tuple(teacher.shape)}")


def batch_center(teacher: Tensor) -> Tensor:
    """Mean of the teacher's logits over views and images.

    teacher: (T, B, K) logits. Returns (K,) fp32 (fp64 for fp64 logits): what distributed callers all-reduce before
    `center_ema_`. Raises ValueError for another shape or dtype, and for an empty batch.
    """
    _check_teacher(teacher)
    teacher = teacher.detach()
    return _batch_center(teacher) if use_triton(teacher) else reference.batch_center(teacher)


def center_ema_(center: Tensor, batch_mean: Tensor, momentum: float | Tensor) -> None:
    """center <- momentum * center + (1 - momentum) * batch_mean, in place.

    center, batch_mean: (K,). momentum: float in [0, 1] or a 0-D tensor on the same device.
    Raises ValueError where shapes, dtypes or devices do not fit, or the momentum is out of range.
    Source: DINO (arXiv:2104.14294), equation 4.
    """
    check_floating("center", center)
    check_floating("batch_mean", batch_mean)
    check_shape("center", center, ("K",))
    check_shape("batch_mean", batch_mean, center.shape)
    check_same_device(center=center, batch_mean=batch_mean, momentum=momentum)
    check_momentum("momentum", momentum)
    if use_triton(center, batch_mean):
        _center_ema_(center.detach(), batch_mean.detach(), device_scalar(momentum, center))
    else:
        reference.center_ema_(center, batch_mean, momentum)


def center_update_(center: Tensor, teacher: Tensor, momentum: float | Tensor) -> None:
    """The center's update from one batch, in place: `center_ema_(center, batch_center(teacher), momentum)`.

    center: (K,). teacher: (T, B, K) logits. momentum: float in [0, 1] or a 0-D tensor on the same device.
    Raises ValueError where shapes, dtypes or devices do not fit, the batch is empty, or the momentum is out of range.
    """
    check_floating("center", center)
    _check_teacher(teacher)
    check_shape("center", center, teacher.shape[2:])
    check_same_device(center=center, teacher=teacher, momentum=momentum)
    check_momentum("momentum", momentum)
    if use_triton(center, teacher):
        _center_update_(center.detach(), teacher.detach(), device_scalar(momentum, center))
    else:
        reference.center_ema_(center, reference.batch_center(teacher), momentum)


def aot_cases() -> Iterator[AotCase]:
    """ViT-S/B/L all end in K = 65536 (4096 for small sets); the width of the backbone never reaches these kernels."""
    reduce, ema = LAUNCH["batch_center"], LAUNCH["center_ema"]
    rows = {"stride_t": "i32", "stride_b": "i32", "n_views": "i32", "n_images": "i32", "n_prototypes": "i32"}
    for dtype in ("bf16", "fp32"):
        yield AotCase(
            name=f"batch_center {dtype}",
            kernel=_batch_center_kernel,
            signature={"teacher_ptr": f"*{dtype}", "mean_ptr": "*fp32", **rows},
            constexprs={"ROWS": ROWS, "BLOCK_K": reduce.block},
            aligned=("teacher_ptr", "mean_ptr", "stride_t", "stride_b", "n_prototypes"),
            num_warps=reduce.num_warps,
        )
        yield AotCase(
            name=f"center_update_ {dtype}",
            kernel=_center_update_kernel,
            signature={"center_ptr": "*fp32", "teacher_ptr": f"*{dtype}", "momentum_ptr": "*fp32", **rows},
            constexprs={"ROWS": ROWS, "BLOCK_K": reduce.block},
            aligned=("center_ptr", "teacher_ptr", "stride_t", "stride_b", "n_prototypes"),
            num_warps=reduce.num_warps,
        )
    yield AotCase(
        name="center_ema_ fp32",
        kernel=_center_ema_kernel,
        signature={"center_ptr": "*fp32", "mean_ptr": "*fp32", "momentum_ptr": "*fp32", "n_prototypes": "i32"},
        constexprs={"BLOCK_K": ema.block},
        aligned=("center_ptr", "mean_ptr", "n_prototypes"),
        num_warps=ema.num_warps,
    )
