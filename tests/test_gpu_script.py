"""bench/gpu.sh with stand-ins for python and timeout: what it runs, in which order, for how long, and what again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["proof", "main", "tests", "ops", "attention", "base", "batch", "plain", "compiled", "fused", "jpeg"]
ORDER += ["features", "patches", "recipes", "doctor", "tuned", "step", "adamw", "report"]

PYTHON = """#!/bin/bash
(IFS='|'; echo "$*" >> "$STUB/calls")
case " $* " in
  *preflight*) [ -z "${LACKS:-}" ] || { echo "MISSING $LACKS"; exit 2; }; echo "device ${DEVICE:-H200}, commit 1" ;;
  *" ${HANGS:-nobody} "*) echo $$ > "$STUB/hanging"; exec sleep 30 ;;
  *" ${FAILS:-nobody} "*) exit "${CODE:-1}" ;;
esac
"""
TIMEOUT = """#!/bin/bash
echo "$4" >> "$STUB/limits"
exec {timeout} --foreground -k 1 "${{LIMIT:-9}}" "${{@:5}}"
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A folder in which the stand-ins write: calls, limits, hanging."""
    real = subprocess.run(["bash", "-c", "type -P timeout"], capture_output=True, text=True).stdout.strip()
    for name, text in (("python", PYTHON), ("timeout", TIMEOUT.format(timeout=real))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("STUB", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def gpu_sh(stub, *words, **environment):
    """Runs it in an own process group, as a shell would."""
    (stub / "calls").write_text("")
    return subprocess.Popen(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *words, str(stub / "out")], env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finished(stub, *words, **environment):
    process = gpu_sh(stub, *words, **environment)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def parts(stub):
    """(name, what became of it) of each line in parts.txt."""
    return [tuple(line.split(": ", 1)) for line in (stub / "out" / "parts.txt").read_text().splitlines()]


def calls(stub):
    return (stub / "calls").read_text().splitlines()


def test_a_host_that_lacks_something_is_told_so_before_anything_else_runs(stub):
    code, output = finished(stub, LACKS="no C compiler")
    assert code == 2
    assert "MISSING no C compiler" in output
    assert [call.split("|")[1] for call in calls(stub)] == ["bench.preflight"]


def test_the_evidence_comes_in_order_and_its_limits_fit_into_nine_minutes(stub):
    code, output = finished(stub)
    assert code == 0, output
    assert [name for name, _ in parts(stub)] == ORDER
    preflight, *limits, report = map(int, (stub / "limits").read_text().split())
    asked = ORDER.index("plain") + 1  # what follows has the time that these leave
    assert preflight + sum(limits[:asked]) + report <= 540
    assert "-k|graph_equals_eager|tests/" in calls(stub)[1]
    assert "--continue" in calls(stub)[2]


def test_no_part_is_given_more_than_what_is_left_of_the_budget(stub):
    assert finished(stub, BUDGET="80")[0] == 0
    assert max(map(int, (stub / "limits").read_text().split())) <= 70  # 10 s are kept back for the report


def test_parts_for_which_there_is_no_time_are_left_for_the_next_call(stub):
    code, output = finished(stub, BUDGET="40")
    assert code == 3
    assert "main: no time for it" in output
    assert "report: exit code 0" in output
    assert finished(stub)[0] == 0
    assert sorted(name for name, _ in parts(stub)) == sorted([*ORDER, "report"])


def test_a_second_call_runs_what_failed_and_nothing_that_is_done(stub):
    assert finished(stub, FAILS="attention")[0] == 1
    assert finished(stub)[0] == 0
    assert [name for name, _ in parts(stub)] == [*ORDER, "attention", "report"]
    finished(stub, DEVICE="H100")
    assert len(parts(stub)) == 2 * len(ORDER) + 2  # on another device all of it


def test_a_part_that_finds_nothing_to_measure_is_done_in_a_quick_run_alone(stub):
    assert finished(stub, FAILS="vit_base", CODE="5")[0] == 1
    for _ in range(2):
        assert finished(stub, "--quick", FAILS="vit_base", CODE="5", DEVICE="CPU")[0] == 0
    assert [name for name, _ in parts(stub)] == [*ORDER, *ORDER, "report"]


def test_a_part_that_the_budget_cut_short_asks_for_another_call_and_is_no_failure(stub):
    code, output = finished(stub, HANGS="vit_base", LIMIT="0.5", BUDGET="78")
    assert code == 3, output  # it had 68 of 70 s
    assert "base: stopped, its time was over" in output


def test_a_part_that_hangs_is_stopped_and_said_so(stub):
    code, output = finished(stub, HANGS="attention", LIMIT="0.5")
    assert code == 1
    assert "attention: stopped, its time was over: exit code 124" in output
    assert dict(parts(stub))["base"].startswith("exit code 0")
    assert finished(stub)[0] == 0


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_half_way_it_leaves_nothing_running_and_goes_on_when_called_again(stub, how, code):
    process = gpu_sh(stub, HANGS="attention")
    hanging = stub / "hanging"
    while not (hanging.is_file() and hanging.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, how)
    killed = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == code
    proc = Path("/proc") / hanging.read_text().strip() / "stat"
    while proc.is_file() and proc.read_text().split()[2] != "Z":
        assert time.monotonic() - killed < 10
        time.sleep(0.02)
    assert finished(stub)[0] == 0
    assert [name for name, _ in parts(stub)] == ORDER


def test_words_choose_on_a_gpu_what_the_parts_are_named_after(stub):
    """Planned, not run, as if there was a CUDA device. The main case and its profile share one step."""
    finished(stub)
    asked = [call.split("|") for call in calls(stub)]
    asked = [call for call in asked if "bench" in call and "-k" in call]
    words = [(f"bench/test_{call[2]}.py", call[call.index("-k") + 1]) for call in asked]
    code = f"""
