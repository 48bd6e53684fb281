"""patch_loss against fp64, against plain PyTorch in the same dtype, and on everything a caller may hand it.

Sizes: 257 leaves a tail in a chunk, 2049 needs several chunks and leaves a tail, 2048 and 4096 fill them exactly.
"""

import math

import pytest
import torch
from budget import assert_error_at_most, assert_within_budget, budget
from torch import Tensor

from fastdino_kernels import LinearLogits, dino_loss, launch, library, patch_loss, patch_loss_and_grad_, reference
from fastdino_kernels.patch_loss import _linear_patch_loss, _patch_loss, _patch_loss_and_grad_, _patch_loss_backward

TEMPS = 0.1, 0.04
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16


def case(n_rows: int, n_prototypes: int, dtype: torch.dtype) -> object:
    short = {fp32: "fp32", bf16: "bf16", fp16: "fp16"}[dtype]
    return pytest.param(n_rows, n_prototypes, dtype, id=f"M{n_rows}-K{n_prototypes}-{short}")


CASES = [
    case(5, 257, fp32),
    case(5, 257, bf16),
    case(5, 257, fp16),
    case(1, 1, fp32),
    case(2, 33, bf16),
    case(7, 2048, fp32),
    case(4, 4096, bf16),
    case(3, 2049, fp32),
]


def inputs(n_rows: int, n_prototypes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """student (M, K), teacher (M, K), center (K,), weights (M,)."""
    draw = torch.Generator().manual_seed(n_prototypes)
    student, teacher = (torch.randn(n_rows, n_prototypes, generator=draw).to(device, dtype) for _ in range(2))
    center = 0.3 * torch.randn(n_prototypes, generator=draw)
    return student, teacher, center.to(device), (torch.rand(n_rows, generator=draw) + 0.1).to(device)


def value_and_grad(function, student: Tensor, *others) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    loss = function(student, *others, *TEMPS)
    loss.backward()
    return loss.detach(), student.grad


def in_place(student: Tensor, *others) -> tuple[Tensor, Tensor]:
    owned = student.clone()
    return patch_loss_and_grad_(owned, *others, *TEMPS), owned


def loss_budget(student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor) -> float:
    """A sum may be as wrong as its rows, each of which is allowed what the worst of them is."""

    def rows(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
        one = torch.ones_like(center[:1])
        pairs = zip(student[:, None], teacher[:, None])
        return torch.stack([reference.patch_loss(s, t, center, one, *TEMPS) for s, t in pairs])

    truth = rows(student.double(), teacher.double(), center.double())
    return budget(rows(student, teacher, center), truth, fp32) * weights.abs().sum().item()


def check_against_fp64(student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor) -> None:
    """Loss and gradient, within the budget of the dtype; in place as well."""
    tensors = student, teacher, center, weights
    loss, grad = value_and_grad(patch_loss, *tensors)
    _, plain_grad = value_and_grad(reference.patch_loss, *tensors)
    true_loss, true_grad = value_and_grad(reference.patch_loss, *(x.double() for x in tensors))
    assert loss.dtype == fp32
    assert grad.dtype == student.dtype
    assert_error_at_most("loss", loss, true_loss, loss_budget(student, teacher, center, weights))
    assert_within_budget("gradient", grad, plain_grad, true_grad, student.dtype)
    owned_loss, owned = in_place(*tensors)
    assert torch.equal(owned_loss, loss)
    assert_within_budget("gradient in place", owned, plain_grad, true_grad, student.dtype)


@pytest.fixture(params=["kernels", "library"])
def place(request, monkeypatch, device) -> torch.device:
    """Where the kernels run, and the CPU without them, where library calls do the same."""
    if request.param == "kernels":
        return device
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    return torch.device("cpu")


@pytest.mark.parametrize(("n_rows", "n_prototypes", "dtype"), CASES)
def test_loss_and_gradient_match_fp64(n_rows, n_prototypes, dtype, place):
    check_against_fp64(*inputs(n_rows, n_prototypes, dtype, place))


@pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=["fp32", "bf16", "fp16"])
def test_huge_logits_match_fp64(dtype, place):
    """+-1e4: every softmax is one-hot, and the loss is either enormous or, where student and teacher agree, 0."""
    student, teacher, center, weights = inputs(5, 257, fp32, place)
    student, teacher = ((1e4 * x.clamp(-1, 1)).to(dtype) for x in (student, teacher))
    check_against_fp64(student, teacher, center, weights)
    check_against_fp64(teacher, teacher, torch.zeros_like(center), weights)


def test_one_hot_teacher_row_matches_fp64(place):
    student, teacher, center, weights = inputs(3, 257, fp32, place)
    teacher[1] = 0
    teacher[1, 256] = 1e3
    check_against_fp64(student, teacher, center, weights)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38], ids=str)
