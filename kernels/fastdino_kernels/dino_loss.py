"""Centered-softmax cross-entropy over all pairs of different views, and its gradient.

    q[t, b] = softmax((teacher[t, b] - center) / teacher_temp)      p[v, b] = softmax(student[v, b] / student_temp)
    loss    = 1 / (B * n_pairs) * sum over b and over pairs t != v of H(q[t, b], p[v, b])
    d loss / d student[v, b] = (n_v * p[v, b] - sum over t != v of q[t, b]) / (student_temp * B * n_pairs)

with n_pairs = V * T - min(V, T) and n_v = T - [v < T]: view v of the student and view v of the teacher are the same
crop and are not compared. DINO (arXiv:2104.14294), equations 1 to 4.

Axes: V student views, T teacher views, B images, K prototypes, S splits of K.
Forward: a program takes one image and one split of K and walks over it in chunks, computes a chunk's teacher
exponentials once and runs all student rows past them; a second kernel joins an image's splits, a third averages the
images. Backward: one pass, a program's columns of all rows at once. Memory, in words of B * K: forward T + V read;
backward T + V read and V written. At V = 10, T = 2: 34, where the original moves about 690. Every sum has a fixed
order, so a rerun gives the same bits.
Dtypes: logits in fp32, bf16 or fp16 give an fp32 loss, computed in fp32, and a gradient in the student's dtype;
fp64 stays fp64 (no kernel's). A logit that is infinite or NaN makes the loss NaN. The kernels take
logits above -1e36.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_same_device, check_shape, check_temperature
from fastdino_kernels.launch import LAUNCH, AotCase, device_scalar, on_host, on_own_device, tl, triton, use_triton
from fastdino_kernels.library import WithGradient, rows_at_once, softmax
from fastdino_kernels.softmax import LN_2, LOWEST, numerators, quotient, scale_of

MAX_VIEWS = 12  # student views that a program of the forward pass keeps sums of: 4 registers each


@triton.jit
def _teacher_chunk(row_ptr, center, inside, scale, top, total, dot):
    row = tl.load(row_ptr, mask=inside, other=0.0).to(tl.float32) - center
    row = tl.where(inside, row, LOWEST)
    below, exps, new_top, shrink = numerators(row, inside, scale, top)
    before = total * shrink
    dot = dot * shrink + before * (top - new_top) + tl.sum(exps * below, axis=1)
    return exps, shrink, before, new_top, before + tl.sum(exps, axis=1), dot


# Joins the lanes of a teacher row, and returns what a sum over its numerators is to be multiplied with.
@triton.jit
def _store_teacher(part_ptr, quantity, scale, lane_top, lane_total, lane_dot):
    top = tl.max(lane_top)
    below = lane_top - top
    weight = tl.exp2(below * scale)
    tl.store(part_ptr, top)
    tl.store(part_ptr + quantity, tl.sum(lane_total * weight))
    tl.store(part_ptr + 2 * quantity, tl.sum(weight * (lane_dot + lane_total * below)))
    return weight


# Reads (T + V + 1) * B * K words, the center from L2, and writes a few per row and split; each logit comes from memory
# once for T <= 2, above that the student's T / 2 times. A program takes one image, one split, two teacher views and
# VIEWS student views, and walks over its split in chunks of 16 bytes per lane. Sums and tops stay in their lane until
# the end: a sum over lanes is five dependent steps, which would be paid for every row and chunk. With a top m that
# grows to m', old sums follow:
#     total <- total * 2^(s (m - m')) + sum e        s: the student's scale, e = 2^(s (x - m'))
#     dot <- w dot + w Z (m - m') + sum f (x - m')   f, Z, w: a teacher's numerators, their sum before, its own factor
# Programs that share a row write the same bits for it.
@triton.jit
def _dino_loss_fwd_kernel(
    student_ptr,  # (V, B, K)
    teacher_ptr,  # (T, B, K)
    center_ptr,  # (K,)
    student_temp_ptr,  # ()
    teacher_temp_ptr,  # ()
    student_part_ptr,  # (2, B, V, S): top, total
    teacher_part_ptr,  # (3, B, T, S): top, total, sum of numerators * (teacher - center - top)
    dot_part_ptr,  # (B, T, V, S): sum of teacher numerators * (student - top)
    student_stride_v,
    student_stride_b,
    teacher_stride_t,
    teacher_stride_b,
    n_student_views,
    n_teacher_views,
    n_images,
    n_prototypes,
    n_splits,
    VIEWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,  # logits of 16 bytes
):
    program = tl.program_id(0)
    image, split = program // n_splits, program % n_splits
    first_view, t = tl.program_id(1) * VIEWS, 2 * tl.program_id(2)
    u = tl.minimum(t + 1, n_teacher_views - 1)  # the last of an odd number pairs with itself
    student_scale, teacher_scale = scale_of(student_temp_ptr), scale_of(teacher_temp_ptr)
    student_ptr += image.to(tl.int64) * student_stride_b + first_view.to(tl.int64) * student_stride_v
    teacher_ptr += image.to(tl.int64) * teacher_stride_b
    teacher_ptr_t = teacher_ptr + t.to(tl.int64) * teacher_stride_t
    teacher_ptr_u = teacher_ptr + u.to(tl.int64) * teacher_stride_t

    low, zero = tl.full((LANES,), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)
    top_t, total_t, dot_t = low, zero, zero
    top_u, total_u, dot_u = low, zero, zero
    tops, totals, dots_t, dots_u = (low,) * VIEWS, (zero,) * VIEWS, (zero,) * VIEWS, (zero,) * VIEWS
    first_col = split * BLOCK_K
    for col in range(first_col, tl.minimum(first_col + BLOCK_K, n_prototypes), LANES * WIDTH):
        cols = col + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = (cols < n_prototypes) | EVEN_K  # all true, and folded away, where BLOCK_K divides K
        center = tl.load(center_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        exps_t, shrink_t, before_t, top_t, total_t, dot_t = _teacher_chunk(
            teacher_ptr_t + cols, center, inside, teacher_scale, top_t, total_t, dot_t
        )
        exps_u, shrink_u, before_u, top_u, total_u, dot_u = _teacher_chunk(
            teacher_ptr_u + cols, center, inside, teacher_scale, top_u, total_u, dot_u
        )
        row_ptr = student_ptr
        for _ in tl.static_range(VIEWS):  # a view's sums are taken from the front and come back at the end
            row = tl.where(inside, tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32), LOWEST)
            row_ptr += student_stride_v  # one pointer for all views: one each would take 2 * VIEWS registers
            below, exps, top, shrink = numerators(row, inside, student_scale, tops[0])
            grown = tops[0] - top
            tops = tops[1:] + (top,)  # noqa: RUF005  (Triton knows no *)
            totals = totals[1:] + (totals[0] * shrink + tl.sum(exps, axis=1),)  # noqa: RUF005
            pair_t = tl.sum(exps_t * below, axis=1) + dots_t[0] * shrink_t + before_t * grown
            pair_u = tl.sum(exps_u * below, axis=1) + dots_u[0] * shrink_u + before_u * grown
            dots_t, dots_u = dots_t[1:] + (pair_t,), dots_u[1:] + (pair_u,)  # noqa: RUF005

    image = image.to(tl.int64)
    student_part_ptr += (image * n_student_views + first_view) * n_splits + split
    teacher_part_ptr += image * n_teacher_views * n_splits + split
    dot_part_ptr += (image * n_teacher_views * n_student_views + first_view) * n_splits + split
    student_quantity = n_images * n_student_views * n_splits
    teacher_quantity = n_images * n_teacher_views * n_splits
    part_ptr_t, part_ptr_u = teacher_part_ptr + t * n_splits, teacher_part_ptr + u * n_splits
    weight_t = _store_teacher(part_ptr_t, teacher_quantity, teacher_scale, top_t, total_t, dot_t)
    weight_u = _store_teacher(part_ptr_u, teacher_quantity, teacher_scale, top_u, total_u, dot_u)
    for i in tl.static_range(VIEWS):
        top = tl.max(tops[i])
        below = tops[i] - top
        part_ptr, dot_ptr = student_part_ptr + i * n_splits, dot_part_ptr + i * n_splits
        tl.store(part_ptr, top)
        tl.store(part_ptr + student_quantity, tl.sum(totals[i] * tl.exp2(below * student_scale)))
        tl.store(dot_ptr + t * n_student_views * n_splits, tl.sum(weight_t * (dots_t[i] + total_t * below)))
        tl.store(dot_ptr + u * n_student_views * n_splits, tl.sum(weight_u * (dots_u[i] + total_u * below)))


# One program per image: reads S * (2 * V + 3 * T + T * V) words and writes 2 * (V + T + 1), a hundredth of the logits.
@triton.jit
def _dino_loss_join_kernel(
    student_part_ptr,  # (2, B, V, S)
    teacher_part_ptr,  # (3, B, T, S)
    dot_part_ptr,  # (B, T, V, S)
    student_temp_ptr,  # ()
    teacher_temp_ptr,  # ()
    student_norm_ptr,  # (2, V, B): top, 1 / total
    teacher_norm_ptr,  # (2, T, B)
    per_image_ptr,  # (B,)
    entropy_ptr,  # (B,)
    n_student_views,
    n_teacher_views,
    n_images,
    n_splits,
    n_pairs,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    student_scale, teacher_scale = scale_of(student_temp_ptr), scale_of(teacher_temp_ptr)
    views, splits = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)
    is_view, is_split = views < n_student_views, splits < n_splits
    tile, in_tile = views[:, None] * n_splits + splits[None, :], is_view[:, None] & is_split[None, :]
    student_quantity = n_images * n_student_views * n_splits
    teacher_quantity = n_images * n_teacher_views * n_splits

    part_ptr = student_part_ptr + image * n_student_views * n_splits + tile
    split_top = tl.load(part_ptr, mask=in_tile, other=-float("inf"))
    split_total = tl.load(part_ptr + student_quantity, mask=in_tile, other=0.0)
    top = tl.where(is_view, tl.max(split_top, axis=1), 0.0)
    below = tl.where(in_tile, split_top - top[:, None], 0.0)  # <= 0
    total = tl.where(is_view, tl.sum(split_total * tl.exp2(below * student_scale), axis=1), 1.0)

    loss = 0.0
    entropy = 0.0
    for t in range(n_teacher_views):
        part_ptr_t = teacher_part_ptr + (image * n_teacher_views + t) * n_splits + splits
        split_top_t = tl.load(part_ptr_t, mask=is_split, other=-float("inf"))
        top_t = tl.max(split_top_t, axis=0)
        below_t = tl.where(is_split, split_top_t - top_t, 0.0)
        weight = tl.exp2(below_t * teacher_scale)
        split_total_t = tl.load(part_ptr_t + teacher_quantity, mask=is_split, other=0.0) * weight
        split_dot_t = tl.load(part_ptr_t + 2 * teacher_quantity, mask=is_split, other=0.0) * weight
        total_t = tl.sum(split_total_t, axis=0)
        dot_t = tl.sum(split_dot_t + split_total_t * below_t, axis=0) / total_t
        entropy_t = LN_2 * (tl.log2(total_t) - dot_t * teacher_scale)

        dot_ptr = dot_part_ptr + (image * n_teacher_views + t) * n_student_views * n_splits + tile
        dots = tl.load(dot_ptr, mask=in_tile, other=0.0) * weight[None, :] + split_total_t[None, :] * below
        cross_entropy = LN_2 * (tl.log2(total) - tl.sum(dots, axis=1) / total_t * student_scale)
        cross_entropy = tl.where(is_view, cross_entropy, 0.0)
        compared = is_view & (views != t)
        loss += tl.sum(tl.where(compared, cross_entropy, 0.0), axis=0)
        entropy += entropy_t * tl.sum(compared.to(tl.float32), axis=0)

        # A logit of -inf has probability 0 and could pass unseen. 0 * x is NaN where x is not finite, and these
        # two hold every logit: so the NaN reaches the loss and, through the totals, the gradient.
        total += 0.0 * cross_entropy
        total_t += 0.0 * entropy_t
        loss += tl.sum(0.0 * cross_entropy, axis=0) + 0.0 * entropy_t
        tl.store(teacher_norm_ptr + t * n_images + image, top_t)
        tl.store(teacher_norm_ptr + (n_teacher_views + t) * n_images + image, tl.div_rn(1.0, total_t))

    tl.store(student_norm_ptr + views * n_images + image, top, mask=is_view)
    tl.store(student_norm_ptr + (n_student_views + views) * n_images + image, tl.div_rn(1.0, total), mask=is_view)
    tl.store(per_image_ptr + image, loss / n_pairs)
    tl.store(entropy_ptr + image, entropy / n_pairs)


# One program in all: reads 2 * B words.
@triton.jit
def _dino_loss_mean_kernel(per_image_ptr, entropy_ptr, loss_ptr, mean_entropy_ptr, n_images, BLOCK_B: tl.constexpr):
    loss = tl.zeros((BLOCK_B,), tl.float32)
    entropy = tl.zeros((BLOCK_B,), tl.float32)
    for first in range(0, n_images, BLOCK_B):
        images = first + tl.arange(0, BLOCK_B)
        loss += tl.load(per_image_ptr + images, mask=images < n_images, other=0.0)
        entropy += tl.load(entropy_ptr + images, mask=images < n_images, other=0.0)
    tl.store(loss_ptr, tl.sum(loss) / n_images)
    tl.store(mean_entropy_ptr, tl.sum(entropy) / n_images)


@triton.jit
def _probs(row, norm_ptr, quantity, scale, times):
    return tl.exp2((row - tl.load(norm_ptr)) * scale) * (times * tl.load(norm_ptr + quantity))


# Reads (T + V + 1) * B * K words, the center from L2, and writes V * B * K. A teacher row whose view the student has
# too is read twice, the second time from L1. Images go from last to first: the forward pass read the last ones last,
# and part of them is still in L2. grad_ptr may be student_ptr: a program reads an element before it writes it, and no
# other program reads it.
@triton.jit
def _dino_loss_bwd_kernel(
    student_ptr,  # (V, B, K)
    teacher_ptr,  # (T, B, K)
    center_ptr,  # (K,)
    student_temp_ptr,  # ()
    teacher_temp_ptr,  # ()
    student_norm_ptr,  # (2, V, B): top, 1 / total
    teacher_norm_ptr,  # (2, T, B)
    grad_loss_ptr,  # ()
    grad_ptr,  # (V, B, K), contiguous
    student_stride_v,
    student_stride_b,
    teacher_stride_t,
    teacher_stride_b,
    n_student_views,
    n_teacher_views,
    n_images,
    n_prototypes,
    n_splits,
    n_pairs,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image, split = n_images - 1 - program // n_splits, program % n_splits
    cols = split * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (cols < n_prototypes) | EVEN_K
    student_scale, teacher_scale = scale_of(student_temp_ptr), scale_of(teacher_temp_ptr)
    student_temp = tl.load(student_temp_ptr).to(tl.float32)
    factor = quotient(tl.load(grad_loss_ptr).to(tl.float32), student_temp * n_images * n_pairs)
    center = tl.load(center_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    student_ptr += image * student_stride_b + cols
    teacher_ptr += image * teacher_stride_b + cols
    grad_ptr += image * n_prototypes + cols
    student_norm_ptr += image
    teacher_norm_ptr += image
    grad_stride_v = tl.cast(n_images, tl.int64) * n_prototypes
    student_quantity, teacher_quantity = n_student_views * n_images, n_teacher_views * n_images

    target = tl.zeros((BLOCK_K,), tl.float32)  # sum of q over all teacher views
    for t in range(n_teacher_views):
        row_ptr = teacher_ptr + tl.cast(t, tl.int64) * teacher_stride_t
        row = tl.load(row_ptr, mask=inside, other=0.0).to(tl.float32) - center
        target += _probs(row, teacher_norm_ptr + t * n_images, teacher_quantity, teacher_scale, 1.0)

    for v in range(n_student_views):
        row_ptr = student_ptr + tl.cast(v, tl.int64) * student_stride_v
        row = tl.load(row_ptr, mask=inside, other=0.0).to(tl.float32)
        n_compared = n_teacher_views - (v < n_teacher_views)
        norm_ptr = student_norm_ptr + v * n_images
        grad = _probs(row, norm_ptr, student_quantity, student_scale, n_compared) - target
        if v < n_teacher_views:
            row_ptr = teacher_ptr + tl.cast(v, tl.int64) * teacher_stride_t
            row = tl.load(row_ptr, mask=inside, other=0.0).to(tl.float32) - center
            grad += _probs(row, teacher_norm_ptr + v * n_images, teacher_quantity, teacher_scale, 1.0)
        tl.store(grad_ptr + v * grad_stride_v, grad * factor, mask=inside)


def _n_pairs(n_student_views: int, n_teacher_views: int) -> int:
    return n_student_views * n_teacher_views - min(n_student_views, n_teacher_views)


def _unit_stride(logits: Tensor) -> Tensor:
    """The logits with unit stride along K, copied where it is another; the kernels take any other strides."""
    return logits if logits.stride(2) == 1 else logits.contiguous()


@on_own_device
def _launch_forward(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), teacher entropy (), losses (B,), student_norm (2, V, B), teacher_norm (2, T, B): all fp32."""
    student, teacher, center = _unit_stride(student), _unit_stride(teacher), center.contiguous()
    (n_student, n_images, n_prototypes), n_teacher = student.shape, teacher.shape[0]
    launch = LAUNCH["dino_loss_fwd"]
    lanes, width = 32 * launch.num_warps, 16 // student.element_size()
    block = max(launch.block_for(n_prototypes), lanes * width)  # a chunk at least
    n_splits = triton.cdiv(n_prototypes, block)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    student_part = empty(2, n_images, n_student, n_splits)
    teacher_part = empty(3, n_images, n_teacher, n_splits)
    dot_part = empty(n_images, n_teacher, n_student, n_splits)
    even = n_prototypes % block == 0
    max_views = MAX_VIEWS if even else MAX_VIEWS // 2  # masks take registers too
    n_views = max(n for n in range(1, max_views + 1) if n_student % n == 0)
    _dino_loss_fwd_kernel[(n_images * n_splits, n_student // n_views, triton.cdiv(n_teacher, 2))](
        student, teacher, center, student_temp, teacher_temp, student_part, teacher_part, dot_part,
        *student.stride()[:2], *teacher.stride()[:2], n_student, n_teacher, n_images, n_prototypes, n_splits,
        VIEWS=n_views, EVEN_K=even, BLOCK_K=block, LANES=lanes, WIDTH=width, num_warps=launch.num_warps,
        maxnreg=launch.max_registers if even else None,
    )  # fmt: skip

    student_norm, teacher_norm = empty(2, n_student, n_images), empty(2, n_teacher, n_images)
    per_image, entropy = empty(n_images), empty(n_images)
    _dino_loss_join_kernel[(n_images,)](
        student_part, teacher_part, dot_part, student_temp, teacher_temp, student_norm, teacher_norm,
        per_image, entropy, n_student, n_teacher, n_images, n_splits, _n_pairs(n_student, n_teacher),
        BLOCK_V=triton.next_power_of_2(n_student), BLOCK_S=triton.next_power_of_2(n_splits),
        num_warps=LAUNCH["dino_loss_join"].num_warps,
    )  # fmt: skip

    loss, mean_entropy = empty(), empty()
    block = LAUNCH["dino_loss_mean"].block
    _dino_loss_mean_kernel[(1,)](per_image, entropy, loss, mean_entropy, n_images, BLOCK_B=block)
    return loss, mean_entropy, per_image, student_norm, teacher_norm


_dino_loss = torch.library.custom_op("fastdino::dino_loss", _launch_forward, mutates_args=())


@_dino_loss.register_fake
def _(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (n_student, n_images, _), n_teacher = student.shape, teacher.shape[0]

    def empty(*shape: int) -> Tensor:
        return student.new_empty(shape, dtype=torch.float32)

    return empty(), empty(), empty(n_images), empty(2, n_student, n_images), empty(2, n_teacher, n_images)


@on_own_device
def _launch_backward(
    grad: Tensor,
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    student_norm: Tensor,
    teacher_norm: Tensor,
) -> None:
    """Fill grad (V, B, K), contiguous; it may be the student itself."""
    student, teacher, center = _unit_stride(student), _unit_stride(teacher), center.contiguous()
    (n_student, n_images, n_prototypes), n_teacher = student.shape, teacher.shape[0]
    launch = LAUNCH["dino_loss_bwd"]
    block = launch.block_for(n_prototypes)
    n_splits = triton.cdiv(n_prototypes, block)
    _dino_loss_bwd_kernel[(n_images * n_splits,)](
        student, teacher, center, student_temp, teacher_temp, student_norm, teacher_norm, grad_loss, grad,
        *student.stride()[:2], *teacher.stride()[:2], n_student, n_teacher, n_images, n_prototypes, n_splits,
        _n_pairs(n_student, n_teacher),
        EVEN_K=n_prototypes % block == 0, BLOCK_K=block, num_warps=launch.num_warps,
    )  # fmt: skip


@torch.library.custom_op("fastdino::dino_loss_backward", mutates_args=())
def _dino_loss_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    student_norm: Tensor,
    teacher_norm: Tensor,
) -> Tensor:
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _launch_backward(grad, grad_loss, student, teacher, center, student_temp, teacher_temp, student_norm, teacher_norm)
    return grad


@_dino_loss_backward.register_fake
def _(grad_loss: Tensor, student: Tensor, *saved: Tensor) -> Tensor:
    return student.new_empty(student.shape)


@torch.library.custom_op("fastdino::dino_loss_and_grad_", mutates_args=("student",))
def _dino_loss_and_grad_(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor, grad_loss: Tensor
) -> Tensor:
    loss, _, _, student_norm, teacher_norm = _launch_forward(student, teacher, center, student_temp, teacher_temp)
    _launch_backward(
        student, grad_loss, student, teacher, center, student_temp, teacher_temp, student_norm, teacher_norm
    )
    return loss


@_dino_loss_and_grad_.register_fake
def _(student: Tensor, *others: Tensor) -> Tensor:
    return student.new_empty((), dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    *statistics, student_norm, teacher_norm = output[1:]
    ctx.mark_non_differentiable(*statistics, student_norm, teacher_norm)
    ctx.save_for_backward(*inputs, student_norm, teacher_norm)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return _dino_loss_backward(grad_loss, *ctx.saved_tensors), None, None, None, None


_dino_loss.register_autograd(_backward, setup_context=_save_for_backward)


# Speed against plain PyTorch, forward and backward, one core of an AMD EPYC, 2026-11-25, T = 2, B 1 to 64, K 64 to
# 65536, fp32 and bf16: 1.6 to 3.0 at V = 10, 1.1 to 3.2 at V = 4. Autograd on the reference: 0.3 to 2.5.
@torch.no_grad()
def _library_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    grad_loss: float | Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' formulas in library calls: (loss, teacher entropy, losses (B,)); fills grad, or student as grad."""
    (n_student, n_images, n_prototypes), n_teacher = student.shape, len(teacher)
    compared, n_pairs = reference.compared_views(student, teacher), _n_pairs(n_student, n_teacher)
    weights = compared / -n_pairs
    per_image, entropies = compared.new_empty(n_images), compared.new_empty(n_images)
    n_at_once = rows_at_once(n_student * n_prototypes) if on_host(student) else n_images
    for first in range(0, n_images, n_at_once):
        images = slice(first, first + n_at_once)
        rows, probs, log_top = softmax(student[:, images], student_temp)
        logits = reference.promote(teacher[:, images]) - reference.promote(center)
        teacher_rows, teacher_probs, teacher_log_top = softmax(logits, teacher_temp)
        dots = torch.bmm(teacher_probs.transpose(0, 1), rows.permute(1, 2, 0))  # (images, T, V)
        minus_cross_entropy = (dots + log_top.t()[:, None]).flatten(1)
        entropy = weights.sum(1) @ ((teacher_probs * teacher_rows).sum(-1) + teacher_log_top)
        zero_or_nan = 0 * (minus_cross_entropy.sum(1) + entropy)  # NaN if any logit is infinite or NaN
        per_image[images] = minus_cross_entropy @ weights.flatten() + zero_or_nan
        entropies[images] = entropy
        factor = grad_loss / (student_temp * n_images * n_pairs) + zero_or_nan
        probs.mul_(compared.sum(0)[:, None, None]).sub_(teacher_probs.sum(0))
        probs[:n_teacher].add_(teacher_probs[:n_student])
        grad[:, images] = probs.mul_(factor[:, None])  # all that reads these logits has run
    return per_image.mean(), entropies.mean(), per_image


class DINOLossStats(NamedTuple):
    """The loss and what a training log wants beside it; everything stays on the device.

    loss: () differentiable in the student. teacher_entropy: () mean entropy of q, in nats; ln K means collapse to
    uniform, 0 to one prototype. kl: () mean KL(q || p) over the pairs, loss - teacher_entropy. per_image: (B,) losses.
    """

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor
    per_image: Tensor


def _check(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> None:
    check_floating("student", student)
    check_floating("teacher", teacher)
    check_floating("center", center)
    check_shape("student", student, ("V", "B", "K"))
    check_shape("teacher", teacher, ("T", *student.shape[1:]))
    check_shape("center", center, student.shape[2:])
    check_same_device(
        student=student, teacher=teacher, center=center, student_temp=student_temp, teacher_temp=teacher_temp
    )
    check_temperature("student_temp", student_temp)
    check_temperature("teacher_temp", teacher_temp)
    if student.shape[0] < 2 or teacher.shape[0] < 1 or student.shape[2] < 1:
        raise ValueError(
            f"student, teacher: expected at least 2 student views, 1 teacher view and 1 prototype, "
            f"got {student.shape[0]}, {teacher.shape[0]} and {student.shape[2]}"
        )


def _with_statistics(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), teacher entropy () and losses (B,), from the kernels, library calls or the reference."""
    _check(student, teacher, center, student_temp, teacher_temp)
    if not use_triton(student, teacher, center):
        if on_host(student):
            fixed = student.detach(), teacher.detach(), center.detach(), student_temp, teacher_temp, 1.0
            outputs: tuple[Tensor, Tensor, Tensor] = WithGradient.apply(student, partial(_library_loss, *fixed))
            return outputs
        return reference.dino_loss_with_stats(student, teacher, center, student_temp, teacher_temp)
    temps = device_scalar(student_temp, student), device_scalar(teacher_temp, student)
    # Made to unit stride here and not only in the launchers, so that the backward pass finds it done.
    loss, teacher_entropy, per_image, *_ = _dino_loss(
        _unit_stride(student), _unit_stride(teacher.detach()), center.detach(), *temps
    )
    return loss, teacher_entropy, per_image


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> Tensor:
    """DINO's loss over all pairs of a teacher view with a different student view.

    student: (V, B, K) logits, differentiable. teacher: (T, B, K) logits, never differentiated. center: (K,).
    student_temp, teacher_temp: floats, or 0-D tensors on the same device.
    Returns the mean over images and pairs, () fp32 (fp64 for fp64 logits); NaN where a logit is infinite or NaN, and,
    as every mean of nothing, where B is 0.
    Raises ValueError where shapes, dtypes or devices do not fit, or a temperature given as a float is not positive.
    Source: DINO (arXiv:2104.14294), equations 1 to 4.
    """
    return _with_statistics(student, teacher, center, student_temp, teacher_temp)[0]


def dino_loss_with_stats(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> DINOLossStats:
    """`dino_loss`, and the monitoring numbers that come with it: see `DINOLossStats`. Same arguments and errors."""
    loss, teacher_entropy, per_image = _with_statistics(student, teacher, center, student_temp, teacher_temp)
    return DINOLossStats(loss, teacher_entropy, loss.detach() - teacher_entropy, per_image)


def dino_loss_and_grad_(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    grad_loss: float | Tensor = 1.0,
) -> Tensor:
    """The loss, computed while the student's logits are overwritten with their gradient: no second (V, B, K) tensor.

    For callers that own the logits and read them nowhere else:

        logits = head(features)  # (V * B, K), the last thing the student computes
        loss = dino_loss_and_grad_(logits.detach().view(V, B, K), teacher, center, 0.1, 0.04)
        logits.backward(gradient=logits.detach())  # they are their own gradient now

    Arguments and errors as in `dino_loss`; student must be contiguous, and is not differentiated through.
    grad_loss: what the gradient is multiplied with, for a loss scale: a float or a 0-D tensor on the same device.
    Returns the loss itself, () and not scaled.
    """
    _check(student, teacher, center, student_temp, teacher_temp)
    check_same_device(student=student, grad_loss=grad_loss)
    if not student.is_contiguous():
        raise ValueError(f"student: expected contiguous logits to overwrite, got strides {student.stride()}")
    student, teacher, center = student.detach(), teacher.detach(), center.detach()
    if not use_triton(student, teacher, center):
        return _library_loss(student, teacher, center, student_temp, teacher_temp, grad_loss, student)[0]
    temps = device_scalar(student_temp, student), device_scalar(teacher_temp, student)
    return _dino_loss_and_grad_(student, _unit_stride(teacher), center, *temps, device_scalar(grad_loss, student))


def aot_cases() -> Iterator[AotCase]:
    """Ten student views and two teacher views, at the two widths of head in use; the backbone does not show here."""
    fwd, bwd = LAUNCH["dino_loss_fwd"], LAUNCH["dino_loss_bwd"]
    fp32 = dict.fromkeys(
        (
            "center_ptr", "student_temp_ptr", "teacher_temp_ptr", "student_part_ptr", "teacher_part_ptr",
            "dot_part_ptr", "student_norm_ptr", "teacher_norm_ptr", "per_image_ptr", "entropy_ptr", "loss_ptr",
            "mean_entropy_ptr", "grad_loss_ptr",
        ), "*fp32"
    )  # fmt: skip
    strides = dict.fromkeys(("student_stride_v", "student_stride_b", "teacher_stride_t", "teacher_stride_b"), "i32")
    sizes = ("n_student_views", "n_teacher_views", "n_images", "n_prototypes", "n_splits", "n_pairs")
    for dtype in ("bf16", "fp32"):
        logits = dict.fromkeys(("student_ptr", "teacher_ptr", "grad_ptr"), f"*{dtype}")
        types = fp32 | strides | dict.fromkeys(sizes, "i32") | logits
        chunk = {"VIEWS": 10, "LANES": 32 * fwd.num_warps, "WIDTH": {"bf16": 8, "fp32": 4}[dtype]}
        for name, kernel, launch, extra in (
            ("forward", _dino_loss_fwd_kernel, fwd, chunk),
            ("backward", _dino_loss_bwd_kernel, bwd, {}),
        ):
            yield AotCase(
                name=f"dino_loss {name} {dtype}",
                kernel=kernel,
                signature=types,
                constexprs={"EVEN_K": True, "BLOCK_K": launch.block, **extra},
                aligned=(*logits, *strides, "center_ptr", "n_prototypes"),
                num_warps=launch.num_warps,
                max_registers=launch.max_registers,
            )
    for n_prototypes in (4096, 65536):
        yield AotCase(
            name=f"dino_loss join K={n_prototypes}",
            kernel=_dino_loss_join_kernel,
            signature=types,
            constexprs={"BLOCK_V": 16, "BLOCK_S": n_prototypes // fwd.block},
            num_warps=LAUNCH["dino_loss_join"].num_warps,
            narrow_load="a few words per split, a hundredth of the logits' bytes",
        )
    yield AotCase(
        name="dino_loss mean",
        kernel=_dino_loss_mean_kernel,
        signature=types,
        constexprs={"BLOCK_B": LAUNCH["dino_loss_mean"].block},
        narrow_load="two words per image",
    )
