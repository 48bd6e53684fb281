"""LayerNorm, whose backward pass makes all that a residual stream asks for while it has the numbers in hand.

    y = n * weight + bias        n = (x - mean) / std
    d x = (g - mean(g) - n * mean(g * n)) / std        g = weight * d y
    d weight = column sums of n * d y        d bias = column sums of d y

Layer Normalization (arXiv:1607.06450), equation 3, over the last axis. Axes: M tokens, D channels.
In a pre-norm block the norm reads a stream to which branches are added. Its gradient is then added to the stream's,
scaled for the branch before it (drop-path by rows, LayerScale by channels), and summed over tokens for that branch's
bias and LayerScale. One launch does all of it, and a small one joins what its programs have summed; PyTorch reads the
result again for each. `fusion.JoinResiduals` finds these in a compiler's graph. Norm and branch may be of some rows of
the stream alone (drop-path by batch): T rows then, of which M have a norm's gradient and k go to the branch.
Memory, in units of M*D: reads d y, x, the stream's gradient and LayerScale's input; writes d x, and again if scaled.
Dtypes: bf16, fp16 and fp32, x's and the weight's each their own; statistics and sums in fp32. No atomics.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino_kernels.checks import check_floating, check_same_device, check_shape
from fastdino_kernels.column_sums import column_sums
from fastdino_kernels.launch import LAUNCH, AotCase, Launch, on_own_device, tl, triton, use_triton

# Of a program, unless there are more than PROGRAMS times as many; what a program has summed is 3 * D words.
ROWS, PROGRAMS = 32, 1536


# A program walks down its rows, one at a time, STAGES - 1 more under way, and keeps its sums in registers.
# Reads 2*M*D, T*D with ADD and k*D with GAMMA; writes T*D, k*D with BRANCH, and SUMS*D fp32 a program. T = M = k unless
# TAKEN or SENT.
@triton.jit
def _layer_norm_bwd_kernel(
    grad_y_ptr,  # (M, D)
    x_ptr,  # (M, D)
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    weight_ptr,  # (D,)
    stream_ptr,  # (T, D), or not read
    scale_ptr,  # (k,), or not read
    gamma_ptr,  # (D,), or not read
    scaled_ptr,  # (k, D), what gamma is a factor of, or not read
    taken_ptr,  # (T,) int64 where among the M each row of the stream is, -1 for nowhere, or not read
    sent_ptr,  # (T,) int64 where among the k, or not read
    grad_x_ptr,  # (T, D)
    branch_ptr,  # (k, D), or not written
    part_ptr,  # (programs, SUMS, D) fp32: for weight, bias, the branch, gamma
    n_tokens,  # T
    n_rows,  # of a program
    D: tl.constexpr,
    ADD: tl.constexpr,
    SCALE: tl.constexpr,
    GAMMA: tl.constexpr,
    BRANCH: tl.constexpr,
    TAKEN: tl.constexpr,
    SENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    SUMS: tl.constexpr = 4 if GAMMA else 3
    first = tl.program_id(0) * n_rows
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    grad_weight, grad_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    grad_branch, grad_gamma = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if GAMMA:
        gamma = tl.load(gamma_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for row in tl.range(first, tl.minimum(first + n_rows, n_tokens), num_stages=STAGES):
        at = tl.cast(row, tl.int64) * D + cols
        # A row that has no norm reads zeros for it, so its gradient is the stream's.
        if TAKEN:
            from_row = tl.load(taken_ptr + row)
            has_norm = from_row >= 0
            from_at, inside = from_row * D + cols, mask & has_norm
            mean = tl.load(mean_ptr + from_row, mask=has_norm, other=0.0)
            rstd = tl.load(rstd_ptr + from_row, mask=has_norm, other=0.0)
        else:
            from_at, inside, mean, rstd = at, mask, tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        grad_y = tl.load(grad_y_ptr + from_at, mask=inside, other=0.0).to(tl.float32)
        normed = (tl.load(x_ptr + from_at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        if TAKEN or SENT:  # again, from L1, so that more programs fit
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        grad = grad_y * weight
        along = tl.sum(grad * normed, axis=0) * (1 / D)
        level = tl.sum(grad, axis=0) * (1 / D)
        grad_x = (grad - level - normed * along) * rstd
        if ADD:
            grad_x += tl.load(stream_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad_x, mask=mask)
        to_row, inside = row, mask
        if SENT:
            to_row = tl.load(sent_ptr + row)
            at, inside = to_row * D + cols, mask & (to_row >= 0)
            grad_x = tl.where(inside, grad_x, 0.0)
        if SCALE:
            if SENT:
                grad_x *= tl.load(scale_ptr + to_row, mask=to_row >= 0, other=0.0).to(tl.float32)
            else:
                grad_x *= tl.load(scale_ptr + to_row).to(tl.float32)
        if GAMMA:
            grad_gamma += grad_x * tl.load(scaled_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if TAKEN or SENT:
                gamma = tl.load(gamma_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            grad_x *= gamma
        if BRANCH:
            tl.store(branch_ptr + at, grad_x, mask=inside)
        grad_weight += normed * grad_y
        grad_bias += grad_y
        grad_branch += grad_x
    part_ptr += tl.cast(tl.program_id(0), tl.int64) * (SUMS * D) + cols
    tl.store(part_ptr, grad_weight, mask=mask)
    tl.store(part_ptr + D, grad_bias, mask=mask)
    tl.store(part_ptr + 2 * D, grad_branch, mask=mask)
    if GAMMA:
        tl.store(part_ptr + 3 * D, grad_gamma, mask=mask)


def _branch(
    grad_x: Tensor, scale: Tensor | None, gamma: Tensor | None, dtype: torch.dtype | None, n_sent: int | None
) -> Tensor:
    """Memory for what the branch is given; none where that is grad_x."""
    dtype = dtype or grad_x.dtype
    if n_sent is None and scale is None and gamma is None and dtype == grad_x.dtype:
        return grad_x.new_empty(0, dtype=dtype)
    return grad_x.new_empty(grad_x.shape[0] if n_sent is None else n_sent, grad_x.shape[1], dtype=dtype)


def _shape(x: Tensor, taken: Tensor | None) -> tuple[int, int]:
    """Of the stream's gradient."""
    return x.shape[0] if taken is None else taken.shape[0], x.shape[1]


