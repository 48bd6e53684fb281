"""linear_gelu and mlp against fp64, against plain PyTorch in the same dtype, and on everything a caller may hand them.

fp32, which the public ops leave to PyTorch, goes through the kernels here: same code, more digits to judge it by.
Sizes: a tile is 128 x 128, and a step of the inner axis 32 or 64: all are missed, met and passed.
"""

import math
from collections.abc import Iterator
from importlib import import_module
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from budget import assert_error_at_most, budget
from fake_device import run_launcher
from torch import Tensor

from fastdino_kernels import linear_gelu, mlp, reference

room = import_module("fastdino_kernels.mlp")  # in the package, `mlp` is the function
fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
SHORT = {fp32: "fp32", bf16: "bf16", fp16: "fp16"}
POLYNOMIAL = 1e-6  # what Phi is off by: of a number up to 1, and below the roundings of bf16 and fp16


@pytest.fixture(autouse=True)
def _kernels_take_fp32() -> Iterator[None]:
    with mock.patch.object(room, "KERNEL_DTYPES", room.KERNEL_DTYPES | {fp32}):
        yield


def case(n_tokens: int, n_channels: int, n_hidden: int, dtype: torch.dtype) -> object:
    return pytest.param(
        n_tokens, n_channels, n_hidden, dtype, id=f"M{n_tokens}-D{n_channels}-H{n_hidden}-{SHORT[dtype]}"
    )


CASES = [
    case(37, 33, 129, fp32),
    case(37, 33, 129, fp16),
    case(37, 33, 129, bf16),
    case(1, 64, 128, fp32),  # one token
    case(5, 1, 1, fp16),  # one channel
    case(200, 48, 132, fp16),  # a tile and a part of one
    case(128, 64, 128, fp32),  # exactly one
    case(256, 128, 256, bf16),  # exactly four
    case(130, 160, 40, bf16),  # more channels than hidden units
]


def inputs(
    n_tokens: int, n_channels: int, n_hidden: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> list[Tensor]:
    """x, w1, b1, w2, b2: hidden has deviation `scale`, y about half of that."""
    draw = torch.Generator().manual_seed(n_tokens + n_channels)
    shapes = (n_tokens, n_channels), (n_hidden, n_channels), (n_hidden,), (n_channels, n_hidden), (n_channels,)
    gains = 1.0, scale / math.sqrt(n_channels), 0.1, 1 / math.sqrt(n_hidden), 0.1
    return [(gain * torch.randn(s, generator=draw)).to(device, dtype) for s, gain in zip(shapes, gains)]


def value_and_grads(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves)
    y.backward(grad)
    return [y.detach(), *(x.grad for x in leaves)]


def upstream(tensors: list[Tensor], n_out: int) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(tensors[0].shape[0], n_out, generator=draw).to(tensors[0])


def check_against_fp64(function, plain, tensors: list[Tensor], grad: Tensor) -> None:
    """Values and all gradients."""
    ours, theirs = value_and_grads(function, tensors, grad), value_and_grads(plain, tensors, grad)
    truths = value_and_grads(plain, [x.double() for x in tensors], grad.double())
    for name, our, their, truth in zip(("y", "x", "w1", "b1", "w2", "b2"), ours, theirs, truths):
        assert our.dtype == tensors[0].dtype
        allowed = budget(their, truth, our.dtype)
        if our.dtype == fp32 and truth.numel() > 0:
            allowed += POLYNOMIAL * truth.abs().max().item()
        assert_error_at_most(name, our, truth, allowed)


@pytest.mark.parametrize(("n_tokens", "n_channels", "n_hidden", "dtype"), CASES)
def test_mlp_and_its_gradients_match_fp64(n_tokens, n_channels, n_hidden, dtype, device):
    tensors = inputs(n_tokens, n_channels, n_hidden, dtype, device)
    check_against_fp64(mlp, reference.mlp, tensors, upstream(tensors, n_channels))


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=["fp32", "fp16", "bf16"])
def test_linear_gelu_and_its_gradients_match_fp64(dtype, device):
    tensors = inputs(37, 33, 129, dtype, device)[:3]
    check_against_fp64(linear_gelu, reference.linear_gelu, tensors, upstream(tensors, 129))


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=["fp32", "fp16", "bf16"])
def test_huge_hidden_values_match_fp64(dtype, device):
    """+-1e4 before GELU: it is the identity or zero there, and its slope 1 or 0."""
    tensors = inputs(37, 33, 129, dtype, device, scale=1e4 / 4)
    tensors[3] *= 1e-3  # y within fp16
    check_against_fp64(mlp, reference.mlp, tensors, upstream(tensors, 33))


