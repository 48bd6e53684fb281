"""The ops beside plain PyTorch, torch.compile, the best library calls and whoever else is installed.

Every provider is compared with fp64 before it is timed. Bytes are those that the operation cannot avoid, whoever does
it, so a share of the copy bandwidth says how far each provider is from the floor. FLOPs are counted by hand, and rough:
they only say that these ops are bound by memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.measure import DEVICE, ON_GPU, QUICK, require
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
BATCHES = (64, 256) if ON_GPU else (4,) if QUICK else (16,)
K = 65536 if ON_GPU or not QUICK else 8192
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
STUDENT_TEMP, TEACHER_TEMP, MOMENTUM = 0.1, 0.04, 0.996
CLIP, LR, WEIGHT_DECAY = 3.0, 5e-4, 0.04

Timed = Callable[..., Any]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By Inductor, whose C++ takes a minute per function without a GPU: not in a quick run there."""
    if QUICK and not ON_GPU:
        pytest.skip("Inductor compiles for minutes on a CPU: left out of --quick")
    return torch.compile(function, fullgraph=True, dynamic=False)


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
        require(error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}")


def logits(n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student = torch.randn(N_STUDENT, n_images, K, device=DEVICE).to(DTYPE)
    teacher = torch.randn(N_TEACHER, n_images, K, device=DEVICE).to(DTYPE)
    return student, teacher, 0.1 * torch.randn(K, device=DEVICE)


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """The original's structure: a loop over pairs of views."""
    total, n_pairs = student.new_zeros((), dtype=torch.float32), 0
    students = [x.float() / student_temp for x in student]
    for t, x in enumerate(teacher):
        probs = F.softmax((x.float() - center) / teacher_temp, dim=-1).detach()
        for v, y in enumerate(students):
            if v != t:
                total, n_pairs = total + torch.sum(-probs * F.log_softmax(y, dim=-1), dim=-1).mean(), n_pairs + 1
    return total / n_pairs


def their_loss(provider: str, center: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(student (V, B, K), teacher (T, B, K)) -> loss, by others. Skips the test where they are absent."""
    try:
        if provider == "lightly":
            return peers.lightly_loss(K, STUDENT_TEMP, TEACHER_TEMP, center)
        if provider == "Liger":
            return peers.liger_loss(STUDENT_TEMP, TEACHER_TEMP, center)
        theirs = peers.original().main_dino.DINOLoss(K, N_STUDENT, TEACHER_TEMP, TEACHER_TEMP, 0, 1).to(DEVICE)
    except peers.Absent as reason:
        pytest.skip(str(reason))

    def original(student: Tensor, teacher: Tensor) -> Tensor:
        theirs.center.copy_(center[None])  # which it moves at every call
        return theirs(student.flatten(0, 1), teacher.flatten(0, 1), 0)

    return original


def loss_provider(provider: str, n_images: int) -> Provider:
    student, teacher, center = logits(n_images)
    arguments = (teacher, center, STUDENT_TEMP, TEACHER_TEMP)
    results: list[Tensor] = []
    if provider == "ours, in place":
        fresh = student.clone()

        def run() -> None:
            results[:] = [dino_loss_and_grad_(fresh, *arguments), fresh]

        return Provider(run, lambda: [x.detach() for x in results])
    student.requires_grad_()
    theirs = their_loss(provider, center) if provider in ("original", "lightly", "Liger") else None
    ways = {"ours": dino_loss, "plain": plain_loss}
    function = None if theirs else ways.get(provider) or compiled(reference.dino_loss)

    def run() -> None:
        student.grad = None
        loss = theirs(student, teacher) if theirs else function(student, *arguments)
        loss.backward()
        results[:] = [loss.detach(), student.grad]

    return Provider(run, lambda: results)


@pytest.mark.parametrize("n_images", BATCHES, ids=lambda n: f"B{n} K{K}")
@pytest.mark.parametrize("provider", ["ours", "ours, in place", "plain", "compiled", "original", "lightly", "Liger"])
def test_dino_loss(provider: str, n_images: int, timed: Timed) -> None:
    small = loss_provider(provider, 2)
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
    n_logits = n_images * K
    # Forward: T + V rows per image read. Backward: as many, and V written.
    n_bytes = (3 * N_STUDENT + 2 * N_TEACHER) * n_logits * DTYPE.itemsize
    # A softmax is about 5 per logit, a pair's product 2; backward is another softmax and 3 per student logit.
    n_flops = (2 * 5 * (N_STUDENT + N_TEACHER) + 2 * N_STUDENT * N_TEACHER + 3 * N_STUDENT) * n_logits
    timed(loss_provider(provider, n_images).run, n_bytes=n_bytes, n_flops=n_flops)


@pytest.mark.parametrize("n_images", BATCHES, ids=lambda n: f"B{n} K{K}")
@pytest.mark.parametrize("provider", ["ours", "plain", "compiled"])
def test_center_update(provider: str, n_images: int, timed: Timed) -> None:
    def plainly(center: Tensor, teacher: Tensor, momentum: Tensor) -> None:
        reference.center_ema_(center, reference.batch_center(teacher), momentum)

    _, teacher, center = logits(n_images)
    momentum = torch.tensor(0.9, device=DEVICE)
    update = {"ours": center_update_, "plain": plainly}.get(provider) or compiled(plainly)
    truth, plain = center.double(), center.clone()
    plainly(truth, teacher.double(), momentum.double())
    plainly(plain, teacher, momentum)
    way = Provider(lambda: update(center, teacher, momentum), lambda: [center])
    way.run()
    check(way, [truth], [plain])
    timed(way.run, n_bytes=teacher.numel() * DTYPE.itemsize + 2 * K * 4, n_flops=teacher.numel() + 3 * K)


def shapes() -> list[tuple[int, ...]]:
    """ViT-S/16 with its head; a small one in a quick run without a GPU."""
    dim, depth, hidden, n_patches = (384, 12, 2048, 196) if ON_GPU or not QUICK else (192, 12, 512, 196)
    block = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    block += [(dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    embed = [(1, 1, dim), (1, n_patches + 1, dim), (dim, 3, 16, 16), (dim,), (dim,), (dim,)]
    head = [(hidden, dim), (hidden,), (hidden, hidden), (hidden,), (256, hidden), (256,), (K, 256)]
    return embed + block * depth + head


def model(scale: float = 0.02) -> list[Tensor]:
    return [scale * torch.randn(shape, device=DEVICE) for shape in shapes()]


def n_params() -> int:
    return sum(torch.Size(shape).numel() for shape in shapes())


def plain_ema(teacher: list[Tensor], student: list[Tensor]) -> None:
    for x, y in zip(teacher, student):
        x.mul_(MOMENTUM).add_((1 - MOMENTUM) * y)


def foreach_mul_add(teacher: list[Tensor], student: list[Tensor]) -> None:
    torch._foreach_mul_(teacher, MOMENTUM)
    torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)


def foreach_lerp(teacher: list[Tensor], student: list[Tensor]) -> None:
    torch._foreach_lerp_(teacher, student, 1 - MOMENTUM)


@pytest.mark.parametrize("provider", ["ours", "plain", "foreach mul, add", "foreach lerp", "compiled"])
def test_ema_update(provider: str, timed: Timed) -> None:
    torch.manual_seed(0)
    teacher, student = model(), model()
    momentum = torch.tensor(MOMENTUM, device=DEVICE)
    ways: dict[str, Callable[[list[Tensor], list[Tensor]], None]] = {
        "ours": lambda x, y: ema_update_(x, y, momentum),
        "plain": plain_ema,
        "foreach mul, add": foreach_mul_add,
        "foreach lerp": foreach_lerp,
    }
    update = ways.get(provider) or compiled(plain_ema)
    truth, plain = [x.double() for x in teacher], [x.clone() for x in teacher]
    plain_ema(truth, [x.double() for x in student])
    plain_ema(plain, student)
    way = Provider(lambda: update(teacher, student), lambda: teacher)
    way.run()
    check(way, truth, plain)
    timed(way.run, n_bytes=12 * n_params(), n_flops=3 * n_params())


def plain_clip(params: list[Tensor]) -> None:
    """The original's structure: two synchronisations per tensor."""
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


def update_provider(provider: str, dtype: torch.dtype = torch.float32) -> Provider:
    """Clip, AdamW, EMA and bf16 copies of student and teacher."""
    torch.manual_seed(0)
    params, teacher, grads = ([x.to(dtype) for x in model()] for _ in range(3))
    low = [torch.empty_like(x, dtype=torch.bfloat16) for x in (*params, *teacher)]
    for x, grad in zip(params, grads):
        x.requires_grad_()
        x.grad = grad

    def outputs() -> list[Tensor]:
        return [x.detach() for x in (*params, *teacher)]

    if provider == "ours":
        optimizer = ClipAdamWEMA(
            params, lr=LR, weight_decay=WEIGHT_DECAY, clip_grad=CLIP, teacher=zip(params, teacher), momentum=MOMENTUM,
            copies=zip((*params, *teacher), low),
        )  # fmt: skip
        return Provider(optimizer.step, outputs)
    choice = {"foreach": False} if provider == "plain" else {"fused": True} if provider == "library" and ON_GPU else {}
    theirs = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **choice)
    clip, average = (plain_clip, plain_ema) if provider == "plain" else (foreach_clip, foreach_lerp)

    def tail() -> None:
        average(teacher, [x.detach() for x in params])
        torch._foreach_copy_(low, [x.detach() for x in (*params, *teacher)])

    tail_function = compiled(tail) if provider == "compiled" else tail
    step = torch.compile(theirs.step, dynamic=False) if provider == "compiled" and ON_GPU else theirs.step

    @torch.no_grad()
    def run() -> None:
        clip(params)
        step()
        tail_function()

    return Provider(run, outputs)


@pytest.mark.parametrize("provider", ["ours", "plain", "library", "compiled"])
def test_clip_adamw_ema(provider: str, timed: Timed) -> None:
    way, truth, plain = (
        update_provider(provider),
        update_provider("plain", torch.float64),
        update_provider("plain"),
    )
    for each in (way, truth, plain):
        each.run()
    check(way, truth.outputs(), plain.outputs())
    del truth, plain
    timed(way.run, n_bytes=44 * n_params(), n_flops=20 * n_params())
