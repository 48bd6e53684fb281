"""What turns a test into a figure: `timed`, a name for each, and a line on disk the moment it is known.

`pytest bench` shows pytest-benchmark's table and `--benchmark-save` keeps it; `python -m bench` sets $BENCH_OUT, where
records go. Parametrize `provider` nearest to the function: its id is the provider, the rest of the id is the case.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import DEVICE, FLUSH_BYTES, ON_GPU, QUICK, UNCHECKED, Timing, environment, host, now, times_ms
from bench.records import Record, append, measured, read

OUT = os.environ.get("BENCH_OUT")
CONTINUE = os.environ.get("BENCH_CONTINUE") == "1"  # `python -m bench ... --continue`
ITERATIONS = 5  # of what is not timed: the last of them replays a graph
_playing: Iterator[float] = iter(())


def _playback() -> float:
    """A timer for pytest-benchmark that gives back times measured before, in seconds."""
    return next(_playing)


def identity(item: pytest.Item) -> Record:
    """What a test is called in the records: test_ops.py::test_dino_loss[ours-B2] -> ops/dino_loss B2/ours."""
    part = item.path.stem.removeprefix("test_")
    what, call = item.originalname.removeprefix("test_"), getattr(item, "callspec", None)  # type: ignore[attr-defined]
    default = "PyTorch" if part == "ceilings" else "ours"
    provider = call.params.get("provider", default) if call else default
    case = call.id.removeprefix(provider).removeprefix("-") if call else ""
    group = f"{what} {case}".strip()
    return {"name": f"{part}/{group}/{provider}", "part": part, "group": group, "provider": provider}


def line(record: Record) -> str:
    """A record for a reader."""
    for word in ("failed", "absent", "unchecked"):
        if word in record:
            return f"{record['name']:58} {word}: {record[word]}"
    text = f"{record['name']:58} {record['median_ms']:10.3f} ms"
    by_flops = record.get("share_of_matmul", 0) > record.get("share_of_copy", 0)
    rates = [("images_per_s", "images/s"), ("tflops", "TFLOP/s") if by_flops else ("gbps", "GB/s")]
    rate = next((f"{record[key]:10,.2f} {unit}" for key, unit in rates if key in record), "")
    return f"{text} {rate}".rstrip()


def _keep(record: Record) -> None:
    if OUT:
        append(Path(OUT), record)
        print(line(record), flush=True)


def known(folder: Path) -> set[str]:
    """Names that have a time in a folder, of this host and commit."""
    if not (folder / "results.jsonl").is_file():
        return set()
    return {name for name, record in measured(read(folder)).items() if record.items() >= host().items()}


NOTHING_NEW = pytest.StashKey[bool]()


@pytest.hookimpl(trylast=True)  # what -k leaves
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_playback))
    if OUT and CONTINUE:
        done = known(Path(OUT))
        old = [item for item in items if identity(item)["name"] in done]
        config.hook.pytest_deselected(items=old)
        config.stash[NOTHING_NEW] = len(old) == len(items) > 0
        items[:] = [item for item in items if identity(item)["name"] not in done]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash.get(NOTHING_NEW, False):
        session.exitstatus = pytest.ExitCode.OK  # and not "no tests collected"


def pytest_collection_finish(session: pytest.Session) -> None:
    if OUT and not session.config.option.collectonly:
        append(Path(OUT), {"planned": [identity(item)["name"] for item in session.items], "date": now()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # pytest keeps it, and it the tensors
        pytest.skip("does not fit into the device's memory")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.skipped and call.excinfo:
        _keep(identity(item) | {"absent": str(call.excinfo.value).removeprefix("Skipped: "), "date": now()})
    elif report.failed and call.excinfo:
        words = str(call.excinfo.value).strip().splitlines() or [""]
        _keep(identity(item) | {"failed": f"{call.excinfo.typename}: {words[0]}"[:300], "date": now()})
        print(report.longreprtext, flush=True)
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots between the lines."""
    if not OUT or report.failed:
        return None
    return (report.outcome if report.skipped or report.when == "call" else "", "", "")


def rates(timing: Timing, n_bytes: float, n_flops: float, dtype: str, n_images: float) -> Record:
    """What follows from a time: n_bytes that cannot be avoided, n_flops and n_images of a run; 0 where not counted."""
    found: Record = {}
    if n_bytes:
        gbps = n_bytes / timing.median_ms / 1e6
        found |= {"floor_bytes": n_bytes, "gbps": gbps, "share_of_copy": gbps / environment()["copy_gbps"]}
    if n_flops:
        tflops = n_flops / timing.median_ms / 1e9
        share = tflops / environment()[f"matmul_{dtype}_tflops"]
        found |= {"flops": n_flops, "dtype": dtype, "tflops": tflops, "share_of_matmul": share}
    if n_images:
        found["images_per_s"] = 1e3 * n_images / timing.median_ms
    return found


Timed = Callable[..., Record]


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """Times a run, after the test has checked what it computes, and keeps the record."""
    who = identity(request.node)
    if not UNCHECKED:
        environment()  # its ceilings are measured while the memory is free

    def time_it(
        run: Callable[[], object],
        *,
        n_bytes: float = 0,
        n_flops: float = 0,
        dtype: str = "fp32",
        n_images: float = 0,
        repeats: int | None = None,
        warmup: int | None = None,
        times: list[float] | None = None,
        extra: Callable[[Timing], Record] | None = None,
    ) -> Record:
        """times: milliseconds that were measured already. extra: more fields, from the timing."""
        global _playing
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        if UNCHECKED:
            for _ in range(0 if times else ITERATIONS):
                run()
            _keep(who | {"unchecked": "it ran; nothing was checked or timed"} | host() | {"date": now()})
            return {}
        repeats = repeats or (50 if ON_GPU else 10) // (2 if QUICK else 1)
        found = times or times_ms(run, repeats, (5 if ON_GPU else 2) if warmup is None else warmup)
        peak = (torch.cuda.max_memory_allocated(DEVICE) - FLUSH_BYTES) / 2**30 if ON_GPU else None
        timing = Timing.of(found)
        record = who | vars(timing) | {"repeats": len(found)} | rates(timing, n_bytes, n_flops, dtype, n_images)
        if peak is not None:
            record["peak_gib"] = peak
        record |= (extra(timing) if extra else {}) | environment() | {"date": now()}
        _playing = iter([x for ms in found for x in (0.0, ms / 1e3)])
        benchmark.group = f"{who['part']} {who['group']}"
        benchmark.extra_info.update(record)
        benchmark.pedantic(lambda: None, rounds=len(found))
        _keep(record)
        return record

    return time_it
