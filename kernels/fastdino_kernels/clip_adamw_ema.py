"""Clip, AdamW, the teacher's EMA and low-precision copies: a model's whole update in two launches.

    grad       <- grad * min(1, clip / (|grad| + 1e-6))         |.| over one tensor, as DINO clips, or over a set
    exp_avg    <- beta1 * exp_avg    + (1 - beta1) * grad
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad**2
    param      <- param * (1 - lr * weight_decay)
                  - lr / (1 - beta1**step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2**step)) + eps)
    teacher    <- momentum * teacher + (1 - momentum) * param

AdamW (arXiv:1711.05101) in the form of torch.optim.AdamW; DINO (arXiv:2104.14294), section 3.1 and its code.
Memory, in bytes per fp32 parameter: 4 for the norms (the gradient), then 20 read (param, grad, both moments, teacher)
and 16 written, 4 more with bf16 copies of student and teacher: 44, and 4 less where nothing asks for the norms. The
best from libraries (fused AdamW, foreach norms and EMA, casts) moves 64 and looks at the norms one tensor at a time.
Launch 1 sums squares per chunk and counts the steps. Launch 2 adds up the chunks of its tensor, each program for
itself and in the same order: no atomics, the same bits on every run. Where sets of tensors are clipped together, as in
DINOv2, a launch between the two adds up the chunks of each set.
Whatever may change from step to step is read on the device: lr and weight decay per group, momentum, step counts, and
which tensors are frozen.
Dtypes: params, moments and teachers in fp32; gradients and copies in fp32, bf16 or fp16; fp64 is the reference's.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import FLOATS, check_momentum, check_same_device, check_shape
from fastdino_kernels.ema import library_ema_
from fastdino_kernels.launch import LAUNCH, AotCase, device_scalar, on_host, tl, triton, use_triton
from fastdino_kernels.tensor_table import (
    ALIGNED,
    FIRST_PROGRAM,
    NUMEL,
    common_type,
    element_column,
    load_fp32,
    operand_columns,
    packed,
    scalar_column,
    store_fp32,
    table_for,
    unpack_,
)

# The columns of `rows`: where a tensor's chunks begin, an address and a dtype per operand, an address per scalar.
FIRST_CHUNK = tl.constexpr(3)
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ = tl.constexpr(4), tl.constexpr(6), tl.constexpr(8), tl.constexpr(10)
TEACHER, PARAM_COPY, TEACHER_COPY = tl.constexpr(12), tl.constexpr(14), tl.constexpr(16)
STEP, LR, WEIGHT_DECAY, FROZEN, GRAD_NORM = (tl.constexpr(i) for i in range(18, 23))
CLIP_SET = tl.constexpr(23)  # a number, and no address
WIDTH = tl.constexpr(24)

# Elements per program of launch 1, each with a partial sum of squares, and of launch 2, which goes through its own in
# BLOCKs. The last layer of ViT-S, 65536 x 256, has 512 partial sums: 2 KB that a program of launch 2 reads from the L2
# beside its 160 KB from memory.
CHUNK, SPAN = 32768, 4096
PARTIALS = tl.constexpr(512)  # partial sums that launch 2, or the one before it, reads at once


@triton.jit
def _load_scalar(row, COLUMN: tl.constexpr):
    return tl.load(tl.load(row + COLUMN).to(tl.pointer_type(tl.float32)))


@triton.jit
def _is_live(row):
    """Whether a tensor is updated: it has a gradient and no freeze flag, or one that is off."""
    flag_ptr = tl.load(row + FROZEN).to(tl.pointer_type(tl.int8))
    frozen = tl.load(flag_ptr, mask=tl.load(row + FROZEN) != 0, other=0)
    return (tl.load(row + GRAD) != 0) & (frozen == 0)


@triton.jit
def _sum_of_squares(
    row, start, left, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        grad = load_fp32(row, GRAD, TYPE, start + offset, left - offset, BLOCK, WHOLE)
        total += grad * grad
    return tl.sum(total)


@triton.jit
def _store_partial(row, chunk, partial_ptr, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    if tl.load(row + GRAD) != 0:
        start = tl.multiple_of(chunk * CHUNK, CHUNK)
        left = tl.load(row + NUMEL) - start
        if (tl.load(row + ALIGNED) != 0) & (left >= CHUNK):
            partial = _sum_of_squares(row, start, left, TYPE, CHUNK, BLOCK, True)
        else:
            partial = _sum_of_squares(row, start, left, TYPE, CHUNK, BLOCK, False)
        tl.store(partial_ptr, partial)


# Reads 4 bytes per parameter, or none without NORMS. Writes a float per chunk, and a step count and two corrections
# per tensor: in fp64, because 1 - 0.999**step loses half its digits in fp32 while the counts are small.
@triton.jit
def _grad_norm_kernel(
    rows_ptr,  # (tensors, WIDTH) int64
    chunks_ptr,  # (chunks,) int32: the tensor of each
    partials_ptr,  # (chunks,) fp32
    corrections_ptr,  # (tensors, 2) fp32: 1 - beta1**step, sqrt(1 - beta2**step)
    log_beta1,
    log_beta2,
    GRAD_TYPE: tl.constexpr,
    NORMS: tl.constexpr,  # else one program per tensor
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = program
    chunk = program * 0
    if NORMS:
        tensor = tl.load(chunks_ptr + program).to(tl.int64)
        chunk = program - tl.load(rows_ptr + tensor * WIDTH + FIRST_CHUNK)
    row = rows_ptr + tensor * WIDTH
    if NORMS:
        _store_partial(row, chunk, partials_ptr + program, GRAD_TYPE, CHUNK, BLOCK)
    if (chunk == 0) & _is_live(row):
        step_ptr = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr) + 1
        tl.store(step_ptr, step)
        correction1 = 1 - tl.exp(step.to(tl.float64) * log_beta1)
        correction2 = 1 - tl.exp(step.to(tl.float64) * log_beta2)
        tl.store(corrections_ptr + tensor * 2, correction1.to(tl.float32))
        tl.store(corrections_ptr + tensor * 2 + 1, tl.sqrt(correction2).to(tl.float32))


# A program per set. Reads 24 bytes per chunk of the model, some 30 KB of ViT-S, out of the L2.
@triton.jit
def _set_norm_kernel(
    rows_ptr,  # (tensors, WIDTH) int64
    chunks_ptr,  # (chunks,) int32
    partials_ptr,  # (chunks,) fp32
    set_norms_ptr,  # (sets,) fp32
    n_chunks,
):
    lanes = tl.arange(0, PARTIALS)
    total = tl.zeros((PARTIALS,), tl.float32)
    for first in range(0, n_chunks, PARTIALS):
        left = first + lanes < n_chunks
        tensors = tl.load(chunks_ptr + first + lanes, mask=left, other=0).to(tl.int64)
        grads = tl.load(rows_ptr + tensors * WIDTH + GRAD, mask=left, other=0)
        sets = tl.load(rows_ptr + tensors * WIDTH + CLIP_SET, mask=left, other=-1)
        mine = (grads != 0) & (sets == tl.program_id(0))  # without a gradient, nothing was stored
        total += tl.load(partials_ptr + first + lanes, mask=mine, other=0.0)
    tl.store(set_norms_ptr + tl.program_id(0), tl.sqrt(tl.sum(total)))


@triton.jit
def _norm_of_tensor(row, partials_ptr, start, numel, CHUNK: tl.constexpr):
    lanes = tl.arange(0, PARTIALS)
    n_chunks = tl.maximum(tl.cdiv(numel, CHUNK), 1)
    total = tl.zeros((PARTIALS,), tl.float32)
    for chunk in range(0, n_chunks, PARTIALS):
        chunks = tl.load(row + FIRST_CHUNK) + chunk + lanes
        total += tl.load(partials_ptr + chunks, mask=chunk + lanes < n_chunks, other=0.0)
    grad_norm = tl.sqrt(tl.sum(total))
    norm_ptr = tl.load(row + GRAD_NORM).to(tl.pointer_type(tl.float32))
    grad_norm = tl.where(tl.load(row + GRAD) != 0, grad_norm, 0.0)
    tl.store(norm_ptr, grad_norm, mask=(tl.load(row + GRAD_NORM) != 0) & (start == 0))
    return grad_norm


@triton.jit
def _update_block(
    row,
    start,
    left,
    live,
    coefficient,
    step_size,
    decay,
    root_correction2,
    momentum,
    beta1,
    weight1,
    beta2,
    weight2,
    eps,
    GRAD_TYPE: tl.constexpr,
    PARAM_COPY_TYPE: tl.constexpr,
    TEACHER_COPY_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    fp32: tl.constexpr = tl.float32
    param = load_fp32(row, PARAM, fp32, start, left, BLOCK, WHOLE)
    if live:
        grad = load_fp32(row, GRAD, GRAD_TYPE, start, left, BLOCK, WHOLE) * coefficient
        exp_avg = load_fp32(row, EXP_AVG, fp32, start, left, BLOCK, WHOLE)
        exp_avg_sq = load_fp32(row, EXP_AVG_SQ, fp32, start, left, BLOCK, WHOLE)
        exp_avg = exp_avg * beta1 + grad * weight1
        exp_avg_sq = exp_avg_sq * beta2 + grad * grad * weight2
        param = param * decay - step_size * (exp_avg / (tl.sqrt(exp_avg_sq) / root_correction2 + eps))
        store_fp32(row, EXP_AVG, fp32, start, left, exp_avg, BLOCK, WHOLE)
        store_fp32(row, EXP_AVG_SQ, fp32, start, left, exp_avg_sq, BLOCK, WHOLE)
        store_fp32(row, PARAM, fp32, start, left, param, BLOCK, WHOLE)
    store_fp32(row, PARAM_COPY, PARAM_COPY_TYPE, start, left, param, BLOCK, WHOLE)
    if tl.load(row + TEACHER) != 0:
        teacher = load_fp32(row, TEACHER, fp32, start, left, BLOCK, WHOLE)
        teacher = teacher * momentum + param * (1 - momentum)
        store_fp32(row, TEACHER, fp32, start, left, teacher, BLOCK, WHOLE)
        store_fp32(row, TEACHER_COPY, TEACHER_COPY_TYPE, start, left, teacher, BLOCK, WHOLE)


# Reads 20 bytes per parameter and writes 16, and 4 more with both bf16 copies; beside them each program reads a row of
# 192 and its tensor's partial sums, which stay in the L2. Frozen tensors: reads 8, writes 4. Four elements per thread:
# fp32 moves 128 bits at a time and bf16 64, because with eight the nine operands spill (8 bytes of stack on sm_90).
@triton.jit
def _clip_adamw_ema_kernel(
    rows_ptr,  # (tensors, WIDTH) int64
    programs_ptr,  # (programs,) int32
    partials_ptr,  # (chunks,) fp32
    corrections_ptr,  # (tensors, 2) fp32
    momentum_ptr,  # (), None without teachers
    set_norms_ptr,  # (sets,) fp32, None where each tensor is clipped by itself
    clip,  # 0: off
    beta1,
    weight1,  # 1 - beta1
    beta2,
    weight2,  # 1 - beta2
    eps,
    GRAD_TYPE: tl.constexpr,
    PARAM_COPY_TYPE: tl.constexpr,
    TEACHER_COPY_TYPE: tl.constexpr,
    NORMS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs_ptr + program).to(tl.int64)
    row = rows_ptr + tensor * WIDTH
    start = tl.multiple_of((program - tl.load(row + FIRST_PROGRAM)) * SPAN, SPAN)
    numel = tl.load(row + NUMEL)
    left = numel - start

    coefficient = 1.0
    if NORMS:
        if set_norms_ptr is not None:
            grad_norm = tl.load(set_norms_ptr + tl.load(row + CLIP_SET))
        else:
            grad_norm = _norm_of_tensor(row, partials_ptr, start, numel, CHUNK)
        coefficient = clip / (grad_norm + 1e-6)
        coefficient = tl.where(
            (clip > 0) & (coefficient < 1), coefficient, 1.0
        )  # 1 where the norm is NaN, as DINO has it

    momentum = 1.0
    if momentum_ptr is not None:
        momentum = tl.load(momentum_ptr).to(tl.float32)

    live = _is_live(row)
    lr, weight_decay = _load_scalar(row, LR), _load_scalar(row, WEIGHT_DECAY)
    step_size = lr / tl.load(corrections_ptr + tensor * 2, mask=live, other=1.0)
    root_correction2 = tl.load(corrections_ptr + tensor * 2 + 1, mask=live, other=1.0)
    decay = 1 - lr * weight_decay
    aligned = tl.load(row + ALIGNED) != 0
    for offset in range(0, tl.minimum(left, SPAN), BLOCK):
        if aligned & (left - offset >= BLOCK):
            _update_block(
                row, start + offset, left - offset, live, coefficient, step_size, decay, root_correction2, momentum,
                beta1, weight1, beta2, weight2, eps, GRAD_TYPE, PARAM_COPY_TYPE, TEACHER_COPY_TYPE, BLOCK, True,
            )  # fmt: skip
        else:
            _update_block(
                row, start + offset, left - offset, live, coefficient, step_size, decay, root_correction2, momentum,
                beta1, weight1, beta2, weight2, eps, GRAD_TYPE, PARAM_COPY_TYPE, TEACHER_COPY_TYPE, BLOCK, False,
            )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@torch.library.custom_op(
    "fastdino::clip_adamw_ema_",
    mutates_args=(
        "params", "exp_avgs", "exp_avg_sqs", "steps", "teachers", "param_copies", "teacher_copies", "grad_norms",
    ),
)  # fmt: skip
def _clip_adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    updated: Sequence[int],  # the params that the four lists before it belong to; likewise below
    teachers: Sequence[Tensor],
    averaged: Sequence[int],
    param_copies: Sequence[Tensor],
    param_copied: Sequence[int],
    teacher_copies: Sequence[Tensor],
    teacher_copied: Sequence[int],
    lrs: Sequence[Tensor],  # one per group
    weight_decays: Sequence[Tensor],
    groups: Sequence[int],  # one per param
    beta1: float,
    beta2: float,
    eps: float,
    clip: float,
    momentum: Tensor | None,
    frozen: Tensor | None,
    grad_norms: Tensor | None,
    clip_sets: Sequence[int],  # one per param, or none
) -> None:
    norms_launch, launch = LAUNCH["grad_norm"], LAUNCH["clip_adamw_ema"]
    n = len(params)
    table = table_for(params, (SPAN, CHUNK))
    programs, chunks = table.programs

    operands = [
        (params, range(n)),
        (grads, updated),
        (exp_avgs, updated),
        (exp_avg_sqs, updated),
        (teachers, averaged),
        (param_copies, param_copied),
        (teacher_copies, teacher_copied),
    ]
    like = packed(params)
    lists = [like] + [packed(tensors, [like[i] for i in at]) for tensors, at in operands[1:]]
    rows = table.rows(
        [operand_columns(tensors, at, n) for tensors, (_, at) in zip(lists, operands)],
        [
            scalar_column(steps, updated, n),
            scalar_column([lrs[group] for group in groups], range(n), n),
            scalar_column([weight_decays[group] for group in groups], range(n), n),
            element_column(frozen, n),
            (0,) * n if clip_sets else element_column(grad_norms, n),
            tuple(clip_sets) or (0,) * n,
        ],
    )

    norms = clip > 0 or grad_norms is not None
    partials = torch.empty(chunks.numel(), dtype=torch.float32, device=params[0].device)
    corrections = torch.empty(n, 2, dtype=torch.float32, device=params[0].device)
    grad_type = common_type(grads)
    with torch.cuda.device_of(params[0]):
        _grad_norm_kernel[(chunks.numel() if norms else n,)](
            rows, chunks, partials, corrections, _log(beta1), _log(beta2), grad_type, norms, CHUNK, norms_launch.block,
            num_warps=norms_launch.num_warps,
        )  # fmt: skip
        set_norms = grad_norms if clip_sets else None
        if set_norms is not None:
            _set_norm_kernel[(set_norms.numel(),)](rows, chunks, partials, set_norms, chunks.numel(), num_warps=4)
        _clip_adamw_ema_kernel[(programs.numel(),)](
            rows, programs, partials, corrections, momentum, set_norms, clip, beta1, 1 - beta1, beta2, 1 - beta2, eps,
            grad_type, common_type(param_copies), common_type(teacher_copies), norms, CHUNK, SPAN,
            launch.block, num_warps=launch.num_warps,
        )  # fmt: skip
    for (tensors, _), copies in zip(operands, lists):
        if tensors is not grads:
            unpack_(tensors, copies)


@_clip_adamw_ema_.register_fake
def _(*args: object) -> None:
    return None


class ModelTensors(NamedTuple):
    """What an update reads and writes: one entry per parameter, None where there is nothing."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    exp_avgs: Sequence[Tensor | None]
    exp_avg_sqs: Sequence[Tensor | None]
    steps: Sequence[Tensor | None]
    teachers: Sequence[Tensor | None]
    param_copies: Sequence[Tensor | None]
    teacher_copies: Sequence[Tensor | None]

    def part(self, of: slice) -> "ModelTensors":
        return ModelTensors(self.params[of], *(entries[of] for entries in self[1:]))


