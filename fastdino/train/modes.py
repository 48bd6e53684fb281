"""How a step is run, and what happens where that fails.

- eager: PyTorch operation by operation. The reference for the other two.
- compiled: both networks and the loss are one graph, compiled by Inductor. The same function up to rounding: sums may
  be taken in another order. Random numbers are Inductor's, so that drop-path drops other images than in eager; the same
  seed gives the same run within a mode.
- graph: the compiled iteration, and all that follows it, captured in one CUDA graph: the same kernels as in compiled,
  in one launch. Bits may differ between reruns where PyTorch's kernels add atomically: the backward pass of xformers'
  and flash attention, and in eager that of the position embedding's interpolation. Our own kernels do not.

A mode that fails falls back to the one before it, on all processes together, and says why in one line. It is found out
before anything has changed: a first iteration is compiled and computed before its gradients are averaged, a graph is
captured before it is replayed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdino.capture import StuckCapture, capture
from fastdino.errors import TrainingError, reason
from fastdino.objectives import Evaluated, Objective
from fastdino.train import distributed, memory
from fastdino.train.optim import Update
from fastdino.train.precision import Networks
from fastdino.train.schedules import Row, ScheduleTable

MODES = ("eager", "compiled", "graph")
# What `--compile` accepts, and what PyTorch calls it. max: Inductor times matrix products of its own, with what follows
# them as an epilogue, beside cuBLAS's, and block sizes of all kernels, before the first iteration.
EFFORTS = {"default": None, "max": "max-autotune-no-cudagraphs"}
WARM_UP = 3  # iterations on a side stream before a capture, which wants everything allocated and compiled

# Views, the schedules' row, what is known of the other parts of a batch -> what an objective's `evaluate` returns.
Forward = Callable[[Sequence[Tensor], Row, Any], Evaluated]


class Step(Protocol):
    """What is run: see `step.TrainStep`."""

    device: torch.device
    loss: Objective
    run: Networks
    update: Update
    schedule: ScheduleTable
    replays: bool

    @property
    def forward(self) -> Forward: ...
    def compute(self, forward: Forward, crops: Sequence[Tensor]) -> None: ...
    def compute_alone(self, forward: Forward, crops: Sequence[Tensor]) -> None: ...
    def drop_gradients(self) -> None: ...
    def finish(self) -> None: ...


def why_no_graph(device: torch.device, capturable: bool, replays: bool = False) -> str | None:
    """What a CUDA graph of the step would need and does not have; None where there can be one.

    replays: whether random numbers are drawn a second time, see `accumulation`.
    """
    if device.type != "cuda":
        return "a CUDA device"
    if replays:
        return "a batch in one part (--accumulate 1): parts that see the whole batch draw random numbers twice"
    return None if capturable else "adamw without fp16's GradScaler: other optimizers ask the host"


def _passes(say: Callable[[str], object]) -> dict[str, Any]:
    """Options for Inductor: our own pass over its graphs, where this PyTorch still has what that builds on."""
    try:
        from fastdino_kernels.fusion import JoinResiduals  # a second of imports that eager runs do without
    except (ImportError, AttributeError) as error:
        say(f"step: compiled without JoinResiduals, so with more passes over memory ({error})")
        return {}
    return {"post_grad_custom_pre_pass": JoinResiduals()}


class _Failure(NamedTuple):
    """Of an iteration on one process. fatal: whether no slower mode would help."""

    reason: str
    fatal: bool


class Modes:
    """Runs a step's iterations in a mode, or in the next one that works.

    effort: of the compiler, a name of EFFORTS. Raises ValueError for a name that is none of MODES or EFFORTS.
    Attribute: name, the mode as it came to be.
    """

    def __init__(self, step: Step, mode: str, say: Callable[[str], object] = print, effort: str = "default") -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if effort not in EFFORTS:
            raise ValueError(f"compile: expected one of {', '.join(EFFORTS)}, got {effort!r}")
        self._step, self._say, self._effort = step, say, EFFORTS[effort]
        if mode == "graph" and (missing := why_no_graph(step.device, step.update.capturable, step.replays)):
            say(f"step: a graph needs {missing}; using compiled")
            mode = "compiled"
        # Such a BatchNorm waits for the other processes in the middle of the forward pass.
        self._meets_others = False
        self.name = "eager"
        self._forward = step.forward
        self._proven = True  # whether an iteration in this mode has been computed on all processes
        self._use(mode)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: list[Tensor] = []  # what the graph reads its crops from
        self._n_warm = 0
        self._stream = torch.cuda.Stream(step.device) if mode == "graph" else None

    def _use(self, mode: str) -> None:
        norms = [m for network in self._step.run.both for m in network.modules() if isinstance(m, nn.SyncBatchNorm)]
        self._meets_others = bool(norms) or self._step.loss.meets_others
        self.name, self._forward, self._proven = mode, self._step.forward, mode == "eager"
        if mode != "eager":
            for norm in norms:
                norm.forward = torch.compiler.disable(norm.forward)  # type: ignore[method-assign]
            # Not block by block: that compiles in a third of the time, but residuals no longer join the norm of the
            # next block, and drop-path is drawn in launches of its own. A step of ViT-S with 64 images moves 2.8 GB
            # more, of 62, in 207 launches more; without drop-path 1.8 GB in 57. As nested regions of one graph, without
            # drop-path: half the time, 1.7 GB in 44. Counted in what PyTorch 2.14 generates, November 2026.
            options = torch._inductor.list_mode_options(self._effort or "default") | _passes(self._say)
            if self._step.replays:  # a compiler's own generator draws other numbers than the eager first pass
                options["fallback_random"] = True
            forward = self._step.forward
            self._forward = torch.compile(forward, fullgraph=not norms, dynamic=False, options=options)

    def __call__(self, crops: Sequence[Tensor]) -> None:
        """One iteration."""
        if self._stream is None or self.name != "graph":
            return self._iterate(crops)
        self._load(crops)
        if self._graph is None and self._n_warm < WARM_UP:
            current = torch.cuda.current_stream(self._step.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._iterate(self._static)
            current.wait_stream(self._stream)
            self._n_warm += 1
            return None
        graph = self._graph or self._capture(self._stream)
        if graph is None:  # the mode has fallen back
            return self(crops)
        self._graph = graph
        graph.replay()
        return None

    def _iterate(self, crops: Sequence[Tensor]) -> None:
        step = self._step
        step.schedule.advance()
        if self._proven:
            step.compute(self._forward, crops)
        else:
            error = None
            try:
                step.compute_alone(self._forward, crops)
            except Exception as raised:
                error = raised
            if words := self._failure(error):
                self._fall_back(words, "eager")
                return self._iterate(crops)
            self._proven = True
        step.finish()
        return None

    def _load(self, crops: Sequence[Tensor]) -> None:
        shapes = [crop.shape for crop in crops]
        if not self._static:
            self._static = [torch.empty_like(crop, dtype=self._step.run.dtype_of(crop)) for crop in crops]
        elif shapes != [x.shape for x in self._static]:
            raise ValueError(
                f"crops: expected the captured shapes {[tuple(x.shape) for x in self._static]}, "
                f"got {[tuple(shape) for shape in shapes]}; a batch of another size is dropped, not captured again"
            )
        torch._foreach_copy_(self._static, list(crops))

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        """The iteration as a graph; None where that failed, and the mode has fallen back."""
        self._step.drop_gradients()  # the next ones live in the graph's memory
        graph, error = None, None
        try:
            graph = capture(lambda: self._iterate(self._static), stream, self._step.device)
        except Exception as raised:
            error = raised
            self._step.drop_gradients()
        if words := self._failure(error):
            self._fall_back(words, "compiled")
            return None
        return graph

    def _failure(self, error: Exception | None) -> str | None:
        """Why the mode has failed, on whichever process; None where all went well.

        Where one cannot fall back, all of them end: raises the error itself where memory ran out, else TrainingError.
        Raises it at once where the others wait in the forward pass.
        """
        mine, short = None, False
        if error is not None:
            if self._meets_others:
                raise error
            short, stuck = memory.shortage(error) is not None, isinstance(error, StuckCapture)
            mine = _Failure(str(error) if stuck else reason(error), short or stuck)
        failures = [(rank, failure) for rank, failure in enumerate(distributed.gather(mine)) if failure is not None]
        if not failures:
            return None
        rank, failure = next(((r, f) for r, f in failures if f.fatal), failures[0])
        words = failure.reason + ("" if distributed.is_alone() else f", on process {rank}")
        if not failure.fatal:
            return words
        if error is not None and short:
            raise error
        raise TrainingError(f"{self.name} failed: {words}") from error

    def _fall_back(self, words: str, mode: str) -> None:
        self._say(f"step: {self.name if mode == 'compiled' else 'compiled'} failed ({words}); using {mode}")
        self.close()
        self._use(mode)
        self._step.schedule.rewind()

    def restart(self) -> None:
        """The iteration is another one from now on: proven, warmed up and captured anew."""
        if self._graph is not None:
            torch.cuda.synchronize(self._step.device)  # it may still run
        self.close()
        self._n_warm, self._proven = 0, self.name == "eager"

    def close(self) -> None:
        """Drop the graph and what it holds."""
        self._graph, self._static = None, []
