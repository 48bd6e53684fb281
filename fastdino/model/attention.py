"""Attention over packed tokens, behind one function. The only module that imports xformers.

Crops of several resolutions lie one after another in one matrix of tokens, so that linears and norms run once for all
of them; only attention has to know where an image ends. `Packing` tells it.
Axes: M tokens of all images, n images of a group, N tokens of an image, H heads, D channels of a head.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HALF = (torch.float16, torch.bfloat16)


class Packing(NamedTuple):
    """Groups of equally large images in a token matrix, one group after another: (n images, N tokens of each)."""

    groups: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return [n_images * n_tokens for n_images, n_tokens in self.groups]

    def split(self, tokens: Tensor) -> list[Tensor]:
        """(M, ...) -> (n, N, ...) per group, without a copy."""
        return [part.unflatten(0, group) for part, group in zip(tokens.split(self.sizes), self.groups)]

    def cls(self, tokens: Tensor) -> Tensor:
        """(M, ...) -> (images, ...): the first token of every image."""
        return torch.cat([group[:, 0] for group in self.split(tokens)])

    def per_token(self, values: Tensor) -> Tensor:
        """(images,) -> (M, 1): each image's value, for every token of it."""
        parts = values.split([n for n, _ in self.groups])
        return torch.cat([x[:, None].expand(group).flatten() for x, group in zip(parts, self.groups)])[:, None]


# q, k, v (M, H, D), scale, packing -> (M, H, D)
AttentionOp = Callable[[Tensor, Tensor, Tensor, float, Packing], Tensor]


def _by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> Tensor:
    """PyTorch's scaled_dot_product_attention, a call per group: runs everywhere, in every dtype.

    But not in half precision on a CPU: there PyTorch's kernel takes 18.0 and 14.3 ms, matrix products by hand 10.5 and
    3.6, their probabilities computed twice (forward and backward of 3 heads, 8 images of 197 tokens and 32 of 37; one
    core of an AMD EPYC with avx512_bf16, torch 2.13, November 2026).
    """
    outputs = []
    for group in zip(packing.split(q), packing.split(k), packing.split(v)):
        query, key, value = (x.transpose(1, 2) for x in group)
        if q.device.type != "cpu" or q.dtype not in HALF:
            out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        elif torch.is_grad_enabled():
            out = checkpoint(_by_hand, query, key, value, scale, use_reentrant=False, preserve_rng_state=False)
        else:
            out = _by_hand(query, key, value, scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _load_cuda12_runtime() -> None:
    """Make libcudart.so.12 visible: the xformers wheel is built for CUDA 12 and, under a CUDA 13 PyTorch, would
    otherwise switch itself off with no more than a warning.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for library in (Path(root) / "cuda_runtime" / "lib").glob("libcudart.so.12*"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


# What tells a kernel where images end, per packing and device. Made before a compiler traces or a graph captures
# (`prepare`), because making one copies lengths to the device.
_MASKS: dict[tuple[Packing, torch.device], Any] = {}
_BOUNDARIES: dict[tuple[Packing, torch.device], Tensor] = {}


def _block_diagonal_mask(packing: Packing, device: torch.device) -> Any:
    if (packing, device) not in _MASKS:
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        lengths = [n_tokens for n_images, n_tokens in packing.groups for _ in range(n_images)]
        _MASKS[packing, device] = BlockDiagonalMask.from_seqlens(lengths, device=device)
    return _MASKS[packing, device]


def _boundaries(packing: Packing, device: torch.device) -> Tensor:
    """(images + 1,) int32: where each image begins, and the end."""
    if (packing, device) not in _BOUNDARIES:
        lengths = [n_tokens for n_images, n_tokens in packing.groups for _ in range(n_images)]
        _BOUNDARIES[packing, device] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return _BOUNDARIES[packing, device]


def prepare(backend: str, packing: Packing, device: torch.device) -> None:
    """Make what a backend needs for a packing."""
    if backend == "xformers":
        _block_diagonal_mask(packing, device)
    elif backend == "varlen":
        _boundaries(packing, device)


def xformers(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> Tensor:
    """xformers' memory-efficient attention over all groups in one call."""
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal_mask(packing, q.device)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]


def varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> Tensor:
    """torch.nn.attention.varlen over all groups in one call. A scale of its own is folded into q: it takes none yet."""
    from torch.nn.attention.varlen import varlen_attn

    starts = _boundaries(packing, q.device)
    longest = max(n_tokens for _, n_tokens in packing.groups)
    q = q * (scale * q.shape[-1] ** 0.5) if scale != q.shape[-1] ** -0.5 else q
    out = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(out, Tensor)
    return out


BACKENDS: dict[str, AttentionOp] = {"xformers": xformers, "varlen": varlen, "sdpa": sdpa}


@cache
def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on such tensors here, in words; None where it can. Tries it once, both ways."""
    if backend == "sdpa":
        return None
    if device_type != "cuda":
        return f"{backend} has kernels for CUDA only, and the model is on {device_type}"
    if dtype not in (HALF if backend == "varlen" else (*HALF, torch.float32)):
        return f"{backend} has no kernel for {str(dtype).removeprefix('torch.')}"
    try:
        if backend == "xformers":
            if importlib.util.find_spec("xformers") is None:
                return "xformers is not installed"
            _load_cuda12_runtime()
        probe = torch.zeros(16, 1, 64, device="cuda", dtype=dtype, requires_grad=True)
        BACKENDS[backend](probe, probe, probe, 0.125, Packing(((2, 8),))).sum().backward()
    except Exception as error:  # a missing module, library or kernel, each with an exception of its own
        return f"{backend} does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def _time_ms(backend: str, packing: Packing, n_heads: int, head_dim: int, dtype: torch.dtype) -> float:
    """Median of five runs forward and backward on the GPU."""
    q, k, v = torch.randn(3, sum(packing.sizes), n_heads, head_dim, device="cuda", dtype=dtype).unbind()
    q.requires_grad_()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        BACKENDS[backend](q, k, v, head_dim**-0.5, packing).sum().backward()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[2]


def check(asked: str, device_type: str, dtype: torch.dtype) -> None:
    """Raises ValueError for a name that is none, and where the backend asked for cannot run here: what is missing."""
    if asked == "auto":
        return
    if asked not in BACKENDS:
        raise ValueError(f"attention: expected auto, {', '.join(BACKENDS)}, got {asked!r}")
    if reason := why_not(asked, device_type, dtype):
        raise ValueError(f"attention: {reason}")


@cache
def choose(
    packing: Packing, n_heads: int, head_dim: int, device_type: str, dtype: torch.dtype, asked: str = "auto"
) -> tuple[str, str]:
    """(backend, why): the one asked for, or under `auto` the fastest that runs on these shapes, timed once.

    Raises ValueError as `check` does.
    """
    check(asked, device_type, dtype)
    if asked != "auto":
        return asked, "as asked"
    reasons = {name: why_not(name, device_type, dtype) for name in BACKENDS}
    usable = [name for name, reason in reasons.items() if reason is None]
    if len(usable) == 1:
        return usable[0], "; ".join(reason for reason in reasons.values() if reason)
    times = {name: _time_ms(name, packing, n_heads, head_dim, dtype) for name in usable}
    return min(usable, key=times.__getitem__), ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())


class _Current:
    """The backend that models use on CUDA for what it can take; None: the first that works."""

    name: str | None = None


def use_backend(name: str | None) -> None:
    """Set the backend of all models in this process: a name of BACKENDS; None for the first that works."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {name!r}")
    _Current.name = name


def attention_op(device_type: str, dtype: torch.dtype) -> AttentionOp:
    """What computes attention of such tensors: the backend in use where it can, else SDPA (CPU, fp64)."""
    if _Current.name is None and torch.compiler.is_compiling():
        return sdpa  # a compiler cannot try things out
    if device_type == "cuda" and dtype != torch.float64:
        name = _Current.name or "xformers"
        if torch.compiler.is_compiling() or why_not(name, device_type, dtype) is None:
            return BACKENDS[name]
    return sdpa


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """softmax(scale * q k^T) v, within each image.

    q, k, v: (M, H, D). Returns the (M, H, D) in parts, as they were computed: joined, they would be kept twice for the
    backward pass. Source: Attention Is All You Need (arXiv:1706.03762), equation 1.
    """
    op = attention_op(q.device.type, q.dtype)
    if op is not sdpa:
        return [op(q, k, v, scale, packing)]
    sizes = packing.sizes
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), packing.groups)
    return [sdpa(q, k, v, scale, Packing((group,))) for q, k, v, group in parts]
