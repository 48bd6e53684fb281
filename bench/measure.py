"""How long a run takes, and on what machine: medians between two quantiles, beside the ceilings of the same process.

Every run begins with cold caches. On a GPU Triton's do_bench times it, elsewhere the clock of the host. There a copy is
no strict ceiling: it also reads the lines that it overwrites, uncounted, which an update in place has read already.
"""

import datetime
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
QUICK = os.environ.get("BENCH_QUICK") == "1"  # few repeats, nothing compiled on a CPU: `python -m bench ... --quick`
UNCHECKED = os.environ.get("BENCH_UNCHECKED") == "1"  # launch it all, check and time nothing: a device without values
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = torch.get_num_threads()  # of an operation
FLUSH_BYTES = 2**28 if ON_GPU else 2**26  # written between runs; on a GPU what do_bench writes
LEAST_RUNS = 3 if QUICK else 5  # on a CPU
COPY_BYTES = 10**9 if ON_GPU else 64 * 10**6
MATMUL_SIDE = 8192 if ON_GPU else 1024


def spread(times: list[float]) -> dict[str, float]:
    """Of single runs, ms."""
    low, middle, high = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
    return {"median_ms": middle, "p20_ms": low, "p80_ms": high, "repeats": len(times)}


def require(right: bool | torch.Tensor, otherwise: str) -> None:
    """The check before every time. Raises AssertionError."""
    if not (UNCHECKED or right):
        raise AssertionError(f"{otherwise}: not timed")


def times_ms(run: Callable[[], object], budget_ms: float = 200, on_host: bool = not ON_GPU) -> list[float]:
    """Milliseconds of each of the runs that take about budget_ms together, after warming up.

    on_host: by its clock, for what does not end on the device.
    """
    if not on_host:
        from triton.testing import do_bench

        return do_bench(run, warmup=budget_ms / 4, rep=budget_ms, return_mode="all")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8)

    def once() -> float:
        flush.zero_()
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    once()
    repeats = max(LEAST_RUNS, int(budget_ms / once()))
    return [once() for _ in range(LEAST_RUNS if QUICK else repeats)]


@cache
def ceilings() -> dict[str, float]:
    """What this device reaches in this process: a copy of random bytes, and products of two square matrices."""

    def best(run: Callable[[], object]) -> float:
        return spread(times_ms(run))["p20_ms"]

    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=DEVICE)  # zeros would run faster
    target = torch.empty_like(source)
    found = {"copy_gbps": 2 * COPY_BYTES / best(lambda: target.copy_(source)) / 1e6}  # read and written
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=DEVICE, dtype=dtype).unbind()
        ms = best(partial(torch.mm, a, b, out=torch.empty_like(a)))
        found[f"matmul_{name}_tflops"] = 2 * MATMUL_SIDE**3 / ms / 1e9
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return next(iter(done.stdout.strip().splitlines()), "unknown")


def device_name() -> str:
    """The GPU, or the CPU and how many of its cores this process may use."""
    if ON_GPU:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.is_file() else "")
    return f"{model[1].strip() if model else platform.machine()} CPU, {CORES} core{'' if CORES == 1 else 's'}"


@cache
def host() -> dict[str, Any]:
    """What every figure depends on. power_limit: as the driver says it."""

    def of_gpu(what: str) -> str:
        query = f"--query-gpu={what}", "--format=csv,noheader"
        return _output("nvidia-smi", *query, f"--id={torch.cuda.current_device()}") if ON_GPU else "none"

    facts = {"device": device_name(), "quick": QUICK, "threads": THREADS, "python": platform.python_version()}
    facts |= {"power_limit": of_gpu("power.limit"), "driver": of_gpu("driver_version")}
    for package in ("torch", "triton", "xformers"):
        facts[package] = next((found.version for found in distributions(name=package)), "absent")
    # But for results, which a run itself adds to.
    changed = _output("git", "status", "--porcelain", "-uno", "--", ":/", ":!/bench/results") != "unknown"
    return facts | {"commit": _output("git", "describe", "--always") + "-dirty" * changed}


def now() -> str:
    """Date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