PIECE, SMALL = 2**18, 2**14  # numbers: 1 MiB in fp32, and 64 KiB


def _present(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and where."""
    return [x for x in tensors if x is not None], [i for i, x in enumerate(tensors) if x is not None]


@torch.no_grad()
def _library_update_(
    tensors: ModelTensors,
    lrs: Sequence[float | Tensor],
    weight_decays: Sequence[float | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    clip: float,
    momentum: float | Tensor,
    frozen: Tensor | None,
    grad_norms: Tensor | None,
    clip_sets: Sequence[int] = (),
) -> None:
    """The reference's update from PyTorch's fused and foreach calls: what a CPU, which has no Triton, does fastest.

    Six times as fast on ViT-Ti with 65536 prototypes (27 M parameters, two cores, 2026-11-24). A caller's gradients
    are scaled in pieces that stay in a cache: fresh tensors of their size took half of the update, 85 ms instead of 43
    (one core, clipped gradients; scaled in place, as PyTorch's own clip does, 35 to 40; 2026-11-28).
    """
    skipped = [False] * len(tensors.params) if frozen is None else frozen.tolist()
    if grad_norms is not None:
        grad_norms.zero_()
    in_full = [None if grad is None else grad.to(param.dtype) for param, grad in zip(tensors.params, tensors.grads)]
    grads, updated = _present(in_full)
    wanted = grads and (clip or grad_norms is not None)
    norm_of = dict(zip(updated, torch._foreach_norm(grads))) if wanted else {}
    if clip_sets:
        for number in set(clip_sets):
            members = [i for i in norm_of if clip_sets[i] == number]
            if members:
                norm_of |= dict.fromkeys(members, torch.stack([norm_of[i] for i in members]).norm())
    scaled = dict(zip(updated, grads))
    in_pieces: dict[int, float] = {}
    groups: dict[tuple[float, float, torch.dtype], list[int]] = {}
    for i in updated:
        if grad_norms is not None:
            grad_norms[clip_sets[i] if clip_sets else i] = norm_of[i]
        if skipped[i]:
            continue
        if clip and (coefficient := float(reference.clip_coefficient(norm_of[i], clip))) < 1:
            if scaled[i] is not tensors.grads[i]:
                scaled[i].mul_(coefficient)
            elif scaled[i].numel() > SMALL and all(x.is_contiguous() for x in _present([y[i] for y in tensors[:4]])[0]):
                in_pieces[i] = coefficient
            else:
                scaled[i] = scaled[i] * coefficient
        groups.setdefault((float(lrs[i]), float(weight_decays[i]), tensors.params[i].dtype), []).append(i)
    for (lr, weight_decay, _), members in groups.items():
        columns: Any = (tensors.params, scaled, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps)
        options: Any = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
        options |= {"amsgrad": False, "maximize": False}
        torch._foreach_add_([columns[-1][i] for i in members], 1)
        whole = [i for i in members if i not in in_pieces]
        if whole:
            params, moved, exp_avgs, exp_avg_sqs, steps = ([column[i] for i in whole] for column in columns)
            torch._fused_adamw_(params, moved, exp_avgs, exp_avg_sqs, [], steps, **options)
        for i in in_pieces.keys() & members:
            *large, step = (column[i] for column in columns)
            scratch = torch.empty_like(large[1].view(-1)[:PIECE])
            for param, grad, exp_avg, exp_avg_sq in zip(*(x.view(-1).split(PIECE) for x in large)):
                piece = torch.mul(grad, in_pieces[i], out=scratch[: len(grad)])
                torch._fused_adamw_([param], [piece], [exp_avg], [exp_avg_sq], [], [step], **options)
    averaged = [(teacher, param) for teacher, param in zip(tensors.teachers, tensors.params) if teacher is not None]
    if averaged:
        library_ema_([x for x, _ in averaged], [x for _, x in averaged], float(momentum))
    for copies, sources in ((tensors.param_copies, tensors.params), (tensors.teacher_copies, tensors.teachers)):
        pairs = [(copy, source) for copy, source in zip(copies, sources) if copy is not None and source is not None]
        if pairs:
            torch._foreach_copy_([x for x, _ in pairs], [x for _, x in pairs])


def update_(
    tensors: ModelTensors,
    lrs: Sequence[float | Tensor],
    weight_decays: Sequence[float | Tensor],
    groups: Sequence[int],
    betas: tuple[float, float],
    eps: float,
    clip: float,
    momentum: float | Tensor | None,
    frozen: Tensor | None,
    grad_norms: Tensor | None,
    clip_sets: Sequence[int] = (),
) -> None:
    """`clip_adamw_ema_` of checked arguments, for the optimizer, whose tensors fit each other by construction."""
    grads, updated = _present(tensors.grads)
    if not use_triton(*tensors.params, *grads):
        momentum = 1.0 if momentum is None else momentum
        per_param = [lrs[group] for group in groups], [weight_decays[group] for group in groups]
        if on_host(tensors.params[0]):
            _library_update_(tensors, *per_param, *betas, eps, clip, momentum, frozen, grad_norms, clip_sets)
        else:
            reference.clip_adamw_ema_(*tensors, *per_param, *betas, eps, clip, momentum, frozen, grad_norms, clip_sets)
        return

    def on_device(value: float | Tensor) -> Tensor:
        return device_scalar(value, tensors.params[0]).float()

    states = [[entries[i] for i in updated] for entries in (tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps)]
    _clip_adamw_ema_(
        tensors.params, grads, *states, updated,
        *_present(tensors.teachers), *_present(tensors.param_copies), *_present(tensors.teacher_copies),
        [on_device(lr) for lr in lrs], [on_device(decay) for decay in weight_decays], groups, *betas, eps, clip,
        None if momentum is None else on_device(momentum), frozen, grad_norms, list(clip_sets),
    )  # fmt: skip


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_tensors(tensors: ModelTensors) -> None:
    """Every list has an entry per param: of its shape and dtype (or one that the op reads too), on the one device."""
    params = tensors.params
    for name, entries in tensors._asdict().items():
        if len(entries) != len(params):
            raise ValueError(f"{name}: expected {len(params)} entries, one per param, got {len(entries)}")
        for i, (x, param, grad) in enumerate(zip(entries, params, tensors.grads)):
            if x is None:
                if grad is not None and name in ("exp_avgs", "exp_avg_sqs", "steps"):
                    raise ValueError(f"{name}[{i}]: expected a tensor, because grads[{i}] is one, got None")
                continue
            check_shape(f"{name}[{i}]", x, () if name == "steps" else param.shape)
            if x.device != params[0].device:
                raise ValueError(f"{name}[{i}]: expected to be on {params[0].device} like params[0], got {x.device}")
            if name in ("params", "steps"):
                expected: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
            else:
                expected = FLOATS if name in ("grads", "param_copies", "teacher_copies") else (param.dtype,)
            if x.dtype not in expected:
                raise ValueError(f"{name}[{i}]: expected {_names(expected)}, got {_names((x.dtype,))}")


def check_per_group(name: str, values: Sequence[float | Tensor], like: Tensor) -> None:
    """lr or weight_decay, one per group."""
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            check_shape(f"{name}[{i}]", value, ())
            check_same_device(**{"params[0]": like, f"{name}[{i}]": value})
        elif not value >= 0:
            raise ValueError(f"{name}[{i}]: expected a value of at least 0, got {value}")


def _per_group(
    name: str, value: float | Tensor | Sequence[float | Tensor], n_groups: int, like: Tensor
) -> Sequence[float | Tensor]:
    values = [value] * n_groups if isinstance(value, (Tensor, float, int)) else value
    if len(values) != n_groups:
        raise ValueError(f"{name}: expected one value, or one for each of {n_groups} groups, got {len(values)}")
    check_per_group(name, values, like)
    return values


def _check_per_tensor(name: str, x: Tensor | None, n: int, dtype: torch.dtype, like: Tensor) -> None:
    if x is None:
        return
    check_shape(name, x, (n,))
    check_same_device(**{"params[0]": like, name: x})
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected {_names((dtype,))}, got {_names((x.dtype,))}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected stride (1,), got {x.stride()}")


def check_hyperparameters(betas: tuple[float, float], eps: float, clip_grad: float | None) -> None:
    """What both the op and the optimizer refuse."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected values in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a value of at least 0, got {eps}")
    if clip_grad is not None and not clip_grad >= 0:
        raise ValueError(f"clip_grad: expected None or a value of at least 0, got {clip_grad}")


@torch.no_grad()
def clip_adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    weight_decay: float | Tensor | Sequence[float | Tensor],
    groups: Sequence[int] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_grad: float | None = None,
    teachers: Sequence[Tensor | None] | None = None,
    momentum: float | Tensor | None = None,
    param_copies: Sequence[Tensor | None] | None = None,
    teacher_copies: Sequence[Tensor | None] | None = None,
    frozen: Tensor | None = None,
    grad_norms: Tensor | None = None,
    clip_sets: Sequence[int] | None = None,
) -> None:
    """One optimizer step of a whole model and of its teacher, in place: clip, AdamW, EMA, copies. Two launches.

    Lists have one entry per param, of its shape; n is the number of params. All tensors are on one device.
    params: fp32 (fp64 takes the reference). grads: any floating dtype, never modified; None: the param stays as it is,
    and its teacher still follows it. exp_avgs, exp_avg_sqs: AdamW's moments, in the param's dtype. steps: () fp32,
    updates so far. lr, weight_decay: a float or a 0-D tensor, or a sequence of them, one per group; groups: the group
    of each param. clip_grad: the norm to which each tensor's gradient is cut; 0 or None: none is. teachers: targets of
    the EMA, in the param's dtype; momentum: float in [0, 1] or a 0-D tensor. param_copies, teacher_copies: written
    with the new values, as a rule in bf16. frozen: (n,) bool; true acts like a gradient that is None.
    grad_norms: (n,) fp32, written with the norms before the clip, 0 where there is no gradient. clip_sets: the set of
    each param, from 0 on, where the gradients of a set are cut by the norm of all of them; grad_norms is then (sets,).
    Tensors are read on the device, at each replay of a captured graph; a float costs the launch that fills it in, and
    stays what it was at the capture.
    Raises ValueError where lengths, shapes, dtypes, devices or values do not fit; nothing is modified then.
    Sources: AdamW (arXiv:1711.05101) as in torch.optim.AdamW; DINO (arXiv:2104.14294) and its code.
    """
    absent = [None] * len(params)
    tensors = ModelTensors(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        teachers or absent,
        param_copies or absent,
        teacher_copies or absent,
    )
    _check_tensors(tensors)
    check_hyperparameters(betas, eps, clip_grad)
    if not params:
        return
    groups = [0] * len(params) if groups is None else groups
    if len(groups) != len(params) or min(groups) < 0:
        raise ValueError(f"groups: expected {len(params)} indices, one per param, got {groups}")
    lrs = _per_group("lr", lr, max(groups) + 1, params[0])
    weight_decays = _per_group("weight_decay", weight_decay, max(groups) + 1, params[0])
    _check_per_tensor("frozen", frozen, len(params), torch.bool, params[0])
    sets = [] if clip_sets is None else list(clip_sets)
    if sets and (len(sets) != len(params) or min(sets) < 0):
        raise ValueError(f"clip_sets: expected {len(params)} numbers, one per param, got {sets}")
    n_norms = max(sets) + 1 if sets else len(params)
    if sets and grad_norms is None:
        grad_norms = torch.zeros(n_norms, device=params[0].device)
    _check_per_tensor("grad_norms", grad_norms, n_norms, torch.float32, params[0])
    if momentum is not None:
        check_momentum("momentum", momentum)
        check_same_device(params=params[0], momentum=momentum)
    elif teachers:
        raise ValueError("momentum: expected a number or a 0-D tensor, because there are teachers, got None")
    update_(tensors, lrs, weight_decays, groups, betas, eps, clip_grad or 0.0, momentum, frozen, grad_norms, sets)


