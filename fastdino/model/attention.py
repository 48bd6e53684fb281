"""Attention over packed tokens, behind one function. The only module that imports xformers.

Crops of several resolutions lie one after another in one matrix of tokens, so that linears and norms run once for all
of them; only attention has to know where an image ends. `Packing` tells it.
Axes: M tokens of all images, n images of a group, N tokens of an image, H heads, D channels of a head.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
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


# q, k, v (M, H, D), scale, packing -> (M, H, D) in parts, as they were computed
AttentionOp = Callable[[Tensor, Tensor, Tensor, float, Packing], list[Tensor]]


def _by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """PyTorch's scaled_dot_product_attention, a call per group: runs everywhere, in every dtype.

    But not in half precision on a CPU: there PyTorch's kernel takes 18.0 and 14.3 ms, matrix products by hand 10.5 and
    3.6, their probabilities computed twice (forward and backward of 3 heads, 8 images of 197 tokens and 32 of 37; one
    core of an AMD EPYC with avx512_bf16, torch 2.13, November 2026).
    """
    outputs = []
    for group in zip(packing.split(q), packing.split(k), packing.split(v)):
        query, key, value = (x.transpose(1, 2) for x in group)
        if q.device.type != "cpu" or q.dtype not in HALF:
            # Which of its kernels runs (cuDNN's, flash, efficient) PyTorch decides by device, dtype, head dim and
            # switches of the process: for a compiler's trace as for a call, so what was timed is what is compiled.
            out = F.scaled_dot_product_attention(query, key, value, scale=scale)
        elif torch.is_grad_enabled():
            out = checkpoint(_by_hand, query, key, value, scale, use_reentrant=False, preserve_rng_state=False)
        else:
            out = _by_hand(query, key, value, scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs


# Where images end, as a kernel wants it: by (what makes it, groups, device). Kept for good: captured graphs read it.
_LAYOUTS: dict[tuple[Callable[..., Any], tuple[tuple[int, int], ...], torch.device], Any] = {}


@torch.compiler.assume_constant_result
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


def xformers(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """xformers' memory-efficient attention over all groups in one call."""
    from xformers.ops import memory_efficient_attention

    mask = _layout(_block_diagonal_mask, packing.groups, q.device)
    return [memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]]


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


def varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """torch.nn.attention.varlen over all groups in one call. A scale of its own is folded into q: not every version
    takes one. Flash or, from 2.14 on and for images of more than 128 tokens on Hopper, cuDNN: by shapes, in every call.
    """
    from torch.nn.attention.varlen import varlen_attn

    images = _layout(_boundaries, packing.groups, q.device)
    q = q * (scale * q.shape[-1] ** 0.5) if scale != q.shape[-1] ** -0.5 else q
    out = varlen_attn(q, k, v, images.starts, images.starts, images.longest, images.longest)
    assert isinstance(out, Tensor)
    return [out]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention of packed tokens.

    run: what does it. on_cuda_only: it has no kernels elsewhere. dtypes: what it has kernels for, None for all.
    compiled_dtypes: the same under a compiler. lacks: what it misses on this machine, in words.
    """

    name: str
    run: AttentionOp
    on_cuda_only: bool = True
    dtypes: tuple[torch.dtype, ...] | None = HALF
    compiled_dtypes: tuple[torch.dtype, ...] | None = HALF
    lacks: Callable[[], str | None] = lambda: None

    def takes(self, device_type: str, dtype: torch.dtype, compiled: bool) -> bool:
        """Whether it has kernels for such tensors."""
        dtypes = self.compiled_dtypes if compiled else self.dtypes
        return (device_type == "cuda" or not self.on_cuda_only) and (dtypes is None or dtype in dtypes)


BACKENDS = {
    backend.name: backend
    for backend in (
        # Not fp32 where compiled: what PyTorch shows the compiler of the backward kernel lacks an argument
        # (meta__efficient_attention_backward has no `out`: versions 2.11, 2.13 and 2.14).
        Backend("xformers", xformers, dtypes=(*HALF, torch.float32), lacks=_xformers_lacks),
        Backend("varlen", varlen),
        Backend("sdpa", sdpa, on_cuda_only=False, dtypes=None, compiled_dtypes=None),
    )
}


PROBE = Packing(((2, 197), (4, 37)))  # more than 128 tokens, and fewer: libraries have other kernels for them
WARM_UP, TIMINGS, REPLAYS = 3, 5, 5


class Choice(NamedTuple):
    """A backend, and why it; printed as the latter."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return self.reason


