"""sinkhorn_center against the textbook's iteration in fp64, plain PyTorch, and on all that a caller may hand it."""

import math
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from budget import assert_within_budget
from torch import Tensor

from fastdino_kernels import dino_loss, launch, library, reference, sinkhorn_center
from fastdino_kernels.sinkhorn import _column_exps, _column_probs, _Library

TEMP = 0.04
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def textbook(teacher: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Targets (M, K): rows and columns of exp(teacher / temp) scaled in turn."""
    probs = torch.exp((teacher - teacher.max()) / temp)
    for _ in range(iterations):
        probs = probs / probs.sum(0, keepdim=True)
        probs = probs / probs.sum(1, keepdim=True)
    return probs


def targets(teacher: Tensor, center: Tensor, temp: float = TEMP) -> Tensor:
    return torch.softmax((teacher - center) / temp, dim=-1)


def case(n_rows: int, n_prototypes: int, dtype: torch.dtype) -> object:
    short = {fp32: "fp32", bf16: "bf16", fp16: "fp16"}[dtype]
    return pytest.param(n_rows, n_prototypes, dtype, id=f"M{n_rows}-K{n_prototypes}-{short}")


CASES = [
    case(12, 257, fp32),
    case(12, 257, bf16),
    case(12, 257, fp16),
    case(1, 1, fp32),
    case(1, 33, bf16),
    case(70, 64, bf16),  # two reads of 64 rows, the second not full
    case(131, 2049, fp32),
]


def logits(n_rows: int, n_prototypes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(n_prototypes)
    return (0.5 * torch.randn(n_rows, n_prototypes, generator=draw)).to(device, dtype)


def plain(teacher: Tensor, *args, **kwargs) -> Tensor:
    """The same in plain PyTorch, in fp32: the reference, which on a CPU library calls take the place of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "TRITON_DEVICES", set())
        patch.setattr(import_module("fastdino_kernels.sinkhorn"), "on_host", lambda x: False)
        return sinkhorn_center(teacher, TEMP, *args, **kwargs)


@pytest.fixture(params=["kernels", "library"])
def place(request, monkeypatch, device) -> torch.device:
    """Where the kernels run, and the CPU without them, where library calls do the same."""
    if request.param == "kernels":
        return device
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    return torch.device("cpu")


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_fp64_targets_are_the_textbooks(iterations, device):
    teacher = logits(50, 257, fp32, device).double()
    got = targets(teacher, sinkhorn_center(teacher, TEMP, iterations))
    torch.testing.assert_close(got, textbook(teacher, TEMP, iterations), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("n_rows", "n_prototypes", "dtype"), CASES)
def test_center_matches_fp64(n_rows, n_prototypes, dtype, place):
    teacher = logits(n_rows, n_prototypes, dtype, place)
    center = sinkhorn_center(teacher, TEMP)
    assert center.dtype == fp32
    assert_within_budget("center", center, plain(teacher), sinkhorn_center(teacher.double(), TEMP), fp32)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_logits_of_any_size_match_fp64(scale, place):
    """exp(1e4 / 0.04) has a hundred thousand digits."""
    teacher = scale * logits(40, 257, fp32, place)
    center, truth = sinkhorn_center(teacher, TEMP), sinkhorn_center(teacher.double(), TEMP)
    assert center.isfinite().all()
    assert_within_budget("center", center, plain(teacher), truth, fp32)
    if scale == 1:
        torch.testing.assert_close(
            targets(teacher.double(), center), targets(teacher.double(), truth), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize(("scale", "n_times"), [(0.1, 1), (1e4, 2)])
def test_exponentials_are_taken_again_only_where_they_must_be(scale, n_times, monkeypatch):
    """By library calls: where rows are far below the tops of all columns. In chunks the bits are the same."""
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    keep, calls = _Library._keep, []
    monkeypatch.setattr(_Library, "_keep", lambda self, *words: (calls.append(words), keep(self, *words)))
    teacher = scale * logits(300, 8, fp32, torch.device("cpu"))
    at_once = sinkhorn_center(teacher, TEMP)
    assert len(calls) == n_times
    assert_within_budget("center", at_once, plain(teacher), sinkhorn_center(teacher.double(), TEMP), fp32)
    monkeypatch.setattr(library, "CHUNK", 3 * 8)
    assert torch.equal(sinkhorn_center(teacher, TEMP), at_once)


def test_library_calls_add_up_long_rows_as_exactly_as_plain_pytorch(monkeypatch):
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    teacher = logits(24, 65536, fp32, torch.device("cpu")) / 2
    truth = sinkhorn_center(teacher.double(), TEMP)
    assert_within_budget("center", sinkhorn_center(teacher, TEMP), plain(teacher), truth, fp32)


def test_many_iterations_give_every_prototype_its_share(place):
    teacher = logits(80, 16, fp32, place)
    warm = 0.5  # at TEMP a hundred iterations are not enough
    center = sinkhorn_center(teacher, warm, iterations=20)
    shares = torch.softmax((teacher - center) / warm, -1).mean(0)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 16), rtol=1e-4, atol=0)
    first = torch.softmax((teacher - sinkhorn_center(teacher, warm, iterations=1)) / warm, -1).mean(0)
    assert (first * 16 - 1).abs().max() > 1e-2


