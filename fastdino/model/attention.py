"""Attention over packed tokens, behind one function. The only module that imports xformers.

Crops of several resolutions lie one after another in one matrix of tokens, so that linears and norms run once for all
of them; only attention has to know where an image ends. `Packing` tells it.
Axes: M tokens of all images, n images of a group, N tokens of an image, H heads, D channels of a head.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastdino.model.constant import constant
from fastdino.model.recompute import recomputed
from fastdino.model.rope import Rotation
from fastdino_kernels import cls_attention, short_attention
from fastdino_kernels.attention import why_not as why_not_ours
from fastdino_kernels.reference import turned as plainly_turned

HALF = (torch.float16, torch.bfloat16)


class Packing(NamedTuple):
    """Groups of equally large images in a token matrix, one group after another: (n images, N tokens of each)."""

    groups: tuple[tuple[int, int], ...]

    @property
    def n_images(self) -> int:
        """Of all groups."""
        return sum(n_images for n_images, _ in self.groups)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return [n_images * n_tokens for n_images, n_tokens in self.groups]

    @property
    def of_cls(self) -> "Packing":
        """How what `cls` returns is packed."""
        return Packing(tuple((n_images, 1) for n_images, _ in self.groups))

    def split(self, tokens: Tensor) -> list[Tensor]:
        """(M, ...) -> (n, N, ...) per group, without a copy."""
        return [part.unflatten(0, group) for part, group in zip(tokens.split(self.sizes), self.groups)]

    def cls(self, tokens: Tensor) -> Tensor:
        """(M, ...) -> (images, ...): the first token of every image."""
        return torch.cat([group[:, 0] for group in self.split(tokens)])

    def cls_rows(self, like: Tensor) -> Tensor:
        """(images,) where the first token of every image is, on the device of `like`."""
        starts = [0, *accumulate(self.sizes)]
        rows = [start + n * torch.arange(count, device=like.device) for start, (count, n) in zip(starts, self.groups)]
        return torch.cat(rows)

    def per_token(self, values: Tensor) -> Tensor:
        """(images,) -> (M, 1): each image's value, for every token of it."""
        parts = values.split([n for n, _ in self.groups])
        return torch.cat([x[:, None].expand(group).flatten() for x, group in zip(parts, self.groups)])[:, None]


