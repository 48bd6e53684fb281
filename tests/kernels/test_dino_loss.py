"""dino_loss against fp64, against plain PyTorch in the same dtype, and on everything a caller may hand it.

Sizes: 257 and 2049 leave a tail in a block, 1025 and 2049 need several blocks, 2048 fills them exactly.
"""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from budget import assert_error_at_most, assert_within_budget, loss_budgets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino_kernels import dino_loss, dino_loss_and_grad_, dino_loss_with_stats, launch, library, reference
from fastdino_kernels.dino_loss import _dino_loss, _dino_loss_and_grad_, _dino_loss_backward
from fastdino_kernels.launch import use_triton

GOLDEN = Path(__file__).parents[1] / "golden"
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def case(n_student: int, n_teacher: int, n_images: int, n_prototypes: int, dtype: torch.dtype) -> object:
    short = {fp32: "fp32", bf16: "bf16", fp16: "fp16"}[dtype]
    name = f"V{n_student}-T{n_teacher}-B{n_images}-K{n_prototypes}-{short}"
    return pytest.param(n_student, n_teacher, n_images, n_prototypes, dtype, id=name)


CASES = [
    case(10, 2, 3, 257, fp32),
    case(10, 2, 3, 257, bf16),
    case(10, 2, 3, 257, fp16),
    case(2, 2, 1, 257, fp32),  # the two globals alone
    case(2, 1, 2, 33, bf16),  # view 0 of the student is compared with nothing
    case(3, 3, 2, 1025, fp32),  # an odd number of teachers
    case(4, 5, 2, 1, fp32),  # more teachers than students, and a softmax over one prototype
    case(64, 2, 1, 64, bf16),
    case(4, 2, 2, 2048, bf16),
    case(2, 2, 1, 2049, fp32),
]


def logits(
    n_student: int, n_teacher: int, n_images: int, n_prototypes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """student (V, B, K), teacher (T, B, K) and center (K,), as large as a trained head's."""
    draw = torch.Generator().manual_seed(n_student * 1000 + n_prototypes)
    student = torch.randn(n_student, n_images, n_prototypes, generator=draw)
    teacher = torch.randn(n_teacher, n_images, n_prototypes, generator=draw)
    center = 0.3 * torch.randn(n_prototypes, generator=draw)
    return student.to(device, dtype), teacher.to(device, dtype), center.to(device)


def value_and_grad(loss_function, student: Tensor, *others) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = loss_function(student, *others)
    loss.backward()
    return loss.detach(), student.grad


@pytest.fixture(params=["kernels", "library"])
def place(request, monkeypatch, device) -> torch.device:
    """Where the kernels run, and the CPU without them, where library calls do the same."""
    if request.param == "kernels":
        return device
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    return torch.device("cpu")


def check_against_fp64(student: Tensor, teacher: Tensor, center: Tensor) -> None:
    """Loss and gradient, within the budget of the dtype."""
    temps = STUDENT_TEMP, TEACHER_TEMP
    loss, grad = value_and_grad(dino_loss, student, teacher, center, *temps)
    _, plain_grad = value_and_grad(reference.dino_loss, student, teacher, center, *temps)
    truth = student.double(), teacher.double(), center.double()
    true_loss, true_grad = value_and_grad(reference.dino_loss, *truth, *temps)
    assert loss.dtype == fp32
    assert grad.dtype == student.dtype
    assert_error_at_most("loss", loss, true_loss, loss_budgets(student, teacher, center, *temps)[0])
    assert_within_budget("gradient", grad, plain_grad, true_grad, student.dtype)


@pytest.mark.parametrize(("n_student", "n_teacher", "n_images", "n_prototypes", "dtype"), CASES)
def test_loss_and_gradient_match_fp64(n_student, n_teacher, n_images, n_prototypes, dtype, place):
    check_against_fp64(*logits(n_student, n_teacher, n_images, n_prototypes, dtype, place))


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=["fp32", "bf16", "fp16"])
def test_huge_logits_match_fp64(dtype, place):
    """+-1e4: every softmax is one-hot, and the loss is either enormous or, where student and teacher agree, 0."""
    student, teacher, center = logits(4, 2, 2, 257, fp32, place)
    student, teacher = 1e4 * student.clamp(-1, 1), 1e4 * teacher.clamp(-1, 1)
    check_against_fp64(student.to(dtype), teacher.to(dtype), center)
    agreeing = teacher[:1].expand(4, -1, -1)
    check_against_fp64(agreeing.to(dtype), agreeing[:2].to(dtype), torch.zeros_like(center))


