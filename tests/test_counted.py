"""Counted figures of a step: read from what watched it, said to be untimed, shown side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from trials.counted import count, table

LAUNCHES = """\
setup\t0\tkernel\ttriton triton_poi_fused_0
iteration 3\t0\thost\tcudaGraphLaunch
iteration 3\t1\tkernel\ttriton triton_poi_fused_0
iteration 3\t1\tkernel\ttriton _dino_loss_fwd_kernel
iteration 3\t1\tkernel\tvoid pytorch_flash::flash_bwd_kernel<...>
iteration 3\t1\tkernel\tvoid at::native::reduce_kernel<...>
iteration 3\t1\tgemm\tcublasGemmEx\tNT\tm=1000 n=1000 k=500 batch=2\tbf16->bf16
iteration 3\t1\tmemset\tcudaMemsetAsync\t64
iteration 3\t1\tsync\tcudaStreamSynchronize
"""
NODES = [
    {"kind": "SchedulerNode", "reads": 2e9, "writes": 1e9},
    {"kind": "ExternKernelSchedulerNode", "reads": 5e9, "writes": 5e9, "extern": "aten.addmm"},
    {"kind": "NopKernelSchedulerNode", "reads": 5e9, "writes": 5e9},
]


@pytest.fixture
def run(tmp_path):
    case = {"torch": "2.14.1", "arch": "vit_small", "batch": 64, "mode": "graph", "dtype": "bf16"}
    case |= {"phase": "iteration 3", "peak_gib": 7.5319, "graph_breaks": {"a reason": 2}}
    graphs = [{"backward": False, "nodes": NODES}, {"backward": True, "nodes": NODES[:1] * 2}]
    (tmp_path / "a.kernels.json").write_text(json.dumps({"case": case, "graphs": graphs}))
    (tmp_path / "a.launches.tsv").write_text(LAUNCHES)
    return tmp_path / "a"


def test_figures_are_those_of_one_replay(run):
    record = count(run, ["commit=4918220"])
    assert record["commit"] == "4918220"
    assert record["launches"] == 6
    kinds = ("generated", "of the project", "attention", "of PyTorch", "gemm", "memset")
    assert [record[f"launches, {kind}"] for kind in kinds] == [1] * 6
    assert record["generated kernels, GB forward"] == 3
    assert record["generated kernels, GB backward"] == 6
    assert record["GEMM, TFLOP"] == 0.002
    assert (record["peak_gib"], record["graph breaks"]) == (7.53, 2)


def test_no_time_is_in_it_but_one_that_is_called_predicted(run):
    record = count(run, [], (1.5, 2.5))
    assert record["timed"] is False
    assert {name: x for name, x in record.items() if " ms" in name} == {
        "PREDICTED ms, ideal": 1.5,
        "PREDICTED ms, expected": 2.5,
    }
    with pytest.raises(ValueError, match="NAME=VALUE"):
        count(run, ["4918220"])


def test_a_figure_that_only_one_record_has_is_blank_in_the_other():
    assert table([{"a": 1, "b": 2}, {"a": 3}]) == "a  1  3\nb  2"


def test_the_command_adds_a_record_and_shows_all(run, tmp_path):
    for commit in ("1", "2"):
        command = [sys.executable, "-m", "trials.counted", str(tmp_path / "f.jsonl"), str(run), f"commit={commit}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["commit", "1", "2"]
    assert len((tmp_path / "f.jsonl").read_text().splitlines()) == 2