def _cause(error: BaseException) -> str:
    """What failed, in a line, and in brackets what had failed before it, if something had."""

    def line(error: BaseException) -> str:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return lines[-1] if lines[0].endswith(":") else lines[0]

    first = error
    while before := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
        first = before
    return line(error) if line(first) == line(error) else f"{line(error)} ({line(first)})"


class _Workload(NamedTuple):
    """What a step asks of attention in one block: the student's tokens both ways, the teacher's forward."""

    student: Packing
    teacher: Packing | None
    n_heads: int
    head_dim: int
    dtype: torch.dtype
    compiled: bool
    device: str = "cuda"

    def qkv(self, packing: Packing) -> Tensor:
        """(M, 3, H, D), of which the model's q, k and v are views. Leaves the run's random numbers alone."""
        shape, own = (sum(packing.sizes), 3, self.n_heads, self.head_dim), torch.Generator(self.device)
        return torch.randn(shape, generator=own, device=self.device, dtype=self.dtype, requires_grad=True)

    def of(self, backend: Backend) -> Callable[[], None]:
        """The work as a function; where compiled, it is traced as the step will be."""
        run = _traced(backend.run) if self.compiled else backend.run
        student, teacher = self.qkv(self.student), self.qkv(self.teacher) if self.teacher else None

        def attend(qkv: Tensor, packing: Packing) -> list[Tensor]:
            q, k, v = qkv.unbind(1)
            return run(q, k, v, self.head_dim**-0.5, packing)

        upstream = [out.detach() for out in attend(student, self.student)]

        def work() -> None:
            if self.teacher is not None and teacher is not None:
                with torch.no_grad():
                    attend(teacher, self.teacher)
            torch.autograd.grad(attend(student, self.student), student, upstream)

        return work


def _traced(run: AttentionOp) -> AttentionOp:
    """Traced forward and backward like the step, then run as it is: there is nothing to generate code for."""
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")

    def attend(*arguments: Any) -> list[Tensor]:
        with torch._dynamo.config.patch(recompile_limit=1000):  # a benchmark asks for many shapes
            return compiled(*arguments)

    return attend


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work as a graph, after a warm-up on a side stream, which allocates, compiles and plans."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            work()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own stream the current one
    return graph


