"""The ops beside plain PyTorch, torch.compile and the best library calls: `pytest bench/test_ops.py`.

Every provider is compared with fp64 before it is timed. Bytes are those that the operation cannot avoid, whoever does
it, so a share of the copy bandwidth says how far each provider is from the floor.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import DEVICE, ON_GPU, line, measure, row
from fastdino_kernels import (
    ClipAdamWEMA,
    center_update_,
    dino_loss,
    dino_loss_and_grad_,
    ema_update_,
    reference,
)
from fastdino_kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's time says nothing: unset TRITON_INTERPRET")

N_STUDENT, N_TEACHER = 10, 2
BATCHES = (64, 256) if ON_GPU else (2,)
K = 65536 if ON_GPU else 1024
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
STUDENT_TEMP, TEACHER_TEMP, MOMENTUM = 0.1, 0.04, 0.996
CLIP, LR, WEIGHT_DECAY = 3.0, 5e-4, 0.04
REPEATS = 50 if ON_GPU else 3

# Inductor's C++ takes a minute per case and measures nothing here; without a GPU the graph alone is proved.
compiled = torch.compile(fullgraph=True, dynamic=False, backend="inductor" if ON_GPU else "aot_eager")


@dataclass(frozen=True)
class Provider:
    """One way to do an operation. run: on its own tensors, again and again. outputs: what it wrote, after one run."""

    run: Callable[[], object]
    outputs: Callable[[], list[Tensor]]


def check(provider: Provider, truth: list[Tensor], plain: list[Tensor]) -> None:
    """2 x the error of plain PyTorch in the same dtype, and two roundings: the budget of the tests."""
    for ours, exact, same in zip(provider.outputs(), truth, plain, strict=True):
        exact = exact.double()
        allowed = 2 * (same.double() - exact).abs().max() + 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
        error = (ours.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}: not timed"


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Provider, int], None]:
    """Times a provider, prints its line, and adds the row to pytest-benchmark's and to $BENCH_ROWS (JSON lines)."""

    def time_it(provider: Provider, n_bytes: int) -> None:
        figures = row(request.node.name.removeprefix("test_"), measure(provider.run, REPEATS), n_bytes)
        benchmark.extra_info.update(figures)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + line(figures), end=" ", flush=True)
        if path := os.environ.get("BENCH_ROWS"):
            with open(path, "a") as file:
                file.write(json.dumps(figures) + "\n")

        def run_to_the_end() -> None:
            provider.run()
            if ON_GPU:
                torch.cuda.synchronize()

        benchmark.pedantic(run_to_the_end, rounds=REPEATS, warmup_rounds=1)

    return time_it


# --- the loss


