"""layer_norm against fp64: values, gradients, and all that its backward pass can be asked to do on the way.

Sizes: a program has 32 rows and a row is padded to a power of two: both are missed, met and passed.
"""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from budget import assert_error_at_most, assert_within_budget, budget
from fake_device import run_launcher
from torch import Tensor

from fastdino.model.drop_path import Rows
from fastdino_kernels import layer_norm
from fastdino_kernels.column_sums import AT_ONCE

room = import_module("fastdino_kernels.layer_norm")  # in the package, `layer_norm` is the function
sums_room = import_module("fastdino_kernels.column_sums")
fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHORT = {fp32: "fp32", bf16: "bf16", fp16: "fp16"}
EPS = 1e-6
CASES = [
    (37, 33, fp32, fp32),
    (37, 33, bf16, bf16),
    (37, 33, fp16, fp16),
    (70, 48, fp32, bf16),  # a residual stream in full precision
    (1, 64, fp32, fp32),  # one token
    (64, 1, fp32, fp32),  # one channel: its variance is zero
    (32, 64, fp32, fp32),  # exactly one program
    (65, 520, fp32, fp32),  # more channels than one warp takes
]


def case_id(case: tuple) -> str:
    n_tokens, n_channels, stream, weights = case
    return f"M{n_tokens}-D{n_channels}-{SHORT[stream]}-{SHORT[weights]}"


def inputs(n_tokens: int, n_channels: int, stream: torch.dtype, weights: torch.dtype, device: torch.device) -> list:
    """x, weight, bias and the gradient of y."""
    draw = torch.Generator().manual_seed(n_tokens + n_channels)
    x = 3 * torch.randn(n_tokens, n_channels, generator=draw) + 1
    weight, bias, grad = (torch.randn(s, generator=draw) for s in (n_channels, n_channels, (n_tokens, n_channels)))
    return [x.to(device, stream), *(t.to(device, weights) for t in (weight, bias, grad))]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's, in the dtype with more digits, given back in the weight's."""
    full = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(x.to(full), weight.shape, weight.to(full), bias.to(full), EPS).to(weight.dtype)


def value_and_grads(function, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, EPS)


def rounding_of_sums(tensors: list[Tensor]) -> float:
    """Over tokens, in fp32: by chance PyTorch's own error may be none."""
    x, _, _, grad = (t.double() for t in tensors)
    terms = grad.abs() * F.layer_norm(x, x.shape[1:]).abs().clamp(min=1)
    return torch.finfo(fp32).eps * terms.sum(0).max().item()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients_match_fp64(case, device):
    tensors = inputs(*case, device)
    results = [value_and_grads(function, *tensors) for function in (ours, plain)]
    truths = value_and_grads(plain, *(x.double() for x in tensors))
    for name, our, their, truth in zip(("y", "x", "weight", "bias"), *results, truths):
        assert our.dtype == their.dtype
        allowed = budget(their, truth, our.dtype) + (rounding_of_sums(tensors) if name in ("weight", "bias") else 0)
        assert_error_at_most(name, our, truth, allowed)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ((37, 33, bf16, bf16), ""),
        ((37, 33, bf16, bf16), "stream"),
        ((70, 48, fp32, bf16), "stream scale"),
        ((65, 520, fp32, fp32), "scale"),
        ((37, 33, bf16, bf16), "stream gamma"),
        ((70, 48, fp32, bf16), "stream scale gamma"),
        ((65, 520, fp32, fp32), "stream scale gamma"),
        ((33, 33, fp32, bf16), "stream dtype"),
        ((37, 33, bf16, bf16), "stream taken"),
        ((37, 33, bf16, bf16), "stream sent"),
        ((70, 48, fp32, bf16), "stream scale gamma taken sent"),
        ((65, 520, fp32, fp32), "stream scale taken sent"),
        ((1, 33, fp32, bf16), "stream dtype taken sent"),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else case_id(x),
)
def test_what_is_joined_matches_fp64(case, parts, device):
    """The stream's gradient, some rows of it, drop-path, LayerScale, a branch in the weights' dtype, and all sums."""
    tensors, names = inputs(*case, device), parts.split()
    draw = torch.Generator().manual_seed(5)
    n_stream = case[0] + 29 * ("taken" in names)
    n_sent = n_stream - 5 if "sent" in names else n_stream
    taken, sent = (torch.randperm(n_stream, generator=draw)[:n].to(device) for n in (case[0], n_sent))
    given = {
        "stream": torch.randn(n_stream, case[1], generator=draw).to(tensors[0]),
        "scale": (2 * torch.randint(0, 2, (n_sent,), generator=draw)).to(tensors[0]),
        "gamma": torch.randn(case[1], generator=draw).to(tensors[1]),
        "scaled": torch.randn(n_sent, case[1], generator=draw).to(tensors[1]),
    }
    given = {name: t for name, t in given.items() if name in names or (name == "scaled" and "gamma" in names)}
    of_branch = case[3] if {"gamma", "dtype"} & set(names) else case[2]

    def in_passes(dtype: torch.dtype) -> list[Tensor]:
        """Each pass rounded to the dtype of what it writes, as autograd's are."""
        x, weight, bias, grad = (t.to(dtype) if dtype == fp64 else t for t in tensors)
        more = {name: t.to(dtype) if dtype == fp64 else t for name, t in given.items()}
        _, grad_x, grad_weight, grad_bias = value_and_grads(plain, x, weight, bias, grad)
        if "taken" in names:
            grad_x = torch.zeros_like(more["stream"]).index_copy(0, taken, grad_x)
        grad_x = whole = grad_x + more.get("stream", 0)
        if "sent" in names:
            grad_x = grad_x[sent]
        branch = (grad_x * more["scale"][:, None] if "scale" in more else grad_x).to(
            dtype if dtype == fp64 else of_branch
        )
        sums = [grad_weight, grad_bias]
        if "gamma" in more:
            of_gamma, branch = (branch * more["scaled"]).sum(0), branch * more["gamma"]
        return [whole, branch, *sums, branch.sum(0), *([of_gamma] if "gamma" in more else [])]

    x, weight, bias, grad = tensors
    _, mean, rstd = room.plain_layer_norm(x, weight, bias, EPS)
    values = [given.get(name) for name in ("stream", "scale", "gamma", "scaled")]
    at = [Rows.among(n_stream, x).at if name in names else None for name, x in (("taken", taken), ("sent", sent))]
    values += [of_branch, *at, n_sent if "sent" in names else None]
    grad_x, branch, part = room._layer_norm_backward(grad, x, mean, rstd, weight, *values)
    branch = branch if branch.numel() else grad_x
    assert branch.dtype == of_branch
    found = [grad_x, branch, *sums_room.column_sums(part, fp32)]
    for i, (our, their, truth) in enumerate(zip(found, in_passes(fp32), in_passes(fp64), strict=True)):
        allowed = budget(their, truth, our.dtype) + (4 * rounding_of_sums(tensors) if truth.ndim == 1 else 0)
        assert_error_at_most(str(i), our, truth, allowed)