def test_gelu_is_exact_everywhere(device):
    """One channel, so that hidden is the input: Phi to 7e-7, its tail to 2e-4 of itself, nothing beyond fp32."""
    h = torch.cat(
        [torch.linspace(-8, 8, 4097), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30, -30, 1e4, -1e4, 1e30, -1e30])]
    )
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    x = h[:, None].to(device).requires_grad_()
    y = mlp(x, one, zero, one, zero)
    y.sum().backward()
    leaf = h.double()[:, None].requires_grad_()
    truth = F.gelu(leaf)
    truth.sum().backward()
    torch.testing.assert_close(y.detach().cpu().double(), truth.detach(), rtol=3e-7, atol=4e-7)
    torch.testing.assert_close(x.grad.cpu().double(), leaf.grad, rtol=0, atol=1e-6)
    tail = (h > -6) & (h < -0.1)
    torch.testing.assert_close(y.detach().cpu().double()[tail], truth.detach()[tail], rtol=3e-4, atol=0)


def test_zeros(device):
    tensors = [torch.zeros_like(x) for x in inputs(37, 33, 129, fp16, device)]
    assert all(not x.any() for x in value_and_grads(mlp, tensors, torch.zeros(37, 33, dtype=fp16, device=device)))


@pytest.mark.parametrize("shape", [(0, 33), (0, 5, 33), (3, 0, 33)], ids=str)
def test_no_tokens(shape, device):
    tensors = inputs(1, 33, 129, fp16, device)
    tensors[0] = torch.zeros(shape, dtype=fp16, device=device)
    y, *grads = value_and_grads(mlp, tensors, torch.zeros(shape, dtype=fp16, device=device))
    assert y.shape == shape
    assert [g.shape for g in grads] == [x.shape for x in tensors]
    assert not any(g.any() for g in grads)
    assert linear_gelu(*tensors[:3]).shape == (*shape[:-1], 129)


def test_leading_axes_are_tokens(device):
    tensors = inputs(6, 33, 40, fp16, device)
    grad = upstream(tensors, 33)
    expected = value_and_grads(mlp, tensors, grad)
    shaped = [tensors[0].view(2, 3, 33), *tensors[1:]]
    for ours, flat in zip(value_and_grads(mlp, shaped, grad.view(2, 3, 33)), expected):
        assert torch.equal(ours.view(flat.shape), flat)
    vector = mlp(tensors[0][0], *tensors[1:])
    assert vector.shape == (33,)
    assert torch.equal(vector, expected[0][0])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.t().contiguous().t(), id="transposed"),
        pytest.param(lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]], id="rows-with-gaps"),
    ],
)
def test_strides_change_no_bit(layout, device):
    tensors = inputs(37, 33, 129, fp16, device)
    grad = upstream(tensors, 33)
    strided = [layout(x) if x.ndim == 2 else torch.stack([x, x], 1)[:, 0] for x in tensors]
    leaves = [x.detach().requires_grad_() for x in strided]
    y = mlp(*leaves)
    y.backward(layout(grad))
    for ours, expected in zip([y, *(x.grad for x in leaves)], value_and_grads(mlp, tensors, grad)):
        assert torch.equal(ours, expected)


def test_stride_0_gradient(device):
    """What `y.sum().backward()` and `y.mean().backward()` hand down."""
    tensors = inputs(37, 33, 129, fp16, device)
    ones = torch.ones((), dtype=fp16, device=device)
    expected = value_and_grads(mlp, tensors, ones.repeat(37, 33))
    for ours, their in zip(value_and_grads(mlp, tensors, ones.expand(37, 33)), expected):
        assert torch.equal(ours, their)