def test_dino_loss_takes_it(place):
    """As its center: the loss against the textbook's targets."""
    student, teacher = logits(20, 65, fp32, place).view(2, 10, 65), logits(20, 65, fp32, place).neg()
    center = sinkhorn_center(teacher, TEMP)
    loss = dino_loss(student, teacher.view(2, 10, 65), center, 0.1, TEMP)
    probs = textbook(teacher.double(), TEMP).view(2, 10, 65)
    log_probs = torch.log_softmax(student.double() / 0.1, -1)
    expected = -(probs * log_probs.flip(0)).sum(-1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38], ids=str)
def test_padding_changes_nothing(garbage, place):
    teacher = logits(12, 257, bf16, place)
    padding = torch.full((5, 257), garbage, device=place).to(bf16)
    rows = torch.cat([padding[:2], teacher[:6], padding[2:4], teacher[6:], padding[4:]])
    weights = torch.tensor([0, 0, *[0.3] * 6, 0, 0, *[0.1] * 6, 0], device=place)
    torch.testing.assert_close(sinkhorn_center(rows, TEMP, weights=weights), sinkhorn_center(teacher, TEMP))


def test_strides_change_no_bit(device):
    teacher = logits(12, 257, bf16, device)
    expected = sinkhorn_center(teacher, TEMP)
    for layout in (teacher.t().contiguous().t(), torch.cat([teacher, teacher], dim=1)[:, :257]):
        assert torch.equal(sinkhorn_center(layout, TEMP), expected)


def test_rerun_and_a_temperature_on_the_device_give_the_same_bits(device):
    teacher = logits(131, 257, bf16, device)
    expected = sinkhorn_center(teacher, TEMP)
    for temp in (TEMP, torch.tensor(TEMP, device=device), torch.tensor([TEMP], device=device)):
        assert torch.equal(sinkhorn_center(teacher, temp), expected)


def test_no_gradient_is_recorded(place):
    assert not sinkhorn_center(logits(3, 33, fp32, place).requires_grad_(), TEMP).requires_grad


def test_a_nan_is_not_averaged_away(place):
    teacher = logits(12, 257, fp32, place)
    teacher[3, 5] = math.nan
    assert sinkhorn_center(teacher, TEMP).isnan().any()


BAD = [
    ("three axes", lambda t: ((t[None], 0.04), {}), r"teacher: expected shape \(M, K\), got \(1, 3, 17\)"),
    ("no rows", lambda t: ((t[:0], 0.04), {}), r"at least one row and one prototype, got shape \(0, 17\)"),
    ("no prototype", lambda t: ((t[:, :0], 0.04), {}), r"one prototype, got shape \(3, 0\)"),
    ("integer logits", lambda t: ((t.long(), 0.04), {}), "teacher: .* got torch.int64"),
    ("temperature 0", lambda t: ((t, 0.0), {}), "temp: expected .* above 0, got 0.0"),
    ("temperature elsewhere", lambda t: ((t, torch.ones((), device="meta")), {}), "temp: .* got meta"),
    ("no iteration", lambda t: ((t, 0.04, 0), {}), "iterations: expected at least 1, got 0"),
    ("other M in the weights", lambda t: ((t, 0.04), {"weights": t[:2, 0]}), r"weights: .* \(3\), got \(2,\)"),
    ("boolean weights", lambda t: ((t, 0.04), {"weights": t[:, 0] > 0}), "weights: .* got torch.bool"),
]