def test_near_ties_at_huge_logits_match_fp64(place):
    """Prototypes one step of the dtype apart at 1e4: where a log-sum-exp in one fp32 word loses its digits."""
    student, teacher, _ = logits(3, 2, 2, 257, fp32, place)
    step = 2.0**-9  # four steps of fp32 at 1e4
    near = [1e4 + step * (8 * x).round() for x in (student, teacher)]
    check_against_fp64(*near, torch.zeros(257, device=place))


def test_one_hot_teacher_row_matches_fp64(place):
    student, teacher, center = logits(4, 2, 2, 257, fp32, place)
    teacher[0, 0] = 0
    teacher[0, 0, 256] = 1e3
    check_against_fp64(student, teacher, center)


@pytest.mark.parametrize(("n_student", "n_teacher", "n_images", "n_prototypes", "dtype"), CASES)
def test_statistics_match_fp64(n_student, n_teacher, n_images, n_prototypes, dtype, place):
    inputs = logits(n_student, n_teacher, n_images, n_prototypes, dtype, place)
    stats = dino_loss_with_stats(*inputs, STUDENT_TEMP, TEACHER_TEMP)
    truth = reference.dino_loss_with_stats(*(x.double() for x in inputs), STUDENT_TEMP, TEACHER_TEMP)
    loss_budget, entropy_budget = loss_budgets(*inputs, STUDENT_TEMP, TEACHER_TEMP)
    assert_error_at_most("loss", stats.loss, truth[0], loss_budget)
    assert_error_at_most("teacher_entropy", stats.teacher_entropy, truth[1], entropy_budget)
    assert_error_at_most("per_image", stats.per_image, truth[2], loss_budget)
    assert torch.equal(stats.loss, dino_loss(*inputs, STUDENT_TEMP, TEACHER_TEMP))
    assert torch.equal(stats.kl, stats.loss - stats.teacher_entropy)


def test_uniform_logits_cost_ln_k_and_agreement_costs_the_entropy(device):
    student, teacher = torch.zeros(4, 2, 300, device=device), torch.zeros(2, 2, 300, device=device)
    stats = dino_loss_with_stats(student, teacher, torch.zeros(300, device=device), STUDENT_TEMP, TEACHER_TEMP)
    assert stats.loss.item() == pytest.approx(math.log(300), rel=1e-6)
    assert stats.teacher_entropy.item() == pytest.approx(math.log(300), rel=1e-6)
    assert stats.kl.item() == pytest.approx(0, abs=1e-6)


def test_gradient_flows_from_the_loss_alone(place):
    student, teacher, center = logits(3, 2, 2, 257, fp32, place)
    student.requires_grad_(), teacher.requires_grad_(), center.requires_grad_()
    stats = dino_loss_with_stats(student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    assert [name for name, x in stats._asdict().items() if x.requires_grad] == ["loss"]
    stats.loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert center.grad is None


def test_the_kernels_run_here(device):
    assert use_triton(torch.zeros(1, device=device)), "on a GPU, or under TRITON_INTERPRET=1"


def test_fp64_logits_stay_fp64(device):
    inputs = [x.double() for x in logits(3, 2, 2, 257, fp32, device)]
    loss, grad = value_and_grad(dino_loss, *inputs, STUDENT_TEMP, TEACHER_TEMP)
    truth, true_grad = value_and_grad(reference.dino_loss, *inputs, STUDENT_TEMP, TEACHER_TEMP)
    assert loss.dtype == grad.dtype == torch.float64
    assert_error_at_most("loss", loss, truth, 1e-14)
    assert_error_at_most("gradient", grad, true_grad, 1e-14)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="image-major"),
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="K-strided"),
        pytest.param(lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]], id="rows-with-gaps"),
    ],
)
def test_strides_change_no_bit(layout, device):
    student, teacher, center = logits(4, 2, 3, 257, bf16, device)
    expected_loss, expected_grad = value_and_grad(dino_loss, student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    leaf = student.clone().requires_grad_()
    gaps = torch.stack([center, center], dim=1)[:, 0]
    loss = dino_loss(layout(leaf), layout(teacher), gaps, STUDENT_TEMP, TEACHER_TEMP)
    loss.backward()
    assert torch.equal(loss, expected_loss)
    assert torch.equal(leaf.grad, expected_grad)


def test_a_k_strided_input_is_copied_once(device, monkeypatch):
    """In the public function; forward and backward then find unit stride."""
    room = import_module("fastdino_kernels.dino_loss")
    copies, original = [], room._unit_stride

    def counted(x: Tensor) -> Tensor:
        result = original(x)
        copies.append(result is not x)
        return result

    monkeypatch.setattr(room, "_unit_stride", counted)
    student, teacher, center = logits(3, 2, 2, 257, fp32, device)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (student, teacher)]
    value_and_grad(dino_loss, *strided, center, STUDENT_TEMP, TEACHER_TEMP)
    assert len(copies) == 6  # student and teacher: public function, forward, backward
    assert sum(copies) == 2


