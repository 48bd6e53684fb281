"""softmax(scale * q k^T) v within each of many short images, one launch each way for all that are equally long.

Attention Is All You Need (arXiv:1706.03762), equation 1. Axes: M tokens of all images, N tokens of an image (at most
256), H heads, D channels of a head. q, k and v lie packed as one linear map leaves them, (M, 3, H, D), and so does
their gradient: nothing is split or joined.
An image's keys and values stay on chip, so its scores are seen whole: no running maximum, and each gradient is written
once, by one program, in the same order on every run. A tile has 64, 128 or 256 rows; short images share one.
Memory, in units of M*H*D: forward reads 3, writes 1; backward reads 4, writes 3. Beside qkv one fp32 number per token
and head is kept for the backward pass; the output is not.
Rotary positions (RoFormer, arXiv:2104.09864): queries and keys are turned as they are loaded, and their gradients
turned back as they are stored, so that none is in memory a second time. The tables, of one image, come from the L2.
Dtypes: bf16 and fp16 in and out; statistics and sums in fp32. fp32 and fp64 take the plain form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastdino_kernels import reference
from fastdino_kernels.checks import check_floating, check_same_device, check_shape
from fastdino_kernels.launch import ARCHS, INTERPRETED, LAUNCH, AotCase, Launch, on_own_device, tl, triton, use_triton

BLOCKS, HEAD_DIMS = (64, 128, 256), (16, 32, 64)
HALF = (torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(1.4426950408889634)  # the exponential is exp2's


# A tile holds BLOCK // N whole images, fewer at the end: their first row and how many rows they have. That an image
# alone has N is said in so many words, for then the compiler drops what would be masked: a fifth of 197's columns.
@triton.jit
def _tile(first_row, n_images, H: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) // H * (BLOCK // N)
    start = first_row + tl.cast(first, tl.int64) * N
    return start, N if BLOCK // N == 1 else tl.minimum(BLOCK // N, n_images - first) * N


# Which keys a query attends to: its image's. In a tile of one image that is all of its rows.
@triton.jit
def _same_image(queries, keys, rows, N: tl.constexpr, BLOCK: tl.constexpr):
    seen = keys < rows
    if BLOCK // N > 1:
        seen = seen & (queries // N == keys // N)
    return seen


# Where tables (N, D / 2) have the rows of a tile: those of one image serve all.
@triton.jit
def _places(rows, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    return (rows % N if BLOCK // N > 1 else rows) * (D // 2)


# Rows of queries, keys or values. TURNED: x1 cos - x2 sin, x2 cos + x1 sin of the halves of the channels; each half is
# read again as the other's partner, from L1.
@triton.jit
def _load(
    ptr, rows, mask, sin_ptr, cos_ptr,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    d, row_at = tl.arange(0, D)[None, :], rows[:, None] * (3 * H * D)
    x = tl.load(ptr + (row_at + d), mask=mask[:, None], other=0.0)
    if TURNED:
        partner = tl.load(ptr + (row_at + (d + D // 2) % D), mask=mask[:, None], other=0.0).to(tl.float32)
        table_at = _places(rows, N, D, BLOCK)[:, None] + d % (D // 2)
        sin = tl.load(sin_ptr + table_at, mask=mask[:, None], other=0.0)
        cos = tl.load(cos_ptr + table_at, mask=mask[:, None], other=0.0)
        x = (x.to(tl.float32) * cos + tl.where(d < D // 2, -partner, partner) * sin).to(x.dtype)
    return x


# A gradient of such rows, turned back.
@triton.jit
def _turned_back(grad, rows, mask, sin_ptr, cos_ptr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    table_at = _places(rows, N, D, BLOCK)[:, None] + tl.arange(0, D // 2)[None, :]
    sin = tl.load(sin_ptr + table_at, mask=mask[:, None], other=0.0)
    cos = tl.load(cos_ptr + table_at, mask=mask[:, None], other=0.0)
    first, second = tl.split(tl.permute(tl.reshape(grad, (rows.shape[0], 2, D // 2)), (0, 2, 1)))
    halves = tl.join(first * cos + second * sin, second * cos - first * sin)
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (rows.shape[0], D))


# A program is a tile and a head; heads of a tile follow one another. Reads 3*M*H*D, writes M*H*D + M*H fp32.
@triton.jit
def _short_attention_fwd_kernel(
    qkv_ptr,  # (M, 3, H, D)
    sin_ptr,  # (N, D / 2) fp32, TURNED
    cos_ptr,
    out_ptr,  # (M, H, D)
    lse_ptr,  # (H, M) fp32: log2 of the sum of exp2 of the scaled scores
    n_tokens,  # M
    first_row,  # of the images
    n_images,
    scale,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TURNED: tl.constexpr,
):
    start, rows = _tile(first_row, n_images, H, N, BLOCK)
    head, d, keys = tl.program_id(0) % H, tl.arange(0, D), tl.arange(0, BLOCK)
    qkv_ptr += start * (3 * H * D) + head * D
    out_ptr += start * (H * D) + head * D
    lse_ptr += tl.cast(head, tl.int64) * n_tokens + start
    k = _load(qkv_ptr + H * D, keys, keys < rows, sin_ptr, cos_ptr, N, H, D, BLOCK, TURNED)
    v = _load(qkv_ptr + 2 * H * D, keys, keys < rows, sin_ptr, cos_ptr, N, H, D, BLOCK, False)
    for first in range(0, rows, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        mask = queries < rows
        q = _load(qkv_ptr, queries, mask, sin_ptr, cos_ptr, N, H, D, BLOCK, TURNED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = _same_image(queries[:, None], keys[None, :], rows, N, BLOCK)
        scores = tl.where(seen, scores, float("-inf"))
        # Rows behind the last may see no key, and -inf - -inf is NaN.
        top = tl.where(mask, tl.max(scores, axis=1), 0.0) * (scale * LOG2E)
        probs = tl.exp2(scores * (scale * LOG2E) - top[:, None])
        total = tl.where(mask, tl.sum(probs, axis=1), 1.0)
        out = tl.dot(probs.to(v.dtype), v, input_precision="ieee") / total[:, None]
        tl.store(out_ptr + queries[:, None] * (H * D) + d[None, :], out, mask=mask[:, None])
        tl.store(lse_ptr + queries, top + tl.log2(total), mask=mask)


# Keys along the rows, queries along the columns: scores need no exchange to be the left operands of the products with
# grad and q, and an image of 197 tokens wastes 27 queries of the last block, not 59.
# Reads 4*M*H*D + M*H fp32, writes 3*M*H*D; with SUMS 3*H*D fp32 a tile: what a bias of qkv's linear map needs.
@triton.jit
def _short_attention_bwd_kernel(
    grad_ptr,  # (M, H, D)
    qkv_ptr,  # (M, 3, H, D)
    sin_ptr,  # (N, D / 2) fp32, TURNED
    cos_ptr,
    lse_ptr,  # (H, M) fp32
    grad_qkv_ptr,  # (M, 3, H, D)
    part_ptr,  # (tiles, 3, H, D) fp32, or not written: grad_qkv, summed over a tile's tokens
    n_tokens,
    first_row,
    n_images,
    scale,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SUMS: tl.constexpr,
    TURNED: tl.constexpr,
):
    start, rows = _tile(first_row, n_images, H, N, BLOCK)
    head, d, keys = tl.program_id(0) % H, tl.arange(0, D), tl.arange(0, BLOCK)
    qkv_ptr += start * (3 * H * D) + head * D
    grad_qkv_ptr += start * (3 * H * D) + head * D
    grad_ptr += start * (H * D) + head * D
    lse_ptr += tl.cast(head, tl.int64) * n_tokens + start
    part_ptr += tl.cast(tl.program_id(0) // H, tl.int64) * (3 * H * D) + head * D
    key_at = keys[:, None] * (3 * H * D) + d[None, :]
    k = _load(qkv_ptr + H * D, keys, keys < rows, sin_ptr, cos_ptr, N, H, D, BLOCK, TURNED)
    v = _load(qkv_ptr + 2 * H * D, keys, keys < rows, sin_ptr, cos_ptr, N, H, D, BLOCK, False)
    grad_k, grad_v = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    sum_q = tl.zeros((D, BLOCK_Q), tl.float32)
    for first in range(0, rows, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        mask = queries < rows
        q = _load(qkv_ptr, queries, mask, sin_ptr, cos_ptr, N, H, D, BLOCK, TURNED)
        grad = tl.load(grad_ptr + queries[:, None] * (H * D) + d[None, :], mask=mask[:, None], other=0.0)
        lse = tl.load(lse_ptr + queries, mask=mask, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        seen = _same_image(queries[None, :], keys[:, None], rows, N, BLOCK)
        probs = tl.where(seen, tl.exp2(scores * (scale * LOG2E) - lse[None, :]), 0.0)
        grad_probs = tl.dot(v, tl.trans(grad), input_precision="ieee")
        # sum(probs * grad_probs) is also sum(out * grad), but the output need not be read for it.
        inner = tl.sum(probs * grad_probs, axis=0)
        grad_scores = (probs * (grad_probs - inner[None, :])).to(q.dtype)
        grad_v = tl.dot(probs.to(q.dtype), grad, grad_v, input_precision="ieee")
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
        grad_q = tl.dot(tl.trans(k), grad_scores, input_precision="ieee") * scale  # (D, BLOCK_Q)
        if TURNED:
            grad_q = tl.trans(_turned_back(tl.trans(grad_q), queries, mask, sin_ptr, cos_ptr, N, D, BLOCK))
        tl.store(grad_qkv_ptr + queries[None, :] * (3 * H * D) + d[:, None], grad_q, mask=mask[None, :])
        if SUMS:
            sum_q += grad_q
    grad_k *= scale
    if TURNED:
        grad_k = _turned_back(grad_k, keys, keys < rows, sin_ptr, cos_ptr, N, D, BLOCK)
    tl.store(grad_qkv_ptr + H * D + key_at, grad_k, mask=(keys < rows)[:, None])
    tl.store(grad_qkv_ptr + 2 * H * D + key_at, grad_v, mask=(keys < rows)[:, None])
    if SUMS:  # in all three the rows behind the last are zeros
        tl.store(part_ptr + d, tl.sum(sum_q, axis=1))
        tl.store(part_ptr + H * D + d, tl.sum(grad_k, axis=0))
        tl.store(part_ptr + 2 * H * D + d, tl.sum(grad_v, axis=0))


# Of CLS alone as a query: keys N, those behind the last at zero.
@triton.jit
def _cls_probs(q, k, keys, scale, N: tl.constexpr):
    scores = tl.where(keys < N, tl.sum(k.to(tl.float32) * q[None, :], axis=1), float("-inf"))
    probs = tl.exp2((scores - tl.max(scores, axis=0)) * (scale * LOG2E))
    return probs / tl.sum(probs, axis=0)


# A program is an image and a head; nothing is worth a tensor core. Reads 2*M*H*D, writes n*H*D.
@triton.jit
def _cls_attention_fwd_kernel(
    q_ptr,  # (n, H, D)
    kv_ptr,  # (M, 2, H, D)
    out_ptr,  # (n, H, D)
    first_row,
    first_image,
    scale,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, head = tl.cast(tl.program_id(0) // H, tl.int64), tl.program_id(0) % H
    d, keys = tl.arange(0, D), tl.arange(0, BLOCK)
    q_at = (first_image + image) * (H * D) + head * D + d
    kv_ptr += (first_row + image * N) * (2 * H * D) + head * D
    at, mask = keys[:, None] * (2 * H * D) + d[None, :], (keys < N)[:, None]
    k = tl.load(kv_ptr + at, mask=mask, other=0.0)
    v = tl.load(kv_ptr + H * D + at, mask=mask, other=0.0)
    probs = _cls_probs(tl.load(q_ptr + q_at).to(tl.float32), k, keys, scale, N)
    tl.store(out_ptr + q_at, tl.sum(probs[:, None] * v.to(tl.float32), axis=0))


# Reads 2*M*H*D, writes 2*M*H*D; the probabilities are computed again. SUMS: as above.
@triton.jit
def _cls_attention_bwd_kernel(
    grad_ptr,  # (n, H, D)
    q_ptr,  # (n, H, D)
    kv_ptr,  # (M, 2, H, D)
    grad_q_ptr,  # (n, H, D)
    grad_kv_ptr,  # (M, 2, H, D)
    part_ptr,  # (n, 2, H, D) fp32, or not written: grad_kv, summed over an image's tokens
    first_row,
    first_image,
    scale,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    image, head = tl.cast(tl.program_id(0) // H, tl.int64), tl.program_id(0) % H
    d, keys = tl.arange(0, D), tl.arange(0, BLOCK)
    q_at = (first_image + image) * (H * D) + head * D + d
    kv_ptr += (first_row + image * N) * (2 * H * D) + head * D
    grad_kv_ptr += (first_row + image * N) * (2 * H * D) + head * D
    at, mask = keys[:, None] * (2 * H * D) + d[None, :], (keys < N)[:, None]
    k = tl.load(kv_ptr + at, mask=mask, other=0.0)
    v = tl.load(kv_ptr + H * D + at, mask=mask, other=0.0)
    q, grad = tl.load(q_ptr + q_at).to(tl.float32), tl.load(grad_ptr + q_at).to(tl.float32)
    probs = _cls_probs(q, k, keys, scale, N)
    grad_probs = tl.sum(v.to(tl.float32) * grad[None, :], axis=1)
    grad_scores = probs * (grad_probs - tl.sum(probs * grad_probs, axis=0)) * scale
    tl.store(grad_kv_ptr + at, grad_scores[:, None] * q[None, :], mask=mask)
    tl.store(grad_kv_ptr + H * D + at, probs[:, None] * grad[None, :], mask=mask)
    if SUMS:
        part_ptr += (first_image + image) * (2 * H * D) + head * D + d
        tl.store(part_ptr, tl.sum(grad_scores, axis=0) * q)
        tl.store(part_ptr + H * D, tl.sum(probs, axis=0) * grad)
    tl.store(grad_q_ptr + q_at, tl.sum(grad_scores[:, None] * k.to(tl.float32), axis=0))


def _block(n_tokens: int) -> int:
    """Rows of a tile: the fewest of three that hold an image, and then as many images as fit."""
    return next(block for block in BLOCKS if n_tokens <= block)


@dataclass(frozen=True)
class _Group:
    """Images that are equally long: where their tokens begin, the first of them, how many they are, tokens of each; and
    where the places of one of them begin, in tables of all groups.
    """

    first_row: int
    first_image: int
    first_place: int
    n_images: int
    n_tokens: int

    @property
    def block(self) -> int:
        return _block(self.n_tokens)

    @property
    def n_tiles(self) -> int:
        return -(-self.n_images // (self.block // self.n_tokens))

    def tables(self, sin: Tensor | None, cos: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
        """Of one image; without any, a pointer that nothing reads."""
        if sin is None or cos is None:
            return unread, unread
        return sin[self.first_place :], cos[self.first_place :]


def _groups(flat: Sequence[int]) -> Iterator[_Group]:
    """From (images, tokens of each), one after another, as an operator takes them; without groups of no images."""
    row = image = place = 0
    for n_images, n_tokens in zip(flat[::2], flat[1::2]):
        if n_images:
            yield _Group(row, image, place, n_images, n_tokens)
        row, image, place = row + n_images * n_tokens, image + n_images, place + n_tokens


def _n_tiles(groups: Sequence[int]) -> int:
    return sum(group.n_tiles for group in _groups(groups))


def _launch(op: str, n_tokens: int, head_dim: int, arch: int, turned: bool = False) -> Launch:
    """arch: one of ARCHS. Caps on registers hold where these are enough: up to 208 tokens, whose columns are kept."""
    name = f"{op}{'_turned' * turned}_{_block(n_tokens)}"
    launch = LAUNCH.get(f"{name}_sm{arch}", LAUNCH[name])
    return launch if head_dim == 64 and n_tokens <= 208 else replace(launch, max_registers=None)


def _arch(device: torch.device) -> int:
    """The one of ARCHS that a device is, or is older than; the interpreter is Hopper."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return next((arch for arch in ARCHS if major <= arch // 10), ARCHS[-1])


