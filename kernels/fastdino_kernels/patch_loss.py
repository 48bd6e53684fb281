"""Centered-softmax cross-entropy of rows: every masked patch of the student against the same patch of the teacher.

    q[i] = softmax((teacher[i] - center) / teacher_temp)      p[i] = softmax(student[i] / student_temp)
    loss = sum over rows i of weights[i] * H(q[i], p[i])
    d loss / d student[i] = weights[i] * (p[i] - q[i]) / student_temp

iBOT (arXiv:2111.07832), equation 2, as DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104) weigh it: weights[i] =
1 / (V * masked patches of i's crop), V the global crops of the batch, those without a mask too. All that divides is in
the weights, so a row of weight 0 is padding: whatever it holds does not count, and its gradient is 0.

Axes: M rows (masked patches), K prototypes.
Forward: a program takes two rows, which share the center, and walks over K in chunks; sums and tops stay in their lane
until the end. In place it then walks back, from what the L2 still holds, and leaves the gradient. A second kernel adds
up the rows. Memory, in words of M * K: in place 2 read, as many again where the L2 does not hold them, and 1 written;
`patch_loss` and its backward pass 4 and 1. At 2 bytes a word 6 to 10 bytes a logit, where the original moves 46 to 72.
The L2 holds them while the rows under way fit: on an H100 up to K 2048. Every sum has a fixed order.
Given x and prototypes, whose product the student's logits are, it multiplies itself, and returns with the gradients of
both: of the matrices of M * K that autograd would keep for the backward pass, student's and teacher's, none is.
Dtypes: logits in fp32, bf16 or fp16 give an fp32 loss, computed in fp32, and a gradient in the student's dtype; fp64
stays fp64 (no kernel's). A logit that is infinite or NaN makes the loss NaN. The kernels take logits above -1e36.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_same_device, check_shape, check_temperature
from fastdino_kernels.launch import LAUNCH, AotCase, device_scalar, on_host, on_own_device, tl, triton, use_triton
from fastdino_kernels.library import WithGradient, rows_at_once, softmax
from fastdino_kernels.softmax import LN_2, LOWEST, numerators, quotient, scale_of

ROWS = 2  # that a program of the forward pass takes


class LinearLogits(NamedTuple):
    """Logits x @ prototypes.T (M, K) that nobody has multiplied yet.

    Rows of weight 0 may hold any finite number: NaN or infinity in x, times a gradient of 0, is NaN in the prototypes'.
    """

    x: Tensor
    """(M, D)."""
    prototypes: Tensor
    """(K, D), in x's dtype."""