def aot_cases() -> Iterator[AotCase]:
    """Two kernels serve models of every size; they differ by the dtypes of gradients and copies."""
    norms, update = LAUNCH["grad_norm"], LAUNCH["clip_adamw_ema"]
    pointers = {"rows_ptr": "*i64", "partials_ptr": "*fp32", "corrections_ptr": "*fp32"}
    fp32, bf16 = tl.float32, tl.bfloat16
    for name, grad in (("fp32", fp32), ("bf16", bf16), ("mixed dtypes", None)):
        yield AotCase(
            name=f"gradient norms, {name}",
            kernel=_grad_norm_kernel,
            signature={**pointers, "chunks_ptr": "*i32", "log_beta1": "fp32", "log_beta2": "fp32"},
            constexprs={"GRAD_TYPE": grad, "NORMS": True, "CHUNK": CHUNK, "BLOCK": norms.block},
            aligned=(*pointers, "chunks_ptr"),
            num_warps=norms.num_warps,
        )
    yield AotCase(
        name="gradient norms, of sets",
        kernel=_set_norm_kernel,
        signature={
            "rows_ptr": "*i64",
            "chunks_ptr": "*i32",
            "partials_ptr": "*fp32",
            "set_norms_ptr": "*fp32",
            "n_chunks": "i32",
        },
        constexprs={},
        aligned=("rows_ptr", "chunks_ptr", "partials_ptr"),
        num_warps=4,
        narrow_load="four partial sums a thread, of tensors looked up one by one",
    )
    for name, grad, copy, sets in (
        ("fp32", fp32, fp32, None),
        ("fp32, bf16 copies", fp32, bf16, None),
        ("bf16 gradients and copies", bf16, bf16, None),
        ("mixed gradients and copies", None, None, None),
        ("bf16, sets", bf16, bf16, "*fp32"),
    ):
        yield AotCase(
            name=f"clip + AdamW + EMA, {name}",
            kernel=_clip_adamw_ema_kernel,
            signature={
                **pointers,
                "programs_ptr": "*i32",
                "momentum_ptr": "*fp32",
                **({"set_norms_ptr": sets} if sets else {}),
                **dict.fromkeys(("clip", "beta1", "weight1", "beta2", "weight2", "eps"), "fp32"),
            },
            constexprs={
                **({} if sets else {"set_norms_ptr": None}),
                "GRAD_TYPE": grad,
                "PARAM_COPY_TYPE": copy,
                "TEACHER_COPY_TYPE": copy,
                "NORMS": True,
                "CHUNK": CHUNK,
                "SPAN": SPAN,
                "BLOCK": update.block,
            },
            aligned=(*pointers, "programs_ptr", "momentum_ptr"),
            num_warps=update.num_warps,
        )