def test_rerun_gives_the_same_bits(device):
    tensors = inputs(300, 33, 129, fp16, device)
    grad = upstream(tensors, 33)
    first, second = (value_and_grads(mlp, tensors, grad) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_without_a_gradient_the_bits_are_the_same_and_hidden_is_not_made(device):
    tensors = inputs(37, 33, 129, fp16, device)
    expected = value_and_grads(mlp, tensors, upstream(tensors, 33))[0]
    with mock.patch.object(room, "_linear_gelu_with_hidden", side_effect=AssertionError("hidden was made")):
        assert torch.equal(mlp(*tensors), expected)
        with torch.no_grad():
            leaves = [x.requires_grad_() for x in tensors]
            assert torch.equal(mlp(*leaves), expected)


def test_autograd_keeps_x_and_hidden_alone(device):
    n_tokens, n_channels, n_hidden = 37, 33, 129
    tensors = [x.requires_grad_() for x in inputs(n_tokens, n_channels, n_hidden, fp16, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mlp(*tensors)
    weights = {x.data_ptr() for x in tensors[1:]}
    numbers = sum(x.numel() for x in kept if x.data_ptr() not in weights)
    assert numbers == n_tokens * (n_channels + n_hidden)


def test_some_inputs_without_a_gradient(device):
    tensors = inputs(37, 33, 129, fp16, device)
    grad = upstream(tensors, 33)
    expected = value_and_grads(mlp, tensors, grad)[1:]
    for frozen in ([0], [1, 2, 3, 4]):
        leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(tensors)]
        mlp(*leaves).backward(grad)
        for i, leaf in enumerate(leaves):
            assert leaf.grad is None if i in frozen else torch.equal(leaf.grad, expected[i])


def test_a_nan_stays_in_its_token(device):
    tensors = inputs(37, 33, 129, fp16, device)
    tensors[0][5, 2] = math.nan
    y = mlp(*tensors)
    assert y[5].isnan().all()
    assert y.isfinite().all(dim=1).sum() == 36


def test_fp64_and_mixed_plain_path(device):
    tensors = [x.double() for x in inputs(5, 33, 40, fp32, device)]
    assert torch.equal(mlp(*tensors), reference.mlp(*tensors))
    assert torch.equal(linear_gelu(*tensors[:3]), reference.linear_gelu(*tensors[:3]))


def test_fp32_is_pytorchs(device):
    with mock.patch.object(room, "KERNEL_DTYPES", {bf16, fp16}):
        tensors = inputs(5, 33, 40, fp32, device)
        assert torch.equal(mlp(*tensors), reference.mlp(*tensors))


def test_under_autocast_in_its_dtype(device):
    tensors = inputs(37, 33, 129, fp32, device)
    grad = upstream(tensors, 33)
    with torch.autocast(device.type, dtype=bf16):
        leaves = [x.clone().requires_grad_() for x in tensors]
        y = mlp(*leaves)
    assert y.dtype == bf16
    y.backward(grad.to(bf16))
    expected = value_and_grads(mlp, [x.to(bf16) for x in tensors], grad.to(bf16))
    assert torch.equal(y, expected[0])
    for leaf, theirs in zip(leaves, expected[1:]):
        assert leaf.grad.dtype == fp32
        assert torch.equal(leaf.grad, theirs.float())


BAD = [
    ("x of no axis", lambda x, w1, b1, w2, b2: (x[0, 0], w1, b1, w2, b2), "x: expected at least one axis"),
    ("integer x", lambda x, w1, b1, w2, b2: (x.long(), w1, b1, w2, b2), "x: expected floating-point.* got torch.int64"),
    ("other D", lambda x, w1, b1, w2, b2: (x[:, :9], w1, b1, w2, b2), r"w1: expected shape \(out, 9\), got \(40, 17\)"),
    ("w1 of one axis", lambda x, w1, b1, w2, b2: (x, w1[0], b1, w2, b2), r"w1: expected shape .* got \(17,\)"),
    ("other b1", lambda x, w1, b1, w2, b2: (x, w1, b1[:9], w2, b2), r"b1: expected shape \(40\), got \(9,\)"),
    ("w2 not transposed", lambda x, w1, b1, w2, b2: (x, w1, b1, w2.t(), b2), r"w2: expected shape \(out, 40\), got"),
    ("other b2", lambda x, w1, b1, w2, b2: (x, w1, b1, w2, b1), r"b2: expected shape \(17\), got \(40,\)"),
    ("other dtype", lambda x, w1, b1, w2, b2: (x, w1, b1.float(), w2, b2), "b1: expected torch.float16 like x, got"),
    (
        "other device",
        lambda x, w1, b1, w2, b2: (x, w1, b1, w2.to("meta"), b2),
        "w2: expected to be on cpu like x, got meta",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_a_value_error(arguments, message):
    tensors = inputs(3, 17, 40, fp16, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        mlp(*arguments(*tensors))


def test_bad_input_of_linear_gelu_is_a_value_error():
    x, weight, bias, *_ = inputs(3, 17, 40, fp16, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"weight: expected shape \(out, 9\), got \(40, 17\)"):
        linear_gelu(x[:, :9], weight, bias)
    with pytest.raises(ValueError, match=r"bias: expected shape \(40\), got \(17,\)"):
        linear_gelu(x, weight, x[0])


def test_opcheck(device):
    x, w1, b1, w2, b2 = inputs(37, 33, 40, fp16, device)
    hidden = room._linear_gelu_with_hidden(x, w1, b1)[0]
    torch.library.opcheck(room._linear_gelu, (x, w1, b1))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, b1, w2, b2)]
    torch.library.opcheck(room._linear_gelu_with_hidden, tuple(leaves[:3]))
    torch.library.opcheck(room._mlp, tuple(leaves))
    torch.library.opcheck(room._linear_gelu_backward, (x, w2, hidden))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_fullgraph_equals_eager(backend, device):
    tensors = inputs(37, 33, 129, fp16, device)
    grad = upstream(tensors, 33)

    def step(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return mlp(x, w1, b1, w2, b2) + linear_gelu(x, w1, b1)[:, :33]

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    eager = value_and_grads(step, tensors, grad)
    for ours, expected in zip(value_and_grads(compiled, tensors, grad), eager):
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)  # sums of gradients are rounded elsewhere
    with torch.no_grad():
        assert torch.equal(torch.compile(mlp, fullgraph=True, backend=backend)(*tensors), mlp(*tensors))


def test_nothing_synchronises(fakegpu):
    """The ops, and what runs around the kernels on a real device."""
    x, w1, b1, w2, b2 = (
        torch.randn(s, device=fakegpu, dtype=bf16, requires_grad=True)
        for s in ((4, 37, 64), (256, 64), 256, (64, 256), 64)
    )
    y = mlp(x.transpose(0, 1), w1, b1, w2, b2) + linear_gelu(x.transpose(0, 1), w1, b1)[..., :64]
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in (x, w1, b1, w2, b2))
    rows = x.detach().flatten(0, 1)
    hidden, act = run_launcher(room._linear_gelu_with_hidden, rows, w1, b1)
    assert run_launcher(room._linear_gelu, rows, w1, b1).shape == act.shape
    assert [z.shape[1] for z in run_launcher(room._linear_gelu_backward, rows, w2, hidden)] == [256, 256, 256]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_tokens", "n_channels", "n_hidden", "dtype"),
    [case(690 * 4, 384, 1536, bf16), case(1001, 768, 3072, bf16), case(640, 1024, 4096, fp16)],
)
def test_real_sizes_match_fp64(n_tokens, n_channels, n_hidden, dtype, device):
    tensors = inputs(n_tokens, n_channels, n_hidden, dtype, device)
    check_against_fp64(mlp, reference.mlp, tensors, upstream(tensors, n_channels))


@pytest.mark.gpu
def test_captured_step_equals_eager(device):
    tensors = [x.requires_grad_() for x in inputs(690, 384, 1536, bf16, device)]
    grad = upstream(tensors, 384)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(mlp(*tensors), tensors, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for replay in range(3):
        with torch.no_grad():
            tensors[0].copy_(torch.roll(tensors[0], replay + 1, dims=1))
        graph.replay()
        assert all(torch.equal(ours, expected) for ours, expected in zip(captured, step()))