def _time_ms(work: Callable[[], object]) -> float:
    """Median over replays of the work as a graph: the device's time, whatever the host would take to launch it."""
    graph = _captured(work)
    times = []
    for _ in range(1 + TIMINGS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return median(times[1:])


def _kernels_of_sdpa(work: _Workload) -> str:
    """Names of what SDPA runs for the student's groups: cudnn, flash, efficient or math."""
    kernels = []
    for group in work.student.split(work.qkv(work.student)):
        q, k, v = (x.transpose(1, 2) for x in group.unbind(2))
        kernels.append(SDPBackend(torch._fused_sdp_choice(q, k, v)).name.removesuffix("_ATTENTION").lower())
    return ", ".join(dict.fromkeys(kernels))


@cache
def why_not(backend: str, device_type: str, dtype: torch.dtype, compiled: bool = False) -> str | None:
    """Why a backend cannot run on such tensors here, in words; None where it can. On a GPU it is tried, both ways.

    compiled: whether it has to run under a compiler.
    """
    asked, precision = BACKENDS[backend], str(dtype).removeprefix("torch.")
    if not asked.takes(device_type, dtype, compiled):
        if asked.on_cuda_only and device_type != "cuda":
            return f"{backend} has kernels for CUDA only, and the model is on {device_type}"
        if asked.takes(device_type, dtype, compiled=False):
            return f"{backend} cannot be compiled in {precision}, only run eagerly"
        return f"{backend} has no kernel for {precision}"
    if device_type != "cuda":
        return None
    try:
        if reason := asked.lacks():
            return reason
        _Workload(PROBE, None, 1, 64, dtype, compiled).of(asked)()
        torch.cuda.synchronize()
    except Exception as error:  # a missing module, library or kernel, each with an exception of its own
        return f"{backend} does not run here: {_cause(error)}"
    return None


def _agreed(outcomes: dict[str, float | str]) -> dict[str, float | str]:
    """Of all ranks' outcomes per backend (ms, or why not) the worst, the same on every rank: a collective.

    The slowest rank's time, since the others wait for it; and what cannot run on one rank can run on none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return outcomes
    ranks: list[dict[str, float | str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, outcomes)
    worst: dict[str, float | str] = {}
    for name in outcomes:
        times = [x for x in (rank[name] for rank in ranks) if isinstance(x, float)]
        reasons = {i: x for i, x in enumerate(rank[name] for rank in ranks) if isinstance(x, str)}
        if not reasons:
            worst[name] = max(times)
        else:
            rank, reason = next(iter(reasons.items()))
            worst[name] = f"{reason} (rank {rank})" if times else reason
    return worst


def check(asked: str, device_type: str, dtype: torch.dtype, compiled: bool = False) -> None:
    """Raises ValueError for a name that is none, and where the backend asked for cannot run on some rank: why.

    A collective, where there are several processes: all raise, or none.
    """
    if asked == "auto":
        return
    if asked not in BACKENDS:
        raise ValueError(f"attention: expected auto, {', '.join(BACKENDS)}, got {asked!r}")
    reason = _agreed({asked: why_not(asked, device_type, dtype, compiled) or 0.0})[asked]
    if isinstance(reason, str):
        raise ValueError(f"attention: {reason}")


@cache
def choose(
    packing: Packing,
    n_heads: int,
    head_dim: int,
    device_type: str,
    dtype: torch.dtype,
    asked: str = "auto",
    *,
    teacher: Packing | None = None,
    compiled: bool = False,
) -> Choice:
    """The backend asked for, or under `auto` the fastest that runs on these shapes, timed once.

    packing: of the student, timed forward and backward. teacher: its packing, timed forward. compiled: whether the step
    is. A collective, where there are several processes: the choice is the same on all.
    Raises ValueError as `check` does, and RuntimeError where none runs.
    """
    check(asked, device_type, dtype, compiled)
    if asked != "auto":
        return Choice(asked, f"{asked}, as asked")
    if device_type != "cuda":
        return Choice("sdpa", "sdpa")

    work = _Workload(packing, teacher, n_heads, head_dim, dtype, compiled)

    def outcome(name: str) -> float | str:
        if reason := why_not(name, device_type, dtype, compiled):
            return reason
        try:
            return _time_ms(work.of(BACKENDS[name]))
        except Exception as error:
            return f"{name} does not run here: {_cause(error)}"

    outcomes = _agreed({name: outcome(name) for name in BACKENDS})
    times = {name: ms for name, ms in outcomes.items() if isinstance(ms, float)}
    reasons = [reason for reason in outcomes.values() if isinstance(reason, str)]
    if not times:
        raise RuntimeError(f"attention: {'; '.join(reasons)}")
    ranking = sorted(times, key=times.__getitem__)
    titles = {name: f"{name} ({_kernels_of_sdpa(work)})" if name == "sdpa" else name for name in ranking}
    words = ", ".join(f"{titles[name]} {times[name]:.2f} ms" for name in ranking)
    return Choice(ranking[0], "; ".join([words, *reasons]))


class _Current:
    """The backend of all models in this process, for what it takes."""

    backend = BACKENDS["sdpa"]


def use_backend(name: str) -> None:
    """Set the backend of all models in this process: a name of BACKENDS. Raises ValueError for another."""
    if name not in BACKENDS:
        raise ValueError(f"attention: expected one of {', '.join(BACKENDS)}, got {name!r}")
    _Current.backend = BACKENDS[name]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> list[Tensor]:
    """softmax(scale * q k^T) v, within each image, by the backend in use, or by SDPA where that has no kernel.

    q, k, v: (M, H, D). Returns the (M, H, D) in parts, as they were computed: joined, they would be kept twice for the
    backward pass. Source: Attention Is All You Need (arXiv:1706.03762), equation 1.
    """
    backend = _Current.backend
    if not backend.takes(q.device.type, q.dtype, torch.compiler.is_compiling()):
        return sdpa(q, k, v, scale, packing)
    return backend.run(q, k, v, scale, packing)


def prepare(backend: str, packing: Packing, device: torch.device) -> None:
    """Nothing: a layout is made where it is needed."""
