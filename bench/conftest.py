"""What turns a test into a figure: `timed`, a name for each, and a line on disk the moment it is known.

`pytest bench` shows pytest-benchmark's table and takes its options (`--benchmark-autosave`, `--benchmark-compare`);
`python -m bench` sets $BENCH_OUT, where records go. Parametrize `provider` nearest to the function: its id is the
provider, the rest of the id is the case.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import FLUSH_BYTES, ON_GPU, UNCHECKED, ceilings, host, now, spread, times_ms
from bench.records import Record, append, measured, rate, read

OUT = Path(os.environ["BENCH_OUT"]) / "results.jsonl" if "BENCH_OUT" in os.environ else None
CONTINUE = os.environ.get("BENCH_CONTINUE") == "1"  # `python -m bench ... --continue`
ITERATIONS = 5  # of what is not timed: the last of them replays a graph
NOTHING_NEW = pytest.StashKey[bool]()
_playing: Iterator[float] = iter(())


def _playback() -> float:
    """A timer for pytest-benchmark that gives back times measured before, in seconds."""
    return next(_playing)


def identity(item: pytest.Item) -> Record:
    """What a test is called in the records: test_ops.py::test_dino_loss[ours-B2] -> ops/dino_loss B2/ours."""
    part = item.path.stem.removeprefix("test_")
    what, call = item.originalname.removeprefix("test_"), item.callspec  # type: ignore[attr-defined]
    provider = call.params["provider"]
    group = f"{what} {call.id.removeprefix(provider).removeprefix('-')}".strip()
    return {"name": f"{part}/{group}/{provider}", "part": part, "group": group, "provider": provider}


def _keep(record: Record) -> None:
    if OUT:
        append(OUT, record)
        word = next((word for word in ("failed", "absent", "unchecked") if word in record), None)
        text = f"{word}: {record[word]}" if word else f"{record['median_ms']:10.3f} ms {rate(record)[0]:>16}"
        print(f"{record['name']:58} {text}".rstrip(), flush=True)


def known(file: Path) -> set[str]:
    """Names that have a time in a file, of this host and commit."""
    records = measured(read(file)) if file.is_file() else {}
    return {name for name, record in records.items() if record.items() >= host().items()}


@pytest.hookimpl(trylast=True)  # what -k leaves
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_playback))
    if OUT and CONTINUE:
        done = known(OUT)
        new = [item for item in items if identity(item)["name"] not in done]
        config.stash[NOTHING_NEW] = bool(items) and not new
        items[:] = new


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash.get(NOTHING_NEW, False):
        session.exitstatus = pytest.ExitCode.OK  # and not "no tests collected"


def pytest_collection_finish(session: pytest.Session) -> None:
    planned = [identity(item)["name"] for item in session.items]
    if OUT and not session.config.option.collectonly:
        append(OUT, {"planned": planned, "date": now()})


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
    counts = report.skipped or report.when == "call"
    return (report.outcome if counts else "", "", "") if OUT and not report.failed else None


def rates(median_ms: float, n_bytes: float, n_flops: float, dtype: str, n_images: float) -> Record:
    """What follows from a time: n_bytes that cannot be avoided, n_flops and n_images of a run; 0 where not counted."""
    found: Record = {}
    if n_bytes:
        gbps = n_bytes / median_ms / 1e6
        found |= {"floor_bytes": n_bytes, "gbps": gbps, "share_of_copy": gbps / ceilings()["copy_gbps"]}
    if n_flops:
        tflops = n_flops / median_ms / 1e9
        found |= {"flops": n_flops, "tflops": tflops, "share_of_matmul": tflops / ceilings()[f"matmul_{dtype}_tflops"]}
    return found | ({"images_per_s": 1e3 * n_images / median_ms} if n_images else {})


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times a run, after the test has checked what it computes, and keeps the record."""
    who = identity(request.node)
    if not UNCHECKED:
        ceilings()  # measured while the memory is free

    def time_it(
        run: Callable[[], object], *, n_bytes: float = 0, n_flops: float = 0, dtype: str = "fp32", n_images: float = 0,
        budget_ms: float = 200, times: list[float] | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        """times: milliseconds that were measured already. facts: more fields."""
        global _playing
        if UNCHECKED:
            for _ in range(0 if times else ITERATIONS):
                run()
            if ON_GPU:
                torch.cuda.synchronize()
            _keep(who | {"unchecked": "it ran; nothing was checked or timed"} | host() | {"date": now()})
            return
        if ON_GPU and not times:
            torch.cuda.reset_peak_memory_stats()
        found = times or times_ms(run, budget_ms)
        record = who | spread(found)
        record |= rates(record["median_ms"], n_bytes, n_flops, dtype, n_images) | {"dtype": dtype} | facts
        if ON_GPU and not times:
            record["peak_gib"] = (torch.cuda.max_memory_allocated() - FLUSH_BYTES) / 2**30
        record |= host() | ceilings() | {"date": now()}
        _playing = iter([x for ms in found for x in (0.0, ms / 1e3)])
        benchmark.group = f"{who['part']} {who['group']}"
        benchmark.extra_info.update(record)
        benchmark.pedantic(lambda: None, rounds=len(found))
        _keep(record)

    return time_it