def test_expanded_views_are_respected(device):
    """Stride 0: both teacher views are one tensor, and so are all student views."""
    student, teacher, center = logits(3, 2, 2, 257, fp32, device)
    student, teacher = student[:1], teacher[:1].expand(2, -1, -1)

    def expanded(student: Tensor, *others) -> Tensor:
        return dino_loss(student.expand(3, -1, -1), *others)

    loss, grad = value_and_grad(expanded, student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    dense = student.repeat(3, 1, 1), teacher.contiguous(), center
    expected_loss, expected_grad = value_and_grad(dino_loss, *dense, STUDENT_TEMP, TEACHER_TEMP)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(grad, expected_grad.sum(0, keepdim=True))


def test_upstream_gradient_scales_the_gradient(place):
    student, teacher, center = logits(3, 2, 2, 257, fp32, place)

    def grad_of(upstream) -> Tensor:
        return value_and_grad(lambda *x: upstream(dino_loss(*x, STUDENT_TEMP, TEACHER_TEMP)), student, teacher, center)[
            1
        ]

    once = grad_of(lambda loss: loss)
    assert torch.equal(grad_of(lambda loss: 8 * loss), 8 * once)
    assert torch.equal(grad_of(lambda loss: loss.expand(4).sum()), 4 * once)  # its upstream gradient has stride 0
    assert torch.equal(grad_of(lambda loss: 0 * loss), 0 * once)


def test_a_loss_scale_saves_small_gradients_of_fp16(place):
    """fp16 begins at 6e-8, or 9e-13 of what is scaled by 2**16."""
    student, teacher, center = logits(10, 2, 4, 1025, fp16, place)
    _, grad = value_and_grad(lambda *x: 2.0**16 * dino_loss(*x), student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    exact = [x.double() for x in (student, teacher, center)]
    _, true_grad = value_and_grad(reference.dino_loss, *exact, STUDENT_TEMP, TEACHER_TEMP)
    small = (true_grad.abs() > 1e-9) & (true_grad.abs() < 2e-8)
    assert small.sum() > 1000
    error = (grad[small].double() / 2**16 - true_grad[small]).abs()
    assert (error < 1e-2 * true_grad[small].abs()).double().mean() > 0.99  # the rest are differences that cancel


def test_library_loss_takes_a_large_batch_in_chunks(monkeypatch):
    """Five images, two at a time; with less room than one image's logits, one at a time."""
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    inputs = logits(4, 2, 5, 257, fp32, torch.device("cpu"))
    for chunk in (2 * 4 * 257, 1):
        monkeypatch.setattr(library, "CHUNK", chunk)
        check_against_fp64(*inputs)


def test_backward_may_run_twice(place):
    student, teacher, center = logits(3, 2, 2, 257, fp32, place)
    student.requires_grad_()
    loss = dino_loss(student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_rerun_gives_the_same_bits(device):
    inputs = logits(10, 2, 3, 1025, bf16, device)
    runs = [value_and_grad(dino_loss, *inputs, STUDENT_TEMP, TEACHER_TEMP) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_temperatures_on_the_device_equal_floats(device):
    inputs = logits(3, 2, 2, 257, fp32, device)
    for student_temp, teacher_temp in ((0.1, 0.04), (0.2, 0.07)):
        expected = dino_loss(*inputs, student_temp, teacher_temp)
        tensors = torch.tensor(student_temp, device=device), torch.tensor([teacher_temp], device=device)
        assert torch.equal(dino_loss(*inputs, *tensors), expected)


def test_empty_batch_is_nan_with_an_empty_gradient(place):
    inputs = logits(3, 2, 0, 17, fp32, place)
    loss, grad = value_and_grad(dino_loss, *inputs, STUDENT_TEMP, TEACHER_TEMP)
    assert loss.isnan()
    assert grad.shape == (3, 0, 17)
    assert value_and_grad(reference.dino_loss, *inputs, STUDENT_TEMP, TEACHER_TEMP)[0].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["compared student", "uncompared student", "teacher", "center"])
@pytest.mark.parametrize("rows", ["one", "all"])
def test_a_logit_that_is_not_finite_makes_the_loss_nan(where, value, rows, place):
    student, teacher, center = logits(3, 1, 2, 257, fp32, place)  # T = 1: student view 0 is compared with nothing
    target = {"compared student": student[2, 1], "uncompared student": student[0, 1], "teacher": teacher[0, 1]}
    target.get(where, center)[200 if rows == "one" else slice(None)] = value
    leaf = student.clone().requires_grad_()
    stats = dino_loss_with_stats(leaf, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    stats.loss.backward()
    assert stats.loss.isnan()
    assert not leaf.grad.isfinite().all()
    assert stats.per_image[1].isnan()
    if where != "center":
        assert stats.per_image[0].isfinite(), "the other image is not to blame"
    for exact in (fp32, torch.float64):
        plain = reference.dino_loss(student.to(exact), teacher.to(exact), center.to(exact), STUDENT_TEMP, TEACHER_TEMP)
        assert plain.isnan()


BAD = [
    ("student of two axes", lambda s, t, c: (s[0], t, c, 0.1, 0.04), "student: expected shape .* got"),
    ("one student view", lambda s, t, c: (s[:1], t, c, 0.1, 0.04), "at least 2 student views.* got 1"),
    ("no teacher view", lambda s, t, c: (s, t[:0], c, 0.1, 0.04), "1 teacher view.* got 3, 0"),
    ("no prototype", lambda s, t, c: (s[..., :0], t[..., :0], c[:0], 0.1, 0.04), "1 prototype, got 3, 2 and 0"),
    ("other K in the teacher", lambda s, t, c: (s, t[..., :9], c, 0.1, 0.04), r"teacher: expected shape \(T, 2, 17\)"),
    ("other B in the teacher", lambda s, t, c: (s, t[:, :1], c, 0.1, 0.04), r"teacher: expected .* got \(2, 1, 17\)"),
    ("other K in the center", lambda s, t, c: (s, t, c[:9], 0.1, 0.04), r"center: expected shape \(17\), got \(9,\)"),
    ("center (1, K)", lambda s, t, c: (s, t, c[None], 0.1, 0.04), r"center: expected shape \(17\), got \(1, 17\)"),
    (
        "integer logits",
        lambda s, t, c: (s.long(), t, c, 0.1, 0.04),
        "student: expected floating-point.* got torch.int64",
    ),
    ("complex logits", lambda s, t, c: (s, t.cfloat(), c, 0.1, 0.04), "teacher: expected floating-point"),
    ("other device", lambda s, t, c: (s, t.to("meta"), c, 0.1, 0.04), "teacher: expected to be on .* got meta"),
    ("temperature elsewhere", lambda s, t, c: (s, t, c, torch.ones((), device="meta"), 0.04), "student_temp: .* meta"),
    ("temperature 0", lambda s, t, c: (s, t, c, 0.0, 0.04), "student_temp: expected .* above 0, got 0.0"),
    ("negative temperature", lambda s, t, c: (s, t, c, 0.1, -1.0), "teacher_temp: expected .* above 0, got -1.0"),
    ("NaN temperature", lambda s, t, c: (s, t, c, 0.1, math.nan), "teacher_temp: expected .* above 0, got nan"),
    ("many temperatures", lambda s, t, c: (s, t, c, 0.1, torch.ones(2)), r"teacher_temp: expected .* got shape \(2,\)"),
]


@pytest.mark.parametrize("op", [dino_loss, dino_loss_with_stats, dino_loss_and_grad_])
@pytest.mark.parametrize(("arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_a_value_error_and_changes_nothing(op, arguments, message):
    student, teacher, center = logits(3, 2, 2, 17, fp32, torch.device("cpu"))
    before = [x.clone() for x in (student, teacher, center)]
    with pytest.raises(ValueError, match=message):
        op(*arguments(student, teacher, center))
    assert all(torch.equal(x, y) for x, y in zip((student, teacher, center), before))


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=["fp32", "bf16", "fp16"])
def test_loss_and_grad_overwrites_the_logits_with_the_same_bits(dtype, place):
    student, teacher, center = logits(4, 2, 3, 257, dtype, place)
    expected_loss, expected_grad = value_and_grad(dino_loss, student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    owned = student.clone()
    loss = dino_loss_and_grad_(owned, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(owned, expected_grad)

    owned = student.clone()
    loss = dino_loss_and_grad_(owned, teacher, center, STUDENT_TEMP, TEACHER_TEMP, torch.tensor(4.0, device=place))
    assert torch.equal(loss, expected_loss)
    if dtype == fp32:
        assert torch.equal(owned, 4 * expected_grad)


def test_loss_and_grad_trains_as_its_docstring_says(device):
    _, teacher, center = logits(3, 2, 2, 33, fp32, device)
    torch.manual_seed(0)
    features, head = torch.randn(3 * 2, 8, device=device), torch.nn.Linear(8, 33, device=device)
    dino_loss(head(features).view(3, 2, 33), teacher, center, STUDENT_TEMP, TEACHER_TEMP).backward()
    expected = head.weight.grad.clone()
    head.zero_grad()

    out = head(features)
    dino_loss_and_grad_(out.detach().view(3, 2, 33), teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    out.backward(gradient=out.detach())
    assert torch.equal(head.weight.grad, expected)


def test_loss_and_grad_refuses_logits_it_cannot_overwrite(device):
    student, teacher, center = logits(3, 2, 2, 17, fp32, device)
    for wrong in (student[:, :, ::2], student[:1].expand(3, -1, -1)):
        n_prototypes = wrong.shape[2]
        with pytest.raises(ValueError, match="student: expected contiguous logits to overwrite, got strides"):
            dino_loss_and_grad_(wrong, teacher[..., :n_prototypes], center[:n_prototypes], 0.1, 0.04)


@pytest.mark.parametrize("n_teacher", [1, 2, 4])
def test_loss_and_grad_in_fp64_follows_autograd(n_teacher):
    inputs = [x.double() for x in logits(3, n_teacher, 2, 33, fp32, torch.device("cpu"))]
    expected_loss, expected_grad = value_and_grad(reference.dino_loss, *inputs, STUDENT_TEMP, TEACHER_TEMP)
    loss = dino_loss_and_grad_(*inputs, STUDENT_TEMP, TEACHER_TEMP, 2.0)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(inputs[0], 2 * expected_grad, rtol=1e-12, atol=1e-14)


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "empty" in func.name():
            self.numel = max(self.numel, out.numel())
        return out


def test_forward_makes_nothing_as_large_as_a_row_of_logits(device):
    student, teacher, center = logits(10, 2, 1, 4096, bf16, device)
    temps = torch.tensor(STUDENT_TEMP, device=device), torch.tensor(TEACHER_TEMP, device=device)
    with LargestAllocation() as largest:
        _dino_loss._init_fn(student, teacher, center, *temps)
    assert 0 < largest.numel < 4096 / 8


def test_opcheck(device):
    student, teacher, center = logits(3, 2, 2, 33, fp32, device)
    temps = torch.tensor(STUDENT_TEMP, device=device), torch.tensor(TEACHER_TEMP, device=device)
    inputs = student, teacher, center, *temps
    *_, student_norm, teacher_norm = _dino_loss(*inputs)
    torch.library.opcheck(_dino_loss, (student.clone().requires_grad_(), *inputs[1:]))
    torch.library.opcheck(_dino_loss_backward, (torch.ones((), device=device), *inputs, student_norm, teacher_norm))
    torch.library.opcheck(_dino_loss_and_grad_, (*inputs, torch.ones((), device=device)))


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        pytest.param(bf16, "aot_eager", id="kernels-aot_eager"),
        pytest.param(bf16, "inductor", id="kernels-inductor"),
        pytest.param(torch.float64, "aot_eager", id="reference-aot_eager"),
    ],
)
def test_compiled_fullgraph_equals_eager(dtype, backend, device):
    student, teacher, center = logits(4, 2, 3, 257, dtype, device)

    def step(student: Tensor, teacher: Tensor, center: Tensor, teacher_temp: Tensor) -> tuple[Tensor, ...]:
        stats = dino_loss_with_stats(student, teacher, center, STUDENT_TEMP, teacher_temp)
        owned = student.detach().clone()
        overwritten_loss = dino_loss_and_grad_(owned, teacher, center, STUDENT_TEMP, teacher_temp)
        return *stats, overwritten_loss, owned

    temp = torch.tensor(TEACHER_TEMP, device=device)
    outputs = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaf = student.clone().requires_grad_()
        results = function(leaf, teacher, center, temp)
        results[0].backward()
        outputs.append([*(x.detach() for x in results), leaf.grad])
    # The kernels are the same ones; in fp64, library calls become the reference.
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    for eager, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(compiled, eager, **close)


def test_compiled_follows_a_float_temperature(device):
    """A schedule of Python floats through one compiled function, the annealed temperature of an epoch each."""
    inputs = logits(3, 2, 2, 33, fp32, device)
    compiled = torch.compile(dino_loss, fullgraph=True, backend="aot_eager")
    for teacher_temp in (0.04, 0.055, 0.07):
        assert torch.equal(compiled(*inputs, 0.1, teacher_temp), dino_loss(*inputs, 0.1, teacher_temp))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("loss_*.npz")), ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", [torch.float64, fp32], ids=["fp64", "fp32"])
def test_golden_loss_and_gradient(path, dtype, device):
    """What main_dino.py computed: fp64 through the reference to 1e-10, fp32 through the kernels to 1e-5."""
    with np.load(path) as golden:
        if golden["student0"].dtype == np.float32 and dtype == torch.float64:
            pytest.skip("computed in fp32")
        n_images, n_prototypes, temps = int(golden["B"]), int(golden["K"]), golden["temp"]
        center = torch.zeros(n_prototypes, dtype=dtype, device=device)
        for i, epoch in enumerate(golden["epochs"]):
            student, teacher = (
                torch.from_numpy(golden[f"{name}{i}"]).to(device, dtype).view(-1, n_images, n_prototypes)
                for name in ("student", "teacher")
            )
            loss, grad = value_and_grad(dino_loss, student, teacher, center, STUDENT_TEMP, float(temps[epoch]))
            true_loss, true_grad = torch.from_numpy(golden[f"loss{i}"]), torch.from_numpy(golden[f"grad{i}"])
            bar = 1e-10 if dtype == torch.float64 else 1e-5
            scale = true_grad.abs().max().item()
            torch.testing.assert_close(loss.cpu().double(), true_loss.double(), rtol=bar, atol=bar)
            torch.testing.assert_close(
                grad.cpu().double().flatten(0, 1), true_grad.double(), rtol=bar, atol=bar * scale
            )
            center = torch.from_numpy(golden[f"center{i}"]).to(device, dtype).view(-1)
        assert json.loads(str(golden["args"]))[1] == temps[-1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_student", "n_teacher", "n_images", "n_prototypes", "dtype"),
    [case(10, 2, 8, 65536, bf16), case(10, 2, 4, 65536, fp32), case(12, 2, 3, 65537, bf16), case(2, 1, 1, 4096, fp16)],
)
def test_real_sizes_match_fp64(n_student, n_teacher, n_images, n_prototypes, dtype, device):
    check_against_fp64(*logits(n_student, n_teacher, n_images, n_prototypes, dtype, device))


@pytest.mark.gpu
def test_captured_step_follows_its_scalars(device):
    """One capture, three replays with new logits and temperatures on the device: each equals eager, bit for bit."""
    student, teacher, center = logits(10, 2, 4, 65536, bf16, device)
    student.requires_grad_()
    temp = torch.tensor(TEACHER_TEMP, device=device)

    def step() -> tuple[Tensor, Tensor]:
        loss = dino_loss(student, teacher, center, STUDENT_TEMP, temp)
        return loss, torch.autograd.grad(loss, student)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for replay, value in enumerate((0.04, 0.05, 0.07)):
        temp.fill_(value)
        with torch.no_grad():
            student.copy_(torch.roll(student, replay + 1, dims=2))
        graph.replay()
        expected = step()
        assert torch.equal(captured[0], expected[0])
        assert torch.equal(captured[1], expected[1])


@pytest.mark.gpu
def test_loss_and_grad_takes_no_second_tensor_of_logits(device):
    student, teacher, center = logits(10, 2, 8, 65536, bf16, device)
    dino_loss_and_grad_(student.clone(), teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dino_loss_and_grad_(student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * student.numel() * student.element_size()
