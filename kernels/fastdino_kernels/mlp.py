"""A transformer's MLP, linear - GELU - linear, whose GELU runs inside the products and never as a pass of its own.

    hidden = x W1^T + b1        y = gelu(hidden) W2^T + b2        gelu(h) = h * Phi(h), exact
    d hidden = (dy W2) * gelu'(hidden)        d b1 = its column sums

GELU (arXiv:1606.08415); the MLP of a Vision Transformer (arXiv:2010.11929), H = 4 D.
Axes: M tokens, D channels, H hidden units.
Forward: one launch makes hidden and gelu(hidden), 2 * M * H words written; plain PyTorch writes the first, reads it
again and writes the second. Where no gradient will be asked for, hidden is not written. Backward: one launch makes
d hidden and what b1 needs, reading hidden where plain PyTorch writes, reads and writes again; it also makes
gelu(hidden) once more, M * H words, for the gradient of W2. So autograd keeps x and hidden, D + H words a token, and
not gelu(hidden): H more. The other products are the library's.
Dtypes: bf16 and fp16, accumulated in fp32, hidden rounded once before GELU as plain PyTorch does. fp32 and fp64, where
a product takes longer than all passes, go to the reference. No atomics: the same bits on every run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_same_device, check_shape
from fastdino_kernels.column_sums import column_sums
from fastdino_kernels.launch import INTERPRETED, AotCase, on_own_device, tl, triton, use_triton

KERNEL_DTYPES = {torch.bfloat16, torch.float16}  # a set, so that the tests can add fp32, which shows more digits

UPCAST = tl.constexpr(INTERPRETED)  # the interpreter multiplies matrices of bf16 wrongly, and those of fp32 rightly
MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)  # exp(-h^2 / 2) = exp2(h * h * MINUS_HALF_LOG2_E)
LOG2_DENSITY = tl.constexpr(-1.3257480647361593)  # log2(1 / sqrt(2 pi))


@dataclass(frozen=True)
class Tile:
    """What a program of a product makes, (block_m, block_n) of the result, and in what steps of the inner axis.

    group: row tiles that run side by side, so that they share columns of the weight in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8


# Predicted from sm_90 machine code, 2026-11-28, bf16, M 44160 (batch 64): share of the tensor cores' peak, and in
# brackets of a copy's bandwidth on an H200, where the programs of an SM do not run in step:
#   D            384              768    1024
#   forward      63 % (85 %)      74 %   78 %       without hidden, D 384: 69 %
#   backward     32 % (64 %)      47 %   52 %       at D 384 its bytes alone allow 50 %
# In step: 56, 73, 77 and 30, 42, 47 %. Not in the model: a tile of 128 x 128 asks the L2 for a byte per 64 operations,
# 15 TB/s at the peak, of which a H200 has about half. With that and the reads of shared memory put in, D 384 falls to
# 46 and 23 %, D 768 to 48 and 31 %. To be measured before it is believed.
# Forward, tried at D 384: 8 warps, step 64, 3 stages 53 %; 4 warps, step 64, 2 stages 50 %; 8 warps, step 32 52 %; the
# inner size as an argument, so that the loop is not unrolled, 57 %; columns not in halves 60 %. 128 x 256, D 768: 52 %.
# Backward, tried at D 384: a tile in one piece 21 %, in halves 19 %, in eighths with 4 warps 33 %, but that spills;
# hidden read before the product 22 %, or a side ahead 20 %, because one program fits an SM then; a read per part 29 %;
# 2 stages 24 %; step 32 17 %. 128 x 256, D 768: 31 %.
TILES = {
    "linear_gelu": Tile(128, 128, 32, num_warps=4, num_stages=4),
    "linear_gelu_bwd": Tile(128, 128, 64, num_warps=8, num_stages=3),
}
# Before Hopper a program of 4 warps loads the operands of 12 steps ahead and spills.
TILES_SM80 = {
    "linear_gelu": Tile(128, 128, 32, num_warps=8, num_stages=4),
    "linear_gelu_bwd": Tile(128, 128, 32, num_warps=8, num_stages=4),
}
# Rows that do not start at 16 bytes are read element by element, by more instructions and registers.
TILE_ODD = Tile(128, 64, 32, num_warps=8, num_stages=2)