def test_what_is_written_is_all_of_it(device):
    """Outputs start as NaN where memory does; none may be left."""
    x, weight, bias, grad = inputs(37, 33, fp32, fp32, device)
    _, mean, rstd = room.plain_layer_norm(x, weight, bias, EPS)
    empty, stream = torch.empty, x.repeat(2, 1)
    places = [Rows.among(74, torch.arange(start, start + 37)).at.to(device) for start in (0, 20)]

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        patch.setattr(torch, "empty_like", lambda x, **_: poisoned(x.shape, dtype=x.dtype, device=x.device))
        patch.setattr(Tensor, "new_empty", lambda x, *s, **kw: poisoned(*s, dtype=kw.get("dtype", x.dtype)))
        function = room._layer_norm_backward._init_fn
        results = [*function(grad, x, mean, rstd, weight, x, mean, weight, x, fp16)]
        results += function(grad, x, mean, rstd, weight, stream, mean, weight, x, fp16, *places, 37)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("value", [1e4, 1e-4, 0.0])
def test_rows_of_one_value_and_of_huge_ones(value, device):
    x, weight, bias, grad = inputs(37, 33, fp32, fp32, device)
    for row in (torch.full_like(x[0], value), value * x[0]):
        x[5] = row
        truths = value_and_grads(plain, *(t.double() for t in (x, weight, bias, grad)))
        pairs = zip(value_and_grads(ours, x, weight, bias, grad), value_and_grads(plain, x, weight, bias, grad), truths)
        for our, their, truth in pairs:
            assert_within_budget(str(value), our, their, truth, fp32)


def test_a_nan_stays_in_its_token_and_in_the_sums(device):
    x, weight, bias, grad = inputs(37, 33, fp32, fp32, device)
    x[5, 2] = math.nan
    y, grad_x, grad_weight, grad_bias = value_and_grads(ours, x, weight, bias, grad)
    assert y[5].isnan().all()
    assert grad_x[5].isnan().all()
    assert grad_x.isfinite().all(dim=1).sum() == 36
    assert grad_weight.isnan().all()
    assert grad_bias.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 33), (0, 5, 33), (3, 0, 33)], ids=str)
def test_no_tokens(shape, device):
    _, weight, bias, _ = inputs(1, 33, fp32, fp32, device)
    y, *grads = value_and_grads(
        ours, *(torch.zeros(shape, device=device), weight, bias, torch.zeros(shape, device=device))
    )
    assert y.shape == shape
    assert not any(grad.any() for grad in grads)


