"""A run from command to report: records on disk as they are known, a red check without a number, what is absent."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from bench.conftest import known
from bench.measure import host
from bench.picture import throughput
from bench.records import append, latest, measured, missing, read
from bench.report import put_into, report, summary
from bench.test_ops import BATCHES, K

pytest.importorskip("pytest_benchmark", reason="the benchmarks run under pytest-benchmark: the extra `bench`")

ROOT = Path(__file__).parent.parent
GROUP = f"center_update B{BATCHES[0]} K{K}"
WORDS = f"center_update and B{BATCHES[0]}"  # choose it
FIELDS = ("device", "threads", "power_limit", "driver", "torch", "triton", "xformers", "commit", "date", "group")
FIELDS += ("copy_gbps", "matmul_bf16_tflops", "matmul_fp32_tflops", "p20_ms", "p80_ms")


@pytest.fixture(scope="module")
def bench(forks):
    """`python -m bench WORDS`."""
    return partial(run_module, forks, "bench")


def run_module(forks, *words, cwd=ROOT, **environment):
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment["PYTEST_ADDOPTS"] = "-p no:hypothesispytest"  # whose import takes a third of such a run
    # Where these tests run under pytest-xdist, its variables would make pytest-benchmark measure nothing.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return forks.run("-m", *words, cwd=cwd, env=own | environment)


def test_everything_that_is_measured_has_a_name_of_its_own(forks):
    done = run_module(forks, "pytest", "-o", "addopts=", "--import-mode=importlib", "--collect-only", "-q", "bench")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory, bench):
    """`python -m bench ops --quick` of one op."""
    folder = tmp_path_factory.mktemp("run")
    return bench("ops", "--quick", "--out", str(folder), "-k", WORDS), folder


def test_a_run_ends_in_a_table(run):
    done, folder = run
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| {GROUP} | ours |" in done.stdout
    assert "Not drawn: throughput (no step and no loader was measured)." in done.stdout
    assert (folder / "report.md").read_text().strip() in done.stdout


def record(provider, median_ms, part="step", group="step A"):
    spread = {"median_ms": median_ms, "p20_ms": median_ms, "p80_ms": median_ms, "images_per_s": 1e3 / median_ms}
    where = {"name": f"{part}/{group}/{provider}", "part": part, "group": group, "provider": provider}
    return where | spread | {"device": "GPU", "threads": 2, "torch": "2", "commit": "1", "date": "2026-11-25T00:00"}


def test_ours_is_compared_with_the_fastest_other_of_the_same_group():
    rows = [record("plain", 90.0), record("ours eager", 50.0), record("library", 40.0), record("ours graph", 80.0)]
    rows += [record("ours eager", 1.0, group="step B"), record("library", 2.0, group="step B")]
    (row,) = summary(rows).splitlines()[2:]
    assert row == "| training step | A | PyTorch, fused AdamW | 25.0 images/s | 20.0 images/s (eager) | 0.80 |"


def test_the_picture_shows_the_step_with_most_providers(tmp_path):
    loader = record("ours fast", 5.0, part="pipeline", group="loader 0 workers")
    rows = [record("ours eager", 1.0, group="step B"), record("plain", 90.0), record("ours eager", 50.0), loader]
    assert throughput(rows, tmp_path / "a.svg") is None
    words = (tmp_path / "a.svg").read_text()
    assert "<!-- A -->" in words
    assert "<!-- B -->" not in words
    assert "<!-- 20.0 -->" in words


def test_every_record_says_where_it_was_measured(run):
    for record in measured(read(run[1])).values():
        for key in FIELDS:
            assert key in record, f"{record['name']} lacks {key}"
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


def test_who_is_absent_is_named_with_the_reason(run):
    absent = latest(read(run[1]))[f"ops/{GROUP}/compiled"]
    assert "Inductor" in absent["absent"]
    assert "median_ms" not in absent


def test_a_run_that_was_killed_keeps_what_it_had_and_says_what_it_lacks(run, tmp_path):
    lines = (run[1] / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join([*lines[:2], lines[2][:40]]))
    records = read(tmp_path)
    assert len(measured(records)) == 1
    assert f"ops/{GROUP}/plain" in missing(records)
    assert f"Missing: ops/{GROUP}/plain was planned and not measured." in report(records, tmp_path)


def test_a_run_goes_on_with_what_is_not_known(run, bench, tmp_path):
    lines = (run[1] / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("name") != f"ops/{GROUP}/ours"]
    (tmp_path / "results.jsonl").write_text("\n".join(kept) + "\n")
    options = ("ops", "--quick", "--continue", "--out", str(tmp_path), "-k", f"{WORDS} and not compiled")
    assert bench(*options).returncode == 0
    planned, *measured_now = read(tmp_path)[len(kept) :]
    assert planned["planned"] == [record["name"] for record in measured_now] == [f"ops/{GROUP}/ours"]
    done = bench(*options)
    assert done.returncode == 0, done.stdout  # and not 5, as where -k chooses nothing
    assert len(read(tmp_path)) == len(kept) + 3  # a line of what is planned: nothing


def test_known_is_what_was_timed_by_this_commit_on_this_device(tmp_path):
    file = tmp_path / "results.jsonl"
    assert known(file) == set()
    append(file, {"name": "a", "median_ms": 1.0} | host())
    append(file, {"name": "b", "median_ms": 1.0} | host() | {"commit": "another"})
    append(file, {"name": "c", "median_ms": 1.0} | host() | {"device": "another"})
    append(file, {"name": "d", "failed": "error 1"} | host())
    assert known(file) == {"a"}


def test_where_values_mean_nothing_it_all_runs_and_no_time_is_kept(bench, tmp_path):
    """On a device that computes nothing: $BENCH_UNCHECKED."""
    done = bench("ops", "--quick", "--out", str(tmp_path), "-k", f"{WORDS} and ours", BENCH_UNCHECKED="1")
    assert done.returncode == 0, done.stdout
    record = latest(read(tmp_path))[f"ops/{GROUP}/ours"]
    assert "nothing was checked or timed" in record["unchecked"]
    assert not measured(read(tmp_path))
    assert not {key for key in record if key.endswith(("_ms", "_us", "gbps", "tflops", "_s"))}


def test_a_red_check_prints_no_number_and_ends_the_run_red(forks, tmp_path):
    """Of a benchmark in which our average does nothing."""
    code = "import bench.test_ops as ops, torch, pytest\nfrom bench.test_ops import *\n"
    code += "ops.center_update_ = lambda center, teacher, momentum: None\n"
    wrong = tmp_path / "test_ops.py"
    wrong.write_text(code)
    (tmp_path / "conftest.py").write_text("from bench.conftest import *\n")
    command = ["pytest", "-q", "--no-summary", "-k", f"{WORDS} and ours", str(wrong)]
    done = run_module(forks, *command, cwd=tmp_path, BENCH_OUT=str(tmp_path / "out"), BENCH_QUICK="1")
    assert done.returncode == 1, done.stdout
    assert ": in check" in done.stdout  # where it was found
    record = latest(read(tmp_path / "out"))[f"ops/{GROUP}/ours"]
    assert "not timed" in record["failed"]
    assert "median_ms" not in record
    with pytest.raises(ValueError, match="expected a record with a time"):
        report(read(tmp_path / "out"), tmp_path)


def test_pytest_benchmark_saves_and_compares_the_same_times(run, forks):
    (file,) = run[1].glob("*/0001_*.json")
    saved = {x["extra_info"]["name"]: x for x in json.loads(file.read_text())["benchmarks"]}
    assert saved.keys() == measured(read(run[1])).keys()
    for x in saved.values():
        assert 1e3 * x["stats"]["median"] == pytest.approx(x["extra_info"]["median_ms"], rel=1e-6)
    done = forks.run("-m", "pytest_benchmark", f"--storage=file://{run[1]}", "compare", "--columns=median")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"test_center_update[ours-B{BATCHES[0]} K{K}]" in done.stdout


def test_the_summary_goes_between_its_markers(run, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nbelow\n")
    put_into(readme, summary(read(run[1])))
    text = readme.read_text()
    assert text.startswith("above\n<!-- bench: begin -->\n|")
    assert text.endswith("<!-- bench: end -->\nbelow\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="expected the markers"):
        put_into(run[1] / "report.md", "x")