@pytest.mark.parametrize("padding", [(5, 6), (0,), (2, 3), tuple(range(7))], ids=str)
def test_rows_of_weight_0_change_no_bit_and_have_no_gradient(padding, garbage, place):
    student, teacher, center, weights = inputs(7, 257, bf16, place)
    kept = [i for i in range(7) if i not in padding]
    truth = value_and_grad(reference.patch_loss, *(x.double()[kept] for x in (student, teacher)),
                           center.double(), weights.double()[kept])  # fmt: skip
    weights[list(padding)], student[list(padding)], teacher[list(padding)] = 0, garbage, garbage
    for loss, grad in (value_and_grad(patch_loss, student, teacher, center, weights),
                       in_place(student, teacher, center, weights)):  # fmt: skip
        torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(grad[kept].double(), truth[1], rtol=0.02, atol=2e-3)
        assert not grad[list(padding)].any()


def test_library_calls_take_many_rows_in_chunks(monkeypatch):
    """Seven rows, two at a time, with and without padding; with less room than a row's logits, one at a time."""
    monkeypatch.setattr(launch, "TRITON_DEVICES", set())
    tensors = inputs(7, 257, fp32, torch.device("cpu"))
    for chunk in (2 * 257, 1):
        monkeypatch.setattr(library, "CHUNK", chunk)
        check_against_fp64(*tensors)
        check_against_fp64(*tensors[:3], tensors[3] * torch.tensor([1, 0, 1, 1, 0, 1, 1]))


def test_no_rows_cost_nothing(place):
    loss, grad = value_and_grad(patch_loss, *inputs(0, 17, fp32, place))
    assert loss == 0
    assert grad.shape == (0, 17)
    assert in_place(*inputs(0, 17, fp32, place))[0] == 0


def test_equal_weights_give_dinos_loss_of_one_pair(device):
    """Two student views, one teacher view: view 1 is compared, view 0 is the teacher's own."""
    student, teacher, center, _ = inputs(4, 257, fp32, device)
    expected = dino_loss(torch.stack([student, student]), teacher[None], center, *TEMPS)
    weights = torch.full((4,), 0.25, device=device)
    torch.testing.assert_close(patch_loss(student, teacher, center, weights, *TEMPS), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("where", ["student", "teacher", "center"])
@pytest.mark.parametrize("cols", [200, slice(None)], ids=["one", "all"])
def test_a_logit_that_is_not_finite_makes_the_loss_nan(where, value, cols, place):
    student, teacher, center, weights = inputs(4, 257, fp32, place)
    {"student": student[2], "teacher": teacher[2], "center": center}[where][cols] = value
    for loss, grad in (value_and_grad(patch_loss, student, teacher, center, weights),
                       in_place(student, teacher, center, weights)):  # fmt: skip
        assert loss.isnan()
        assert not grad[2].isfinite().all()


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.t().contiguous().t(), id="K-strided"),
        pytest.param(lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]], id="rows-with-gaps"),
    ],
)
def test_strides_change_no_bit(layout, device):
    student, teacher, center, weights = inputs(5, 257, bf16, device)
    expected = value_and_grad(patch_loss, student, teacher, center, weights)
    leaf = student.clone().requires_grad_()
    gaps = [torch.stack([x, x], dim=1)[:, 0] for x in (center, weights)]
    loss = patch_loss(layout(leaf), layout(teacher), *gaps, *TEMPS)
    loss.backward()
    assert torch.equal(loss, expected[0])
    assert torch.equal(leaf.grad, expected[1])


