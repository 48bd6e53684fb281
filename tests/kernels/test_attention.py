"""short_attention and cls_attention against fp64, and on everything a caller may hand them."""

import pytest
import torch
from budget import assert_error_at_most, assert_within_budget
from fake_device import run_launcher
from torch import Tensor

from fastdino_kernels import cls_attention, reference, short_attention
from fastdino_kernels.attention import (
    _cls_attention,
    _cls_attention_backward,
    _short_attention,
    _short_attention_backward,
)
from fastdino_kernels.launch import INTERPRETED

fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
SCALE = 32**-0.5

# A bf16 product is garbage in the interpreter; `test_aot` compiles it, and the code is the same for every dtype.
DTYPES = [fp32, fp16] if INTERPRETED else [fp16, bf16]
EXACT = DTYPES[0]  # the one with the most digits that the kernels take

# Lengths at the edges of tiles of 64, 128 and 256 rows; several images to a tile, and a last tile that is not full.
GROUPS = [
    [(1, 1)],
    [(33, 2)],
    [(14, 5), (1, 64)],
    [(2, 37), (1, 65)],
    [(3, 41)],
    [(1, 50), (5, 37)],
    [(1, 128), (1, 129)],
    [(2, 197), (3, 37)],
    [(1, 201), (0, 37), (2, 7)],
    [(1, 256)],
]


def case(groups: list[tuple[int, int]]) -> object:
    return pytest.param(groups, id="-".join(f"{n}x{size}" for n, size in groups))


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=draw).to(device, dtype)


def packed(groups: list[tuple[int, int]], n_parts: int, dtype, device, n_heads: int = 3, head_dim: int = 32) -> Tensor:
    """(M, n_parts, H, D)."""
    return random(sum(n * size for n, size in groups), n_parts, n_heads, head_dim, dtype=dtype, device=device)


