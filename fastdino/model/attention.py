"""Attention behind one function: q, k, v (B, N, H, D) -> (B, N, H, D). The only module that imports xformers.

Axes: B images, N tokens, H heads, D channels of a head.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# (B, N, H, D) three times, scale -> (B, N, H, D)
AttentionOp = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which wants the heads before the tokens."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def _load_cuda12_runtime() -> None:
    """Make libcudart.so.12 visible: the xformers wheel is built for CUDA 12 and, under a CUDA 13 PyTorch, would
    otherwise switch itself off with no more than a warning.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for library in (Path(root) / "cuda_runtime" / "lib").glob("libcudart.so.12*"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


@cache
def xformers_attention() -> AttentionOp | None:
    """xformers' memory-efficient attention (layout as ours), or None where its CUDA kernels do not load."""
    if not torch.cuda.is_available() or importlib.util.find_spec("xformers") is None:
        return None
    _load_cuda12_runtime()
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 64, device="cuda", dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, OSError, RuntimeError):
        return None
    return lambda q, k, v, scale: memory_efficient_attention(q, k, v, scale=scale)


def attention_op(device_type: str, dtype: torch.dtype) -> AttentionOp:
    """What computes attention for tensors of this kind: xformers on CUDA where it loads, SDPA everywhere else.

    fp64, which no fused kernel takes, goes to SDPA too.
    """
    fused = xformers_attention() if device_type == "cuda" and dtype != torch.float64 else None
    return fused or sdpa


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v.

    q, k, v: (B, N, H, D). Returns (B, N, H, D). Source: Attention Is All You Need (arXiv:1706.03762), equation 1.
    """
    return attention_op(q.device.type, q.dtype)(q, k, v, scale)
