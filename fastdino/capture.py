"""A CUDA graph of some work, and what is left to mend where its capture fails."""

import gc
import traceback
from collections.abc import Callable
from typing import Any

import torch

from fastdino.errors import reason

PROBE_BYTES = 32 * 2**20  # larger than what PyTorch's allocator takes from a block that it shares


class StuckCapture(RuntimeError):
    """A capture has failed, and PyTorch cannot go on after it: the process has to end."""


def capture(work: Callable[[], object], stream: torch.cuda.Stream, device: torch.device) -> torch.cuda.CUDAGraph:
    """The work as a graph, captured on `stream` and not run.

    Raises what the work or the capture raises, with stream and memory as they were before, or StuckCapture.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    current = torch.cuda.current_stream(device)
    try:
        # thread_local: the loader's threads allocate and copy meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            work()
    except Exception as error:
        torch.cuda.set_stream(current)  # a capture that cannot be ended leaves its own stream the current one
        traceback.clear_frames(error.__traceback__)  # they hold the capture's tensors
        graph.reset()
        if not _leaves_capture(device, pool):
            raise StuckCapture(
                f"{reason(error)}; PyTorch {torch.__version__} cannot go on after a capture that failed (pytorch pull "
                "request 180395). Try --step compiled, or a newer PyTorch"
            ) from error
        raise
    return graph


def _leaves_capture(device: torch.device, pool: Any) -> bool:
    """Bring the allocator out of a capture that CUDA refused to end; whether that worked.

    PyTorch 2.11 leaves it there, 2.14 does not (pull request 180395): it would go on to put everything into the
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


def _memory_comes_back(device: torch.device) -> bool:
    """Whether PyTorch's allocator gives a block back to the device once nobody needs it."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) <= before