# Phi(-a) for a >= 0, as 2 to a polynomial: 7 multiply-adds and one exp2, where erf takes 36 instructions. Off by 7e-7,
# and by 2e-4 of itself down to a = 6; falls to zero beyond.
@triton.jit
def _tail(a):
    log = -1.1395445e-06 * a + 4.8871971e-05
    log = log * a - 0.00084343838
    log = log * a + 0.0082294876
    log = log * a - 0.053530898
    log = log * a - 0.45876062
    log = log * a - 1.1511787
    return tl.exp2(log * a - 0.99999815)


# h * Phi(h), from a = |h|: no branch, and no cancellation where h is far below zero.
@triton.jit
def _gelu(h, a, tail):
    return tl.maximum(h, 0.0) - a * tail


# Phi(h) + h * density(h), which is 1 less its mirror image.
@triton.jit
def _gelu_slope(h, a, tail):
    mirrored = tail - a * tl.exp2(h * h * MINUS_HALF_LOG2_E + LOG2_DENSITY)
    return tl.where(h < 0, mirrored, 1.0 - mirrored)


# Which tile a program makes: GROUP row tiles side by side, then the next column.
@triton.jit
def _tile_of(program, n_rows, N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    col_tiles: tl.constexpr = (N_COLS + BLOCK_N - 1) // BLOCK_N  # Triton 3.6 has no constant of tl.cdiv
    in_group = program % (GROUP * col_tiles)
    first = program // (GROUP * col_tiles) * GROUP
    n_rows_at_once = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - first, GROUP)
    return first + in_group % n_rows_at_once, in_group // n_rows_at_once


@triton.jit
def _dot(a, b, total):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


