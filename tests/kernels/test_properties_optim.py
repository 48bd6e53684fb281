"""ema_update_ and clip_adamw_ema_ on lists nobody thought of: shapes, dtypes, strides and settings drawn at random.

Each against fp64, within what plain PyTorch in the same dtype earns; see `budget`.
"""

import math
from typing import Any

import torch
from budget import assert_within_budget
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdino_kernels import clip_adamw_ema_, ema_update_, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.one_of(
    st.lists(st.integers(0, 12), min_size=0, max_size=4).map(tuple),
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(1, 40), st.integers(1, 120)),
)
LAYOUTS = st.sampled_from(["contiguous", "unaligned", "transposed", "gaps"])
# Not shrunk: with so many draws that takes minutes, and the failing lists are printed as they are.
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, lying otherwise in memory."""
    if layout == "unaligned":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "transposed":
        return x.new_empty(x.shape[::-1]).permute(tuple(range(x.ndim))[::-1]).copy_(x)
    if layout == "gaps":
        return x.new_empty(*x.shape, 2)[..., 0].copy_(x)
    return x


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = (scale * torch.randn(shape, generator=seeded)).to(DEVICE, dtype)
    return laid_out(x, draw(LAYOUTS))


@EXAMPLES
@given(st.data())
def test_ema_of_any_lists_matches_fp64(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(SHAPES, max_size=5))
    teacher = [data.draw(tensors(shape, data.draw(FLOATS))) for shape in shapes]
    student = [data.draw(tensors(shape, data.draw(FLOATS))) for shape in shapes]
    copies = (
        [data.draw(tensors(shape, data.draw(FLOATS), math.nan)) for shape in shapes]
        if data.draw(st.booleans())
        else None
    )
    momentum = data.draw(st.floats(0, 1))
    truth, plain = [x.double() for x in teacher], [x.clone() for x in teacher]
    reference.ema_update_(truth, [x.double() for x in student], momentum)
    reference.ema_update_(plain, student, momentum)
    given_as = torch.tensor(momentum, dtype=torch.float32, device=DEVICE) if data.draw(st.booleans()) else momentum
    ema_update_(teacher, student, given_as, copies=copies)
    for i, (ours, same, exact) in enumerate(zip(teacher, plain, truth)):
        assert_within_budget(f"teacher[{i}]", ours, same, exact, ours.dtype)
    for i, (ours, same, exact) in enumerate(zip(copies or [], plain, truth)):
        assert_within_budget(f"copies[{i}]", ours, same.to(ours.dtype), exact, ours.dtype)


LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "teachers", "param_copies", "teacher_copies")


@EXAMPLES
@given(st.data())
def test_update_of_any_lists_matches_fp64(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=4))
    n, present = len(shapes), st.booleans()

    def draw_list(dtype: st.SearchStrategy, scale: float, optional: bool) -> list[Any]:
        return [
            None if optional and not data.draw(present) else data.draw(tensors(shape, data.draw(dtype), scale))
            for shape in shapes
        ]

    fp32 = st.just(torch.float32)
    ours: dict[str, list[Any]] = {
        "params": draw_list(fp32, 1.0, optional=False),
        "grads": draw_list(FLOATS, data.draw(st.sampled_from([1e-3, 1.0])), optional=True),
        "exp_avgs": draw_list(fp32, 0.1, optional=False),
        "exp_avg_sqs": [x.square() for x in draw_list(fp32, 0.1, optional=False)],
        "steps": [torch.full((), float(data.draw(st.integers(0, 10**6))), device=DEVICE) for _ in shapes],
        "teachers": draw_list(fp32, 1.0, optional=True),
        "param_copies": draw_list(FLOATS, math.nan, optional=True),
        "teacher_copies": draw_list(FLOATS, math.nan, optional=True),
    }
    groups = [data.draw(st.integers(0, 1)) for _ in shapes]
    lr, weight_decay = ([data.draw(st.floats(0, 0.1)) for _ in range(max(groups) + 1)] for _ in range(2))
    betas = data.draw(st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.95, 0.9999)]))
    eps = data.draw(st.sampled_from([1e-8, 1e-4]))
    clip = data.draw(st.sampled_from([None, 0.3, 100.0]))
    momentum = data.draw(st.floats(0, 1))
    frozen = torch.tensor([data.draw(st.booleans()) for _ in shapes], device=DEVICE) if data.draw(present) else None

    def copy_of(dtype: torch.dtype | None) -> list[list[Any]]:
        return [[None if x is None else x.to(dtype or x.dtype, copy=True) for x in ours[name]] for name in LISTS]

    plain, truth = copy_of(None), copy_of(torch.float64)
    norms = torch.full((n,), math.nan, device=DEVICE)
    for lists in (plain, truth):
        reference.clip_adamw_ema_(
            *lists, [lr[group] for group in groups], [weight_decay[group] for group in groups], *betas, eps, clip,
            momentum, frozen, None,
        )  # fmt: skip
    clip_adamw_ema_(
        **ours, lr=lr, weight_decay=weight_decay, groups=groups, betas=betas, eps=eps, clip_grad=clip,
        momentum=momentum, frozen=frozen, grad_norms=norms,
    )  # fmt: skip
    for name, same_list, exact_list in zip(LISTS, plain, truth):
        for i, (x, same, exact) in enumerate(zip(ours[name], same_list, exact_list)):
            written = name != "teacher_copies" or ours["teachers"][i] is not None
            if x is not None and written:
                assert_within_budget(f"{name}[{i}]", x, same, exact, x.dtype)
    expected = [0.0 if x is None else x.double().norm().item() for x in ours["grads"]]
    torch.testing.assert_close(norms.tolist(), expected, rtol=1e-6, atol=1e-12)