def test_upstream_gradient_scales_the_gradient(place):
    tensors = inputs(5, 257, fp32, place)
    once = value_and_grad(patch_loss, *tensors)[1]
    for factor, upstream in ((8, lambda loss: 8 * loss), (4, lambda loss: loss.expand(4).sum())):  # stride 0
        assert torch.equal(value_and_grad(lambda *x, f=upstream: f(patch_loss(*x)), *tensors)[1], factor * once)
    owned = tensors[0].clone()
    patch_loss_and_grad_(owned, *tensors[1:], *TEMPS, torch.tensor(8.0, device=place))
    assert torch.equal(owned, 8 * in_place(*tensors)[1])


def test_in_place_leaves_the_bits_of_the_backward_pass(device):
    for dtype in (fp32, bf16, fp16):
        tensors = inputs(5, 1025, dtype, device)
        assert torch.equal(in_place(*tensors)[1], value_and_grad(patch_loss, *tensors)[1])


def test_backward_may_run_twice_and_a_rerun_gives_the_same_bits(device):
    student, *others = inputs(5, 1025, bf16, device)
    student.requires_grad_()
    loss = patch_loss(student, *others, *TEMPS)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(patch_loss(student, *others, *TEMPS), loss)


def test_gradient_flows_to_the_student_alone(place):
    tensors = [x.requires_grad_() for x in inputs(3, 257, fp32, place)]
    patch_loss(*tensors, *TEMPS).backward()
    assert [x.grad is not None for x in tensors] == [True, False, False, False]


def of_product(factors: tuple[Tensor, Tensor], *others, times: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradients of x and prototypes."""
    x, prototypes = (y.detach().clone().requires_grad_() for y in factors)
    loss = patch_loss(LinearLogits(x, prototypes), *others, *TEMPS)
    (times * loss).backward()
    return loss.detach(), x.grad, prototypes.grad


def of_logits(factors: tuple[Tensor, Tensor], *others, times: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The same by autograd, which keeps the logits."""
    x, prototypes = (y.detach().clone().requires_grad_() for y in factors)
    loss = patch_loss(x @ prototypes.T, *others, *TEMPS)
    (times * loss).backward()
    return loss.detach(), x.grad, prototypes.grad


def factors_of(n_rows: int, n_prototypes: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """x (M, 8), prototypes (K, 8)."""
    draw = torch.Generator().manual_seed(n_rows)
    x, prototypes = (torch.randn(n, 8, generator=draw).to(device, dtype) for n in (n_rows, n_prototypes))
    return x, prototypes


@pytest.mark.parametrize(("n_rows", "n_prototypes", "dtype"), CASES)
def test_a_product_has_the_loss_and_gradients_of_its_logits(n_rows, n_prototypes, dtype, place):
    _, *others = inputs(n_rows, n_prototypes, dtype, place)
    factors = factors_of(n_rows, n_prototypes, dtype, place)
    for got, expected in zip(of_product(factors, *others), of_logits(factors, *others)):
        assert torch.equal(got, expected) or dtype == fp16  # whose smallest numbers the scale makes larger
    close = {fp32: 1e-6, fp16: 2e-3, bf16: 2e-2}[dtype]  # rounded before they are multiplied, not after
    for got, expected in zip(of_product(factors, *others, times=3.0), of_logits(factors, *others, times=3.0)):
        torch.testing.assert_close(got, expected, rtol=close, atol=close * float(expected.abs().max()))


def test_rows_of_a_product_that_do_not_count_change_nothing(place):
    _, teacher, center, weights = inputs(7, 257, fp32, place)
    x, prototypes = factors_of(7, 257, fp32, place)
    kept = of_product((x[2:], prototypes), teacher[2:], center, weights[2:])
    weights[:2], x[:2], teacher[:2] = 0, 1e30, math.nan
    loss, grad_x, grad_prototypes = of_product((x, prototypes), teacher, center, weights)
    assert not grad_x[:2].any()
    for got, expected in zip((loss, grad_x[2:], grad_prototypes), kept):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_gradients_of_a_product_match_fp64(place):
    _, *others = inputs(7, 257, fp32, place)
    factors = factors_of(7, 257, fp32, place)
    double = (tuple(y.double() for y in factors), *(y.double() for y in others))
    for got, expected in zip(of_product(factors, *others), of_logits(*double)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_product_in_fp16_keeps_gradients_that_a_loss_scale_is_to_save(device):
    """The gradient of a logit is at most 1e-7, and fp16 has 6e-8 and its multiples there."""
    _, teacher, center, _ = inputs(256, 513, fp16, device)
    factors, weights = factors_of(256, 513, fp16, device), torch.full((256,), 1e-8, device=device)
    scale = 2.0**16
    got = of_product(factors, teacher, center, weights, times=scale)[1]
    truth = of_logits(
        *((*(y.double() for y in factors),), teacher.double(), center.double(), weights.double()), times=scale
    )
    torch.testing.assert_close(got.double(), truth[1], rtol=0.02, atol=0.01 * float(truth[1].abs().max()))


def test_of_a_product_nothing_as_large_as_the_logits_is_kept(device):
    """x, prototypes and their gradients at most; and without a gradient, nothing."""
    _, *others = inputs(40, 2048, bf16, device)
    x, prototypes = factors_of(40, 2048, bf16, device)
    kept: list[int] = []

    def pack(y: Tensor) -> Tensor:
        kept.append(y.numel())
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        loss = patch_loss(LinearLogits(x.requires_grad_(), prototypes), *others, *TEMPS)
        assert 0 < max(kept) < 40 * 2048
        kept.clear()
        with torch.no_grad():
            assert torch.equal(patch_loss(LinearLogits(x, prototypes), *others, *TEMPS), loss)
        assert not kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda x, p: (x[0], p), r"x: expected shape \(M, D\), got \(8,\)"),
        (lambda x, p: (x, p[:, :7]), r"prototypes: expected shape \(K, 8\), got \(17, 7\)"),
        (lambda x, p: (x, p.half()), "prototypes: expected torch.float32 as x, got torch.float16"),
        (lambda x, p: (x.long(), p), "x: .* got torch.int64"),
        (lambda x, p: (x, p[:9]), r"teacher: expected shape \(3, 9\), got \(3, 17\)"),
    ],
)
def test_factors_that_do_not_fit_are_a_value_error(arguments, message, device):
    _, *others = inputs(3, 17, fp32, device)
    with pytest.raises(ValueError, match=message):
        patch_loss(LinearLogits(*arguments(*factors_of(3, 17, fp32, device))), *others, *TEMPS)