def test_leading_axes_strides_and_reruns_change_no_bit(device):
    tensors = inputs(36, 33, fp16, fp16, device)
    expected = value_and_grads(ours, *tensors)
    x, weight, bias, grad = tensors
    gaps = torch.cat([x, x], dim=1)[:, :33]
    turned = grad.t().contiguous().t()
    for again in (
        value_and_grads(ours, x.view(4, 9, 33), weight, bias, grad.view(4, 9, 33)),
        value_and_grads(ours, gaps, weight, bias, turned),
        value_and_grads(ours, x, torch.stack([weight, weight], 1)[:, 0], bias, grad),
        value_and_grads(ours, *tensors),
    ):
        assert all(torch.equal(y.reshape(z.shape), z) for y, z in zip(again, expected))


def test_some_inputs_without_a_gradient(device):
    x, weight, bias, grad = inputs(37, 33, fp32, fp32, device)
    expected = value_and_grads(ours, x, weight, bias, grad)[1:]
    for frozen in ([0], [1, 2]):
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate((x, weight, bias))]
        ours(*leaves).backward(grad)
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, expected[i])


def test_fp64_is_pytorchs(device):
    tensors = [t.double() for t in inputs(5, 33, fp32, fp32, device)[:3]]
    assert torch.equal(ours(*tensors), plain(*tensors))


BAD = [
    ("x of no axis", lambda x, w, b: (x[0, 0], w, b), "x: expected at least one axis"),
    ("integer x", lambda x, w, b: (x.long(), w, b), "x: expected floating-point.* got torch.int64"),
    ("other D", lambda x, w, b: (x[:, :9], w, b), r"weight: expected shape \(9\), got \(33,\)"),
    ("other bias", lambda x, w, b: (x, w, b[:9]), r"bias: expected shape \(33\), got \(9,\)"),
    ("bias of another dtype", lambda x, w, b: (x, w, b.half()), "bias: expected torch.float32 like weight, got"),
    ("other device", lambda x, w, b: (x, w.to("meta"), b), "weight: expected to be on cpu like x, got meta"),
]


@pytest.mark.parametrize(("arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_a_value_error(arguments, message):
    tensors = inputs(3, 33, fp32, fp32, torch.device("cpu"))[:3]
    with pytest.raises(ValueError, match=message):
        layer_norm(*arguments(*tensors))


def test_opcheck(device):
    x, weight, bias, grad = inputs(37, 33, fp32, fp32, device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(room._layer_norm, (*leaves, EPS))
    _, mean, rstd = room.plain_layer_norm(x, weight, bias, EPS)
    for more in ((), (x,), (x, mean), (x, mean, weight, x, fp16), (x, None, None, None, fp16)):
        torch.library.opcheck(room._layer_norm_backward, (grad, x, mean, rstd, weight, *more))
    rows = Rows.among(50, torch.randperm(50)[:37].to(device))
    for more in ((rows.at,), (rows.at, rows.at, 37)):
        stream = torch.randn(50, 33, device=device)
        torch.library.opcheck(
            room._layer_norm_backward, (grad, x, mean, rstd, weight, stream, None, None, None, None, *more)
        )
    torch.library.opcheck(sums_room._column_sums, ([torch.randn(5, 3, 7, device=device)], fp32))


@pytest.mark.parametrize("n_tensors", [1, AT_ONCE, AT_ONCE + 1])
def test_column_sums_of_many_tensors_match_fp64(n_tensors, device):
    """Of other heights and widths each, in one launch or two; one row, one column, and more rows than are read once."""
    draw = torch.Generator().manual_seed(1)
    shapes = [[(1, 5), (300, 1), (257, 3, 7), (33, 40)][i % 4] for i in range(n_tensors)]
    parts = [torch.randn(shape, generator=draw).to(device) for shape in shapes]
    for part, total in zip(parts, sums_room._column_sums(parts, fp32)):
        assert_error_at_most(str(tuple(part.shape)), total, part.double().sum(0), 1e-7 * part.abs().sum(0).max().item())
    assert not sums_room._column_sums([torch.zeros(0, 5, device=device)], bf16)[0].any()


def test_nothing_synchronises(fakegpu):
    x, weight, bias = (torch.randn(s, device=fakegpu, dtype=bf16, requires_grad=True) for s in ((4, 37, 64), 64, 64))
    layer_norm(x, weight, bias).sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in (x, weight, bias))
    rows, mean = x.detach().flatten(0, 1), torch.empty(148, device=fakegpu)
    for scale, n_branch in ((None, 0), (mean, 148)):
        results = run_launcher(room._layer_norm_backward, rows, rows, mean, mean, weight, rows, scale)
        assert [len(result) for result in results] == [148, n_branch, 5]
    assert run_launcher(sums_room._column_sums, [results[2]], bf16)[0].shape == (3, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [(44160, 384, bf16, bf16), (1001, 768, bf16, bf16), (4096, 1024, fp32, bf16)], ids=case_id
)
def test_at_a_models_size(case, device):
    test_values_and_gradients_match_fp64(case, device)
    test_what_is_joined_matches_fp64(case, "stream scale gamma", device)
    test_what_is_joined_matches_fp64(case, "stream scale gamma taken sent", device)
