"""A run from command to pictures: records on disk as they are known, a red check without a number, what is absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.conftest import known
from bench.measure import host
from bench.records import append, latest, measured, missing, read
from bench.report import put_into, report, summary

pytest.importorskip("pytest_benchmark", reason="the benchmarks run under pytest-benchmark: the extra `bench`")

ROOT = Path(__file__).parent.parent
FIELDS = ("device", "power_limit", "driver", "torch", "triton", "xformers", "commit", "date", "group")
FIELDS += ("copy_gbps", "matmul_bf16_tflops", "matmul_fp32_tflops", "p20_ms", "p80_ms")


def bench(*words, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "bench", *words],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`python -m bench ops --quick` of one op."""
    folder = tmp_path_factory.mktemp("run")
    return bench("ops", "--quick", "--out", str(folder), "-k", "ema_update"), folder


def test_a_run_ends_in_a_table_and_pictures(run):
    done, folder = run
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| ema_update | ours |" in done.stdout
    assert "not measured for two batch sizes" in done.stdout  # and what cannot be drawn is said
    assert (folder / "ops.png").stat().st_size > 10_000
    assert (folder / "report.md").read_text().strip() in done.stdout


def test_every_record_says_where_it_was_measured(run):
    for record in measured(read(run[1])).values():
        for key in FIELDS:
            assert key in record, f"{record['name']} lacks {key}"
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]


def test_who_is_absent_is_named_with_the_reason(run):
    absent = latest(read(run[1]))["ops/ema_update/compiled"]
    assert "Inductor" in absent["absent"]
    assert "median_ms" not in absent


def test_a_run_that_was_killed_keeps_what_it_had_and_says_what_it_lacks(run, tmp_path):
    lines = (run[1] / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join([*lines[:3], lines[3][:40]]))
    records = read(tmp_path)
    assert len(measured(records)) == 2
    assert "ops/ema_update/foreach lerp" in missing(records)
    assert "Missing: ops/ema_update/foreach lerp was planned and not measured." in report(records, tmp_path)


def test_a_run_goes_on_with_what_is_not_known(run, tmp_path):
    lines = (run[1] / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("name") != "ops/ema_update/ours"]
    (tmp_path / "results.jsonl").write_text("\n".join(kept) + "\n")
    options = ("ops", "--quick", "--continue", "--out", str(tmp_path), "-k", "ema_update and not compiled")
    assert bench(*options).returncode == 0
    planned, *measured_now = read(tmp_path)[len(kept) :]
    assert planned["planned"] == [record["name"] for record in measured_now] == ["ops/ema_update/ours"]
    done = bench(*options)
    assert done.returncode == 0, done.stdout  # and not 5, as where -k chooses nothing
    assert len(read(tmp_path)) == len(kept) + 3  # a line of what is planned: nothing


def test_known_is_what_was_timed_by_this_commit_on_this_device(tmp_path):
    assert known(tmp_path) == set()
    append(tmp_path, {"name": "a", "median_ms": 1.0} | host())
    append(tmp_path, {"name": "b", "median_ms": 1.0} | host() | {"commit": "another"})
    append(tmp_path, {"name": "c", "median_ms": 1.0} | host() | {"device": "another"})
    append(tmp_path, {"name": "d", "failed": "error 1"} | host())
    assert known(tmp_path) == {"a"}


def test_where_values_mean_nothing_it_all_runs_and_no_time_is_kept(tmp_path):
    """On a device that computes nothing: $BENCH_UNCHECKED."""
    done = bench("ops", "--quick", "--out", str(tmp_path), "-k", "ema_update and ours", BENCH_UNCHECKED="1")
    assert done.returncode == 0, done.stdout
    record = latest(read(tmp_path))["ops/ema_update/ours"]
    assert "nothing was checked or timed" in record["unchecked"]
    assert not measured(read(tmp_path))
    assert not {key for key in record if key.endswith(("_ms", "_us", "gbps", "tflops", "_s"))}


def test_a_red_check_prints_no_number_and_ends_the_run_red(tmp_path):
    """Of a benchmark in which our average does nothing."""
    code = "import bench.test_ops as ops, torch, pytest\nfrom bench.test_ops import *\n"
    code += "ops.ema_update_ = lambda teacher, student, momentum: None\n"
    wrong = tmp_path / "test_ops.py"
    wrong.write_text(code)
    conftest = "from bench.conftest import *\n"
    (tmp_path / "conftest.py").write_text(conftest)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "BENCH_OUT": str(tmp_path / "out"), "BENCH_QUICK": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-summary", "-k", "ema_update and ours", str(wrong)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1, done.stdout
    assert ": in check" in done.stdout  # where it was found
    record = latest(read(tmp_path / "out"))["ops/ema_update/ours"]
    assert "not timed" in record["failed"]
    assert "median_ms" not in record
    with pytest.raises(ValueError, match="expected a record with a time"):
        report(read(tmp_path / "out"), tmp_path)


def test_pytest_benchmark_has_the_same_times(tmp_path):
    """`pytest bench` without our command: its own table and files."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    file = tmp_path / "saved.json"
    words = ["-k", "ema_update and ours", f"--benchmark-json={file}", str(ROOT / "bench" / "test_ops.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "BENCH_QUICK": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (saved,) = json.loads(file.read_text())["benchmarks"]
    assert 1e3 * saved["stats"]["median"] == pytest.approx(saved["extra_info"]["median_ms"], rel=1e-6)


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
