"""What to say where memory ends: how much was asked for, how much there is, which flags need less."""

import os
import re

import torch

from fastdino.errors import chain
from fastdino.train.config import TrainConfig

# PyTorch's own words, the only place where the sizes are.
_CUDA = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\..*?total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", re.S
)
_CPU = re.compile(
    r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory): you tried to allocate (\d+) bytes"
)


def shortage(error: BaseException) -> str | None:
    """The sizes in words, where an error or what led to it says that memory ran out; None where none does.

    Inside of a CUDA graph's capture the error that comes out can be the capture's own.
    """
    return next((words for e in chain(error) if (words := _shortage(e)) is not None), None)


def _shortage(error: BaseException) -> str | None:
    text = str(error)
    if found := _CUDA.search(text):
        asked, total, free = found.groups()
        return f"{asked} more were asked for, {free} of {total} are free"
    if found := _CPU.search(text):
        return f"{int(found[1]) / 2**30:.2f} GiB more were asked for, {_free_on_host()}"
    is_cudas = isinstance(error, torch.AcceleratorError) and "out of memory" in text
    if is_cudas or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return next((line.strip() for line in text.splitlines() if line.strip()), "how much was asked for is not known")
    return None


def _free_on_host() -> str:
    try:
        return f"{os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.2f} GiB are free"
    except (AttributeError, ValueError):  # not on Linux
        return "how much is free is not known"


def advice(config: TrainConfig) -> str:
    """Flags that make the same step with less memory, and the one that makes another."""
    batch, parts = config.batch_size_per_gpu, config.accumulate
    finer = next((n for n in range(parts + 1, batch + 1) if batch % n == 0), None)
    flags = [f"--accumulate {finer}"] if finer else []
    flags += [] if config.checkpointing else ["--checkpointing true"]
    flags += [f"a smaller --batch_size_per_gpu (now {batch})"]
    return "Try " + " or ".join([", ".join(flags[:-1]), flags[-1]] if flags[:-1] else flags)
