"""ClipAdamWEMA is torch.optim.AdamW, to the bit of its state_dict, with a clip before and a teacher behind it."""

import copy
import io
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fastdino_kernels import ClipAdamWEMA, ema_update_

STEPS = 20
FREEZE_UNTIL = 6  # the last layer starts at this step
CLIP = 0.5


def make(dtype: torch.dtype, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5, bias=False)).to(device, dtype)


def groups_of(model: nn.Module) -> list[dict]:
    decayed = [x for x in model.parameters() if x.ndim > 1]
    return [{"params": decayed}, {"params": [x for x in model.parameters() if x.ndim == 1], "weight_decay": 0.0}]


def batches(dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield (3 * torch.randn(16, 7, generator=draw)).to(device, dtype)


def schedule(i: int) -> tuple[float, float, float]:
    """lr, weight decay and momentum of a step, all changing."""
    return 1e-2 * (1 + math.cos(i / 4)), 0.04 + 0.02 * i, 1 - 0.1 * (1 - i / STEPS)


def train_theirs(model: nn.Module, teacher: nn.Module, dtype: torch.dtype, device: torch.device) -> AdamW:
    """The original's loop: clip per tensor, drop the last layer's gradient at first, AdamW, EMA."""
    optimizer = AdamW(groups_of(model), lr=0.0)
    for i, batch in enumerate(batches(dtype, device)):
        lr, weight_decay, momentum = schedule(i)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        for x in model.parameters():
            coefficient = CLIP / (x.grad.norm(2) + 1e-6)
            if coefficient < 1:
                x.grad.mul_(coefficient)
        if i < FREEZE_UNTIL:
            model[2].weight.grad = None
        optimizer.step()
        with torch.no_grad():
            for student_param, teacher_param in zip(model.parameters(), teacher.parameters()):
                teacher_param.mul_(momentum).add_((1 - momentum) * student_param)
    return optimizer


def train_ours(model: nn.Module, teacher: nn.Module, dtype: torch.dtype, device: torch.device) -> ClipAdamWEMA:
    """The same in one call per step, with what changes on the device."""
    teacher.requires_grad_(False)
    copies = [(x, torch.empty_like(x, dtype=torch.bfloat16)) for x in (*model.parameters(), *teacher.parameters())]
    optimizer = ClipAdamWEMA(
        groups_of(model), lr=0.0, clip_grad=CLIP, teacher=zip(model.parameters(), teacher.parameters()), copies=copies
    )
    lr, weight_decay, momentum = (torch.zeros((), dtype=dtype, device=device) for _ in range(3))
    starting = torch.ones((), dtype=torch.bool, device=device)
    optimizer.momentum = momentum
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    for i, batch in enumerate(batches(dtype, device)):
        for scalar, value in zip((lr, weight_decay, momentum), schedule(i)):
            scalar.fill_(value)
        starting.fill_(i < FREEZE_UNTIL)
        optimizer.freeze_([model[2].weight], starting)
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    for x, low in copies:
        assert (low.double() - x.double()).abs().max() <= torch.finfo(torch.bfloat16).eps * x.abs().max()
    return optimizer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_twenty_steps_equal_adamw_with_clip_freeze_and_ema(
    dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    ours, theirs = make(dtype, device), make(dtype, device)
    our_teacher, their_teacher = make(dtype, device), make(dtype, device)
    our_state = train_ours(ours, our_teacher, dtype, device).state_dict()["state"]
    their_state = train_theirs(theirs, their_teacher, dtype, device).state_dict()["state"]
    for a, b in zip(
        (*ours.parameters(), *our_teacher.parameters()), (*theirs.parameters(), *their_teacher.parameters())
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=True)
    assert their_state[1]["step"] == STEPS - FREEZE_UNTIL
    assert our_state.keys() == their_state.keys()
    for key, entry in our_state.items():
        assert entry.keys() == their_state[key].keys()
        for name, x in entry.items():
            torch.testing.assert_close(x, their_state[key][name], rtol=10 * tolerance, atol=tolerance)


def gradients(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    model.zero_grad()
    model(next(batches(dtype, device))).square().sum().backward()


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dict_goes_to_adamw_and_back(ours_first: bool, device: torch.device) -> None:
    """Through a file: three steps with one, three with the other, against six with AdamW."""
    straight, handed = make(torch.float32, device), make(torch.float32, device)
    alone = AdamW(groups_of(straight), lr=1e-2)
    first, second = (ClipAdamWEMA, AdamW) if ours_first else (AdamW, ClipAdamWEMA)
    optimizer = first(groups_of(handed), lr=1e-2)
    for i in range(6):
        if i == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = second(groups_of(handed), lr=0.5, betas=(0.5, 0.5), eps=1.0)
            optimizer.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        for model, stepped in ((straight, alone), (handed, optimizer)):
            gradients(model, torch.float32, device)
            stepped.step()
    for a, b in zip(handed.parameters(), straight.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    ours, theirs = optimizer.state_dict(), alone.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, entry in theirs["state"].items():
        for name, x in entry.items():
            torch.testing.assert_close(ours["state"][key][name], x, rtol=1e-4, atol=1e-6, check_device=False)


def test_state_dict_has_nothing_of_a_param_that_never_lived(device: torch.device) -> None:
    model = make(torch.float32, device)
    optimizer = ClipAdamWEMA(model.parameters())
    assert optimizer.state_dict()["state"] == {}
    optimizer.freeze_([model[2].weight])
    gradients(model, torch.float32, device)
    model[0].bias.grad = None
    optimizer.step()
    assert set(optimizer.state_dict()["state"]) == {0}
    optimizer.freeze_([model[2].weight], False)
    optimizer.step()
    steps = {key: entry["step"].item() for key, entry in optimizer.state_dict()["state"].items()}
    assert steps == {0: 2, 2: 1}


def test_loading_writes_buffers_in_place(device: torch.device) -> None:
    """What a captured graph has the addresses of: moments, steps, and lr where it is a tensor."""
    model = make(torch.float32, device)
    optimizer = ClipAdamWEMA(model.parameters())
    optimizer.param_groups[0]["lr"] = lr = torch.full((), 0.5, device=device)
    gradients(model, torch.float32, device)
    optimizer.freeze_([model[0].bias])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    buffers = {x: dict(state) for x, state in optimizer.state.items()}
    optimizer.freeze_([model[0].bias], False)
    lr.fill_(0.25)
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert all(optimizer.state[x][name] is buffer for x, state in buffers.items() for name, buffer in state.items())
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.5
    assert [state["step"].item() for state in optimizer.state.values()] == [1, 0, 1]
    assert not optimizer.state[model[0].bias]["exp_avg"].any()
    saved["state"][0]["exp_avg"].zero_()
    assert optimizer.state[model[0].weight]["exp_avg"].any()  # the dict that was loaded is not shared


def test_params_without_gradient_are_skipped_and_averaged(device: torch.device) -> None:
    student, teacher = make(torch.float32, device), make(torch.float32, device)
    student[0].bias.requires_grad_(False)
    before = [x.detach().clone() for x in student.parameters()]
    with torch.no_grad():
        for x in teacher.parameters():
            x.zero_()
    trained = [x for x in student.parameters() if x.requires_grad]  # as get_params_groups leaves it out
    optimizer = ClipAdamWEMA(trained, teacher=zip(student.parameters(), teacher.parameters()), momentum=0.75)
    assert [x is y for x, y in zip(optimizer.tensors, (*trained, student[0].bias))] == [True] * 3
    gradients(student, torch.float32, device)
    optimizer.step()
    assert torch.equal(student[0].bias, before[1])
    assert set(optimizer.state) == set(trained)
    for x, y in zip(teacher.parameters(), student.parameters()):
        torch.testing.assert_close(x, 0.25 * y)


def test_a_predictor_without_teacher_is_only_stepped(device: torch.device) -> None:
    """As in BYOL: some params have an averaged twin, others none."""
    ours, theirs, teacher = (make(torch.float32, device) for _ in range(3))
    optimizer = ClipAdamWEMA(ours.parameters(), teacher=[(ours[0].weight, teacher[0].weight)], momentum=0.5)
    twin = AdamW(theirs.parameters())
    expected = teacher[0].weight.detach().clone()
    for model, stepped in ((ours, optimizer), (theirs, twin)):
        gradients(model, torch.float32, device)
        stepped.step()
    ema_update_([expected], [ours[0].weight], 0.5)
    torch.testing.assert_close(teacher[0].weight, expected)
    assert torch.equal(teacher[2].weight, make(torch.float32, device)[2].weight)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_gradient_norms_are_those_before_the_clip(device: torch.device) -> None:
    model = make(torch.float32, device)
    gradients(model, torch.float32, device)
    expected = torch.stack([x.grad.norm() for x in model.parameters()])
    for kwargs in ({"clip_grad": 1e-3}, {"track_grad_norms": True}):
        optimizer = ClipAdamWEMA(model.parameters(), **kwargs)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norms, expected)
    assert ClipAdamWEMA(model.parameters()).grad_norms is None


def test_groups_with_their_own_betas_and_a_group_added_later(device: torch.device) -> None:
    ours, theirs = make(torch.float32, device), make(torch.float32, device)
    built = []
    for model, kind in ((ours, ClipAdamWEMA), (theirs, AdamW)):
        optimizer = kind([{"params": [model[0].weight], "betas": (0.5, 0.9)}, {"params": [model[0].bias]}], lr=1e-2)
        if kind is ClipAdamWEMA:
            optimizer.freeze_([model[0].bias])
        gradients(model, torch.float32, device)
        if kind is AdamW:
            model[0].bias.grad = None
        optimizer.step()
        optimizer.add_param_group({"params": [model[2].weight], "eps": 1e-3})
        optimizer.step()
        built.append(optimizer)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert built[0].frozen.tolist() == [False, True, False]


def test_a_scheduler_and_a_closure_work(device: torch.device) -> None:
    ours, theirs = make(torch.float32, device), make(torch.float32, device)
    for model, kind in ((ours, ClipAdamWEMA), (theirs, AdamW)):
        optimizer = kind(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=5)  # moves betas, too

        def closure(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            loss = model(next(batches(torch.float32, device))).square().sum()
            loss.backward()
            return loss

        losses = []
        for _ in range(4):
            losses.append(optimizer.step(closure))
            scheduler.step()
        assert losses[-1] < losses[0]
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_does_not_wait_for_the_device(fakegpu: torch.device) -> None:
    """Backward, clip, AdamW, freezing and EMA with nothing but shapes: a host that asked for a value would raise."""
    student = nn.Sequential(nn.Linear(7, 33, device=fakegpu), nn.Linear(33, 5, bias=False, device=fakegpu))
    teacher = [torch.empty_like(x) for x in student.parameters()]
    optimizer = ClipAdamWEMA(
        groups_of(student), lr=1e-3, clip_grad=3.0, teacher=zip(student.parameters(), teacher),
        copies=[(x, torch.empty_like(x, dtype=torch.bfloat16)) for x in teacher],
    )  # fmt: skip
    flag = torch.empty((), dtype=torch.bool, device=fakegpu)
    optimizer.momentum = torch.empty((), device=fakegpu)
    optimizer.param_groups[0]["lr"] = torch.empty((), device=fakegpu)
    for _ in range(2):
        optimizer.zero_grad()
        student(torch.empty(4, 7, device=fakegpu)).square().sum().backward()
        optimizer.freeze_([student[1].weight], flag)
        optimizer.step()


@pytest.mark.parametrize(
    ("kwargs", "expected", "got"),
    [
        ({"clip_grad": -1.0}, "at least 0", "-1.0"),
        ({"momentum": 2.0}, "[0, 1]", "2.0"),
        ({"teacher": "shape"}, "(3, 2)", "(2, 3)"),
        ({"teacher": "dtype"}, "float32", "float64"),
        ({"copies": "shape"}, "(3, 2)", "(2, 3)"),
        ({"params": "dtype"}, "float32 or float64", "bfloat16"),
        ({"params": "device"}, "cpu", "meta"),
        ({"clip_together": "others"}, "each param in one of the sets", "one in none"),
    ],
)
def test_construction_refuses_what_does_not_fit(kwargs: dict, expected: str, got: str) -> None:
    param = torch.zeros(3, 2, requires_grad=True)
    spoilt = {
        ("teacher", "shape"): [(param, torch.zeros(2, 3))],
        ("teacher", "dtype"): [(param, torch.zeros(3, 2, dtype=torch.float64))],
        ("copies", "shape"): [(param, torch.zeros(2, 3))],
        ("clip_together", "others"): [[torch.zeros(3)]],
        ("params", "dtype"): [torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)],
        ("params", "device"): [param, torch.zeros(3, device="meta", requires_grad=True)],
    }
    arguments = {"params": [param]} | {name: spoilt.get((name, value), value) for name, value in kwargs.items()}
    with pytest.raises(ValueError, match="expected") as error:
        ClipAdamWEMA(**arguments)
    assert expected in str(error.value)
    assert got in str(error.value)


def test_loading_refuses_what_does_not_fit(device: torch.device) -> None:
    model = make(torch.float32, device)
    other = AdamW(model.parameters(), amsgrad=True)
    optimizer = ClipAdamWEMA(model.parameters())
    with pytest.raises(ValueError, match="expected amsgrad and maximize to be False, got True"):
        optimizer.load_state_dict(other.state_dict())
    gradients(model, torch.float32, device)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(2, 2)
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    with pytest.raises(ValueError, match=r"expected shape \(33, 7\), got \(2, 2\)"):
        optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], before)


def test_a_step_refuses_scalars_from_elsewhere() -> None:
    param = torch.zeros(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = ClipAdamWEMA([param])
    optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
    with pytest.raises(ValueError, match=r"expected to be on cpu .* got meta"):
        optimizer.step()
    assert not param.any()


@pytest.mark.gpu
def test_a_captured_step_replays_with_changing_scalars() -> None:
    """Forward, backward and step in one graph, three replays over a freeze boundary, against the original's loop."""
    device = torch.device("cuda")
    student, teacher = make(torch.float32, device), make(torch.float32, device)
    twin, twin_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    optimizers = []
    for model, average in ((student, teacher), (twin, twin_teacher)):
        optimizers.append(
            ClipAdamWEMA(model.parameters(), clip_grad=CLIP, teacher=zip(model.parameters(), average.parameters()))
        )
    captured, eager = optimizers
    lr, momentum = torch.full((), 1e-3, device=device), torch.full((), 0.9, device=device)
    starting = torch.ones((), dtype=torch.bool, device=device)
    captured.param_groups[0]["lr"], captured.momentum = lr, momentum
    inputs = list(batches(torch.float32, device))
    batch = inputs[0].clone()

    def step() -> None:
        captured.zero_grad()
        student(batch).square().sum().backward()
        captured.freeze_([student[2].weight], starting)
        captured.step()

    def eager_step(i: int, rate: float, beta: float, frozen: bool) -> None:
        eager.param_groups[0]["lr"], eager.momentum = rate, beta
        eager.zero_grad()
        twin(inputs[i]).square().sum().backward()
        eager.freeze_([twin[2].weight], frozen)
        eager.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    eager_step(0, 1e-3, 0.9, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i, (rate, beta, frozen) in enumerate(((2e-3, 0.8, True), (5e-3, 0.5, False), (1e-3, 0.99, False)), start=1):
        lr.fill_(rate), momentum.fill_(beta), starting.fill_(frozen)
        batch.copy_(inputs[i])
        graph.replay()
        eager_step(i, rate, beta, frozen)
        for a, b in zip(
            (*student.parameters(), *teacher.parameters()), (*twin.parameters(), *twin_teacher.parameters())
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert {key: entry["step"].item() for key, entry in captured.state_dict()["state"].items()} == {0: 4, 1: 4, 2: 2}


def test_step_counts_are_exact_for_long_runs(device: torch.device) -> None:
    """Bias corrections at large and small counts, where fp32 arithmetic on beta**step would show."""
    param = torch.zeros(1, requires_grad=True, device=device)
    for count in (0, 1, 9, 999, 99_999):
        with torch.no_grad():
            param.zero_()
        optimizer = ClipAdamWEMA([param], lr=1.0, weight_decay=0.0, eps=0.0)
        param.grad = torch.ones_like(param)
        state = optimizer._state_of(param)
        state["step"].fill_(count)
        optimizer.step()
        t = count + 1
        expected = -(0.1 / -np.expm1(t * np.log(0.9))) / np.sqrt(0.001 / -np.expm1(t * np.log(0.999)))
        assert param.item() == pytest.approx(expected, rel=1e-6)