import torch, pytest
torch.cuda.is_available = lambda: True
for file, words in {words!r}:
    print("words", words)
    options = ["-o", "addopts=", "--import-mode=importlib", "--setup-plan", "-q", "-p", "no:cacheprovider"]
    options += ["-p", "no:hypothesispytest", "-p", "no:unraisableexception"]  # half of the time
    pytest.main([*options, "-k", words, file])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    plans = done.stdout.split("words ")[1:]
    chosen = [re.findall(r"::(\w+\[.*?\])", plan) for plan in plans]
    ops = chosen.pop(1)
    assert "test_clip_adamw_ema[library]" in ops
    assert "test_clip_adamw_ema[compiled]" not in ops
    assert plans[0].count("SETUP    M step") == 1
    small, base = "vit_small 2+8 B64 bf16", "vit_base 2+8 B64 bf16"
    assert chosen == [
        [f"test_step[ours graph-{small}]", f"test_profile[ours graph-{small}]"],
        [f"test_step[ours graph-{base}]"],
        ["test_step[ours graph-vit_small 2+8 B256 bf16]"],
        [f"test_step[plain-{small}]", f"test_step[plain-{base}]"],
        [f"test_step[ours compiled-{small}]", f"test_step[fused compiled-{small}]"],
        [f"test_step[fused-{small}]", f"test_step[fused compiled-{small}]"],
        ["test_kernels[ours exact]", "test_kernels[ours fast]", f"test_training[ours graph-{small}]"],
        ["test_features[ours]", "test_features[plain]"],
        [
            *(f"test_patch_loss[{by}-B64 K65536]" for by in ("ours", "ours, in place", "plain", "compiled")),
            *(f"test_sinkhorn_center[{by}-B64 K65536]" for by in ("ours", "plain", "compiled")),
        ],
        [f"test_recipe[ours dinov2-{small}]", f"test_recipe[ours dinov3-{small}]"],
        [f"test_step[ours tuned-{small}]"],
    ], done.stdout + done.stderr