def packed(groups: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """(n, N, ...) of each group -> the tokens of all, (M, ...), and where they lie."""
    packing = Packing(tuple((group.shape[0], group.shape[1]) for group in groups))
    return torch.cat([group.flatten(0, 1) for group in groups]), packing


def turned(x: Tensor, rotation: Rotation | None, packing: Packing | None, n_turned: int = 2) -> Tensor:
    """x with its first parts turned, each token by its place; x itself without a rotation. RoFormer (arXiv:2104.09864).

    x: (M, parts, H, D), or without a packing (n, N, parts, H, D); q and k are the first two of qkv.
    """
    return x if rotation is None else plainly_turned(x, rotation, packing and packing.groups, n_turned=n_turned)


# qkv (M, 3, H, D), scale, packing, rotation where it takes one -> (M, H, D) in parts, as they were computed
AttentionOp = Callable[..., list[Tensor]]
# The same of CLS alone: q (images, H, D), kv (M, 2, H, D), scale, packing -> (images, H, D)
ClsAttentionOp = Callable[[Tensor, Tensor, float, Packing], list[Tensor]]


def _by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v


def _one_resolution(qkv: Sequence[Tensor], scale: float) -> Tensor:
    """q, k, v, each (n, N, H, D) -> (n, N, H, D) by PyTorch's scaled_dot_product_attention: everywhere, in every dtype.

    But not in half precision on a CPU: there PyTorch's kernel takes 18.0 and 14.3 ms, matrix products by hand 10.5 and
    3.6, their probabilities computed twice (forward and backward of 3 heads, 8 images of 197 tokens and 32 of 37; one
    core of an AMD EPYC with avx512_bf16, torch 2.13, November 2026).
    """
    query, key, value = (x.transpose(1, 2) for x in qkv)
    if query.device.type != "cpu" or query.dtype not in HALF:
        # Which of its kernels runs (cuDNN's, flash, efficient) PyTorch decides by device, dtype, head dim and
        # switches of the process: for a compiler's trace as for a call, so what was timed is what is compiled.
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    elif torch.is_grad_enabled():
        out = checkpoint(_by_hand, query, key, value, scale, use_reentrant=False, preserve_rng_state=False)
    else:
        out = _by_hand(query, key, value, scale)
    return out.transpose(1, 2)


def sdpa(qkv: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """`_one_resolution` of each group."""
    return [_one_resolution(group.unbind(2), scale).flatten(0, 1) for group in packing.split(qkv)]


def sdpa_of_cls(q: Tensor, kv: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """`sdpa` with one query per image."""
    groups = zip(packing.of_cls.split(q), packing.split(kv))
    return [_one_resolution((query, *group.unbind(2)), scale).flatten(0, 1) for query, group in groups]


def ours(qkv: Tensor, scale: float, packing: Packing, rotation: Rotation | None = None) -> list[Tensor]:
    """Kernels for short images, which read qkv and write its gradient as it lies."""
    return [short_attention(qkv, packing.groups, scale, rotation)]


def ours_of_cls(q: Tensor, kv: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """`ours` with one query per image."""
    return [cls_attention(q, kv, packing.groups, scale)]


# Where images end, as a kernel wants it: by (what makes it, groups, device). Kept for good: captured graphs read it.
_LAYOUTS: dict[tuple[Callable[..., Any], tuple[tuple[int, int], ...], torch.device], Any] = {}


@constant
def _layout(
    make: Callable[[list[int], torch.device], Any], groups: tuple[tuple[int, int], ...], device: torch.device
) -> Any:
    """make(tokens of each image, device), made once, because it copies lengths to the device.

    A constant to a compiler, which runs this while it traces. So a layout made later, for k-NN, say, does not have the
    step compiled again, as reading the dict would; and a packing drawn in a trace (drop-path by batch) finds its own.
    An object with a tensor in it, never a tensor: Dynamo takes several tensors that one function returned for one.
    """
    key = (make, groups, device)
    if key not in _LAYOUTS:
        with torch.inference_mode(False):  # an inference tensor could not be kept for a backward pass
            _LAYOUTS[key] = make([n_tokens for n_images, n_tokens in groups for _ in range(n_images)], device)
    return _LAYOUTS[key]


def _block_diagonal_mask(lengths: list[int], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(lengths, device=device)


def xformers(qkv: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """xformers' memory-efficient attention over all groups in one call."""
    from xformers.ops import memory_efficient_attention

    mask = _layout(_block_diagonal_mask, packing.groups, qkv.device)
    q, k, v = qkv[None].unbind(2)
    return [memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)[0]]


def _load_cuda12_runtime() -> bool:
    """Load libcudart.so.12, where there is one: the xformers wheel is built for CUDA 12 and, under a CUDA 13 PyTorch,
    would otherwise switch itself off with no more than a warning.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) / "cuda_runtime" / "lib" for root in (spec.submodule_search_locations or [])] if spec else []
    installed = [str(library) for folder in folders for library in folder.glob("libcudart.so.12*")]
    for library in (*installed, "libcudart.so.12"):  # the last one: wherever the system looks
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            return True
        except OSError:
            continue
    return False


def _xformers_lacks() -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    has_runtime = _load_cuda12_runtime()
    import xformers

    if getattr(xformers, "_has_cpp_library", True):
        return None
    if not has_runtime:
        return (
            f"xformers needs the CUDA 12 runtime beside this PyTorch for CUDA {torch.version.cuda}: "
            "pip install nvidia-cuda-runtime-cu12"
        )
    return f"xformers cannot load its kernels under PyTorch {torch.__version__}: python -m xformers.info says more"


@dataclass(frozen=True)
class _Boundaries:
    """starts: (images + 1,) int32, where each image begins, and the end. longest: tokens of the largest image."""

    starts: Tensor
    longest: int


def _boundaries(lengths: list[int], device: torch.device) -> _Boundaries:
    return _Boundaries(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths))


def varlen(qkv: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """torch.nn.attention.varlen over all groups in one call. A scale of its own is folded into q: not every version
    takes one. Flash or, from 2.14 on and for images of more than 128 tokens on Hopper, cuDNN: by shapes, in every call.
    """
    from torch.nn.attention.varlen import varlen_attn

    images = _layout(_boundaries, packing.groups, qkv.device)
    q, k, v = qkv.unbind(1)
    q = q * (scale * q.shape[-1] ** 0.5) if scale != q.shape[-1] ** -0.5 else q
    out = varlen_attn(q, k, v, images.starts, images.starts, images.longest, images.longest)
    assert isinstance(out, Tensor)
    return [out]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention of packed tokens.

    run: what does it. turns: whether it takes a rotation, and turns queries and keys itself. run_cls: what does it for
    CLS alone. on_cuda_only: it has no kernels elsewhere. dtypes: what it has kernels for, None for all.
    compiled_dtypes: the same under a compiler. lacks: what it misses here, in words.
    refuses: why it does not take heads of so many channels over such images, in words; None where it does.
    """

    name: str
    run: AttentionOp
    turns: bool = False
    run_cls: ClsAttentionOp = sdpa_of_cls
    on_cuda_only: bool = True
    dtypes: tuple[torch.dtype, ...] | None = HALF
    compiled_dtypes: tuple[torch.dtype, ...] | None = HALF
    lacks: Callable[[], str | None] = lambda: None
    refuses: Callable[[int, Sequence[tuple[int, int]]], str | None] = lambda head_dim, groups: None

    def attend(self, qkv: Tensor, scale: float, packing: Packing, rotation: Rotation | None = None) -> list[Tensor]:
        """`run` of what is turned before, or while it is read."""
        if rotation is not None and self.turns:
            return self.run(qkv, scale, packing, rotation)
        return self.run(turned(qkv, rotation, packing), scale, packing)

    def takes(self, device_type: str, dtype: torch.dtype, compiled: bool) -> bool:
        """Whether it has kernels for such tensors."""
        dtypes = self.compiled_dtypes if compiled else self.dtypes
        return (device_type == "cuda" or not self.on_cuda_only) and (dtypes is None or dtype in dtypes)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(  # fp32 and CPU tensors take its plain form
            "ours",
            ours,
            turns=True,
            run_cls=ours_of_cls,
            on_cuda_only=False,
            dtypes=None,
            compiled_dtypes=None,
            refuses=why_not_ours,
        ),
        # Not fp32 where compiled: what PyTorch shows the compiler of the backward kernel lacks an argument
        # (meta__efficient_attention_backward has no `out`: versions 2.11, 2.13 and 2.14).
        Backend("xformers", xformers, dtypes=(*HALF, torch.float32), lacks=_xformers_lacks),
        Backend("varlen", varlen),
        Backend("sdpa", sdpa, on_cuda_only=False, dtypes=None, compiled_dtypes=None),
    )
}


class _Current:
    """The backend of all models in this process, for what it takes."""

    backend = BACKENDS["sdpa"]


def use_backend(name: str) -> None:
    """Set the backend of all models in this process: a name of BACKENDS. Raises ValueError for another."""
    if name not in BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {name!r}")
    _Current.backend = BACKENDS[name]


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _backend_for(x: Tensor, packing: Packing) -> Backend:
    """The backend in use, or SDPA where that has no kernel for x, (M, ..., H, D)."""
    backend = _Current.backend
    takes = backend.takes(x.device.type, x.dtype, torch.compiler.is_compiling())
    return backend if takes and not backend.refuses(x.shape[-1], packing.groups) else BACKENDS["sdpa"]


def _joined(parts: list[Tensor]) -> Tensor:
    """(M, H, D) in parts -> (M, H * D). Autograd keeps the parts for the attention itself."""
    parts = [part.flatten(1) for part in parts]
    return parts[0] if len(parts) == 1 else recomputed(_join, *parts)


def attention(qkv: Tensor, scale: float, packing: Packing | None, rotation: Rotation | None = None) -> Tensor:
    """softmax(scale * q k^T) v, within each image, by the backend in use, or by SDPA where that has no kernel.

    qkv: (M, 3, H, D). rotation: of queries and keys, before. Returns (M, H * D). Without a packing, by SDPA: (n, N, 3,
    H, D) to (n, N, H * D). Source: Attention Is All You Need (arXiv:1706.03762), equation 1.
    """
    if packing is None:
        return _one_resolution(turned(qkv, rotation, None).unbind(2), scale).flatten(2)
    return _joined(_backend_for(qkv, packing).attend(qkv, scale, packing, rotation))


def attention_of_cls(q: Tensor, kv: Tensor, scale: float, packing: Packing, rotation: Rotation | None = None) -> Tensor:
    """`attention` with one query per image, not turned: q (images, H, D), kv (M, 2, H, D) -> (images, H * D)."""
    kv = turned(kv, rotation, packing, n_turned=1)
    return _joined(_backend_for(kv, packing).run_cls(q, kv, scale, packing))
