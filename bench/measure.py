"""How long a run takes, and on what machine: medians between two quantiles, beside the ceilings of the same process.

Every run begins with cold caches. On a GPU, CUDA events lie around it, and the memory written in between keeps the
device busy while the host launches. Without a GPU it is the clock of the host. There a copy is no strict ceiling: it
also reads the lines that it overwrites, uncounted, which an update in place has read already.
"""

import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
QUICK = os.environ.get("BENCH_QUICK") == "1"  # small cases, few repeats: `python -m bench ... --quick`
UNCHECKED = os.environ.get("BENCH_UNCHECKED") == "1"  # launch it all, check and time nothing: a device without values
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FLUSH_BYTES = 2**28 if ON_GPU else 2**26  # written between runs: more than the caches of anything this is for
COPY_BYTES = 10**9 if ON_GPU else 64 * 10**6
MATMUL_SIDE = 8192 if ON_GPU else 1024


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @classmethod
    def of(cls, times_ms: list[float]) -> "Timing":
        """From single runs."""
        low, median, high = torch.tensor(times_ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
        return cls(median.item(), low.item(), high.item())


def require(right: bool | torch.Tensor, otherwise: str) -> None:
    """The check before every time. Raises AssertionError."""
    if not (UNCHECKED or right):
        raise AssertionError(f"{otherwise}: not timed")


def times_ms(run: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Milliseconds of each of `repeats` runs."""
    for _ in range(warmup):
        run()
    return _gpu_times(run, repeats) if ON_GPU else _host_times(run, repeats)


def _gpu_times(run: Callable[[], object], repeats: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _host_times(run: Callable[[], object], repeats: int) -> list[float]:
    flush, times = torch.empty(FLUSH_BYTES, dtype=torch.uint8), []
    for _ in range(repeats):
        flush.zero_()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def copying() -> Callable[[], object]:
    """A copy of COPY_BYTES, which reads and writes that many."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=DEVICE)  # zeros would run faster
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def multiplying(dtype: torch.dtype) -> Callable[[], object]:
    """A product of two square matrices of MATMUL_SIDE, of random numbers."""
    a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=DEVICE, dtype=dtype).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def launching() -> Callable[[], object]:
    """A hundred launches that do next to nothing: what a launch costs the host."""
    x = torch.zeros(1, device=DEVICE)

    def run() -> None:
        for _ in range(100):
            x.add_(1)

    return run


@cache
def ceilings() -> dict[str, float]:
    """What this device reaches in this process: a copy, matmuls in both precisions, and the price of a launch."""

    def best(run: Callable[[], object]) -> float:
        return Timing.of(times_ms(run, repeats=20, warmup=3)).p20_ms

    found = {"copy_gbps": 2 * COPY_BYTES / best(copying()) / 1e6}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"matmul_{name}_tflops"] = 2 * MATMUL_SIDE**3 / best(multiplying(dtype)) / 1e9
    return found | {"launch_us": 10 * best(launching())}


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def device_name() -> str:
    """The GPU, or the CPU and how many of its cores this process may use."""
    if ON_GPU:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()} CPU, {CORES} core{'' if CORES == 1 else 's'}"


@cache
def host() -> dict[str, Any]:
    """What every figure depends on. power_limit: as the driver says it."""
    driver, limit = "none", "none"
    if ON_GPU:
        of_gpu = ("--format=csv,noheader", f"--id={torch.cuda.current_device()}")
        driver = _output("nvidia-smi", "--query-gpu=driver_version", *of_gpu)
        limit = _output("nvidia-smi", "--query-gpu=power.limit", *of_gpu)
    return {
        "device": device_name(),
        "quick": QUICK,
        "power_limit": limit,
        "driver": driver,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "triton", "xformers")},
        "commit": _output("git", "describe", "--always", "--dirty"),
    }


def environment() -> dict[str, Any]:
    """The host, and its ceilings."""
    return host() | ceilings()


def now() -> str:
    """Date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
