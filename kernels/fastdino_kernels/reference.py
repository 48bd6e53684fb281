"""Every op in plain PyTorch: the truth the tests use in fp64, and the path that CPU tensors take.

Axes: V student views, T teacher views, B images, K prototypes.
Low precision (bf16, fp16) is promoted to fp32 on entry; fp32 and fp64 stay what they are.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def promote(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 are returned as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cross_entropy_pairs(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> tuple[Tensor, Tensor]:
    """H(q[t, b], p[v, b]) for every pair of views (T, V, B), and the entropy of q (T, B)."""
    student_log_probs = torch.log_softmax(promote(student) / student_temp, dim=-1)  # (V, B, K)
    teacher_log_probs = torch.log_softmax((promote(teacher) - promote(center)) / teacher_temp, dim=-1)
    teacher_probs = teacher_log_probs.exp()  # (T, B, K)
    cross_entropy = -torch.einsum("tbk,vbk->tvb", teacher_probs, student_log_probs)
    # xlogy, because a probability of zero has log-probability -inf where logits are huge: 0 * -inf is NaN.
    teacher_entropy = -torch.special.xlogy(teacher_probs, teacher_probs).sum(-1)
    return cross_entropy, teacher_entropy


def compared_views(student: Tensor, teacher: Tensor) -> Tensor:
    """(T, V), the weights of the pairs: 1, or 0 where the two are the same crop."""
    dtype = promote(student[:0]).dtype
    return 1 - torch.eye(teacher.shape[0], student.shape[0], dtype=dtype, device=student.device)


def one_if_finite(*tensors: Tensor) -> Tensor:
    """1, or NaN where a value is infinite or NaN: a factor that keeps a -inf from passing as a probability of 0."""
    return torch.stack([(promote(x.detach()) * 0).sum() for x in tensors]).sum() + 1


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> Tensor:
    """Mean over images and pairs of different views of H(q, p); DINO (arXiv:2104.14294), equations 1 to 4."""
    return dino_loss_with_stats(student, teacher, center, student_temp, teacher_temp)[0]


def dino_loss_with_stats(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float | Tensor, teacher_temp: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), teacher_entropy (), per_image (B,)); the last two without a gradient."""
    cross_entropy, entropy = cross_entropy_pairs(student, teacher.detach(), center.detach(), student_temp, teacher_temp)
    compared = compared_views(student, teacher)
    n_pairs = compared.sum()
    per_image = torch.einsum("tv,tvb->b", compared, cross_entropy) / n_pairs * one_if_finite(student, teacher, center)
    entropies = torch.einsum("tv,tb->b", compared, entropy) / n_pairs * one_if_finite(teacher, center)
    return per_image.mean(), entropies.mean(), per_image.detach()