@pytest.mark.parametrize(("arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_a_value_error(arguments, message):
    args, kwargs = arguments(logits(3, 17, fp32, torch.device("cpu")))
    with pytest.raises(ValueError, match=message):
        sinkhorn_center(*args, **kwargs)


def test_opcheck(device):
    teacher = logits(3, 33, fp32, device)
    weights, temp = torch.ones(3, device=device), torch.tensor(TEMP, device=device)
    torch.library.opcheck(_column_exps, (teacher, weights, temp))
    torch.library.opcheck(_column_probs, (teacher, torch.zeros(33, device=device), weights, temp))


@pytest.mark.parametrize("dtype", [bf16, torch.float64], ids=["kernels", "reference"])
def test_compiled_fullgraph_equals_eager(dtype, device):
    teacher = logits(12, 257, dtype, device)
    compiled = torch.compile(sinkhorn_center, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(teacher, TEMP), sinkhorn_center(teacher, TEMP), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=["fp32", "bf16"])
def test_nothing_of_the_logits_size_is_made(dtype, device):
    teacher = logits(64, 512, dtype, device)
    weights, temp = torch.ones(64, device=device), torch.tensor(TEMP, device=device)
    for got in (_column_exps(teacher, weights, temp), _column_probs(teacher, teacher[0].float(), weights, temp)):
        assert got.numel() <= 2 * 512


SPLITS = [9, 0, 4]
OF_A_PART = "import sys, test_sinkhorn; test_sinkhorn.center_of_a_part(sys.argv[1])"


def center_of_a_part(path: str) -> None:
    """What a process does: the center of its rows and the others'."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=len(SPLITS))
    own = logits(sum(SPLITS), 33, fp32, torch.device("cpu")).double().split(SPLITS)[rank]
    torch.save(sinkhorn_center(own, TEMP, group=dist.group.WORLD), f"{path}/{rank}")
    dist.destroy_process_group()


def test_processes_equal_one_with_the_whole_batch(forks: Any, tmp_path: Path):
    """Unequal numbers of rows, and none at all in one process."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    all_ = forks.run_ranks(3, "-c", OF_A_PART, tmp_path, env=os.environ | {"PYTHONPATH": path})
    assert not any(done.returncode for done in all_), "".join(done.stderr for done in all_)
    expected = sinkhorn_center(logits(13, 33, fp32, torch.device("cpu")).double(), TEMP)
    for rank in range(3):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_rows", "n_prototypes", "dtype"), [case(377, 65536, bf16), case(64, 65537, fp32)])
def test_real_sizes_match_fp64(n_rows, n_prototypes, dtype, device):
    teacher = logits(n_rows, n_prototypes, dtype, device)
    center, truth = sinkhorn_center(teacher, TEMP), sinkhorn_center(teacher.double(), TEMP)
    assert_within_budget("center", center, plain(teacher), truth, fp32)


@pytest.mark.gpu
def test_captured_center_follows_its_temperature(device):
    teacher, temp = logits(64, 65536, bf16, device), torch.tensor(TEMP, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        sinkhorn_center(teacher, temp)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sinkhorn_center(teacher, temp)
    for value in (0.04, 0.05, 0.07):
        temp.fill_(value)
        graph.replay()
        assert torch.equal(captured, sinkhorn_center(teacher, temp))


def test_reference_of_no_row_is_nothing():
    top, total = reference.column_exps(torch.zeros(0, 3), torch.zeros(0), TEMP)
    assert (top < -1e35).all()
    assert not total.any()