def _programs(n_tokens: int) -> tuple[int, int]:
    """Rows of a program, and how many programs there are."""
    n_rows = max(ROWS, -(-n_tokens // PROGRAMS))
    return n_rows, -(-n_tokens // n_rows)


def _launch(n_channels: int, of_rows: bool) -> Launch:
    widths = (512, 1024, 2048) if of_rows else (512, 2048)
    width = next((n for n in widths if n_channels <= n), "wider")
    return LAUNCH[f"layer_norm_bwd_rows_{width}" if of_rows else f"layer_norm_bwd_{width}"]


@torch.library.custom_op("fastdino::layer_norm_backward", mutates_args=())
@on_own_device
def _layer_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    stream: Tensor | None = None,
    scale: Tensor | None = None,
    gamma: Tensor | None = None,
    scaled: Tensor | None = None,
    branch_dtype: torch.dtype | None = None,
    taken: Tensor | None = None,
    sent: Tensor | None = None,
    n_sent: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d x with the stream's gradient (T, D) added; what the branch is given, that times scale (k,) and gamma (D,), in
    branch_dtype; and the programs' sums in fp32, (P, 3, D) or with gamma (P, 4, D).

    The second is empty where it is the first. Sums are for weight, bias, of what the branch is given, and for gamma, a
    factor of `scaled` (k, D). taken, sent: (T,) where among the M rows of x, and the k = n_sent of the branch, each row
    of the stream is, -1 for nowhere; None where all are, in order.
    """
    n_tokens, n_channels = _shape(x, taken)
    launch = _launch(n_channels, of_rows=taken is not None or sent is not None)
    grad_x = x.new_empty(n_tokens, n_channels)
    branch = _branch(grad_x, scale, gamma, branch_dtype, n_sent)
    n_rows, n_programs = _programs(n_tokens)
    part = x.new_empty(n_programs, 3 if gamma is None else 4, n_channels, dtype=torch.float32)
    if grad_x.numel() > 0:
        _layer_norm_bwd_kernel[(n_programs,)](
            grad_y.contiguous(), x.contiguous(), mean, rstd, weight,
            grad_x if stream is None else stream.contiguous(), mean if scale is None else scale.contiguous(),
            weight if gamma is None else gamma.contiguous(), grad_x if scaled is None else scaled.contiguous(),
            mean if taken is None else taken.contiguous(), mean if sent is None else sent.contiguous(),
            grad_x, branch, part, n_tokens, n_rows,
            D=n_channels, ADD=stream is not None, SCALE=scale is not None, GAMMA=gamma is not None,
            BRANCH=branch.numel() > 0, TAKEN=taken is not None, SENT=sent is not None,
            BLOCK=triton.next_power_of_2(n_channels), STAGES=launch.num_stages, num_warps=launch.num_warps,
            maxnreg=launch.max_registers,
        )  # fmt: skip
    return grad_x, branch, part


@_layer_norm_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    stream: Tensor | None = None,
    scale: Tensor | None = None,
    gamma: Tensor | None = None,
    scaled: Tensor | None = None,
    branch_dtype: torch.dtype | None = None,
    taken: Tensor | None = None,
    sent: Tensor | None = None,
    n_sent: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, n_sums = x.new_empty(_shape(x, taken)), 3 if gamma is None else 4
    part = x.new_empty(_programs(grad_x.shape[0])[1], n_sums, x.shape[1], dtype=torch.float32)
    return grad_x, _branch(grad_x, scale, gamma, branch_dtype, n_sent), part


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_layer_norm` in single operations, for a compiler, which joins them with what is before and after."""
    full = x.float()
    var, mean = torch.var_mean(full, dim=1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    y = (full - mean) * rstd * weight.float() + bias.float()
    return y.to(weight.dtype), mean.squeeze(1), rstd.squeeze(1)


@torch.library.custom_op("fastdino::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, D) in the weight's dtype, mean (M,) and 1 / std (M,) in fp32."""
    if not x.is_cuda:
        return plain_layer_norm(x, weight, bias, eps)
    y, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return y.to(weight.dtype), mean.flatten(), rstd.flatten()


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=weight.dtype), mean, rstd


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None
    grad_x, _, part = _layer_norm_backward(grad_y, *ctx.saved_tensors)
    sums = column_sums(part, ctx.saved_tensors[-1].dtype)
    return grad_x, sums[0], sums[1], None


_layer_norm.register_autograd(_backward, setup_context=_keep)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, with a backward pass of two launches.

    x: (..., D). weight, bias: (D,), of one dtype. Returns (..., D) in the weight's dtype, computed in fp32 (fp64 for
    fp64). Raises ValueError where shapes, dtypes or devices do not fit.
    Source: Layer Normalization (arXiv:1607.06450), equation 3.
    """
    for name, value in {"x": x, "weight": weight, "bias": bias}.items():
        check_floating(name, value)
    if x.ndim == 0:
        raise ValueError("x: expected at least one axis, got a 0-D tensor")
    check_shape("weight", weight, x.shape[-1:])
    check_shape("bias", bias, weight.shape)
    check_same_device(x=x, weight=weight, bias=bias)
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias: expected {weight.dtype} like weight, got {bias.dtype}")
    if not use_triton(x, weight) or x.numel() == 0:
        full = torch.promote_types(x.dtype, weight.dtype)
        return F.layer_norm(x.to(full), weight.shape, weight.to(full), bias.to(full), eps).to(weight.dtype)
    if x.ndim == 2:  # no view, which would stand between this and its neighbours in a graph
        return _layer_norm(x, weight.contiguous(), bias, eps)[0]
    return _layer_norm(x.reshape(-1, x.shape[-1]), weight.contiguous(), bias, eps)[0].view(x.shape)


def aot_cases() -> Iterator[AotCase]:
    """The norms of ViT-S/B/L: a network's last, with a stream, with drop-path, with LayerScale and a stream in fp32."""
    halves = ("grad_y_ptr", "weight_ptr", "gamma_ptr", "scaled_ptr", "branch_ptr")
    streams = ("x_ptr", "stream_ptr", "scale_ptr", "grad_x_ptr")
    full = ("mean_ptr", "rstd_ptr", "part_ptr")
    places = ("taken_ptr", "sent_ptr")
    widths = (192, 384, 768, 1024, 4096)
    for n_channels, title, stream, flags in (
        (384, "", "*bf16", ""),
        *((d, " stream", "*bf16", "ADD") for d in widths),
        (384, " stream, drop-path", "*bf16", "ADD SCALE BRANCH"),
        *((d, " fp32 stream, drop-path, LayerScale", "*fp32", "ADD SCALE GAMMA BRANCH") for d in widths),
        *((d, " fp32 stream, rows", "*fp32", "ADD SCALE GAMMA BRANCH TAKEN SENT") for d in widths),
    ):
        launch = _launch(n_channels, of_rows="TAKEN" in flags)
        types = dict.fromkeys(halves, "*bf16") | dict.fromkeys(streams, stream) | dict.fromkeys(full, "*fp32")
        types |= dict.fromkeys(places, "*i64")
        constants = {name: name in flags.split() for name in ("ADD", "SCALE", "GAMMA", "BRANCH", "TAKEN", "SENT")}
        yield AotCase(
            name=f"layer_norm_bwd bf16 D={n_channels}{title}",
            kernel=_layer_norm_bwd_kernel,
            signature={**types, "n_tokens": "i32", "n_rows": "i32"},
            constexprs={
                "D": n_channels, **constants, "BLOCK": triton.next_power_of_2(n_channels), "STAGES": launch.num_stages,
            },
            aligned=(*halves, *streams, *full, *places, "n_tokens", "n_rows"),
            num_warps=launch.num_warps,
            max_registers=launch.max_registers,
        )  # fmt: skip
