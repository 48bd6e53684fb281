"""clip_adamw_ema_ against fp64: every tensor it writes, over several steps, and everything a caller may hand it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import assert_within_budget
from torch import Tensor

from fastdino_kernels import clip_adamw_ema_, reference
from fastdino_kernels.clip_adamw_ema import CHUNK, PIECE, SPAN, ModelTensors, _clip_adamw_ema_, _library_update_
from fastdino_kernels.launch import LAUNCH

fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BLOCK = LAUNCH["clip_adamw_ema"].block
SHAPES = ((2, BLOCK), (BLOCK + 257,), (3, 5), (), (0,), (SPAN + 1,))
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "teachers", "param_copies", "teacher_copies")
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "clip_grad": 1.0, "momentum": 0.9}


def model(
    device: torch.device, shapes: tuple[tuple[int, ...], ...] = SHAPES, grad_dtypes: tuple[torch.dtype, ...] = (fp32,)
) -> dict[str, list[Any]]:
    """A model in the middle of its training: gradients of norms around 1, moments that are not zero, a teacher."""
    draw = torch.Generator().manual_seed(0)

    def normal(scale: float) -> list[Tensor]:
        return [(scale * torch.randn(shape, generator=draw)).to(device) for shape in shapes]

    params, grads, exp_avgs, noise, teachers = normal(1), normal(0.05), normal(0.01), normal(0.01), normal(1)
    return {
        "params": params,
        "grads": [x.to(grad_dtypes[i % len(grad_dtypes)]) for i, x in enumerate(grads)],
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": [x.square() for x in noise],
        "steps": [torch.full((), float(i), device=device) for i in range(len(shapes))],
        "teachers": teachers,
        "param_copies": [torch.full_like(x, torch.nan, dtype=bf16) for x in params],
        "teacher_copies": [torch.full_like(x, torch.nan, dtype=fp16) for x in params],
    }


def copy_of(lists: dict[str, list[Any]], dtype: torch.dtype | None = None) -> dict[str, list[Any]]:
    """Own memory, same strides; in fp64 where a dtype is given."""
    return {
        name: [None if x is None else x.clone() if dtype is None else x.to(dtype, copy=True) for x in tensors]
        for name, tensors in lists.items()
    }


def plain_update_(lists: dict[str, list[Any]], **settings: Any) -> None:
    """The reference, called with the settings of `clip_adamw_ema_`."""
    n = len(lists["params"])
    per_param = [
        settings[name] if isinstance(settings[name], list) else [settings[name]] * n for name in ("lr", "weight_decay")
    ]
    if "groups" in settings:
        per_param = [[values[group] for group in settings["groups"]] for values in per_param]
    reference.clip_adamw_ema_(
        *(lists[name] for name in LISTS), *per_param, *settings.get("betas", (0.9, 0.999)), settings.get("eps", 1e-8),
        settings["clip_grad"], settings["momentum"], settings.get("frozen"), settings.get("grad_norms"),
        settings.get("clip_sets", ()),
    )  # fmt: skip


def check(lists: dict[str, list[Any]], n_steps: int = 1, **settings: Any) -> dict[str, list[Any]]:
    """Steps of ours, of plain PyTorch and of fp64; every tensor within what its dtype allows. Returns ours."""
    settings = SETTINGS | settings
    plain, truth = copy_of(lists), copy_of(lists, fp64)
    for _ in range(n_steps):
        clip_adamw_ema_(**lists, **settings)
        plain_update_(plain, **settings | {"grad_norms": None})
        plain_update_(truth, **settings | {"grad_norms": None})
    for name in LISTS:
        for i, (ours, same, exact) in enumerate(zip(lists[name], plain[name], truth[name])):
            if ours is not None:
                assert_within_budget(f"{name}[{i}]", ours, same, exact, ours.dtype)
    return lists


@pytest.mark.parametrize(
    "grad_dtypes",
    [pytest.param((fp32,), id="fp32"), pytest.param((bf16,), id="bf16"), pytest.param((fp32, bf16, fp16), id="mixed")],
)
def test_update_matches_fp64(grad_dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    lists = check(model(device, grad_dtypes=grad_dtypes), n_steps=3)
    assert [x.item() for x in lists["steps"]] == [3 + i for i in range(len(SHAPES))]


@pytest.mark.parametrize("clip_grad", [None, 0.0, 0.05, 1e6])
def test_clip_matches_fp64(clip_grad: float | None, device: torch.device) -> None:
    check(model(device, SHAPES[1:4]), n_steps=2, clip_grad=clip_grad)


def test_norms_of_a_tensor_of_several_chunks(device: torch.device) -> None:
    lists = model(device, ((CHUNK + SPAN + 3,), (7,)))
    norms = torch.full((2,), torch.nan, device=device)
    expected = torch.stack([x.double().norm() for x in lists["grads"]])
    check(lists, grad_norms=norms, clip_grad=None)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grad_dtypes", [pytest.param((fp32,), id="fp32"), pytest.param((bf16,), id="bf16")])
def test_sets_are_clipped_together(grad_dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """As torch.nn.utils.clip_grad_norm_ does with each of DINOv2's modules. The third set has no gradient."""
    lists = model(device, (*SHAPES, (CHUNK + 5,)), grad_dtypes)
    lists["grads"][2] = None
    norms, sets = torch.full((3,), torch.nan, device=device), [0, 1, 2, 0, 1, 1, 0]
    expected = []
    for number in range(3):
        holders = [torch.nn.Parameter(x.double()) for x in lists["params"]]
        for holder, grad in zip(holders, lists["grads"]):
            holder.grad = None if grad is None else grad.double()
        theirs = [holder for holder, its in zip(holders, sets) if its == number]
        expected.append(float(torch.nn.utils.clip_grad_norm_(theirs, 1.0)))
    check(lists, n_steps=2, clip_sets=sets, grad_norms=norms)
    torch.testing.assert_close(norms.double(), torch.tensor(expected, device=device).double(), rtol=1e-5, atol=0)
    assert sum(norm > 1 for norm in expected) == 2  # so that the clip does something


