"""Attention forward and backward over the packed crops of a step: 197 tokens of each global, 37 of each local.

Every provider gets q, k, v (M, H, D) as the model has them, views of one (M, 3, H, D). Checked against fp64 on a small
batch, gradients included.
Axes: M tokens of all images, N tokens of an image, H heads, D channels of a head.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure import DEVICE, ON_GPU, QUICK, require
from fastdino.model import attention
from fastdino.model.attention import Packing
from fastdino.model.attention_choice import why_not

HEAD_DIM = 64
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
HEADS = (6, 12) if ON_GPU or not QUICK else (3,)
BATCH = 64 if ON_GPU else 1 if QUICK else 4
N_LOCAL = 8


def packing(batch: int) -> Packing:
    return Packing(((2 * batch, 197), (N_LOCAL * batch, 37)))


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, images: Packing) -> list[Tensor]:
    """The probabilities written to memory, per resolution."""
    outputs = []
    for group in zip(images.split(q), images.split(k), images.split(v)):
        query, key, value = (x.transpose(1, 2) for x in group)
        out = (query @ key.transpose(-2, -1) * scale).softmax(-1) @ value
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs


def forced(kernel: SDPBackend) -> attention.AttentionOp:
    def run(*arguments: Any) -> list[Tensor]:
        with sdpa_kernel(kernel):
            try:
                return attention.sdpa(*arguments)
            except RuntimeError as error:
                pytest.skip(f"refused by PyTorch: {str(error).splitlines()[0]}")

    return run


PROVIDERS: dict[str, attention.AttentionOp] = {
    "plain": plain,
    **{name: backend.run for name, backend in attention.BACKENDS.items()},
    "sdpa flash": forced(SDPBackend.FLASH_ATTENTION),
    "sdpa efficient": forced(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn": forced(SDPBackend.CUDNN_ATTENTION),
}


def inputs(batch: int, heads: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    shape = (sum(packing(batch).sizes), 3, heads, HEAD_DIM)
    return torch.randn(shape, device=DEVICE).to(DTYPE).to(dtype).requires_grad_()


def both_ways(op: attention.AttentionOp, qkv: Tensor, images: Packing) -> Callable[[], list[Tensor]]:
    """Outputs in parts, and the gradient of qkv."""
    upstream = torch.ones_like(qkv[:, 0])

    def run() -> list[Tensor]:
        parts = op(*qkv.unbind(1), HEAD_DIM**-0.5, images)
        return [*parts, *torch.autograd.grad(parts, qkv, upstream.split([len(part) for part in parts]))]

    return run


@pytest.mark.parametrize("heads", HEADS, ids=lambda n: f"B{BATCH} 2x197+{N_LOCAL}x37 H{n}")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_crops(provider: str, heads: int, timed: Any) -> None:
    if provider in attention.BACKENDS and (reason := why_not(provider, DEVICE.type, DTYPE)):
        pytest.skip(reason)
    if provider.startswith("sdpa ") and not ON_GPU:
        pytest.skip("a choice of kernels that only CUDA has")
    op = PROVIDERS[provider]
    runs = (
        both_ways(way, inputs(2, heads, dtype), packing(2))()
        for way, dtype in ((plain, torch.float64), (plain, DTYPE), (op, DTYPE))
    )
    for truth, rounded, ours in zip(*((torch.cat(parts), gradient) for *parts, gradient in runs)):
        allowed = 2 * (rounded - truth).abs().max() + 2 * torch.finfo(DTYPE).eps * truth.abs().max()
        error = (ours - truth).abs().max()
        require(error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}")
    images = packing(BATCH)
    n_words = sum(images.sizes) * heads * HEAD_DIM
    # Forward reads q, k, v and writes out; backward reads those and the gradient of out, and writes three more.
    n_bytes = 12 * n_words * DTYPE.itemsize
    # Two products forward, twice as many backward; a product is 2 * N * N * D per head and image.
    n_flops = 3 * 2 * sum(2 * n * tokens**2 * HEAD_DIM * heads for n, tokens in images.groups)
    run = both_ways(op, inputs(BATCH, heads, DTYPE), images)
    timed(run, n_bytes=n_bytes, n_flops=n_flops, dtype="bf16" if ON_GPU else "fp32")