def _can_turn(n_tokens: int, arch: int) -> bool:
    """Whether queries and keys are turned on chip. An A100 has 24 bytes too few registers with tiles of 256 rows."""
    return arch > 80 or _block(n_tokens) < 256


@torch.library.custom_op("fastdino::short_attention", mutates_args=())
@on_own_device
def _short_attention(
    qkv: Tensor, groups: Sequence[int], scale: float, sin: Tensor | None = None, cos: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    n_tokens, _, n_heads, head_dim = qkv.shape
    out = qkv.new_empty(n_tokens, n_heads, head_dim)
    lse = qkv.new_empty(n_heads, n_tokens, dtype=torch.float32)
    for group in _groups(groups):
        launch = _launch("short_attention_fwd", group.n_tokens, head_dim, _arch(qkv.device), sin is not None)
        _short_attention_fwd_kernel[(group.n_tiles * n_heads,)](
            qkv, *group.tables(sin, cos, qkv), out, lse, n_tokens, group.first_row, group.n_images, scale,
            group.n_tokens, n_heads, head_dim, group.block, launch.block, sin is not None,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
            maxnreg=launch.max_registers,
        )  # fmt: skip
    return out, lse


@_short_attention.register_fake
def _(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    n_tokens, _, n_heads, head_dim = qkv.shape
    return qkv.new_empty(n_tokens, n_heads, head_dim), qkv.new_empty(n_heads, n_tokens, dtype=torch.float32)


@torch.library.custom_op("fastdino::short_attention_backward", mutates_args=())
@on_own_device
def _short_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    lse: Tensor,
    groups: Sequence[int],
    scale: float,
    with_sums: bool = False,
    sin: Tensor | None = None,
    cos: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """grad_qkv, (M, 3, H, D), and its sums over each tile's tokens, (tiles, 3, H, D) fp32; else (0, 3, H, D)."""
    grad, qkv = grad.contiguous(), qkv.contiguous()
    n_tokens, _, n_heads, head_dim = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    part = qkv.new_empty(_n_tiles(groups) if with_sums else 0, 3, n_heads, head_dim, dtype=torch.float32)
    first_tile = 0
    for group in _groups(groups):
        launch = _launch("short_attention_bwd", group.n_tokens, head_dim, _arch(qkv.device), sin is not None)
        _short_attention_bwd_kernel[(group.n_tiles * n_heads,)](
            grad, qkv, *group.tables(sin, cos, qkv), lse, grad_qkv, part[first_tile:],
            n_tokens, group.first_row, group.n_images, scale,
            group.n_tokens, n_heads, head_dim, group.block, launch.block, with_sums, sin is not None,
            num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.max_registers,
        )  # fmt: skip
        first_tile += group.n_tiles
    return grad_qkv, part


@_short_attention_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, lse: Tensor, groups: Sequence[int], scale: float, with_sums: bool = False, *tables: Any
) -> tuple[Tensor, Tensor]:
    part = qkv.new_empty(_n_tiles(groups) if with_sums else 0, *qkv.shape[1:], dtype=torch.float32)
    return qkv.new_empty(qkv.shape), part


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, ctx.groups, ctx.scale, sin, cos = inputs
    ctx.save_for_backward(qkv, output[1], sin, cos)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, unused: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    qkv, lse, sin, cos = ctx.saved_tensors
    grads, _ = _short_attention_backward(grad, qkv, lse, ctx.groups, ctx.scale, False, sin, cos)
    return grads, None, None, None, None


_short_attention.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("fastdino::cls_attention", mutates_args=())
@on_own_device
def _cls_attention(q: Tensor, kv: Tensor, groups: Sequence[int], scale: float) -> Tensor:
    q, kv = q.contiguous(), kv.contiguous()
    out, (_, n_heads, head_dim) = torch.empty_like(q), q.shape
    for group in _groups(groups):
        launch = LAUNCH[f"cls_attention_{group.block}"]
        _cls_attention_fwd_kernel[(group.n_images * n_heads,)](
            q, kv, out, group.first_row, group.first_image, scale, group.n_tokens, n_heads, head_dim, group.block,
            num_warps=launch.num_warps,
        )  # fmt: skip
    return out


@_cls_attention.register_fake
def _(q: Tensor, kv: Tensor, groups: Sequence[int], scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("fastdino::cls_attention_backward", mutates_args=())
@on_own_device
def _cls_attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, groups: Sequence[int], scale: float, with_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_q, (n, H, D), grad_kv, (M, 2, H, D), and its sums over each image's, (n, 2, H, D) fp32; else of none."""
    grad, q, kv = grad.contiguous(), q.contiguous(), kv.contiguous()
    grad_q, grad_kv, (n_images, n_heads, head_dim) = torch.empty_like(q), torch.empty_like(kv), q.shape
    part = kv.new_empty(n_images if with_sums else 0, 2, n_heads, head_dim, dtype=torch.float32)
    for group in _groups(groups):
        launch = LAUNCH[f"cls_attention_{group.block}"]
        _cls_attention_bwd_kernel[(group.n_images * n_heads,)](
            grad, q, kv, grad_q, grad_kv, part, group.first_row, group.first_image, scale,
            group.n_tokens, n_heads, head_dim, group.block, with_sums, num_warps=launch.num_warps,
        )  # fmt: skip
    return grad_q, grad_kv, part


@_cls_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, kv: Tensor, groups: Sequence[int], scale: float, with_sums: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    part = kv.new_empty(q.shape[0] if with_sums else 0, *kv.shape[1:], dtype=torch.float32)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), part


def _keep_cls(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, kv, ctx.groups, ctx.scale = inputs
    ctx.save_for_backward(q, kv)


def _backward_cls(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_cls_attention_backward(grad, *ctx.saved_tensors, ctx.groups, ctx.scale)[:2], None, None


_cls_attention.register_autograd(_backward_cls, setup_context=_keep_cls)


def why_not(head_dim: int, groups: Sequence[tuple[int, int]]) -> str | None:
    """What of such heads and images the kernels do not take, in words; None where they take all."""
    if head_dim not in HEAD_DIMS:
        return f"expected a head of {', '.join(map(str, HEAD_DIMS))} channels, got {head_dim}"
    if (longest := max([0, *(size for _, size in groups)])) > BLOCKS[-1]:
        return f"expected images of at most {BLOCKS[-1]} tokens, got {longest}"
    return None


def _check(name: str, x: Tensor, n_parts: int, groups: Sequence[tuple[int, int]]) -> None:
    check_floating(name, x)
    check_shape(name, x, ("M", n_parts, "H", "D"))
    for n_images, n_tokens in groups:
        if n_images < 0 or n_tokens < 1:
            raise ValueError(f"groups: expected images of 1 token or more, got {n_images} of {n_tokens}")
    if (n_tokens := sum(n * size for n, size in groups)) != x.shape[0]:
        raise ValueError(f"groups: expected {x.shape[0]} tokens, as {name} has, got {n_tokens}")
    if words := why_not(x.shape[-1], groups):
        raise ValueError(f"{name}: {words}")


def _takes(x: Tensor) -> bool:
    """fp32 only where the kernels are interpreted: its products would take no tensor core and twice the room."""
    return use_triton(x) and (x.dtype in HALF or INTERPRETED)


def short_attention(
    qkv: Tensor,
    groups: Sequence[tuple[int, int]],
    scale: float | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v within each image.

    qkv: (M, 3, H, D), tokens of all images one after another; D 16, 32 or 64. groups: (images, tokens of each) of
    images that are equally long, in this order; at most 256 tokens. scale: None for 1 / sqrt(D).
    rotation: sines and cosines, (S, D / 2) fp32 each, of the tokens of one image of each group, S in all: queries and
    keys are turned by them first, channel i with channel i + D / 2. No gradient goes to them.
    Returns (M, H, D), differentiable by qkv.
    Raises ValueError for another shape, dtype, width of a head or length of an image, and where the groups do not have
    M tokens.
    Source: Attention Is All You Need (arXiv:1706.03762), equation 1; RoFormer (arXiv:2104.09864), equation 34.
    """
    _check("qkv", qkv, 3, groups)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if rotation is not None:
        rotation = rotation[0].detach(), rotation[1].detach()
        for name, table in zip(("sin", "cos"), rotation):
            check_floating(name, table)
            check_shape(name, table, (sum(n_tokens for _, n_tokens in groups), qkv.shape[-1] // 2))
            check_same_device(qkv=qkv, **{name: table})
    if not _takes(qkv):
        return reference.short_attention(qkv, groups, scale, rotation)
    if rotation is not None and not all(_can_turn(n_tokens, _arch(qkv.device)) for _, n_tokens in groups):
        qkv, rotation = reference.turned(qkv, rotation, groups, n_turned=2), None
    sin, cos = (x.float().contiguous() for x in rotation) if rotation else (None, None)
    return _short_attention(qkv, [x for group in groups for x in group], scale, sin, cos)[0]


def cls_attention(q: Tensor, kv: Tensor, groups: Sequence[tuple[int, int]], scale: float | None = None) -> Tensor:
    """`short_attention` of one query per image, for the last block of a network of which only CLS is read.

    q: (images, H, D). kv: (M, 2, H, D), keys and values of all tokens. groups, scale, what is raised: as there.
    Returns (images, H, D), differentiable by q and kv.
    """
    _check("kv", kv, 2, groups)
    check_shape("q", q, (sum(n for n, _ in groups), *kv.shape[2:]))
    check_same_device(q=q, kv=kv)
    if q.dtype != kv.dtype:
        raise ValueError(f"q: expected {kv.dtype}, as kv has, got {q.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not _takes(kv):
        return reference.cls_attention(q, kv, groups, scale)
    return _cls_attention(q, kv, [x for group in groups for x in group], scale)


def aot_cases() -> Iterator[AotCase]:
    """ViT-S/16 at 224 and 96 pixels; B and L have the same heads, and more of them. 110 tokens: 168 pixels."""
    sizes = dict.fromkeys(("n_tokens", "first_row", "first_image", "n_images"), "i32")
    names = ["qkv", "sin", "cos", "out", "grad", "grad_qkv", "q", "kv", "grad_q", "grad_kv", "lse", "part"]
    pointers, fp32 = tuple(f"{name}_ptr" for name in names), ("lse_ptr", "part_ptr", "sin_ptr", "cos_ptr")
    kernels = {
        "short_attention_fwd": _short_attention_fwd_kernel,
        "short_attention_bwd": _short_attention_bwd_kernel,
        "cls_attention_fwd": _cls_attention_fwd_kernel,
        "cls_attention_bwd": _cls_attention_bwd_kernel,
    }
    heads = (("bf16", 64, False), ("bf16", 32, False), ("fp16", 64, False), ("bf16", 64, True))
    for (op, kernel), (dtype, head_dim, turned), n_tokens in product(kernels.items(), heads, (37, 110, 197)):
        if turned and "TURNED" not in kernel.arg_names:
            continue
        name = op if "short" in op else op[:-4]
        archs = [arch for arch in ARCHS if not turned or _can_turn(n_tokens, arch)]
        of_archs = {arch: _launch(name, n_tokens, head_dim, arch, turned) for arch in archs}
        for launch in dict.fromkeys(of_archs.values()):
            constants = {"N": n_tokens, "H": 6, "D": head_dim, "BLOCK": _block(n_tokens), "BLOCK_Q": launch.block}
            constants |= {"SUMS": True, "TURNED": turned}
            types = {**{name: f"*{dtype}" for name in pointers}, **dict.fromkeys(fp32, "*fp32")}
            yield AotCase(
                name=f"{op} {dtype} D{head_dim} N{n_tokens}{' turned' * turned}",
                kernel=kernel,
                signature={**types, **sizes, "scale": "fp32"},
                constexprs={name: x for name, x in constants.items() if name in kernel.arg_names},
                aligned=(*pointers, "n_tokens", "first_row", "first_image", "n_images"),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                max_registers=launch.max_registers,
                archs=tuple(arch for arch, x in of_archs.items() if x == launch),
            )