def patch_rows(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whose softmaxes p and q are, rows of weight 0 all 0; and 1, or NaN where a value that counts is not finite."""
    live = (weights != 0)[:, None]
    student, teacher = (promote(x).where(live, 0.0) for x in (student, teacher))
    one = one_if_finite(student, teacher, center)
    return student / student_temp, (teacher - promote(center)) / teacher_temp, one


def patch_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
) -> Tensor:
    """Sum over rows of weights * H(q, p), without the rows of weight 0; iBOT (arXiv:2111.07832), equation 2."""
    rows, teacher_rows, one = patch_rows(student, teacher, center, weights, student_temp, teacher_temp)
    return -(weights * (teacher_rows.softmax(-1) * rows.log_softmax(-1)).sum(-1)).sum() * one


@torch.no_grad()
def patch_loss_and_grad_(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    grad_loss: float | Tensor,
) -> Tensor:
    """`patch_loss`, and the student's logits overwritten with grad_loss times their gradient."""
    rows, teacher_rows, one = patch_rows(student, teacher, center, weights, student_temp, teacher_temp)
    targets = teacher_rows.softmax(-1)
    loss = -(weights * (targets * rows.log_softmax(-1)).sum(-1)).sum() * one
    factor = (grad_loss * weights.to(rows.dtype) / student_temp * one)[:, None]
    student.copy_(torch.where(weights[:, None] != 0, (rows.softmax(-1) - targets) * factor, 0.0))
    return loss


def column_exps(teacher: Tensor, weights: Tensor, temp: float | Tensor) -> Tensor:
    """Of every prototype, over the rows that count: largest logit, sum of exp((logit - largest) / temp); (2, K)."""
    lowest = -1e36  # the largest of no logit
    rows = torch.cat([promote(teacher), promote(teacher).new_full((1, teacher.shape[1]), lowest)])
    live = torch.cat([weights != 0, weights.new_zeros(1) != 0])[:, None]
    top = rows.where(live, lowest).amax(0)
    return torch.stack([top, torch.exp((rows - top) / temp).where(live, 0.0).sum(0)])


def column_probs(teacher: Tensor, center: Tensor, weights: Tensor, temp: float | Tensor) -> Tensor:
    """Sum over the rows that count of softmax((teacher - center) / temp): (K,)."""
    return torch.softmax((promote(teacher) - center) / temp, dim=-1).where((weights != 0)[:, None], 0.0).sum(0)


def batch_center(teacher: Tensor) -> Tensor:
    """Mean of the teacher's logits over views and images: (T, B, K) -> (K,)."""
    return promote(teacher).mean(dim=(0, 1))


@torch.no_grad()
def center_ema_(center: Tensor, batch_mean: Tensor, momentum: float | Tensor) -> None:
    """center <- momentum * center + (1 - momentum) * batch_mean; DINO (arXiv:2104.14294), equation 4."""
    center.copy_(promote(center) * momentum + batch_mean * (1 - momentum))


@torch.no_grad()
def ema_update_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor, copies: Sequence[Tensor] = ()
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, tensor by tensor; copies <- teacher before rounding."""
    for i, (target, source) in enumerate(zip(teacher, student, strict=True)):
        dtype = torch.promote_types(promote(target).dtype, source.dtype)
        average = target.to(dtype) * momentum + source.to(dtype) * (1 - momentum)
        target.copy_(average)
        if copies:
            copies[i].copy_(average)


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta**step: what a moment that started at zero still lacks. By expm1, which loses nothing near zero."""
    return -torch.expm1(step * (math.log(beta) if beta > 0 else -math.inf))


def clip_coefficient(grad_norm: Tensor, clip: float) -> Tensor:
    """What DINO multiplies a gradient by: clip / (norm + 1e-6) where that is below 1, else (also where NaN) 1."""
    coefficient = clip / (grad_norm + 1e-6)
    return torch.where(coefficient < 1, coefficient, 1.0)


@torch.no_grad()
def clip_adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor | None],
    exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor | None],
    teachers: Sequence[Tensor | None],
    param_copies: Sequence[Tensor | None],
    teacher_copies: Sequence[Tensor | None],
    lrs: Sequence[float | Tensor],
    weight_decays: Sequence[float | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    clip: float | None,
    momentum: float | Tensor,
    frozen: Tensor | None,
    grad_norms: Tensor | None,
    clip_sets: Sequence[int] = (),
) -> None:
    """Clip, AdamW (arXiv:1711.05101, in torch.optim.AdamW's form), then the EMA; one entry per tensor.

    clip_sets: the set of each, where those of a set are clipped together; else each is by itself.
    Nothing looks at a value on the device: a frozen tensor's results are computed and not taken.
    """
    norms = [None if grad is None else torch.linalg.vector_norm(promote(grad)) for grad in grads]
    sets = clip_sets or range(len(params))
    norm_of: dict[int, Tensor] = {}
    for number in sorted(set(sets)):
        members = [norm for norm, its in zip(norms, sets) if its == number and norm is not None]
        norm_of[number] = torch.linalg.vector_norm(torch.stack(members)) if members else torch.zeros(())
        if grad_norms is not None:
            grad_norms[number] = norm_of[number]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None:
            exp_avg, exp_avg_sq, step = exp_avgs[i], exp_avg_sqs[i], steps[i]
            assert exp_avg is not None
            assert exp_avg_sq is not None
            assert step is not None
            grad = promote(grad)
            if clip:
                grad = grad * clip_coefficient(norm_of[sets[i]].to(grad.dtype), clip)
            new_step = step + 1
            new_avg = exp_avg.lerp(grad.to(exp_avg.dtype), 1 - beta1)
            new_avg_sq = exp_avg_sq * beta2 + (1 - beta2) * grad * grad
            counted = new_step.to(promote(param).dtype)
            denominator = new_avg_sq.sqrt() / bias_correction(beta2, counted).sqrt() + eps
            step_size = lrs[i] / bias_correction(beta1, counted)
            new_param = param * (1 - lrs[i] * weight_decays[i]) - step_size * (new_avg / denominator)
            for old, new in ((param, new_param), (exp_avg, new_avg), (exp_avg_sq, new_avg_sq), (step, new_step)):
                old.copy_(new if frozen is None else torch.where(frozen[i], old, new))
        teacher, param_copy, teacher_copy = teachers[i], param_copies[i], teacher_copies[i]
        if teacher is not None:
            teacher.copy_(teacher * momentum + param * (1 - momentum))
        if param_copy is not None:
            param_copy.copy_(param)
        if teacher is not None and teacher_copy is not None:
            teacher_copy.copy_(teacher)


