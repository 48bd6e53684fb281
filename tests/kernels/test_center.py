"""batch_center, center_ema_ and center_update_ against fp64, and on everything a caller may hand them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from fastdino_kernels import batch_center, center_ema_, center_update_, reference
from fastdino_kernels.center import _batch_center, _center_ema_, _center_update_

GOLDEN = Path(__file__).parents[1] / "golden"
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def case(n_teacher: int, n_images: int, n_prototypes: int, dtype: torch.dtype) -> object:
    short = {fp32: "fp32", bf16: "bf16", fp16: "fp16"}[dtype]
    return pytest.param(
        n_teacher, n_images, n_prototypes, dtype, id=f"T{n_teacher}-B{n_images}-K{n_prototypes}-{short}"
    )


CASES = [
    case(2, 3, 257, fp32),
    case(2, 3, 257, bf16),
    case(2, 3, 257, fp16),
    case(1, 1, 1, fp32),
    case(3, 70, 192, bf16),  # 70 images: a read of 64, and six more
    case(2, 16, 1030, fp32),
]


def rows(
    n_teacher: int, n_images: int, n_prototypes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """teacher (T, B, K) and center (K,)."""
    draw = torch.Generator().manual_seed(n_prototypes)
    teacher = 3 + torch.randn(n_teacher, n_images, n_prototypes, generator=draw)
    return teacher.to(device, dtype), torch.randn(n_prototypes, generator=draw).to(device)


def updated(center: Tensor, *args, op=center_update_) -> Tensor:
    center = center.clone()
    op(center, *args)
    return center


@pytest.mark.parametrize(("n_teacher", "n_images", "n_prototypes", "dtype"), CASES)
def test_center_matches_fp64(n_teacher, n_images, n_prototypes, dtype, device):
    teacher, center = rows(n_teacher, n_images, n_prototypes, dtype, device)
    mean, true_mean = batch_center(teacher), reference.batch_center(teacher.double())
    assert mean.dtype == fp32
    assert_within_budget("batch_center", mean, reference.batch_center(teacher), true_mean, fp32)

    plain = updated(center, reference.batch_center(teacher), 0.9, op=reference.center_ema_)
    truth = updated(center.double(), true_mean, 0.9, op=reference.center_ema_)
    assert_within_budget("center_update_", updated(center, teacher, 0.9), plain, truth, fp32)
    assert_within_budget("center_ema_", updated(center, mean, 0.9, op=center_ema_), plain, truth, fp32)


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=["fp32", "bf16", "fp16"])
def test_huge_logits_match_fp64(dtype, device):
    """+-1e4, and a row of 1e3 in one place: what cancels leaves no more than the rounding of the sum."""
    teacher, center = rows(2, 40, 257, fp32, device)
    teacher = 1e4 * (teacher - 3).clamp(-1, 1)
    teacher[0, 0] = 0
    teacher[0, 0, 256] = 1e3
    teacher = teacher.to(dtype)
    mean, true_mean = batch_center(teacher), reference.batch_center(teacher.double())
    assert_within_budget("batch_center", mean, reference.batch_center(teacher), true_mean, fp32)
    truth = updated(center.double(), true_mean, 0.9, op=reference.center_ema_)
    plain = updated(center, reference.batch_center(teacher), 0.9, op=reference.center_ema_)
    assert_within_budget("center_update_", updated(center, teacher, 0.9), plain, truth, fp32)


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
def test_low_precision_center_is_rounded_once(dtype, device):
    teacher, center = rows(2, 3, 257, fp32, device)
    center = center.to(dtype)
    plain = updated(center, reference.batch_center(teacher), 0.9, op=reference.center_ema_)
    truth = updated(center.double(), reference.batch_center(teacher.double()), 0.9, op=reference.center_ema_)
    assert_within_budget("center", updated(center, teacher, 0.9), plain, truth, dtype)


def test_fp64_center_stays_fp64(device):
    teacher, center = rows(2, 3, 257, fp32, device)
    truth = updated(center.double(), reference.batch_center(teacher), 0.9, op=reference.center_ema_)
    assert torch.equal(updated(center.double(), teacher, 0.9), truth)
    assert batch_center(teacher.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="image-major"),
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="K-strided"),
        pytest.param(lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]], id="rows-with-gaps"),
    ],
)
def test_strides_change_no_bit(layout, device):
    teacher, center = rows(2, 3, 257, bf16, device)
    assert torch.equal(batch_center(layout(teacher)), batch_center(teacher))
    wide = torch.stack([center, center], dim=1)
    center_update_(wide[:, 0], layout(teacher), 0.9)
    assert torch.equal(wide[:, 0], updated(center, teacher, 0.9))
    assert torch.equal(wide[:, 1], center), "the neighbours of a strided center are not its own"
    center_ema_(wide[:, 1], wide[:, 0], 0.9)
    assert torch.equal(wide[:, 1], updated(center, wide[:, 0].clone(), 0.9, op=center_ema_))


def test_expanded_teacher_is_respected(device):
    teacher, _ = rows(1, 3, 257, fp32, device)
    assert torch.equal(batch_center(teacher.expand(2, -1, -1)), batch_center(teacher.repeat(2, 1, 1)))


def test_momentum_on_the_device_equals_a_float(device):
    teacher, center = rows(2, 3, 257, fp32, device)
    for momentum in (0.0, 0.9, 1.0):
        expected = updated(center, teacher, momentum)
        for on_device in (torch.tensor(momentum, device=device), torch.tensor([momentum], device=device)):
            assert torch.equal(updated(center, teacher, on_device), expected)
    assert torch.equal(updated(center, teacher, 1.0), center)
    assert torch.equal(updated(center, teacher, 0.0), batch_center(teacher))


def test_rerun_gives_the_same_bits(device):
    teacher, center = rows(2, 33, 1030, bf16, device)
    assert torch.equal(updated(center, teacher, 0.9), updated(center, teacher, 0.9))


def test_a_logit_that_is_not_finite_is_not_averaged_away(device):
    teacher, center = rows(2, 3, 257, fp32, device)
    teacher[1, 2, 5], teacher[0, 0, 6] = math.nan, math.inf
    result = updated(center, teacher, 0.9)
    assert result[5].isnan()
    assert result[6].isinf()
    assert result.isfinite().sum() == 255


def test_no_gradient_is_recorded(device):
    teacher, center = rows(2, 3, 257, fp32, device)
    teacher.requires_grad_()
    assert not batch_center(teacher).requires_grad
    center_update_(center, teacher, 0.9)
    assert not center.requires_grad


BAD = [
    ("teacher of two axes", lambda c, t: (c, t[0], 0.9), "teacher: expected shape .* got"),
    ("empty batch", lambda c, t: (c, t[:, :0], 0.9), r"teacher: expected at least one row .* got shape \(2, 0, 17\)"),
    ("other K", lambda c, t: (c, t[..., :9], 0.9), r"center: expected shape \(9\), got \(17,\)"),
    ("center (1, K)", lambda c, t: (c[None], t, 0.9), r"center: expected shape \(17\), got \(1, 17\)"),
    ("integer teacher", lambda c, t: (c, t.long(), 0.9), "teacher: expected floating-point values, got torch.int64"),
    ("integer center", lambda c, t: (c.long(), t, 0.9), "center: expected floating-point values, got torch.int64"),
    ("other device", lambda c, t: (c, t.to("meta"), 0.9), "teacher: expected to be on cpu like center, got meta"),
    ("momentum elsewhere", lambda c, t: (c, t, torch.ones((), device="meta")), "momentum: expected to be on cpu"),
    ("momentum above 1", lambda c, t: (c, t, 1.1), r"momentum: expected a value in \[0, 1\], got 1.1"),
    ("negative momentum", lambda c, t: (c, t, -0.1), r"momentum: expected a value in \[0, 1\], got -0.1"),
    ("NaN momentum", lambda c, t: (c, t, math.nan), r"momentum: expected a value in \[0, 1\], got nan"),
    ("many momenta", lambda c, t: (c, t, torch.ones(2)), r"momentum: expected a number .* got shape \(2,\)"),
]


@pytest.mark.parametrize(("arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_a_value_error_and_changes_nothing(arguments, message):
    teacher, center = rows(2, 3, 17, fp32, torch.device("cpu"))
    before = center.clone()
    with pytest.raises(ValueError, match=message):
        center_update_(*arguments(center, teacher))
    assert torch.equal(center, before)


def test_bad_batch_mean_is_a_value_error():
    _, center = rows(2, 3, 17, fp32, torch.device("cpu"))
    for wrong, message in (
        (center[:9], r"batch_mean: expected shape \(17\), got \(9,\)"),
        (center.long(), "batch_mean: expected floating-point values, got torch.int64"),
        (center.to("meta"), "batch_mean: expected to be on cpu like center, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            center_ema_(center, wrong, 0.9)


def test_opcheck(device):
    teacher, center = rows(2, 3, 33, fp32, device)
    momentum = torch.tensor(0.9, device=device)
    torch.library.opcheck(_batch_center, (teacher,))
    torch.library.opcheck(_center_update_, (center, teacher, momentum))
    torch.library.opcheck(_center_ema_, (center, teacher[0, 0], momentum))


def test_compiled_fullgraph_equals_eager(device):
    teacher, center = rows(2, 3, 257, bf16, device)

    def step(center: Tensor, teacher: Tensor, momentum: Tensor) -> None:
        center_update_(center, teacher, momentum)
        center_ema_(center, batch_center(teacher), 0.5)

    momentum = torch.tensor(0.9, device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(updated(center, teacher, momentum, op=compiled), updated(center, teacher, momentum, op=step))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("loss_*.npz")), ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", [torch.float64, fp32], ids=["fp64", "fp32"])
def test_golden_center(path, dtype, device):
    """The center that main_dino.py had after each call, from an empty one: to 1e-10 in fp64 and 1e-5 in fp32."""
    with np.load(path) as golden:
        if golden["teacher0"].dtype == np.float32 and dtype == torch.float64:
            pytest.skip("computed in fp32")
        center = torch.zeros(int(golden["K"]), dtype=dtype, device=device)
        for i in range(len(golden["epochs"])):
            teacher = torch.from_numpy(golden[f"teacher{i}"]).to(device, dtype).view(2, -1, center.numel())
            center_update_(center, teacher, 0.9)
            truth = torch.from_numpy(golden[f"center{i}"]).view(-1).double()
            bar = (1e-10 if dtype == torch.float64 else 1e-5) * truth.abs().max().item()
            torch.testing.assert_close(center.cpu().double(), truth, rtol=0, atol=bar)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_teacher", "n_images", "n_prototypes", "dtype"), [case(2, 64, 65536, bf16), case(2, 7, 65537, fp32)]
)
def test_real_sizes_match_fp64(n_teacher, n_images, n_prototypes, dtype, device):
    teacher, center = rows(n_teacher, n_images, n_prototypes, dtype, device)
    plain = updated(center, reference.batch_center(teacher), 0.9, op=reference.center_ema_)
    truth = updated(center.double(), reference.batch_center(teacher.double()), 0.9, op=reference.center_ema_)
    assert_within_budget("center", updated(center, teacher, 0.9), plain, truth, fp32)


@pytest.mark.gpu
def test_captured_update_follows_its_momentum(device):
    teacher, center = rows(2, 16, 65536, bf16, device)
    momentum = torch.tensor(0.9, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        center_update_(center, teacher, momentum)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        center_update_(center, teacher, momentum)
    for value in (0.9, 0.5, 0.99):
        momentum.fill_(value)
        expected = updated(center, teacher, momentum)
        graph.replay()
        assert torch.equal(center, expected)
