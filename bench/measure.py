"""Time, bytes and where they were measured.

A figure here is a median between two quantiles, of runs that begin with a cold L2, beside the bytes that the operation
cannot avoid and the bandwidth that a plain copy reaches on the same device in the same process. Without a GPU the same
code runs, on the clock of the host, and says so: its figures prove that a benchmark runs, nothing else.
"""

import datetime
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
L2_BYTES = 256 * 2**20  # written between runs: more than the L2 of any GPU this is for


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def measure(run: Callable[[], object], repeats: int = 50, warmup: int = 5) -> Timing:
    """Time runs one by one: with CUDA events around each on a GPU, with the host's clock elsewhere."""
    for _ in range(warmup):
        run()
    return timing_of(_gpu_times(run, repeats) if ON_GPU else _host_times(run, repeats))


def time_once(run: Callable[[], object]) -> float:
    """Milliseconds of one run, from an idle device to an idle device."""
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if ON_GPU:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _gpu_times(run: Callable[[], object], repeats: int) -> list[float]:
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=DEVICE)
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _host_times(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def timing_of(times_ms: list[float]) -> Timing:
    """Median and quantiles of runs."""
    p20, median, p80 = torch.tensor(times_ms, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(median.item(), p20.item(), p80.item())


@cache
def copy_bandwidth_gbps() -> float:
    """The ceiling: bytes read and written per second by a copy of 1 GB (64 MB without a GPU)."""
    n_bytes = 10**9 if ON_GPU else 64 * 10**6
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device=DEVICE)  # zeros would run faster
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), repeats=20)
    return 2 * n_bytes / timing.median_ms / 1e6


@cache
def environment() -> dict[str, str]:
    """What every figure depends on."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if ON_GPU else "none"
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else f"CPU {platform.processor() or platform.machine()}",
        "driver": driver.splitlines()[0] if driver else "unknown",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": output("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def row(name: str, timing: Timing, n_bytes: int) -> dict[str, str | float]:
    """One line of results. n_bytes: the floor, the same for all providers of an operation, so that shares compare."""
    figures: dict[str, str | float] = {
        "name": name,
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
    }
    if ON_GPU:
        gbps = n_bytes / timing.median_ms / 1e6
        figures |= {"floor_bytes": n_bytes, "gbps": gbps, "share_of_copy": gbps / copy_bandwidth_gbps()}
    return figures | environment()


def line(figures: dict[str, str | float]) -> str:
    """The row for a reader."""
    text = "{name:44} {median_ms:9.3f} ms  (p20 {p20_ms:.3f}, p80 {p80_ms:.3f})".format(**figures)
    if "gbps" in figures:
        return text + "  {gbps:7.0f} GB/s  {share_of_copy:4.0%} of a copy".format(**figures)
    return text + "  without a GPU: proves that it runs, nothing more"