def turned(
    x: Tensor, rotation: tuple[Tensor, Tensor], groups: Sequence[tuple[int, int]] | None = None, *, n_turned: int
) -> Tensor:
    """The first n_turned of (M, parts, H, D), or without groups of (n, N, parts, H, D), each token turned by its place.

    rotation: sines and cosines (S, D / 2) of the tokens of one image of each group; computed in their dtype. Channel i
    turns with channel i + D / 2: x1 cos - x2 sin, x2 cos + x1 sin. RoFormer (arXiv:2104.09864), equation 34.
    """
    images = [x] if groups is None else [part.unflatten(0, group) for part, group in zip(_split(x, groups), groups)]
    done = []
    for image, sin, cos in zip(images, *(table.split([part.shape[1] for part in images]) for table in rotation)):
        sin, cos = sin[:, None, None], cos[:, None, None]  # the same for all parts and heads
        first, second = image[:, :, :n_turned].to(sin.dtype).chunk(2, dim=-1)
        halves = first * cos - second * sin, second * cos + first * sin
        whole = torch.cat((torch.cat(halves, dim=-1).to(x.dtype), image[:, :, n_turned:]), dim=2)
        done.append(whole if groups is None else whole.flatten(0, 1))
    return torch.cat(done) if len(done) > 1 else (done or [x])[0]


def _split(x: Tensor, groups: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """(M, ...) by groups of (images, tokens of each)."""
    return x.split([n * size for n, size in groups])


def short_attention(
    qkv: Tensor,
    groups: Sequence[tuple[int, int]],
    scale: float,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v within each image, (M, 3, H, D) -> (M, H, D); q and k `turned` before."""
    dtype, qkv = qkv.dtype, promote(qkv)
    if rotation is not None:
        qkv = turned(qkv, rotation, groups, n_turned=2)
    parts = [qkv[:0, 0]]
    for part, group in zip(_split(qkv, groups), groups):
        q, k, v = part.unflatten(0, group).permute(2, 0, 3, 1, 4)  # each (n, H, N, D)
        out = (scale * q @ k.transpose(-2, -1)).softmax(-1) @ v
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).to(dtype)


def cls_attention(q: Tensor, kv: Tensor, groups: Sequence[tuple[int, int]], scale: float) -> Tensor:
    """`short_attention` of one query per image, (n, H, D), over keys and values (M, 2, H, D) -> (n, H, D)."""
    parts = [promote(q[:0])]
    queries = promote(q).split([n for n, _ in groups])
    for of_group, part, group in zip(queries, _split(kv, groups), groups):
        k, v = promote(part).unflatten(0, group).permute(2, 0, 3, 1, 4)  # each (n, H, N, D)
        parts.append(((scale * of_group[:, :, None] @ k.transpose(-2, -1)).softmax(-1) @ v)[:, :, 0])
    return torch.cat(parts).to(q.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), exact; in x's own dtype, as a model would compute it."""
    return F.gelu(F.linear(x, weight, bias))


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """gelu(x W1^T + b1) W2^T + b2; in x's own dtype."""
    return F.linear(linear_gelu(x, w1, b1), w2, b2)
