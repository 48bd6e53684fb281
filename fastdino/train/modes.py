"""How a step is run, and what happens where that fails.

- eager: PyTorch operation by operation. The reference for the other two.
- compiled: both networks and the loss are one graph, compiled by Inductor. The same function up to rounding: sums may
  be taken in another order. Random numbers are Inductor's, so that drop-path drops other images than in eager; the same
  seed gives the same run within a mode.
- graph: the compiled iteration, and all that follows it, captured in one CUDA graph: the same kernels as in compiled,
  in one launch. Bits may differ between reruns where PyTorch's kernels add atomically: the backward pass of the
  position embedding's interpolation, and of xformers' and flash attention. Our own kernels do not.

A mode that fails falls back to the one before it, on all processes together, and says why in one line. It is found out
before anything has changed: a first iteration is compiled and computed before its gradients are averaged, a graph is
captured before it is replayed.
"""

import gc
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdino.errors import TrainingError, reason
from fastdino.train import distributed, memory
from fastdino.train.optim import Update
from fastdino.train.precision import Networks
from fastdino.train.schedules import Row, ScheduleTable

MODES = ("eager", "compiled", "graph")
WARM_UP = 3  # iterations on a side stream before a capture, which wants everything allocated and compiled
PROBE_BYTES = 32 * 2**20  # larger than what PyTorch's allocator takes from a block that it shares

# Crops and the schedules' row -> what an objective's `evaluate` returns.
Forward = Callable[[Sequence[Tensor], Row], tuple[Tensor, tuple[Tensor, ...], Tensor]]


class Step(Protocol):
    """What is run: see `step.TrainStep`."""

    device: torch.device
    run: Networks
    update: Update
    schedule: ScheduleTable

    @property
    def forward(self) -> Forward: ...
    def compute(self, forward: Forward, crops: Sequence[Tensor]) -> None: ...
    def compute_alone(self, forward: Forward, crops: Sequence[Tensor]) -> None: ...
    def drop_gradients(self) -> None: ...
    def finish(self) -> None: ...


def why_no_graph(device: torch.device, capturable: bool) -> str | None:
    """What a CUDA graph of the step would need and does not have; None where there can be one."""
    if device.type != "cuda":
        return "a CUDA device"
    return None if capturable else "adamw without fp16's GradScaler: other optimizers ask the host"


def _memory_comes_back(device: torch.device) -> bool:
    """Whether PyTorch's allocator gives a block back to the device once nobody needs it."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) <= before


def _leaves_capture(device: torch.device, pool: Any) -> bool:
    """Bring the allocator out of a capture that CUDA refused to end; whether that worked.

    PyTorch before 2.12 leaves it there (pytorch pull request 180395): it would go on to put everything into the
    graph's memory and never reuse what two streams have touched. What it forgets is done here.
    """
    gc.collect()
    if _memory_comes_back(device):
        return True
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
        return _memory_comes_back(device)
    except (AttributeError, RuntimeError):
        return False


class _Failure(NamedTuple):
    """Of an iteration on one process. fatal: why no slower mode would help, in words; None where one might."""

    reason: str
    fatal: str | None


NO_MEMORY = "memory ran out"
STUCK = (
    f"PyTorch {torch.__version__} cannot go on after a capture that failed (pytorch pull request 180395). "
    "Try --step compiled, or a newer PyTorch"
)


class Modes:
    """Runs a step's iterations in a mode, or in the next one that works.

    Raises ValueError for a name that is none of MODES. Attribute: name, the mode as it came to be.
    """

    def __init__(self, step: Step, mode: str, say: Callable[[str], object] = print) -> None:
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self._step, self._say = step, say
        if mode == "graph" and (missing := why_no_graph(step.device, step.update.capturable)):
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
        self._meets_others = bool(norms)
        self.name, self._forward, self._proven = mode, self._step.forward, mode == "eager"
        if mode != "eager":
            for norm in norms:
                norm.forward = torch.compiler.disable(norm.forward)  # type: ignore[method-assign]
            self._forward = torch.compile(self._step.forward, fullgraph=not norms, dynamic=False)

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
            self._static = [torch.empty_like(crop, dtype=self._step.run.dtype) for crop in crops]
        elif shapes != [x.shape for x in self._static]:
            raise ValueError(
                f"crops: expected the captured shapes {[tuple(x.shape) for x in self._static]}, "
                f"got {[tuple(shape) for shape in shapes]}; a batch of another size is dropped, not captured again"
            )
        torch._foreach_copy_(self._static, list(crops))

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        """The iteration as a graph; None where that failed, and the mode has fallen back."""
        device, pool = self._step.device, torch.cuda.graph_pool_handle()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        self._step.drop_gradients()
        error = None
        try:
            # thread_local: the loader's threads allocate and copy meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._iterate(self._static)
        except Exception as raised:
            error = raised
            torch.cuda.set_stream(current)  # a capture that cannot be ended leaves its own stream the current one
            self._step.drop_gradients()
            traceback.clear_frames(raised.__traceback__)  # they hold the capture's tensors
            graph.reset()
        stuck = error is not None and not _leaves_capture(device, pool)
        if words := self._failure(error, STUCK if stuck else None):
            self._fall_back(words, "compiled")
            return None
        return graph

    def _failure(self, error: Exception | None, fatal: str | None = None) -> str | None:
        """Why the mode has failed, on whichever process; None where all went well.

        fatal: why this process cannot fall back. Raises where one cannot, on all of them: the error itself where
        memory ran out, else TrainingError. Raises it alone where the others wait in the forward pass.
        """
        mine = None
        if error is not None:
            fatal = NO_MEMORY if memory.shortage(error) else fatal
            if self._meets_others or (fatal == NO_MEMORY and distributed.is_alone()):
                raise error
            mine = _Failure(reason(error), fatal)
        failures = [(rank, failure) for rank, failure in enumerate(distributed.gather(mine)) if failure is not None]
        if not failures:
            return None
        rank, failure = next(((r, f) for r, f in failures if f.fatal), failures[0])
        where = "" if distributed.is_alone() else f", on process {rank}"
        if failure.fatal is None:
            return failure.reason + where
        if error is not None and fatal == NO_MEMORY:
            raise error
        raise TrainingError(f"{self.name} failed ({failure.reason}{where}): {failure.fatal}") from error

    def _fall_back(self, words: str, mode: str) -> None:
        self._say(f"step: {self.name if mode == 'compiled' else 'compiled'} failed ({words}); using {mode}")
        self.close()
        self._use(mode)
        self._step.schedule.rewind()

    def close(self) -> None:
        """Drop the graph and what it holds."""
        self._graph, self._static = None, []
