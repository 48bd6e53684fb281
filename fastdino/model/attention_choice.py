"""Which way to compute attention: what runs here, which is fastest on a step's own shapes, agreed over all processes.

Timed is what will run: of one qkv matrix, both ways, traced where the step is compiled, inside of a CUDA graph; rotary
positions included, which some turn by themselves and others leave to a compiler.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastdino.errors import reason
from fastdino.model.attention import BACKENDS, AttentionOp, Backend, Packing, use_backend
from fastdino.model.multicrop import MultiCrop
from fastdino.model.rope import Rotation
from fastdino.model.timing import Choice, agreed, outcome, said

PROBE = Packing(((2, 197), (4, 37)))  # more than 128 tokens, and fewer: libraries have other kernels for them


class _Workload(NamedTuple):
    """What a step asks of attention in one block: the student's tokens both ways, the teacher's forward.

    turned: queries and keys turn by their places.
    """

    student: Packing
    teacher: Packing | None
    n_heads: int
    head_dim: int
    dtype: torch.dtype
    compiled: bool
    turned: bool = False
    device: str = "cuda"

    def qkv(self, packing: Packing) -> Tensor:
        """(M, 3, H, D), as the model's linear map leaves it. Leaves the run's random numbers alone."""
        shape, own = (sum(packing.sizes), 3, self.n_heads, self.head_dim), torch.Generator(self.device)
        return torch.randn(shape, generator=own, device=self.device, dtype=self.dtype, requires_grad=True)

    def rotation(self, packing: Packing) -> Rotation | None:
        """Sines and cosines of the tokens of an image of each group."""
        if not self.turned:
            return None
        n_places = sum(n_tokens for _, n_tokens in packing.groups)
        angles = torch.arange(n_places * self.head_dim // 2, dtype=torch.float32, device=self.device)
        return Rotation(*(x.view(n_places, -1) for x in (angles.sin(), angles.cos())))

    def of(self, backend: Backend) -> Callable[[], None]:
        """The work as a function; where compiled, it is traced as the step will be."""
        run = _traced(backend.attend, generated=self.turned) if self.compiled else backend.attend
        student, teacher = self.qkv(self.student), self.qkv(self.teacher) if self.teacher else None
        rotations = {packing: self.rotation(packing) for packing in (self.student, self.teacher) if packing}

        def attend(qkv: Tensor, packing: Packing) -> list[Tensor]:
            return run(qkv, self.head_dim**-0.5, packing, rotations[packing])

        upstream = [out.detach() for out in attend(student, self.student)]

        def work() -> None:
            if self.teacher is not None and teacher is not None:
                with torch.no_grad():
                    attend(teacher, self.teacher)
            torch.autograd.grad(attend(student, self.student), student, upstream)

        return work


def _traced(run: AttentionOp, generated: bool) -> AttentionOp:
    """Traced forward and backward like the step. generated: there is something to generate code for."""
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="inductor" if generated else "aot_eager")

    def attend(*arguments: Any) -> list[Tensor]:
        with torch._dynamo.config.patch(recompile_limit=1000):  # a benchmark asks for many shapes
            return compiled(*arguments)

    return attend


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
        if missing := asked.lacks():
            return missing
        _Workload(PROBE, None, 1, 64, dtype, compiled).of(asked)()
        torch.cuda.synchronize()
    except Exception as error:  # a missing module, library or kernel, each with an exception of its own
        return f"{backend} does not run here: {reason(error)}"
    return None


def check(asked: str, device_type: str, dtype: torch.dtype, compiled: bool = False) -> None:
    """Raises ValueError for a name that is none, and where the backend asked for cannot run on some rank: why.

    A collective, where there are several processes: all raise, or none.
    """
    if asked == "auto":
        return
    if asked not in BACKENDS:
        raise ValueError(f"attention: expected auto, {', '.join(BACKENDS)}, got {asked!r}")
    outcome = agreed({asked: why_not(asked, device_type, dtype, compiled) or 0.0})[asked]
    if isinstance(outcome, str):
        raise ValueError(f"attention: {outcome}")


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
    turned: bool = False,
) -> Choice:
    """The backend asked for, or under `auto` the fastest that runs on these shapes, timed once.

    packing: of the student, timed forward and backward. teacher: its packing, timed forward. compiled: whether the step
    is. turned: whether queries and keys are. A collective, where there are several processes: the same choice on all.
    Raises ValueError as `check` does, and RuntimeError where none runs.
    """
    check(asked, device_type, dtype, compiled)
    if asked != "auto":
        if words := BACKENDS[asked].refuses(head_dim, packing.groups):
            return Choice("sdpa", f"sdpa, because {asked} does not take these crops: {words}")
        return Choice(asked, f"{asked}, as asked")
    if device_type != "cuda":
        return Choice("sdpa", "sdpa")

    work = _Workload(packing, teacher, n_heads, head_dim, dtype, compiled, turned)

    def outcome_of(name: str) -> float | str:
        if missing := why_not(name, device_type, dtype, compiled):
            return missing
        if words := BACKENDS[name].refuses(head_dim, packing.groups):
            return f"{name} does not take these crops: {words}"
        return outcome(name, lambda: work.of(BACKENDS[name]))

    outcomes = agreed({name: outcome_of(name) for name in BACKENDS})
    if all(isinstance(result, str) for result in outcomes.values()):
        raise RuntimeError(f"attention: {'; '.join(map(str, outcomes.values()))}")
    return said(outcomes, {"sdpa": lambda: f"sdpa ({_kernels_of_sdpa(work)})"})


def choose_for(
    student: MultiCrop,
    crops: Sequence[Tensor],
    n_teacher_views: int,
    dtype: torch.dtype,
    asked: str,
    compiled: bool,
) -> Choice | None:
    """`choose` for what a student does with such crops, and its teacher with the first of them; for all models from
    here on. None where the backbone has attention of its own.
    """
    batch_size, backbone = len(crops[0]), student.backbone
    packing, teacher = (student.packing(crops[:n], batch_size) for n in (len(crops), n_teacher_views))
    if packing is None:
        return None
    choice = choose(
        packing,
        backbone.num_heads,
        backbone.embed_dim // backbone.num_heads,
        next(student.parameters()).device.type,
        dtype,
        asked,
        teacher=teacher,
        compiled=compiled,
        turned=getattr(backbone, "rope_embed", None) is not None,
    )
    use_backend(choice.way)
    return choice