# The left and the right half of a tile's columns; of its rows, those of even and those of odd eights. A thread's
# elements of a product lie so that neither moves anything: each takes what it has.
@triton.jit
def _column_halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    return x.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def _row_halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    return x.reshape(ROWS // 16, 2, 8, COLS).permute(0, 2, 3, 1).reshape(ROWS // 2, COLS, 2).split()


# Reads M * D + D * H, writes 2 * M * H, or M * H without KEEP_HIDDEN; plain PyTorch reads M * H more.
@triton.jit
def _linear_gelu_kernel(
    x_ptr,  # (M, D)
    weight_ptr,  # (H, D)
    bias_ptr,  # (H,)
    hidden_ptr,  # (M, H), or not written
    act_ptr,  # (M, H)
    n_tokens,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, col_tile = _tile_of(tl.program_id(0), n_tokens, HIDDEN, BLOCK_M, BLOCK_N, GROUP)
    first_row, first_col = row_tile * BLOCK_M, col_tile * BLOCK_N
    rows, cols, steps = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    even_n: tl.constexpr = HIDDEN % BLOCK_N == 0
    even_k: tl.constexpr = CHANNELS % BLOCK_K == 0
    # Rows and columns beyond the end read the last one again: what they give is not written.
    read_rows = rows if EVEN_M else tl.minimum(rows, n_tokens - 1 - first_row)
    read_cols = cols if even_n else tl.minimum(cols, HIDDEN - 1 - first_col)
    x_at = x_ptr + first_row.to(tl.int64) * CHANNELS + (read_rows[:, None] * CHANNELS + steps[None, :])
    weight_at = weight_ptr + first_col.to(tl.int64) * CHANNELS + (read_cols[None, :] * CHANNELS + steps[:, None])

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, CHANNELS, BLOCK_K):
        inside = (steps < CHANNELS - k) | even_k  # all true, and folded away, where BLOCK_K divides D
        x = tl.load(x_at, mask=inside[None, :], other=0.0)
        weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
        total = _dot(x, weight, total)
        x_at += BLOCK_K
        weight_at += BLOCK_K

    half: tl.constexpr = BLOCK_N // 2
    cols = tl.arange(0, half)
    in_rows = (rows < n_tokens - first_row) | EVEN_M
    start = first_row.to(tl.int64) * HIDDEN + first_col
    hidden_ptr += start
    act_ptr += start
    at = rows[:, None] * HIDDEN + cols[None, :]
    left, right = _column_halves(total, BLOCK_M, BLOCK_N)
    for side in tl.static_range(2):
        in_cols = (cols < HIDDEN - first_col - side * half) | even_n
        inside = in_rows[:, None] & in_cols[None, :]
        bias = tl.load(bias_ptr + first_col + side * half + cols, mask=in_cols, other=0.0).to(tl.float32)
        hidden = ((left if side == 0 else right) + bias[None, :]).to(act_ptr.dtype.element_ty)
        if KEEP_HIDDEN:
            tl.store(hidden_ptr + at + side * half, hidden, mask=inside)
        h = hidden.to(tl.float32)
        a = tl.abs(h)
        tl.store(act_ptr + at + side * half, _gelu(h, a, _tail(a)).to(act_ptr.dtype.element_ty), mask=inside)


# Writes gelu(hidden) and d hidden of a part of a tile, and returns d hidden in fp32.
@triton.jit
def _gelu_backward(grad_act, hidden, act_ptr, grad_ptr, inside, ALL: tl.constexpr):
    h = hidden.to(tl.float32)
    a = tl.abs(h)
    tail = _tail(a)
    tl.store(act_ptr, _gelu(h, a, tail).to(act_ptr.dtype.element_ty), mask=inside)
    grad = grad_act * _gelu_slope(h, a, tail)
    tl.store(grad_ptr, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    return grad if ALL else tl.where(inside, grad, 0.0)


# Reads M * D + D * H + M * H, writes 2 * M * H and M * H / BLOCK_M; plain PyTorch writes 3 * M * H and reads 4. A tile
# is finished in four parts, so that its registers suffice for two programs on an SM.
@triton.jit
def _linear_gelu_bwd_kernel(
    grad_y_ptr,  # (M, D)
    weight_ptr,  # (D, H), of the second linear map
    hidden_ptr,  # (M, H)
    act_ptr,  # (M, H)
    grad_ptr,  # (M, H)
    part_ptr,  # (row tiles, H) fp32: column sums of grad
    n_tokens,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, col_tile = _tile_of(tl.program_id(0), n_tokens, HIDDEN, BLOCK_M, BLOCK_N, GROUP)
    first_row, first_col = row_tile * BLOCK_M, col_tile * BLOCK_N
    rows, cols, steps = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    even_n: tl.constexpr = HIDDEN % BLOCK_N == 0
    even_k: tl.constexpr = CHANNELS % BLOCK_K == 0
    read_rows = rows if EVEN_M else tl.minimum(rows, n_tokens - 1 - first_row)
    grad_y_at = grad_y_ptr + first_row.to(tl.int64) * CHANNELS + (read_rows[:, None] * CHANNELS + steps[None, :])
    weight_at = weight_ptr + first_col + (steps[:, None] * HIDDEN + cols[None, :])
    in_cols = (cols < HIDDEN - first_col) | even_n

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, CHANNELS, BLOCK_K):
        inside = (steps < CHANNELS - k) | even_k
        grad_y = tl.load(grad_y_at, mask=inside[None, :], other=0.0)
        weight = tl.load(weight_at, mask=inside[:, None] & in_cols[None, :], other=0.0)
        total = _dot(grad_y, weight, total)
        grad_y_at += BLOCK_K
        weight_at += BLOCK_K * HIDDEN

    half: tl.constexpr = BLOCK_N // 2
    all_inside: tl.constexpr = EVEN_M and even_n
    rows, cols = tl.arange(0, BLOCK_M // 2), tl.arange(0, half)
    rows = rows // 8 * 16 + rows % 8
    start = first_row.to(tl.int64) * HIDDEN + first_col
    hidden_ptr += start
    act_ptr += start
    grad_ptr += start
    at = rows[:, None] * HIDDEN + cols[None, :]
    part_ptr += row_tile.to(tl.int64) * HIDDEN + first_col
    left, right = _column_halves(total, BLOCK_M, BLOCK_N)
    for side in tl.static_range(2):
        even, odd = _row_halves(left if side == 0 else right, BLOCK_M, half)
        in_cols = (cols < HIDDEN - first_col - side * half) | even_n
        inside = ((rows < n_tokens - first_row) | EVEN_M)[:, None] & in_cols[None, :]
        inside_odd = ((rows + 8 < n_tokens - first_row) | EVEN_M)[:, None] & in_cols[None, :]
        hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0)
        if all_inside:  # ahead, to wait for memory once; where masks take registers, there are none for it
            hidden_odd = tl.load(hidden_ptr + at + 8 * HIDDEN, mask=inside_odd, other=0.0)
        grad = _gelu_backward(even, hidden, act_ptr + at, grad_ptr + at, inside, all_inside)
        at += 8 * HIDDEN
        if not all_inside:
            hidden_odd = tl.load(hidden_ptr + at, mask=inside_odd, other=0.0)
        grad += _gelu_backward(odd, hidden_odd, act_ptr + at, grad_ptr + at, inside_odd, all_inside)
        at += half - 8 * HIDDEN
        tl.store(part_ptr + side * half + cols, tl.sum(grad, axis=0), mask=in_cols)


def _tile(kernel: str, weight: Tensor) -> Tile:
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return TILE_ODD
    before_hopper = weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (9, 0)
    return (TILES_SM80 if before_hopper else TILES)[kernel]


def _n_tiles(n_tokens: int, n_hidden: int, tile: Tile) -> int:
    return triton.cdiv(n_tokens, tile.block_m) * triton.cdiv(n_hidden, tile.block_n)


@on_own_device
def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    """hidden and gelu(hidden), (M, H) both; without keep_hidden, gelu(hidden) twice."""
    (n_tokens, n_channels), n_hidden, tile = x.shape, weight.shape[0], _tile("linear_gelu", weight)
    act = torch.empty(n_tokens, n_hidden, dtype=x.dtype, device=x.device)
    hidden = torch.empty_like(act) if keep_hidden else act
    if act.numel() > 0:
        _linear_gelu_kernel[(_n_tiles(n_tokens, n_hidden, tile),)](
            x, weight, bias, hidden, act, n_tokens,
            CHANNELS=n_channels, HIDDEN=n_hidden, KEEP_HIDDEN=keep_hidden, EVEN_M=n_tokens % tile.block_m == 0,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=tile.group,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return hidden, act


@torch.library.custom_op("fastdino::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(hidden) alone: for a forward pass without a backward."""
    return _launch_forward(x, weight, bias, False)[1]


@torch.library.custom_op("fastdino::linear_gelu_with_hidden", mutates_args=())
def _linear_gelu_with_hidden(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_forward(x, weight, bias, True)


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_linear_gelu_with_hidden.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("fastdino::linear_gelu_backward", mutates_args=())
@on_own_device
def _linear_gelu_backward(grad_y: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(hidden) and d hidden, (M, H) both, and column sums of d hidden, (row tiles, H) fp32."""
    (n_tokens, n_hidden), n_channels, tile = hidden.shape, weight.shape[0], _tile("linear_gelu_bwd", weight)
    act, grad = torch.empty_like(hidden), torch.empty_like(hidden)
    part = torch.empty(triton.cdiv(n_tokens, tile.block_m), n_hidden, dtype=torch.float32, device=hidden.device)
    if hidden.numel() > 0:
        _linear_gelu_bwd_kernel[(_n_tiles(n_tokens, n_hidden, tile),)](
            grad_y, weight, hidden, act, grad, part, n_tokens,
            CHANNELS=n_channels, HIDDEN=n_hidden, EVEN_M=n_tokens % tile.block_m == 0,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=tile.group,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return act, grad, part


@_linear_gelu_backward.register_fake
def _(grad_y: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_row_tiles = -(-hidden.shape[0] // TILE_ODD.block_m)  # which is that of all tiles
    part = hidden.new_empty(n_row_tiles, hidden.shape[1], dtype=torch.float32)
    return torch.empty_like(hidden), torch.empty_like(hidden), part


def _keep_hidden(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _backward_of_linear_gelu(ctx: Any, _: None, grad_act: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_act is None:
        return None, None, None
    x, weight, hidden = ctx.saved_tensors
    grad = torch.ops.aten.gelu_backward(grad_act, hidden)
    return grad @ weight, grad.t() @ x, grad.sum(0)


_linear_gelu_with_hidden.register_autograd(_backward_of_linear_gelu, setup_context=_keep_hidden)


@torch.library.custom_op("fastdino::mlp", mutates_args=())
def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """y and hidden. One operator, because the gradient of W2's product and of GELU are made together."""
    hidden, act = _launch_forward(x, w1, b1, True)
    return torch.addmm(b2, act, w2.t()), hidden


@_mlp.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty(x.shape[0], w1.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, _ = inputs
    ctx.save_for_backward(x, w1, w2, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None, None
    x, w1, w2, hidden = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    act, grad, part = _linear_gelu_backward(grad_y, w2, hidden)
    return grad @ w1, grad.t() @ x, column_sums(part, hidden.dtype), grad_y.t() @ act, grad_y.sum(0)


_mlp.register_autograd(_backward, setup_context=_keep)


def takes_kernels(*tensors: Tensor) -> bool:
    """Whether an MLP of such tensors runs in the kernels."""
    return (
        use_triton(*tensors) and all(x.dtype == tensors[0].dtype for x in tensors) and tensors[0].dtype in KERNEL_DTYPES
    )


def _in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast computes products in, where it is on."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) for x in tensors)


def _check_linear(x: Tensor, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor, n_in: int) -> None:
    for name, value in {weight_name: weight, bias_name: bias}.items():
        check_floating(name, value)
        if value.dtype != x.dtype:
            raise ValueError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
    check_shape(weight_name, weight, ("out", n_in))
    check_shape(bias_name, bias, weight.shape[:1])
    check_same_device(**{"x": x, weight_name: weight, bias_name: bias})


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), in one launch.

    x: (..., D). weight: (H, D) and bias: (H,), as of an `nn.Linear`. All of one dtype; under autocast, in its.
    Returns (..., H). Raises ValueError where shapes, dtypes or devices do not fit.
    Source: GELU (arXiv:1606.08415), equation 1.
    """
    x, weight, bias = _in_autocast(x, weight, bias)
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected at least one axis, got a 0-D tensor")
    _check_linear(x, "weight", weight, "bias", bias, x.shape[-1])
    if not takes_kernels(x, weight, bias):
        return reference.linear_gelu(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    inputs = rows, weight.contiguous(), bias.contiguous()
    act = _linear_gelu_with_hidden(*inputs)[1] if _needs_gradient(x, weight, bias) else _linear_gelu(*inputs)
    return act.view(*x.shape[:-1], weight.shape[0])


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """gelu(x W1^T + b1) W2^T + b2: the MLP of a transformer block.

    x: (..., D). w1: (H, D), b1: (H,), w2: (D', H), b2: (D',), as of two `nn.Linear`. All of one dtype; under autocast,
    in its. Returns (..., D'). Autograd keeps x and the H numbers before GELU of each token.
    Raises ValueError where shapes, dtypes or devices do not fit.
    Source: Vision Transformer (arXiv:2010.11929), section 3.1.
    """
    x, w1, b1, w2, b2 = _in_autocast(x, w1, b1, w2, b2)
    check_floating("x", x)
    if x.ndim == 0:
        raise ValueError("x: expected at least one axis, got a 0-D tensor")
    _check_linear(x, "w1", w1, "b1", b1, x.shape[-1])
    _check_linear(x, "w2", w2, "b2", b2, w1.shape[0])
    if not takes_kernels(x, w1, b1, w2, b2):
        return reference.mlp(x, w1, b1, w2, b2)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    params = w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous()
    if _needs_gradient(x, w1, b1, w2, b2):
        y, _ = _mlp(rows, *params)
    else:
        y = torch.addmm(params[3], _linear_gelu(rows, *params[:2]), params[2].t())
    return y.view(*x.shape[:-1], w2.shape[0])


def aot_cases() -> Iterator[AotCase]:
    """The products of ViT-S/B/L, in whole tiles, and one of a number of tokens that is none."""
    pointers = ("x_ptr", "weight_ptr", "bias_ptr", "hidden_ptr", "act_ptr", "grad_y_ptr", "grad_ptr")
    types = dict.fromkeys(pointers, "*bf16") | {"part_ptr": "*fp32", "n_tokens": "i32"}
    for n_channels, even in ((384, True), (384, False), (768, True), (1024, True)):
        for kernel, function, extra in (
            ("linear_gelu", _linear_gelu_kernel, {"KEEP_HIDDEN": True}),
            ("linear_gelu_bwd", _linear_gelu_bwd_kernel, {}),
        ):
            for tile, archs, where in ((TILES[kernel], (90, 100), ""), (TILES_SM80[kernel], (80,), " before Hopper")):
                yield AotCase(
                    name=f"{kernel} bf16 D={n_channels}{'' if even else ' tail'}{where}",
                    kernel=function,
                    signature=types,
                    constexprs={
                        "CHANNELS": n_channels, "HIDDEN": 4 * n_channels, "EVEN_M": even, "GROUP": tile.group,
                        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, **extra,
                    },
                    aligned=(*pointers, "part_ptr"),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    archs=archs,
                )  # fmt: skip