def plain(qkv: Tensor, groups: list[tuple[int, int]], scale: float) -> Tensor:
    """PyTorch in the dtype of qkv, without the reference's promotion to fp32."""
    parts = []
    for part, group in zip(qkv.split([n * size for n, size in groups]), groups):
        q, k, v = part.unflatten(0, group).permute(2, 0, 3, 1, 4)
        parts.append((((scale * q) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def plain_cls(q: Tensor, kv: Tensor, groups: list[tuple[int, int]], scale: float) -> Tensor:
    parts = []
    for of_group, part, group in zip(q.split([n for n, _ in groups]), kv.split([n * s for n, s in groups]), groups):
        k, v = part.unflatten(0, group).permute(2, 0, 3, 1, 4)
        parts.append((((scale * of_group[:, :, None]) @ k.transpose(-2, -1)).softmax(-1) @ v)[:, :, 0])
    return torch.cat(parts)


def with_gradients(function, inputs: tuple[Tensor, ...], upstream: Tensor, *args) -> list[Tensor]:
    """What function(*inputs, *args) returns, and the gradients of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, *args)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check(
    ours, by_hand, truth, inputs: tuple[Tensor, ...], groups: list[tuple[int, int]], scale: float = SCALE
) -> None:
    upstream = random(*ours(*inputs, groups).shape, dtype=inputs[0].dtype, device=inputs[0].device, seed=1)
    names = ["out", *(f"gradient {i}" for i in range(len(inputs)))]
    results = with_gradients(ours, inputs, upstream, groups, scale)
    plains = with_gradients(by_hand, inputs, upstream, groups, scale)
    truths = with_gradients(truth, tuple(x.double() for x in inputs), upstream, groups, scale)
    for name, *values in zip(names, results, plains, truths):
        assert_within_budget(name, *values, inputs[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [case(groups) for groups in GROUPS])
def test_attention_and_gradient_match_fp64(groups, dtype, device):
    check(short_attention, plain, reference.short_attention, (packed(groups, 3, dtype, device),), groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [case(groups) for groups in GROUPS])
def test_attention_of_cls_and_gradients_match_fp64(groups, dtype, device):
    kv = packed(groups, 2, dtype, device)
    q = random(sum(n for n, _ in groups), *kv.shape[2:], dtype=dtype, device=device)
    check(cls_attention, plain_cls, reference.cls_attention, (q, kv), groups)


def tables(groups: list[tuple[int, int]], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sines and cosines of many turns, for the tokens of an image of each group."""
    angles = 20 * random(sum(size for _, size in groups), head_dim // 2, dtype=fp32, device=device, seed=2)
    return angles.sin(), angles.cos()


def check_turned(groups: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, *heads: int) -> None:
    qkv = packed(groups, 3, dtype, device, *heads)
    rotation = tables(groups, qkv.shape[-1], device)
    exact = rotation[0].double(), rotation[1].double()
    check(
        lambda qkv, *args: short_attention(qkv, *args, rotation=rotation),
        lambda qkv, *args: plain(reference.turned(qkv, rotation, groups, n_turned=2), *args),
        lambda qkv, *args: reference.short_attention(qkv, *args, exact),
        (qkv,),
        groups,
        qkv.shape[-1] ** -0.5,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [case(groups) for groups in GROUPS])
def test_turned_queries_and_keys_match_fp64(groups, dtype, device):
    check_turned(groups, dtype, device)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_other_turned_heads_match_fp64(head_dim, device):
    check_turned([(1, 70), (2, 9)], EXACT, device, 5, head_dim)


def test_what_is_turned_is_what_rope_says():
    """Angles of all channels, the original's rotate_half: q cos + (-q2, q1) sin."""
    x, groups = torch.randn(9, 3, 2, 8, dtype=torch.float64), [(2, 3), (1, 3)]
    angles = torch.randn(6, 4, dtype=torch.float64)
    turned = reference.turned(x, (angles.sin(), angles.cos()), groups, n_turned=2)
    place = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5])
    whole = angles.tile(2)[place][:, None, None]
    rotated_half = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
    torch.testing.assert_close(turned[:, :2], (x * whole.cos() + rotated_half * whole.sin())[:, :2])
    assert torch.equal(turned[:, 2], x[:, 2])


@pytest.mark.parametrize("head_dim", [16, 64])
def test_other_heads_match_fp64(head_dim, device):
    groups = [(1, 70), (2, 9)]
    inputs = (packed(groups, 3, EXACT, device, 5, head_dim),)
    check(short_attention, plain, reference.short_attention, inputs, groups, head_dim**-0.5)


def test_huge_scores_match_fp64(device):
    """Up to 1e4 before the softmax, and rows that attend to one key alone."""
    groups, dtype = [(1, 197), (2, 37)], EXACT
    qkv = packed(groups, 3, dtype, device)
    qkv[:, :2] *= 25
    qkv[0, 0] = 100 * qkv[5, 1]
    check(short_attention, plain, reference.short_attention, (qkv.clamp(-1000, 1000),), groups)


def test_cls_is_the_first_query_of_each_image(device):
    groups = [(2, 41), (3, 7)]
    qkv = packed(groups, 3, EXACT, device)
    firsts = [0, 41, 82, 89, 96]
    out = cls_attention(qkv[firsts, 0], qkv[:, 1:], groups)
    torch.testing.assert_close(
        out, short_attention(qkv, groups)[firsts], rtol=1e-3, atol=1e-3 if not INTERPRETED else 1e-6
    )


def test_an_image_sees_no_other(device):
    """The other images' values are infinite: a weight of zero would show them as NaN."""
    groups = [(3, 37), (2, 5)]
    qkv = packed(groups, 3, EXACT, device)
    alone = short_attention(qkv[37:74].contiguous(), [(1, 37)])
    qkv[:37] = qkv[74:] = float("inf")
    torch.testing.assert_close(short_attention(qkv, groups)[37:74], alone, rtol=0, atol=1e-6)


def test_nothing_in_gives_nothing_out(device):
    for groups in ([], [(0, 37)]):
        qkv = torch.zeros(0, 3, 2, 32, device=device, dtype=fp16, requires_grad=True)
        for rotation in (None, tables(groups, 32, device)):
            out = short_attention(qkv, groups, rotation=rotation)
            assert out.shape == (0, 2, 32)
            assert reference.short_attention(qkv, groups, 1.0, rotation).shape == (0, 2, 32)
            out.sum().backward()
        assert qkv.grad.shape == qkv.shape


def test_strided_inputs_and_upstream(device):
    """A transposed qkv, and the stride-0 gradient of a sum."""
    groups, dtype = [(2, 9)], EXACT
    qkv = packed(groups, 3, dtype, device)
    strided = qkv.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not strided.is_contiguous()
    leaf = qkv.clone().requires_grad_()
    for x in (strided, leaf):
        short_attention(x, groups).sum().backward()
    assert torch.equal(strided.grad, leaf.grad)


@pytest.mark.parametrize("groups", [case(groups) for groups in GROUPS])
def test_sums_over_tokens_are_those_of_the_gradient_before_it_is_rounded(groups, device):
    """Of each tile: the gradient itself does not change, and the sums of all tiles are its sum to fp32."""
    flat = [x for group in groups for x in group]
    qkv = packed(groups, 3, fp32 if INTERPRETED else fp16, device)
    rotation = tables(groups, 32, device)
    out, lse = _short_attention(qkv, flat, SCALE, *rotation)
    grad, none = _short_attention_backward(out, qkv, lse, flat, SCALE, False, *rotation)
    same, turned = _short_attention_backward(out, qkv, lse, flat, SCALE, True, *rotation)
    assert torch.equal(same, grad)
    assert len(none) == 0
    of_turned = grad
    out, lse = _short_attention(qkv, flat, SCALE)
    grad, none = _short_attention_backward(out, qkv, lse, flat, SCALE)
    same, part = _short_attention_backward(out, qkv, lse, flat, SCALE, True)
    assert torch.equal(same, grad)
    assert len(none) == 0
    q, kv = qkv[: sum(n for n, _ in groups), 0].contiguous(), qkv[:, 1:].contiguous()
    grads, sums = [grad, of_turned], [part, turned]
    for with_sums in (False, True):
        _, of_kv, part = _cls_attention_backward(q, q, kv, flat, SCALE, with_sums)
        grads, sums = (grads, [*sums, part]) if with_sums else ([*grads, of_kv], sums)
    for gradient, part in zip(grads, sums):
        rounding = 4 * torch.finfo(gradient.dtype).eps * gradient.abs().double().sum(0).max().item()
        assert_error_at_most("sums", part.double().sum(0), gradient.double().sum(0), rounding)


def test_same_bits_on_every_run(device):
    groups = [(2, 150), (3, 37)]
    inputs = (packed(groups, 3, EXACT, device),)
    upstream = torch.ones_like(inputs[0][:, 0])
    first, second = (with_gradients(short_attention, inputs, upstream, groups) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_opcheck(device):
    groups, flat = [(2, 5), (1, 7)], [2, 5, 1, 7]
    qkv = packed(groups, 3, fp32, device).requires_grad_()
    out, lse = _short_attention(qkv.detach(), flat, SCALE)
    torch.library.opcheck(_short_attention, (qkv, flat, SCALE))
    torch.library.opcheck(_short_attention_backward, (out, qkv.detach(), lse, flat, SCALE))
    torch.library.opcheck(_short_attention_backward, (out, qkv.detach(), lse, flat, SCALE, True))
    rotation = tables(groups, 32, device)
    torch.library.opcheck(_short_attention, (qkv, flat, SCALE, *rotation))
    torch.library.opcheck(_short_attention_backward, (out, qkv.detach(), lse, flat, SCALE, True, *rotation))
    q, kv = out[:3].clone().requires_grad_(), packed(groups, 2, fp32, device).requires_grad_()
    torch.library.opcheck(_cls_attention, (q, kv, flat, SCALE))
    torch.library.opcheck(_cls_attention_backward, (out[:3], q.detach(), kv.detach(), flat, SCALE))
    torch.library.opcheck(_cls_attention_backward, (out[:3], q.detach(), kv.detach(), flat, SCALE, True))


def test_compiled_fullgraph_equals_eager(device):
    groups = [(2, 19), (1, 5)]
    qkv = packed(groups, 3, EXACT, device)

    rotation = tables(groups, 32, device)

    def both(qkv: Tensor) -> Tensor:
        of_all = short_attention(qkv, groups) + short_attention(qkv, groups, rotation=rotation)
        return of_all.sum(0) + cls_attention(qkv[:3, 0], qkv[:, 1:], groups).sum(0)

    upstream = torch.ones_like(qkv[0, 0])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(with_gradients(compiled, (qkv,), upstream), with_gradients(both, (qkv,), upstream)):
        assert torch.equal(ours, eager)


def test_neither_ops_nor_launchers_synchronise(fakegpu):
    groups, flat = [(2, 197), (3, 37)], [2, 197, 3, 37]
    qkv = torch.randn(505, 3, 6, 64, device=fakegpu, dtype=bf16, requires_grad=True)
    q, kv = torch.randn(5, 6, 64, device=fakegpu, dtype=bf16), qkv[:, 1:]
    rotation = torch.randn(234, 32, device=fakegpu), torch.randn(234, 32, device=fakegpu)
    short_attention(qkv, groups, rotation=rotation).sum().backward()
    (short_attention(qkv, groups).sum() + cls_attention(q, kv, groups).sum()).backward()
    assert qkv.grad.shape == qkv.shape
    qkv, kv = qkv.detach(), kv.detach()
    out, lse = run_launcher(_short_attention, qkv, flat, 0.125)
    assert run_launcher(_cls_attention, q, kv, flat, 0.125).shape == q.shape
    for with_sums in (False, True):
        for turning in ((), rotation):
            grads = run_launcher(_short_attention_backward, out, qkv, lse, flat, 0.125, with_sums, *turning)
            assert [len(x) for x in grads] == [505, 5 * with_sums]  # an image is a tile
        grads = run_launcher(_cls_attention_backward, q, q, kv, flat, 0.125, with_sums)
        assert [len(x) for x in grads] == [5, 505, 5 * with_sums]


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((6, 3, 2, 32), [(2, 4)], r"groups: expected 6 tokens, as qkv has, got 8"),
        ((6, 3, 2, 32), [(6, 1), (-1, 3)], r"groups: expected images of 1 token or more, got -1 of 3"),
        ((6, 3, 2, 32), [(6, 1), (1, 0)], r"got 1 of 0"),
        ((6, 2, 2, 32), [(2, 3)], r"qkv: expected shape \(M, 3, H, D\), got \(6, 2, 2, 32\)"),
        ((6, 3, 2, 48), [(2, 3)], r"qkv: expected a head of 16, 32, 64 channels, got 48"),
        ((257, 3, 1, 16), [(1, 257)], r"qkv: expected images of at most 256 tokens, got 257"),
    ],
)
def test_what_does_not_fit_is_refused(shape, groups, message, device):
    with pytest.raises(ValueError, match=message):
        short_attention(torch.zeros(shape, device=device), groups)


def test_tables_that_do_not_fit_are_refused(device):
    qkv, (sin, cos) = torch.zeros(6, 3, 2, 32, device=device), tables([(1, 3)], 32, device)
    with pytest.raises(ValueError, match=r"cos: expected shape \(3, 16\), got \(2, 16\)"):
        short_attention(qkv, [(2, 3)], rotation=(sin, cos[:2]))
    with pytest.raises(ValueError, match=r"sin: expected shape \(4, 16\), got \(3, 16\)"):
        short_attention(qkv, [(1, 2), (2, 2)], rotation=(sin, cos))
    with pytest.raises(ValueError, match=r"sin: expected floating-point values, got torch.int64"):
        short_attention(qkv, [(2, 3)], rotation=(sin.long(), cos))


def test_what_does_not_fit_is_refused_of_cls(device):
    q, kv = torch.zeros(2, 2, 32, device=device), torch.zeros(6, 2, 2, 32, device=device)
    with pytest.raises(ValueError, match=r"q: expected shape \(2, 2, 32\), got \(1, 2, 32\)"):
        cls_attention(q[:1], kv, [(2, 3)])
    with pytest.raises(ValueError, match=r"q: expected torch.float16, as kv has, got torch.float32"):
        cls_attention(q, kv.half(), [(2, 3)])
    with pytest.raises(ValueError, match=r"kv: expected floating-point values, got torch.int64"):
        cls_attention(q, kv.long(), [(2, 3)])


STEP = [(16, 197), (64, 37)]  # of 8 images: 2 crops of 224 pixels and 8 of 96, a sixteenth of each


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=["bf16", "fp16"])
def test_a_steps_shapes_match_fp64(dtype, device):
    check(short_attention, plain, reference.short_attention, (packed(STEP, 3, dtype, device, 6, 64),), STEP, 0.125)
    check_turned(STEP, dtype, device, 6, 64)
    kv = packed(STEP, 2, dtype, device, 6, 64)
    q = random(80, 6, 64, dtype=dtype, device=device)
    check(cls_attention, plain_cls, reference.cls_attention, (q, kv), STEP, 0.125)


@pytest.mark.gpu
def test_captured_attention_equals_eager(device):
    qkv = packed(STEP, 3, bf16, device, 6, 64).requires_grad_()
    upstream = torch.ones_like(qkv[:, 0])

    def both() -> list[Tensor]:
        out = short_attention(qkv, STEP)
        return [out, *torch.autograd.grad(out, qkv, upstream)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for seed in range(3):
        with torch.no_grad():
            qkv.copy_(random(*qkv.shape, dtype=bf16, device=device, seed=seed))
        graph.replay()
        for a, b in zip(captured, both(), strict=True):
            assert torch.equal(a, b)
