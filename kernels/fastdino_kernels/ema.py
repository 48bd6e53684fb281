"""teacher <- momentum * teacher + (1 - momentum) * student, for every tensor of a model in one launch.

DINO (arXiv:2104.14294), section 3.1. Memory: reads 2 and writes 1 word per parameter (12 bytes in fp32), the least
possible, and 2 bytes more for a bf16 copy; `mul_` and `add_` move 20, the textbook loop 28 in 3 launches per tensor.
Dtypes: fp32, bf16 and fp16 in any mixture, accumulated in fp32 and rounded once; fp64 is the reference's.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_momentum, check_pairs, check_same_device
from fastdino_kernels.launch import LAUNCH, AotCase, device_scalar, on_host, tl, triton, use_triton
from fastdino_kernels.tensor_table import (
    ALIGNED,
    FIRST_PROGRAM,
    NUMEL,
    common_type,
    load_fp32,
    operand_columns,
    packed,
    store_fp32,
    table_for,
    unpack_,
)

# The columns of `rows` after those of every table: an address and a dtype each.
TEACHER, STUDENT, COPY, WIDTH = tl.constexpr(3), tl.constexpr(5), tl.constexpr(7), tl.constexpr(9)


@triton.jit
def _average_block(
    row,
    start,
    left,
    momentum,
    TEACHER_TYPE: tl.constexpr,
    STUDENT_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    teacher = load_fp32(row, TEACHER, TEACHER_TYPE, start, left, BLOCK, WHOLE)
    student = load_fp32(row, STUDENT, STUDENT_TYPE, start, left, BLOCK, WHOLE)
    teacher = teacher * momentum + student * (1 - momentum)
    store_fp32(row, TEACHER, TEACHER_TYPE, start, left, teacher, BLOCK, WHOLE)
    store_fp32(row, COPY, COPY_TYPE, start, left, teacher, BLOCK, WHOLE)


# Reads 2 words per parameter and writes 1 (12 bytes in fp32), and 2 bytes more with a bf16 copy; beside them each
# program reads 4 bytes of `programs` and a row of 72 that stays in the L2.
@triton.jit
def _ema_kernel(
    rows_ptr,  # (tensors, WIDTH) int64
    programs_ptr,  # (programs,) int32
    momentum_ptr,  # ()
    TEACHER_TYPE: tl.constexpr,
    STUDENT_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = rows_ptr + tl.load(programs_ptr + program).to(tl.int64) * WIDTH
    start = tl.multiple_of((program - tl.load(row + FIRST_PROGRAM)) * BLOCK, BLOCK)
    left = tl.load(row + NUMEL) - start
    momentum = tl.load(momentum_ptr).to(tl.float32)
    if (tl.load(row + ALIGNED) != 0) & (left >= BLOCK):
        _average_block(row, start, left, momentum, TEACHER_TYPE, STUDENT_TYPE, COPY_TYPE, BLOCK, True)
    else:
        _average_block(row, start, left, momentum, TEACHER_TYPE, STUDENT_TYPE, COPY_TYPE, BLOCK, False)


@torch.library.custom_op("fastdino::ema_update_", mutates_args=("teacher", "copies"))
def _ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: Tensor, copies: Sequence[Tensor]
) -> None:
    launch = LAUNCH["ema"]
    table = table_for(teacher, (launch.block,))
    lists = [packed(teacher)]
    lists += [packed(student, lists[0]), packed(copies, lists[0])]
    rows = table.rows([operand_columns(tensors, range(len(tensors)), len(teacher)) for tensors in lists])
    types = [common_type(tensors) for tensors in lists]
    (programs,) = table.programs
    with torch.cuda.device_of(teacher[0]):
        _ema_kernel[(programs.numel(),)](rows, programs, momentum, *types, launch.block, num_warps=launch.num_warps)
    unpack_(teacher, lists[0])
    unpack_(copies, lists[2])


@_ema_update_.register_fake
def _(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: Tensor, copies: Sequence[Tensor]) -> None:
    return None


def library_ema_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """The reference's average in one foreach call where all have one dtype: what is fastest on a CPU.

    1.58 ms on ViT-Ti's 150 tensors, as the call alone; `ema_update_`, with its checks, 1.70 (one core, 2026-11-28).
    """
    if {x.dtype for x in (*teacher, *student)} in ({torch.float32}, {torch.float64}):
        torch._foreach_lerp_(list(teacher), list(student), 1 - momentum)
    else:
        reference.ema_update_(teacher, student, momentum)


@torch.no_grad()
def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Exponential moving average of a list of tensors, in place and in one launch.

    teacher, student: lists of tensors of equal shapes on one device; dtypes and strides may differ (operands that are
    not laid out like the teacher's are copied first). momentum: float in [0, 1] or a 0-D tensor on the same device; a
    float costs the launch that fills it in. copies: one more tensor for each of the teacher's, as a rule in bf16,
    written with the new teacher (rounded from fp32, once). Raises ValueError where lengths, shapes, dtypes or devices
    do not fit, or the momentum is out of range; nothing is modified then.
    Source: DINO (arXiv:2104.14294), section 3.1.
    """
    check_pairs("teacher", teacher, "student", student)
    if copies is not None:
        check_pairs("teacher", teacher, "copies", copies)
    check_momentum("momentum", momentum)
    if not teacher:
        return
    device = teacher[0].device
    for i, x in enumerate(teacher):
        if x.device != device:
            raise ValueError(f"teacher[{i}]: expected to be on {device} like teacher[0], got {x.device}")
    check_same_device(teacher=teacher[0], momentum=momentum)
    copies = copies or ()
    if use_triton(*teacher, *student, *copies):
        _ema_update_(teacher, student, device_scalar(momentum, teacher[0]), copies)
    elif on_host(teacher[0]) and not copies:
        library_ema_(teacher, student, float(momentum))
    else:
        reference.ema_update_(teacher, student, momentum, copies)


def aot_cases() -> Iterator[AotCase]:
    """One kernel serves models of every size; it differs by dtypes alone."""
    fp32, bf16 = tl.float32, tl.bfloat16
    for name, teacher, student, copy in (
        ("fp32", fp32, fp32, fp32),
        ("fp32, bf16 copy", fp32, fp32, bf16),
        ("bf16 student", fp32, bf16, fp32),
        ("bf16", bf16, bf16, fp32),
        ("mixed dtypes", None, None, None),
    ):
        yield AotCase(
            name=f"ema, {name}",
            kernel=_ema_kernel,
            signature={"rows_ptr": "*i64", "programs_ptr": "*i32", "momentum_ptr": "*fp32"},
            constexprs={
                "TEACHER_TYPE": teacher,
                "STUDENT_TYPE": student,
                "COPY_TYPE": copy,
                "BLOCK": LAUNCH["ema"].block,
            },
            aligned=("rows_ptr", "programs_ptr", "momentum_ptr"),
            num_warps=LAUNCH["ema"].num_warps,
        )