def test_temperatures_on_the_device_equal_floats(device):
    tensors = inputs(3, 257, fp32, device)
    on_device = torch.tensor(0.1, device=device), torch.tensor([0.04], device=device)
    assert torch.equal(patch_loss(*tensors, *on_device), patch_loss(*tensors, *TEMPS))


def test_fp64_stays_fp64(device):
    tensors = [x.double() for x in inputs(3, 257, fp32, device)]
    truth = value_and_grad(reference.patch_loss, *tensors)
    for got in (value_and_grad(patch_loss, *tensors), in_place(*tensors)):
        assert got[0].dtype == got[1].dtype == torch.float64
        torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-15)


BAD = [
    ("student of three axes", lambda s, t, c, w: (s[None], t, c, w, 0.1, 0.04), r"student: expected shape \(M, K\)"),
    ("other M in the teacher", lambda s, t, c, w: (s, t[:2], c, w, 0.1, 0.04), r"teacher: .* \(3, 17\), got \(2, 17\)"),
    ("other K in the center", lambda s, t, c, w: (s, t, c[:9], w, 0.1, 0.04), r"center: .* \(17\), got \(9,\)"),
    ("other M in the weights", lambda s, t, c, w: (s, t, c, w[:2], 0.1, 0.04), r"weights: .* \(3\), got \(2,\)"),
    ("no prototype", lambda s, t, c, w: (s[:, :0], t[:, :0], c[:0], w, 0.1, 0.04), "at least 1 prototype"),
    ("integer logits", lambda s, t, c, w: (s.long(), t, c, w, 0.1, 0.04), "student: .* got torch.int64"),
    ("boolean weights", lambda s, t, c, w: (s, t, c, w > 0, 0.1, 0.04), "weights: .* got torch.bool"),
    ("other device", lambda s, t, c, w: (s, t, c, w.to("meta"), 0.1, 0.04), "weights: expected to be on .* got meta"),
    ("temperature 0", lambda s, t, c, w: (s, t, c, w, 0.0, 0.04), "student_temp: expected .* above 0, got 0.0"),
    ("many temperatures", lambda s, t, c, w: (s, t, c, w, 0.1, torch.ones(2)), r"teacher_temp: .* got shape \(2,\)"),
]