def logits(n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student = torch.randn(N_STUDENT, n_images, K, device=DEVICE).to(DTYPE)
    teacher = torch.randn(N_TEACHER, n_images, K, device=DEVICE).to(DTYPE)
    return student, teacher, 0.1 * torch.randn(K, device=DEVICE)


def original_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """DINOLoss.forward of facebookresearch/dino: a loop over pairs of views."""
    total, n_pairs = student.new_zeros((), dtype=torch.float32), 0
    students = [x.float() / student_temp for x in student]
    for t, x in enumerate(teacher):
        probs = F.softmax((x.float() - center) / teacher_temp, dim=-1).detach()
        for v, y in enumerate(students):
            if v != t:
                total, n_pairs = total + torch.sum(-probs * F.log_softmax(y, dim=-1), dim=-1).mean(), n_pairs + 1
    return total / n_pairs


def loss_provider(kind: str, n_images: int) -> Provider:
    student, teacher, center = logits(n_images)
    arguments = (teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    results: list[Tensor] = []
    if kind == "ours, in place":
        fresh = student.clone()

        def run() -> None:
            results[:] = [dino_loss_and_grad_(fresh, *arguments), fresh]

        return Provider(run, lambda: [x.detach() for x in results])
    function = {"ours": dino_loss, "original": original_loss, "compiled": compiled(reference.dino_loss)}[kind]
    student.requires_grad_()

    def run() -> None:
        student.grad = None
        loss = function(student, *arguments)
        loss.backward()
        results[:] = [loss.detach(), student.grad]

    return Provider(run, lambda: results)


@pytest.mark.parametrize("n_images", BATCHES, ids=lambda n: f"B{n}-K{K}")
@pytest.mark.parametrize("kind", ["ours", "ours, in place", "original", "compiled"])
def test_dino_loss(kind: str, n_images: int, timed: Callable[[Provider, int], None]) -> None:
    small = loss_provider(kind, 2)
    small.run()
    outputs = []
    for dtype in (torch.float64, DTYPE):
        student, teacher, center = (
            x.to(dtype if x.ndim == 3 else torch.promote_types(dtype, x.dtype)) for x in logits(2)
        )
        student.requires_grad_()
        loss = reference.dino_loss(student, teacher, center, STUDENT_TEMP, TEACHER_TEMP)
        loss.backward()
        outputs.append([loss.detach(), student.grad])
    check(small, *outputs)
    # Forward: T + V rows per image read. Backward: as many, and V written.
    n_bytes = (3 * N_STUDENT + 2 * N_TEACHER) * n_images * K * DTYPE.itemsize
    timed(loss_provider(kind, n_images), n_bytes)


# --- the center


@pytest.mark.parametrize("n_images", BATCHES, ids=lambda n: f"B{n}-K{K}")
@pytest.mark.parametrize("kind", ["ours", "eager", "compiled"])
def test_center_update(kind: str, n_images: int, timed: Callable[[Provider, int], None]) -> None:
    def eager(center: Tensor, teacher: Tensor, momentum: Tensor) -> None:
        reference.center_ema_(center, reference.batch_center(teacher), momentum)

    _, teacher, center = logits(n_images)
    momentum = torch.tensor(0.9, device=DEVICE)
    update = {"ours": center_update_, "eager": eager, "compiled": compiled(eager)}[kind]
    truth, plain = center.double(), center.clone()
    eager(truth, teacher.double(), momentum.double())
    eager(plain, teacher, momentum)
    provider = Provider(lambda: update(center, teacher, momentum), lambda: [center])
    provider.run()
    check(provider, [truth], [plain])
    timed(provider, teacher.numel() * DTYPE.itemsize + 2 * K * 4)


# --- the optimizer and the teacher


def shapes() -> list[tuple[int, ...]]:
    """ViT-S/16 with its head, 65536 prototypes; a small one without a GPU."""
    dim, depth, hidden, n_patches = (384, 12, 2048, 196) if ON_GPU else (64, 2, 128, 16)
    block = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    block += [(dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    embed = [(1, 1, dim), (1, n_patches + 1, dim), (dim, 3, 16, 16), (dim,), (dim,), (dim,)]
    head = [(hidden, dim), (hidden,), (hidden, hidden), (hidden,), (256, hidden), (256,), (K, 256)]
    return embed + block * depth + head


def model(scale: float = 0.02) -> list[Tensor]:
    return [scale * torch.randn(shape, device=DEVICE) for shape in shapes()]


def n_params() -> int:
    return sum(torch.Size(shape).numel() for shape in shapes())


def original_ema(teacher: list[Tensor], student: list[Tensor]) -> None:
    for x, y in zip(teacher, student):
        x.mul_(MOMENTUM).add_((1 - MOMENTUM) * y)


def foreach_mul_add(teacher: list[Tensor], student: list[Tensor]) -> None:
    torch._foreach_mul_(teacher, MOMENTUM)
    torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)


def foreach_lerp(teacher: list[Tensor], student: list[Tensor]) -> None:
    torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)


@pytest.mark.parametrize("kind", ["ours", "original", "foreach mul, add", "foreach lerp", "compiled"])
def test_ema_update(kind: str, timed: Callable[[Provider, int], None]) -> None:
    torch.manual_seed(0)
    teacher, student = model(), model()
    momentum = torch.tensor(MOMENTUM, device=DEVICE)
    update: Callable[[list[Tensor], list[Tensor]], None] = {
        "ours": lambda x, y: ema_update_(x, y, momentum),
        "original": original_ema,
        "foreach mul, add": foreach_mul_add,
        "foreach lerp": foreach_lerp,
        "compiled": compiled(original_ema),
    }[kind]
    truth, plain = [x.double() for x in teacher], [x.clone() for x in teacher]
    original_ema(truth, [x.double() for x in student])
    original_ema(plain, student)
    provider = Provider(lambda: update(teacher, student), lambda: teacher)
    provider.run()
    check(provider, truth, plain)
    timed(provider, 12 * n_params())


def original_clip(params: list[Tensor]) -> None:
    """utils.clip_gradients of facebookresearch/dino: two synchronisations per tensor."""
    for x in params:
        coefficient = CLIP / (x.grad.norm(2) + 1e-6)
        if coefficient < 1:
            x.grad.mul_(coefficient)


def foreach_clip(params: list[Tensor]) -> None:
    grads = [x.grad for x in params]
    norms = torch._foreach_norm(grads)
    torch._foreach_add_(norms, 1e-6)
    torch._foreach_reciprocal_(norms)
    torch._foreach_mul_(norms, CLIP)
    torch._foreach_clamp_max_(norms, 1.0)
    torch._foreach_mul_(grads, norms)


def update_provider(kind: str, dtype: torch.dtype = torch.float32) -> Provider:
    """Clip, AdamW, EMA and bf16 copies of student and teacher."""
    torch.manual_seed(0)
    params, teacher, grads = ([x.to(dtype) for x in model()] for _ in range(3))
    low = [torch.empty_like(x, dtype=torch.bfloat16) for x in (*params, *teacher)]
    for x, grad in zip(params, grads):
        x.requires_grad_()
        x.grad = grad

    def outputs() -> list[Tensor]:
        return [x.detach() for x in (*params, *teacher)]

    if kind == "ours":
        optimizer = ClipAdamWEMA(
            params, lr=LR, weight_decay=WEIGHT_DECAY, clip_grad=CLIP, teacher=zip(params, teacher), momentum=MOMENTUM,
            copies=zip((*params, *teacher), low),
        )  # fmt: skip
        return Provider(optimizer.step, outputs)
    choice = {"foreach": False} if kind == "original" else {"fused": True} if kind == "library" and ON_GPU else {}
    theirs = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **choice)
    clip, average = (original_clip, original_ema) if kind == "original" else (foreach_clip, foreach_lerp)

    def tail() -> None:
        average(teacher, [x.detach() for x in params])
        torch._foreach_copy_(low, [x.detach() for x in (*params, *teacher)])

    tail_function = compiled(tail) if kind == "compiled" else tail
    step = torch.compile(theirs.step, dynamic=False) if kind == "compiled" and ON_GPU else theirs.step

    @torch.no_grad()
    def run() -> None:
        clip(params)
        step()
        tail_function()

    return Provider(run, outputs)


@pytest.mark.parametrize("kind", ["ours", "original", "library", "compiled"])
def test_clip_adamw_ema(kind: str, timed: Callable[[Provider, int], None]) -> None:
    provider, truth, plain = (
        update_provider(kind),
        update_provider("original", torch.float64),
        update_provider("original"),
    )
    for each in (provider, truth, plain):
        each.run()
    check(provider, truth.outputs(), plain.outputs())
    del truth, plain
    timed(provider, 44 * n_params())