# Reads 2 * M * K words, and the center from L2, 4 bytes a column: for its sake two rows at a time. IN_PLACE it reads
# the rows once more, from L2 as far as that holds them, and writes M * K over the student, each word after its last
# read.
@triton.jit
def _patch_loss_fwd_kernel(
    student_ptr,  # (M, K)
    teacher_ptr,  # (M, K)
    center_ptr,  # (K,)
    weights_ptr,  # (M,)
    student_temp_ptr,  # ()
    teacher_temp_ptr,  # ()
    grad_loss_ptr,  # (), IN_PLACE
    norm_ptr,  # (4, M) student's top and 1 / total, teacher's; not IN_PLACE
    row_loss_ptr,  # (M,)
    student_stride,
    teacher_stride,
    n_rows,
    n_prototypes,
    IN_PLACE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,  # logits of 16 bytes
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n_rows
    rows = tl.minimum(rows, n_rows - 1)  # the last of an odd number is read twice, and stored once
    weights = tl.load(weights_ptr + rows).to(tl.float32)
    live = (weights != 0.0)[:, None, None]
    student_scale, teacher_scale = scale_of(student_temp_ptr), scale_of(teacher_temp_ptr)
    student_ptr += (rows.to(tl.int64) * student_stride)[:, None, None]
    teacher_ptr += (rows.to(tl.int64) * teacher_stride)[:, None, None]
    tile = (tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[None, :, :]
    n_chunks = tl.cdiv(n_prototypes, LANES * WIDTH)

    zero = tl.zeros((ROWS, LANES), tl.float32)
    top, total, dot = zero + LOWEST, zero, zero  # dot: sum of the teacher's numerators * (student - top)
    top_t, total_t, dot_t = zero + LOWEST, zero, zero  # and the same of the teacher itself
    for i in range(n_chunks):
        cols = i * (LANES * WIDTH) + tile
        inside = (cols < n_prototypes) | EVEN_K  # all true, and folded away, where the chunks divide K
        center = tl.load(center_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        row = tl.where(inside, tl.load(student_ptr + cols, mask=inside, other=0.0).to(tl.float32), LOWEST)
        row_t = tl.where(inside, tl.load(teacher_ptr + cols, mask=inside, other=0.0).to(tl.float32) - center, LOWEST)
        below_t, exps_t, new_top_t, shrink_t = numerators(row_t, inside, teacher_scale, top_t)
        below, exps, new_top, shrink = numerators(row, inside, student_scale, top)
        before = total_t * shrink_t
        dot = dot * shrink_t + before * (top - new_top) + tl.sum(exps_t * below, axis=2)
        dot_t = dot_t * shrink_t + before * (top_t - new_top_t) + tl.sum(exps_t * below_t, axis=2)
        total, total_t = total * shrink + tl.sum(exps, axis=2), before + tl.sum(exps_t, axis=2)
        top, top_t = new_top, new_top_t

    row_top, row_top_t = tl.max(top, axis=1), tl.max(top_t, axis=1)
    below, below_t = top - row_top[:, None], top_t - row_top_t[:, None]
    shrink_t = tl.exp2(below_t * teacher_scale)
    row_total = tl.sum(total * tl.exp2(below * student_scale), axis=1)
    row_total_t = tl.sum(total_t * shrink_t, axis=1)
    row_dot = tl.sum(shrink_t * (dot + total_t * below), axis=1) / row_total_t
    row_dot_t = tl.sum(shrink_t * (dot_t + total_t * below_t), axis=1) / row_total_t
    cross_entropy = LN_2 * (tl.log2(row_total) - row_dot * student_scale)
    # A logit of -inf has probability 0 and could pass unseen. 0 * x is NaN where x is not finite, and these two hold
    # every logit: so the NaN reaches the loss and, through the totals, the gradient.
    entropy = tl.log2(row_total_t) - row_dot_t * teacher_scale
    cross_entropy += 0.0 * cross_entropy + 0.0 * entropy
    tl.store(row_loss_ptr + rows, tl.where(weights != 0.0, weights * cross_entropy, 0.0), mask=in_rows)
    norm, norm_t = tl.div_rn(1.0, row_total + 0.0 * cross_entropy), tl.div_rn(1.0, row_total_t)

    if IN_PLACE:
        grad_loss = tl.load(grad_loss_ptr).to(tl.float32)
        factor = quotient(grad_loss * weights, tl.load(student_temp_ptr).to(tl.float32))
        norm, norm_t = (factor * norm)[:, None, None], (factor * norm_t)[:, None, None]
        row_top, row_top_t = row_top[:, None, None], row_top_t[:, None, None]
        for i in range(n_chunks):  # from last to first: the L2 holds what was read last
            cols = (n_chunks - 1 - i) * (LANES * WIDTH) + tile
            inside = (cols < n_prototypes) | EVEN_K
            center = tl.load(center_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            row = tl.load(student_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            row_t = tl.load(teacher_ptr + cols, mask=inside, other=0.0).to(tl.float32) - center
            grad = tl.exp2((row - row_top) * student_scale) * norm
            grad -= tl.exp2((row_t - row_top_t) * teacher_scale) * norm_t
            tl.store(student_ptr + cols, tl.where(live, grad, 0.0), mask=inside & in_rows[:, None, None])
    else:
        tl.store(norm_ptr + rows, row_top, mask=in_rows)
        tl.store(norm_ptr + n_rows + rows, norm, mask=in_rows)
        tl.store(norm_ptr + 2 * n_rows + rows, row_top_t, mask=in_rows)
        tl.store(norm_ptr + 3 * n_rows + rows, norm_t, mask=in_rows)


# One program in all: reads M words.
@triton.jit
def _patch_loss_sum_kernel(row_loss_ptr, loss_ptr, n_rows, BLOCK_M: tl.constexpr):
    loss = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, n_rows, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        loss += tl.load(row_loss_ptr + rows, mask=rows < n_rows, other=0.0)
    tl.store(loss_ptr, tl.sum(loss))


# Reads 2 * M * K words, the center from L2, and writes M * K. From the last row to the first: part of what the forward
# pass read last is still in L2.
@triton.jit
def _patch_loss_bwd_kernel(
    student_ptr,  # (M, K)
    teacher_ptr,  # (M, K)
    center_ptr,  # (K,)
    weights_ptr,  # (M,)
    student_temp_ptr,  # ()
    teacher_temp_ptr,  # ()
    grad_loss_ptr,  # ()
    norm_ptr,  # (4, M)
    grad_ptr,  # (M, K), contiguous
    student_stride,
    teacher_stride,
    n_rows,
    n_prototypes,
    n_splits,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = (program // n_splits * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (program % n_splits * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    rows = tl.minimum(rows, n_rows - 1)  # the last of an odd number twice, with the same result
    inside = (cols < n_prototypes) | EVEN_K
    weights = tl.load(weights_ptr + rows).to(tl.float32)
    live = weights != 0.0
    student_scale, teacher_scale = scale_of(student_temp_ptr), scale_of(teacher_temp_ptr)
    factor = quotient(tl.load(grad_loss_ptr).to(tl.float32) * weights, tl.load(student_temp_ptr).to(tl.float32))
    top, norm = tl.load(norm_ptr + rows), tl.load(norm_ptr + n_rows + rows)
    top_t, norm_t = tl.load(norm_ptr + 2 * n_rows + rows), tl.load(norm_ptr + 3 * n_rows + rows)
    center = tl.load(center_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(student_ptr + rows.to(tl.int64) * student_stride + cols, mask=inside, other=0.0).to(tl.float32)
    row_t = tl.load(teacher_ptr + rows.to(tl.int64) * teacher_stride + cols, mask=inside, other=0.0).to(tl.float32)
    row_t -= center
    grad = tl.exp2((row - top) * student_scale) * (factor * norm)
    grad -= tl.exp2((row_t - top_t) * teacher_scale) * (factor * norm_t)
    tl.store(grad_ptr + rows.to(tl.int64) * n_prototypes + cols, tl.where(live, grad, 0.0), mask=inside)


def _unit_stride(logits: Tensor) -> Tensor:
    """The logits with unit stride along K, copied where it is another; the kernels take any distance of rows."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


@on_own_device
def _launch_forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    grad_loss: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss () and norms (4, M), fp32; with grad_loss the gradient takes the student's place, and norms are empty."""
    student, teacher, center, weights = (
        _unit_stride(student), _unit_stride(teacher), center.contiguous(), weights.contiguous()
    )  # fmt: skip
    n_rows, n_prototypes = student.shape
    in_place, width = grad_loss is not None, 16 // student.element_size()
    launch = LAUNCH["patch_loss_fwd"]
    n_warps = min(launch.num_warps, max(1, triton.next_power_of_2(n_prototypes) // (32 * width)))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    row_loss, loss, norm = empty(n_rows), empty(), empty(4, 0 if in_place else n_rows)
    _patch_loss_fwd_kernel[(triton.cdiv(n_rows, ROWS),)](
        student, teacher, center, weights, student_temp, teacher_temp,
        student_temp if grad_loss is None else grad_loss, norm, row_loss,  # not in place, nothing reads it
        student.stride(0), teacher.stride(0), n_rows, n_prototypes,
        IN_PLACE=in_place, EVEN_K=n_prototypes % (32 * n_warps * width) == 0, ROWS=ROWS, LANES=32 * n_warps,
        WIDTH=width, num_warps=n_warps, maxnreg=launch.max_registers,
    )  # fmt: skip
    _patch_loss_sum_kernel[(1,)](row_loss, loss, n_rows, BLOCK_M=LAUNCH["patch_loss_sum"].block)
    return loss, norm


@torch.library.custom_op("fastdino::patch_loss", mutates_args=())
def _patch_loss(
    student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor]:
    return _launch_forward(student, teacher, center, weights, student_temp, teacher_temp, None)


@_patch_loss.register_fake
def _(student: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=torch.float32), student.new_empty((4, student.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fastdino::patch_loss_backward", mutates_args=())
@on_own_device
def _patch_loss_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    norm: Tensor,
) -> Tensor:
    student, teacher = _unit_stride(student), _unit_stride(teacher)
    n_rows, n_prototypes = student.shape
    grad = torch.empty((n_rows, n_prototypes), dtype=student.dtype, device=student.device)
    launch = LAUNCH["patch_loss_bwd"]
    block = launch.block_for(n_prototypes)
    n_splits = triton.cdiv(n_prototypes, block)
    _patch_loss_bwd_kernel[(triton.cdiv(n_rows, ROWS) * n_splits,)](
        student, teacher, center.contiguous(), weights.contiguous(), student_temp, teacher_temp, grad_loss, norm, grad,
        student.stride(0), teacher.stride(0), n_rows, n_prototypes, n_splits,
        EVEN_K=n_prototypes % block == 0, ROWS=ROWS, BLOCK_K=block, num_warps=launch.num_warps,
    )  # fmt: skip
    return grad


@_patch_loss_backward.register_fake
def _(grad_loss: Tensor, student: Tensor, *saved: Tensor) -> Tensor:
    return student.new_empty(student.shape)


@torch.library.custom_op("fastdino::patch_loss_and_grad_", mutates_args=("student",))
def _patch_loss_and_grad_(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    grad_loss: Tensor,
) -> Tensor:
    return _launch_forward(student, teacher, center, weights, student_temp, teacher_temp, grad_loss)[0]


@_patch_loss_and_grad_.register_fake
def _(student: Tensor, *others: Tensor) -> Tensor:
    return student.new_empty((), dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_loss: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    return _patch_loss_backward(grad_loss, *ctx.saved_tensors), None, None, None, None, None


_patch_loss.register_autograd(_backward, setup_context=_save_for_backward)


def _scale_of_gradient(x: Tensor) -> float:
    """What the gradient is multiplied with while it is in the dtype of x (M, D): in fp16 about M, lest it underflow."""
    return 2.0 ** round(math.log2(max(1, len(x)))) if x.dtype == torch.float16 else 1.0


@torch.library.custom_op("fastdino::linear_patch_loss", mutates_args=())
def _linear_patch_loss(
    x: Tensor,
    prototypes: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () and, times `_scale_of_gradient`, its gradients at x and prototypes."""
    logits = x @ prototypes.T
    scale = device_scalar(_scale_of_gradient(x), x)
    loss = _launch_forward(logits, teacher, center, weights, student_temp, teacher_temp, scale)[0]
    return loss, logits @ prototypes, logits.T @ x


@_linear_patch_loss.register_fake
def _(x: Tensor, prototypes: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape), prototypes.new_empty(prototypes.shape)


def _save_gradients(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scaled_gradients(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_prototypes = ctx.saved_tensors
    factor = grad_loss / _scale_of_gradient(grad_x)
    return grad_x * factor, grad_prototypes * factor, None, None, None, None, None


_linear_patch_loss.register_autograd(_scaled_gradients, setup_context=_save_gradients)


# Speed against plain PyTorch, forward and backward, one core of an AMD EPYC, 2026-11-29, fp32 and bf16: M 236, K 65536
# 2.4 and 5.5; M 500, K 4096 1.2 and 1.3; M 1000, K 512 0.8: plain does not look for values that are not finite.
@torch.no_grad()
def _library_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    grad_loss: float | Tensor,
    grad: Tensor,
) -> tuple[Tensor]:
    """The kernels' formulas in library calls: the loss; fills grad, or student as grad. Padding is left out."""
    n_at_once, live = rows_at_once(student.shape[1]), weights != 0
    blocks: Sequence[Tensor | slice] = [slice(i, i + n_at_once) for i in range(0, len(student), n_at_once)]
    if not live.all():
        grad[~live] = 0
        blocks = live.nonzero().flatten().split(n_at_once)
    loss, center = reference.promote(student[:0]).new_zeros(()), reference.promote(center)
    weights = weights.to(loss.dtype)
    for rows in blocks:
        student_rows, probs, log_top = softmax(student[rows], student_temp)
        teacher_rows, teacher_probs, _ = softmax(reference.promote(teacher[rows]) - center, teacher_temp)
        cross_entropy = -torch.linalg.vecdot(teacher_probs, student_rows) - log_top
        zero_or_nan = 0 * (cross_entropy + teacher_rows.sum(-1))  # NaN if any logit is infinite or NaN
        loss = loss + (weights[rows] * (cross_entropy + zero_or_nan)).sum()
        factor = grad_loss * weights[rows] / student_temp + zero_or_nan
        grad[rows] = probs.sub_(teacher_probs).mul_(factor[:, None]).to(grad.dtype)
    return (loss,)


def _check(
    student: Mapping[str, Tensor],
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> None:
    """student: by name its logits (M, K), or what they are the product of, (M, D) and (K, D)."""
    tensors = {**student, "teacher": teacher, "center": center, "weights": weights}
    for name, x in tensors.items():
        check_floating(name, x)
    (name, rows), *others = student.items()
    check_shape(name, rows, ("M", "D" if others else "K"))
    for other, x in others:
        check_shape(other, x, ("K", rows.shape[1]))
        if x.dtype != rows.dtype:
            raise ValueError(f"{other}: expected {rows.dtype} as {name}, got {x.dtype}")
    shape = len(rows), len(others[0][1]) if others else rows.shape[1]
    check_shape("teacher", teacher, shape)
    check_shape("center", center, shape[1:])
    check_shape("weights", weights, shape[:1])
    check_same_device(**tensors, student_temp=student_temp, teacher_temp=teacher_temp)
    check_temperature("student_temp", student_temp)
    check_temperature("teacher_temp", teacher_temp)
    if shape[1] < 1:
        raise ValueError(f"{name}: expected at least 1 prototype, got logits of shape {shape}")


def patch_loss(
    student: Tensor | LinearLogits,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> Tensor:
    """iBOT's loss: the weighted sum, over masked patches, of the cross-entropy between teacher and student.

    student: (M, K) logits, differentiable; or the product that they are, then none is kept for the backward pass, and
    the gradients of x and prototypes are made with the loss. teacher: (M, K) logits, never differentiated.
    center: (K,). weights: (M,), all that divides included: 1 / (V * masked patches of the row's crop), V the batch's
    global crops. A row of weight 0 is padding: neither its logits nor NaN among them count. student_temp, teacher_temp:
    floats, or 0-D tensors on the same device.
    Returns () fp32 (fp64 for fp64 logits): 0 where M is 0, NaN where a logit of a row that counts is infinite or NaN.
    Raises ValueError where shapes, dtypes or devices do not fit, or a temperature given as a float is not positive.
    Sources: iBOT (arXiv:2111.07832), equation 2; gradients made with the loss: Liger Kernel (arXiv:2410.10989).
    """
    others = teacher, center, weights, student_temp, teacher_temp
    if isinstance(student, LinearLogits):
        _check(student._asdict(), *others)
        x, prototypes = student
        is_learned = torch.is_grad_enabled() and (x.requires_grad or prototypes.requires_grad)
        if is_learned and use_triton(x, teacher, center, weights):
            temps = device_scalar(student_temp, x), device_scalar(teacher_temp, x)
            fixed = (y.detach() for y in (teacher, center, weights))
            return _linear_patch_loss(x, prototypes, *fixed, *temps)[0]
        student = x @ prototypes.T
    _check({"student": student}, *others)
    teacher, center, weights = teacher.detach(), center.detach(), weights.detach()
    if not use_triton(student, teacher, center, weights):
        if on_host(student):
            given = student.detach(), teacher, center, weights, student_temp, teacher_temp, 1.0
            outputs: tuple[Tensor] = WithGradient.apply(student, partial(_library_loss, *given))
            return outputs[0]
        return reference.patch_loss(student, teacher, center, weights, student_temp, teacher_temp)
    temps = device_scalar(student_temp, student), device_scalar(teacher_temp, student)
    # Made to unit stride here and not only in the launchers, so that the backward pass finds it done.
    return _patch_loss(_unit_stride(student), _unit_stride(teacher), center, weights, *temps)[0]


def patch_loss_and_grad_(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    grad_loss: float | Tensor = 1.0,
) -> Tensor:
    """The loss, computed while the student's logits are overwritten with their gradient: no second (M, K) tensor.

    For callers that own the logits and read them nowhere else:

        logits = head(patches)  # (M, K), the last thing the student computes
        loss = patch_loss_and_grad_(logits.detach(), teacher, center, weights, 0.1, 0.07)
        logits.backward(gradient=logits.detach())  # they are their own gradient now

    Arguments and errors as in `patch_loss`; student must be contiguous, and is not differentiated through.
    grad_loss: what the gradient is multiplied with, for a loss scale: a float or a 0-D tensor on the same device.
    Returns the loss itself, () and not scaled.
    """
    _check({"student": student}, teacher, center, weights, student_temp, teacher_temp)
    check_same_device(student=student, grad_loss=grad_loss)
    if not student.is_contiguous():
        raise ValueError(f"student: expected contiguous logits to overwrite, got strides {student.stride()}")
    student, teacher, center, weights = (x.detach() for x in (student, teacher, center, weights))
    if not use_triton(student, teacher, center, weights):
        if on_host(student):
            return _library_loss(student, teacher, center, weights, student_temp, teacher_temp, grad_loss, student)[0]
        return reference.patch_loss_and_grad_(student, teacher, center, weights, student_temp, teacher_temp, grad_loss)
    temps = device_scalar(student_temp, student), device_scalar(teacher_temp, student)
    return _patch_loss_and_grad_(
        student, _unit_stride(teacher), center, weights, *temps, device_scalar(grad_loss, student)
    )


def aot_cases() -> Iterator[AotCase]:
    """A head of 65536 prototypes; how many patches are masked does not show here."""
    fwd, bwd = LAUNCH["patch_loss_fwd"], LAUNCH["patch_loss_bwd"]
    fp32 = dict.fromkeys(
        (
            "center_ptr", "weights_ptr", "student_temp_ptr", "teacher_temp_ptr", "grad_loss_ptr", "norm_ptr",
            "row_loss_ptr", "loss_ptr",
        ), "*fp32"
    )  # fmt: skip
    sizes = dict.fromkeys(("student_stride", "teacher_stride", "n_rows", "n_prototypes", "n_splits"), "i32")
    aligned = ("student_ptr", "teacher_ptr", "grad_ptr", "center_ptr", "student_stride", "teacher_stride")
    for dtype in ("bf16", "fp32"):
        types = fp32 | sizes | dict.fromkeys(("student_ptr", "teacher_ptr", "grad_ptr"), f"*{dtype}")
        chunk = {"LANES": 32 * fwd.num_warps, "WIDTH": {"bf16": 8, "fp32": 4}[dtype]}
        for name, kernel, launch, extra in (
            ("forward", _patch_loss_fwd_kernel, fwd, {"IN_PLACE": False, **chunk}),
            ("in place", _patch_loss_fwd_kernel, fwd, {"IN_PLACE": True, **chunk}),
            ("backward", _patch_loss_bwd_kernel, bwd, {"BLOCK_K": bwd.block}),
        ):
            yield AotCase(
                name=f"patch_loss {name} {dtype}",
                kernel=kernel,
                signature=types,
                constexprs={"EVEN_K": True, "ROWS": ROWS, **extra},
                aligned=(*aligned, "n_prototypes"),
                num_warps=launch.num_warps,
                max_registers=launch.max_registers,
            )
    yield AotCase(
        name="patch_loss sum",
        kernel=_patch_loss_sum_kernel,
        signature=types,
        constexprs={"BLOCK_M": LAUNCH["patch_loss_sum"].block},
        narrow_load="a word per row",
    )