@pytest.mark.parametrize("op", [patch_loss, patch_loss_and_grad_])
@pytest.mark.parametrize(("arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_a_value_error_and_changes_nothing(op, arguments, message):
    tensors = inputs(3, 17, fp32, torch.device("cpu"))
    before = [x.clone() for x in tensors]
    with pytest.raises(ValueError, match=message):
        op(*arguments(*tensors))
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))


def test_in_place_refuses_logits_it_cannot_overwrite(device):
    student, teacher, center, weights = inputs(3, 17, fp32, device)
    with pytest.raises(ValueError, match="student: expected contiguous logits to overwrite, got strides"):
        patch_loss_and_grad_(student[:, ::2], teacher[:, ::2], center[::2], weights, *TEMPS)


def test_opcheck(device):
    tensors = inputs(3, 33, fp32, device)
    one, *temps = (torch.tensor(x, device=device) for x in (1.0, *TEMPS))
    norm = _patch_loss(*tensors, *temps)[1]
    torch.library.opcheck(_patch_loss, (tensors[0].clone().requires_grad_(), *tensors[1:], *temps))
    torch.library.opcheck(_patch_loss_backward, (one, *tensors, *temps, norm))
    torch.library.opcheck(_patch_loss_and_grad_, (*tensors, *temps, one))
    factors = [y.requires_grad_() for y in factors_of(3, 33, fp32, device)]
    torch.library.opcheck(_linear_patch_loss, (*factors, *tensors[1:], *temps))


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        pytest.param(bf16, "aot_eager", id="kernels-aot_eager"),
        pytest.param(bf16, "inductor", id="kernels-inductor"),
        pytest.param(torch.float64, "aot_eager", id="reference-aot_eager"),
    ],
)
def test_compiled_fullgraph_equals_eager(dtype, backend, device):
    tensors = inputs(4, 257, dtype, device)

    prototypes = factors_of(4, 257, dtype, device)[1]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        owned = tensors[0].detach().clone()
        of_product = patch_loss(LinearLogits(tensors[0][:, :8], prototypes), *tensors[1:], *TEMPS)
        return patch_loss(*tensors, *TEMPS) + of_product, patch_loss_and_grad_(owned, *tensors[1:], *TEMPS), owned

    outputs = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaf = tensors[0].clone().requires_grad_()
        results = function(leaf, *tensors[1:])
        results[0].backward()
        outputs.append([*(x.detach() for x in results), leaf.grad])
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(outputs[1], outputs[0], **close)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_rows", "n_prototypes", "dtype"), [case(301, 65536, bf16), case(5, 131072, fp32), case(7, 65537, bf16)]
)
def test_real_sizes_match_fp64(n_rows, n_prototypes, dtype, device):
    check_against_fp64(*inputs(n_rows, n_prototypes, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
def test_products_of_real_size_have_the_gradients_of_their_logits(dtype, device):
    _, *others = inputs(301, 65536, dtype, device)
    x, prototypes = (torch.randn(n, 256, device=device, dtype=dtype) / 16 for n in (301, 65536))
    for got, expected in zip(of_product((x, prototypes), *others), of_logits((x, prototypes), *others)):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))


@pytest.mark.gpu
def test_captured_loss_follows_its_scalars(device):
    """One capture, three replays with new logits and temperatures on the device: each equals eager, bit for bit."""
    student, *others = inputs(16, 65536, bf16, device)
    temp, owned = torch.tensor(0.04, device=device), torch.empty_like(student)

    def step() -> Tensor:
        owned.copy_(student)
        return patch_loss_and_grad_(owned, *others, 0.1, temp)

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
        student.copy_(torch.roll(student, replay + 1, dims=1))
        graph.replay()
        got = captured.clone(), owned.clone()
        assert torch.equal(step(), got[0])
        assert torch.equal(owned, got[1])