def test_clip_is_the_originals(device: torch.device) -> None:
    """utils.clip_gradients of facebookresearch/dino, then torch.optim.AdamW, on ordinary parameters."""
    lists = model(device, SHAPES[1:4])
    params = [x.clone().requires_grad_() for x in lists["params"]]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    lists |= {name: [torch.zeros_like(x) for x in lists[name]] for name in ("exp_avgs", "exp_avg_sqs", "steps")}
    for _ in range(3):
        for param, grad in zip(params, lists["grads"]):
            param.grad = grad.clone()
            coefficient = 1.0 / (param.grad.norm(2) + 1e-6)
            if coefficient < 1:
                param.grad.mul_(coefficient)
        optimizer.step()
        clip_adamw_ema_(**lists, **SETTINGS)
    for ours, theirs in zip(lists["params"], params):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_spoils_what_it_spoils_in_the_original(device: torch.device) -> None:
    lists = model(device, ((600,), (600,), (600,)))
    lists["grads"][0][7] = torch.nan
    lists["grads"][1][7] = torch.inf
    params = [x.clone() for x in lists["params"]]
    clip_adamw_ema_(**lists, **SETTINGS)
    plain = copy_of(model(device, ((600,), (600,), (600,))))
    plain["grads"] = [x.clone() for x in lists["grads"]]
    plain_update_(plain, **SETTINGS)
    for ours, theirs in zip(lists["params"], plain["params"]):
        assert torch.equal(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert lists["params"][0].isnan().sum() == 1  # the others keep their gradients: NaN < 1 is false
    assert not torch.equal(lists["params"][1], params[1])


def test_groups_read_their_lr_and_weight_decay_on_the_device(device: torch.device) -> None:
    def scalar(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    values = {"lr": [1e-2, 3e-3], "weight_decay": [0.2, 0.0]}
    tensors = {name: [scalar(x) for x in pair] for name, pair in values.items()}
    ours = model(device, SHAPES[:4])
    theirs = copy_of(ours)
    groups = [0, 1, 1, 0]
    for factor in (1.0, 0.5):
        for name, pair in tensors.items():
            for x, value in zip(pair, values[name]):
                x.fill_(value * factor)
        clip_adamw_ema_(**ours, **SETTINGS | tensors, groups=groups)
        halved = {name: [x * factor for x in pair] for name, pair in values.items()}
        clip_adamw_ema_(**theirs, **SETTINGS | halved, groups=groups)
    assert all(torch.equal(a, b) for name in LISTS for a, b in zip(ours[name], theirs[name]))
    check(model(device, SHAPES[:4]), groups=groups, **values)


def test_a_frozen_tensor_is_one_without_gradient(device: torch.device) -> None:
    """Frozen for two steps by the mask, by grads that are None: the same bits, and then the same first live step."""
    by_mask, by_none = model(device), model(device)
    for lists in (by_mask, by_none):
        for name in ("exp_avgs", "exp_avg_sqs", "steps"):
            for x in lists[name]:
                x.zero_()
    grads, initial = by_none["grads"], copy_of(by_mask)
    mask = torch.tensor([True, False, True, False, True, False], device=device)
    for frozen in (True, True, False):
        by_none["grads"] = [None if frozen and i % 2 == 0 else x for i, x in enumerate(grads)]
        clip_adamw_ema_(**by_mask, **SETTINGS, frozen=mask & frozen)
        clip_adamw_ema_(**by_none, **SETTINGS)
        for name in LISTS:
            if name != "grads":
                assert all(torch.equal(a, b) for a, b in zip(by_mask[name], by_none[name])), name
        if frozen:
            for i in (0, 2, 4):
                for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
                    assert torch.equal(by_mask[name][i], initial[name][i])
    assert [x.item() for x in by_mask["steps"]] == [1, 3, 1, 3, 1, 3]
    assert not torch.equal(by_mask["teachers"][0], initial["teachers"][0])


def test_frozen_and_absent_operands_match_fp64(device: torch.device) -> None:
    lists = model(device)
    lists["teachers"][1] = lists["teacher_copies"][1] = lists["param_copies"][2] = None
    lists["grads"][3] = lists["exp_avgs"][3] = lists["exp_avg_sqs"][3] = lists["steps"][3] = None
    norms = torch.full((len(SHAPES),), torch.nan, device=device)
    frozen = torch.tensor([False] * 5 + [True], device=device)
    check(lists, n_steps=2, frozen=frozen, grad_norms=norms)
    expected = [0.0 if x is None else x.double().norm().item() for x in lists["grads"]]
    torch.testing.assert_close(norms.tolist(), expected, rtol=1e-6, atol=0)


def test_update_of_unaligned_and_strided_tensors(device: torch.device) -> None:
    lists = model(device, ((40, 60), (BLOCK + 9,), (48, 64), (2, 3, 4, 5)))
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.new_zeros(80, 180)[::2, ::3].copy_(x),  # with gaps
        lambda x: x.new_zeros(x.numel() + 1)[1:].copy_(x),  # unaligned
        lambda x: x.t().contiguous().t(),  # in another order
        lambda x: x.contiguous(memory_format=torch.channels_last),
    ]
    for names in (("params",), ("grads", "teachers"), ("exp_avgs", "param_copies"), tuple(LISTS[:4] + LISTS[5:])):
        strided = copy_of(lists)
        for name in names:
            strided[name] = [layout(x) for layout, x in zip(layouts, strided[name])]
        strides = {name: [x.stride() for x in tensors] for name, tensors in strided.items()}
        check(strided)
        assert strides == {name: [x.stride() for x in tensors] for name, tensors in strided.items()}


def test_update_with_an_expanded_gradient(device: torch.device) -> None:
    lists = model(device, ((30, 20),))
    lists["grads"] = [torch.full((), 0.02, device=device).expand(30, 20)]
    check(lists)


def test_update_reruns_to_the_same_bits(device: torch.device) -> None:
    first, second = model(device), model(device)
    for lists in (first, second):
        clip_adamw_ema_(**lists, **SETTINGS)
    assert all(torch.equal(a, b) for name in LISTS for a, b in zip(first[name], second[name]))


def test_update_without_teachers_copies_or_tensors(device: torch.device) -> None:
    lists = model(device, SHAPES[1:3])
    for name in ("teachers", "param_copies", "teacher_copies"):
        lists[name] = [None, None]
    expected = copy_of(lists)
    check(lists)
    clip_adamw_ema_(*(expected[name] for name in LISTS[:5]), lr=1e-2, weight_decay=0.1, clip_grad=1.0)
    assert all(torch.equal(a, b) for a, b in zip(lists["params"], expected["params"]))
    clip_adamw_ema_([], [], [], [], [], lr=1e-2, weight_decay=0.1)


def test_gradients_are_not_modified(device: torch.device) -> None:
    lists = model(device, SHAPES[:3])
    before = [x.clone() for x in lists["grads"]]
    clip_adamw_ema_(**lists, **SETTINGS | {"clip_grad": 1e-3})
    assert all(torch.equal(a, b) for a, b in zip(before, lists["grads"]))


def op_arguments(device: torch.device) -> tuple[Any, ...]:
    lists = model(device, ((3, 5), (4,)))
    lr = torch.tensor(1e-2, device=device)
    return (
        lists["params"], lists["grads"][:1], lists["exp_avgs"][:1], lists["exp_avg_sqs"][:1], lists["steps"][:1], [0],
        lists["teachers"][1:], [1], lists["param_copies"], [0, 1], [], [], [lr], [lr.clone()], [0, 0],
        0.9, 0.999, 1e-8, 1.0, torch.tensor(0.9, device=device), torch.zeros(2, dtype=torch.bool, device=device),
        torch.zeros(2, device=device), [0, 1],
    )  # fmt: skip


def test_update_passes_opcheck(device: torch.device) -> None:
    torch.library.opcheck(_clip_adamw_ema_, op_arguments(device))


def test_update_compiles_fullgraph(device: torch.device) -> None:
    def step(lists: dict[str, list[Tensor]], lr: Tensor) -> Tensor:
        clip_adamw_ema_(**lists, **SETTINGS | {"lr": lr})
        return lists["params"][0].sum() + lists["teachers"][0].sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        lists = model(device, SHAPES[1:3])
        total = run(lists, torch.tensor(1e-2, device=device))
        results.append([total, *(x for tensors in lists.values() for x in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_update_does_not_wait_for_the_device(fakegpu: torch.device) -> None:
    def empty(*shape: int) -> list[Tensor]:
        return [torch.empty(*shape, 3, device=fakegpu), torch.empty(shape, device=fakegpu)]

    scalar = torch.empty((), device=fakegpu)
    clip_adamw_ema_(
        empty(4), empty(4), empty(4), empty(4), [scalar, scalar.clone()], lr=[scalar, 0.1], weight_decay=scalar,
        groups=[0, 1], clip_grad=3.0, teachers=empty(4), momentum=scalar, teacher_copies=[None, *empty(4)[1:]],
        frozen=torch.empty(2, dtype=torch.bool, device=fakegpu), grad_norms=torch.empty(2, device=fakegpu),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected", "got"),
    [
        pytest.param({"grads": [None]}, "2 entries", "got 1", id="length"),
        pytest.param({"grads": [torch.ones(3, 2), None]}, "(2, 3)", "(3, 2)", id="shape"),
        pytest.param({"exp_avgs": [None, torch.ones(4)]}, "a tensor", "None", id="state missing"),
        pytest.param({"exp_avgs": [torch.ones(2, 3, dtype=bf16), torch.ones(4)]}, "float32", "bfloat16", id="moments"),
        pytest.param(
            {"params": [torch.zeros(2, 3, dtype=bf16), torch.zeros(4)]}, "float32 or", "bfloat16", id="params"
        ),
        pytest.param({"grads": [torch.ones(2, 3, dtype=torch.int32), None]}, "float", "int32", id="integers"),
        pytest.param({"steps": [torch.zeros(1), torch.zeros(())]}, "()", "(1,)", id="steps"),
        pytest.param({"teachers": [torch.ones(2, 3, device="meta"), None]}, "cpu", "meta", id="device"),
        pytest.param({"lr": -1.0}, "at least 0", "-1.0", id="lr"),
        pytest.param({"lr": [0.1, 0.1, 0.1]}, "1 groups", "got 3", id="lr per group"),
        pytest.param({"lr": torch.ones((), device="meta")}, "cpu", "meta", id="lr elsewhere"),
        pytest.param({"weight_decay": torch.ones(2)}, "()", "(2,)", id="weight decay"),
        pytest.param({"groups": [0]}, "2 indices", "[0]", id="groups"),
        pytest.param({"betas": (0.9, 1.0)}, "[0, 1)", "1.0", id="betas"),
        pytest.param({"eps": -1e-8}, "at least 0", "-1e-08", id="eps"),
        pytest.param({"clip_grad": -1.0}, "at least 0", "-1.0", id="clip"),
        pytest.param({"momentum": 1.01}, "[0, 1]", "1.01", id="momentum"),
        pytest.param({"momentum": None}, "because there are teachers", "None", id="momentum missing"),
        pytest.param({"frozen": torch.zeros(3, dtype=torch.bool)}, "(2)", "(3,)", id="frozen"),
        pytest.param({"frozen": torch.zeros(2)}, "bool", "float32", id="frozen dtype"),
        pytest.param({"grad_norms": torch.zeros(4)[::2]}, "stride (1,)", "(2,)", id="grad norms"),
    ],
)
def test_update_refuses_what_does_not_fit(change: dict[str, Any], expected: str, got: str) -> None:
    lists = {name: [torch.zeros(2, 3), torch.zeros(4)] for name in LISTS[:4] + LISTS[5:6]}
    lists |= {"grads": [torch.ones(2, 3), torch.ones(4)], "steps": [torch.zeros(()), torch.zeros(())]}
    arguments = lists | SETTINGS | change
    with pytest.raises(ValueError, match="expected") as error:
        clip_adamw_ema_(**arguments)
    assert expected in str(error.value)
    assert got in str(error.value)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps", "teachers"):
        assert not any(x.any() for x in lists[name])


@pytest.mark.gpu
def test_update_of_a_whole_model_on_the_gpu() -> None:
    block = ((1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536))
    shapes = ((65536, 256), *block * 12, (1, 197, 384))
    check(model(torch.device("cuda"), shapes, (bf16,)), n_steps=2)
    check(model(torch.device("cuda"), shapes, (bf16,)), n_steps=2, clip_sets=[0] + [1] * (len(shapes) - 1))


@pytest.mark.gpu
def test_update_never_synchronises_the_gpu() -> None:
    lists = model(torch.device("cuda"))
    clip_adamw_ema_(**lists, **SETTINGS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            lists["grads"] = [x.clone() for x in lists["grads"]]
            clip_adamw_ema_(**lists, **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_update_replays_with_changing_scalars() -> None:
    """lr, weight decay, momentum, freeze mask and gradients change between replays; gradients are the capture's own."""
    device = torch.device("cuda")
    captured, eager = model(device), model(device)
    scalars = {name: torch.tensor(SETTINGS[name], device=device) for name in ("lr", "weight_decay", "momentum")}
    frozen = torch.zeros(len(SHAPES), dtype=torch.bool, device=device)
    static = [x.clone() for x in captured["grads"]]
    for lists in (captured, eager):
        clip_adamw_ema_(**lists, **SETTINGS | scalars, frozen=frozen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured["grads"] = [x * 2 for x in static]
        clip_adamw_ema_(**captured, **SETTINGS | scalars, frozen=frozen)
    for i in range(3):
        scalars["lr"].fill_(1e-2 / (i + 1))
        scalars["weight_decay"].fill_(0.1 * i)
        scalars["momentum"].fill_(0.9 + 0.03 * i)
        frozen[i] = True
        for x in static:
            x.mul_(0.5)
        graph.replay()
        eager["grads"] = [x * 2 for x in static]
        clip_adamw_ema_(**eager, **SETTINGS | scalars, frozen=frozen)
        assert all(torch.equal(a, b) for name in LISTS for a, b in zip(captured[name], eager[name]))


def test_large_gradients_in_pieces_are_moved_as_whole_ones_and_left_alone():
    """On a CPU: a number more than two pieces, alone in its group; its gradient is clipped, and stays the caller's."""
    torch.manual_seed(0)
    n = 2 * PIECE + 1
    start, grad = torch.randn(n), torch.randn(n)
    found, expected = ([start.clone(), torch.zeros(n), torch.zeros(n), torch.zeros(())] for _ in range(2))
    kept = grad.clone()
    param, exp_avg, exp_avg_sq, step = found
    groups = ([param], [grad], [exp_avg], [exp_avg_sq], [step], [None], [None], [None])
    _library_update_(ModelTensors(*groups), [0.1], [0.04], 0.9, 0.999, 1e-8, 3.0, 0.99, None, None)
    assert torch.equal(grad, kept)
    param, exp_avg, exp_avg_sq, step = expected
    clipped = grad * (3.0 / (float(torch.linalg.vector_norm(grad)) + 1e-6))
    step += 1
    torch._fused_adamw_(
        [param], [clipped], [exp_avg], [exp_avg_sq], [], [step],
        amsgrad=False, lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.04, eps=1e-8, maximize=False,
    )  # fmt: skip
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)
