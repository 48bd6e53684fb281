"""Attention and MLP forward and backward over the packed crops of a step: 197 tokens of each global, 37 of each local.

Every provider gets q, k, v as the model has them, one (M, 3, H, D).
Axes: M tokens of all images, N tokens of an image, H heads, D channels of a head.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import DEVICE, ON_GPU
from bench.test_ops import DTYPE, MAIN, Way, check, compiled, with_gradients
from fastdino.model import attention
from fastdino.model.attention import Packing
from fastdino.model.attention_choice import why_not
from fastdino.model.rope import Rotation
from fastdino_kernels import mlp, reference

HEAD_DIM, N_LOCAL = 64, 8
HEADS, BATCH = ((6, 12), 64) if ON_GPU else ((3,), 4)
WAYS = [pytest.param(name, False, id=name) for name in ("plain", *(f"ours {name}" for name in attention.BACKENDS))]
WAYS += [pytest.param(name, True, id=f"{name}-turned") for name in ("plain", "ours ours", "ours sdpa compiled")]


def plain(qkv: Tensor, scale: float, images: Packing, rotation: Rotation | None = None) -> list[Tensor]:
    """The probabilities written to memory, per resolution."""
    qkv = attention.turned(qkv, rotation, images)
    groups = zip(*([part.transpose(1, 2) for part in images.split(x)] for x in qkv.unbind(1)))
    outputs = ((query @ key.transpose(-2, -1) * scale).softmax(-1) @ value for query, key, value in groups)
    return [out.transpose(1, 2).flatten(0, 1) for out in outputs]


def both_ways(provider: str, batch: int, heads: int, turned: bool, dtype: torch.dtype = DTYPE) -> Way:
    """Outputs in parts, and the gradient of q, k, v. turned: queries and keys, by rotary positions."""
    torch.manual_seed(0)
    op = plain if provider == "plain" else attention.BACKENDS[provider.split()[1]].attend
    op, angles = compiled(op) if "compiled" in provider else op, torch.randn(197 + 37, HEAD_DIM // 2, device=DEVICE)
    rotation = Rotation(angles.sin(), angles.cos()) if turned else None
    images = Packing(((2 * batch, 197), (N_LOCAL * batch, 37)))
    qkv = torch.randn(sum(images.sizes), 3, heads, HEAD_DIM, device=DEVICE).to(DTYPE).to(dtype)
    return with_gradients(lambda: op(qkv, HEAD_DIM**-0.5, images, rotation), [qkv], torch.ones_like(qkv[:, 0]))


@pytest.mark.parametrize("heads", HEADS, ids=lambda n: f"B{BATCH} 2x197+{N_LOCAL}x37 H{n}")
@pytest.mark.parametrize(("provider", "turned"), WAYS)
def test_crops(provider: str, turned: bool, heads: int, timed: Any) -> None:
    if provider != "plain" and (reason := why_not(provider.split()[1], DEVICE.type, DTYPE)):
        pytest.skip(reason)
    cases = (provider, 2, heads, turned), ("plain", 2, heads, turned, torch.float64), ("plain", 2, heads, turned)
    ways = [both_ways(*case) for case in cases]
    check(*([torch.cat(parts), gradient] for *parts, gradient in (way() for way in ways)))
    # Forward reads q, k, v and writes out; backward reads those and the gradient of out, and writes three more.
    n_bytes = 12 * BATCH * (2 * 197 + N_LOCAL * 37) * heads * HEAD_DIM * DTYPE.itemsize
    # Two products forward, twice as many backward; a product is 2 * N * N * D per head and image.
    n_flops = 3 * 2 * 2 * BATCH * (2 * 197**2 + N_LOCAL * 37**2) * HEAD_DIM * heads
    timed(both_ways(provider, BATCH, heads, turned), n_bytes=n_bytes, n_flops=n_flops, dtype=MAIN.dtype)


def mlp_both_ways(provider: str, batch: int, width: int, dtype: torch.dtype = DTYPE) -> Way:
    """y, and the gradients of x and of both maps' weights and biases."""
    torch.manual_seed(0)
    op = {"ours": mlp, "plain": reference.mlp}.get(provider) or compiled(reference.mlp)
    shapes = (batch * (2 * 197 + N_LOCAL * 37), width), (4 * width, width), (4 * width,), (width, 4 * width), (width,)
    values = [torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5 for shape in shapes]
    inputs = [x.to(DTYPE).to(dtype) for x in values]
    return with_gradients(lambda: [op(*inputs)], inputs, torch.ones_like(inputs[0]))


@pytest.mark.parametrize("heads", HEADS, ids=lambda n: f"B{BATCH} 2x197+{N_LOCAL}x37 D{n * HEAD_DIM}")
@pytest.mark.parametrize("provider", ["ours", "plain", "compiled"])
def test_mlp(provider: str, heads: int, timed: Any) -> None:
    width, n_tokens = heads * HEAD_DIM, BATCH * (2 * 197 + N_LOCAL * 37)
    ways = (provider, 2, width), ("plain", 2, width, torch.float64), ("plain", 2, width)
    check(*(mlp_both_ways(*way)() for way in ways))
    # In D: x, 4 before GELU, 4 behind it written and read by the second map, y. Backward reads x and the first 4, makes
    # the second 4 and their gradient, each read by two maps, reads y's gradient twice and writes x's.
    n_bytes = (1 + 4 + 8 + 1 + 1 + 4 + 12 + 4 + 3) * n_tokens * width * DTYPE.itemsize
    n_flops = 3 * 2 * 8 * n_tokens * width**2  # two maps of 4 D * D; backward twice that
    timed(mlp_both_ways(provider, BATCH, width), n_bytes=n_bytes, n_flops=n_flops, dtype=MAIN.dtype)
