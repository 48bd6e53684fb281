"""The ops beside plain PyTorch, torch.compile and PyTorch's own fused calls, on the tensors of the step's main case.

Every provider is compared with fp64 before it is timed. Bytes are those that the operation cannot avoid, whoever does
it, so a share of the copy bandwidth says how far each provider is from the floor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines
from bench.measure import DEVICE, ON_GPU, QUICK, require
from bench.test_step import MAIN, NETWORKS
from fastdino import DINOHead
from fastdino_kernels import (
    ClipAdamWEMA,
    center_update_,
    dino_loss,
    dino_loss_and_grad_,
    ema_update_,
    patch_loss,
    patch_loss_and_grad_,
    reference,
    sinkhorn_center,
)
from fastdino_kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's time says nothing: unset TRITON_INTERPRET")

N_STUDENT, N_TEACHER = 10, 2
BATCHES, K = (64, 256) if ON_GPU else (MAIN.batch,), MAIN.out_dim
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
MASKED = 59  # patches per image that a student does not see: 0.3 of the 196 of half of the global crops
TEMPS, MOMENTUM = (0.1, 0.04), 0.996
CLIP, LR, WEIGHT_DECAY = 3.0, 5e-4, 0.04

Way = Callable[[], list[Tensor]]  # does an operation once more on its own tensors, and returns what it wrote


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By Inductor, whose C++ takes a minute per function without a GPU: not in a quick run there."""
    if QUICK and not ON_GPU:
        pytest.skip("Inductor compiles for minutes on a CPU: left out of --quick")
    return torch.compile(function, fullgraph=True, dynamic=False)


def check(ours: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> None:
    """2 x the error of plain PyTorch in the same dtype, and two roundings: the budget of the tests."""
    for got, exact, same in zip(ours, truth, plain, strict=True):
        allowed = 2 * (same.double() - exact).abs().max() + 2 * torch.finfo(got.dtype).eps * exact.abs().max()
        error = (got.double() - exact).abs().max()
        require(error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}")


def with_gradients(op: Callable[[], list[Tensor]], wanted: list[Tensor], upstream: Tensor | None = None) -> Way:
    """What an op makes, in parts, and the gradients of `wanted`. upstream: the parts' own, joined; a loss has 1."""
    for x in wanted:
        x.requires_grad_()

    def run() -> list[Tensor]:
        parts = op()
        given = None if upstream is None else upstream.split([len(part) for part in parts])
        return [*(part.detach() for part in parts), *torch.autograd.grad(parts, wanted, given)]

    return run


def logits(*shapes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The student's and the teacher's, (*shape, K), and a center."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(*shape, K, device=DEVICE).to(DTYPE).to(dtype) for shape in shapes)
    return student, teacher, 0.1 * torch.randn(K, device=DEVICE).to(torch.promote_types(dtype, torch.float32))


def loss_way(provider: str, n_images: int, dtype: torch.dtype = DTYPE) -> Way:
    student, teacher, center = logits((N_STUDENT, n_images), (N_TEACHER, n_images), dtype=dtype)
    if provider == "ours, in place":
        return lambda: [dino_loss_and_grad_(student, teacher, center, *TEMPS), student]
    known = {"ours": dino_loss, "plain": baselines.plain_loss, "reference": reference.dino_loss}
    function = known.get(provider) or compiled(reference.dino_loss)

    def loss() -> list[Tensor]:
        return [function(student.float() if provider == "plain" else student, teacher, center, *TEMPS)]

    return with_gradients(loss, [student])


@pytest.mark.parametrize("n_images", BATCHES, ids=lambda n: f"B{n} K{K}")
@pytest.mark.parametrize("provider", ["ours", "ours, in place", "plain", "compiled"])
def test_dino_loss(provider: str, n_images: int, timed: Any) -> None:
    check(loss_way(provider, 2)(), loss_way("reference", 2, torch.float64)(), loss_way("reference", 2)())
    # Forward: T + V rows per image read. Backward: as many, and V written.
    n_bytes = (3 * N_STUDENT + 2 * N_TEACHER) * n_images * K * DTYPE.itemsize
    timed(loss_way(provider, n_images), n_bytes=n_bytes)


def patches(n_images: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = MASKED * n_images
    student, teacher, center = logits((n,), (n,), dtype=dtype)
    return student, teacher, center, torch.full((n,), 1 / n, device=DEVICE).to(center.dtype)


def patch_way(provider: str, n_images: int, dtype: torch.dtype = DTYPE) -> Way:
    student, *others = patches(n_images, dtype)
    if provider == "ours, in place":
        return lambda: [patch_loss_and_grad_(student, *others, *TEMPS), student]
    known = {"ours": patch_loss, "plain": baselines.plain_patch_loss, "reference": reference.patch_loss}
    function = known.get(provider) or compiled(baselines.plain_patch_loss)
    return with_gradients(lambda: [function(student, *others, *TEMPS)], [student])


@pytest.mark.parametrize("n_images", BATCHES[:1], ids=lambda n: f"B{n} K{K}")
@pytest.mark.parametrize("provider", ["ours", "ours, in place", "plain", "compiled"])
def test_patch_loss(provider: str, n_images: int, timed: Any) -> None:
    check(patch_way(provider, 1)(), patch_way("reference", 1, torch.float64)(), patch_way("reference", 1)())
    timed(patch_way(provider, n_images), n_bytes=3 * MASKED * n_images * K * DTYPE.itemsize)  # 2 rows read, 1 written


def sinkhorn_way(provider: str, n_images: int, dtype: torch.dtype = DTYPE) -> Way:
    teacher = patches(n_images, dtype)[1] / 4  # beyond +-3.5 the plain one's exp(teacher / 0.04) leaves fp32
    known = {"ours": sinkhorn_center, "plain": baselines.plain_sinkhorn_center}
    center = known.get(provider) or compiled(baselines.plain_sinkhorn_center)
    return lambda: [center(teacher, TEMPS[1])]


@pytest.mark.parametrize("n_images", BATCHES[:1], ids=lambda n: f"B{n} K{K}")
@pytest.mark.parametrize("provider", ["ours", "plain", "compiled"])
def test_sinkhorn_center(provider: str, n_images: int, timed: Any) -> None:
    way = sinkhorn_way(provider, 1)
    check(way(), sinkhorn_way("plain", 1, torch.float64)(), sinkhorn_way("plain", 1)())
    # Sums over columns and over rows in turn, five in all, and no chip holds the logits in between.
    timed(sinkhorn_way(provider, n_images), n_bytes=5 * MASKED * n_images * K * DTYPE.itemsize)


def center_way(provider: str, n_images: int, dtype: torch.dtype = DTYPE) -> Way:
    def plain(center: Tensor, teacher: Tensor, momentum: Tensor) -> None:
        reference.center_ema_(center, reference.batch_center(teacher), momentum)

    _, teacher, center = logits((0,), (N_TEACHER, n_images), dtype=dtype)
    momentum = torch.tensor(0.9, device=DEVICE, dtype=center.dtype)
    update = {"ours": center_update_, "plain": plain}.get(provider) or compiled(plain)

    def run() -> list[Tensor]:
        update(center, teacher, momentum)
        return [center]

    return run


@pytest.mark.parametrize("n_images", BATCHES, ids=lambda n: f"B{n} K{K}")
@pytest.mark.parametrize("provider", ["ours", "plain", "compiled"])
def test_center_update(provider: str, n_images: int, timed: Any) -> None:
    way = center_way(provider, n_images)
    check(way(), center_way("plain", n_images, torch.float64)(), center_way("plain", n_images)())
    timed(way, n_bytes=N_TEACHER * n_images * K * DTYPE.itemsize + 2 * K * 4)


with torch.device("meta"):
    _backbone = NETWORKS[MAIN.arch]()
    SHAPES = [p.shape for p in (*_backbone.parameters(), *DINOHead(_backbone.embed_dim, K).parameters())]
N_PARAMS = sum(shape.numel() for shape in SHAPES)


def weights(dtype: torch.dtype) -> list[Tensor]:
    """As many, and of the same shapes, as backbone and head have."""
    return [0.02 * torch.randn(shape, device=DEVICE).to(dtype) for shape in SHAPES]


def ema_way(provider: str, dtype: torch.dtype = torch.float32) -> Way:
    torch.manual_seed(0)
    teacher, student = weights(dtype), weights(dtype)
    momentum = torch.tensor(MOMENTUM, device=DEVICE) if provider == "ours" else MOMENTUM
    known = {"ours": ema_update_, "plain": baselines.plain_ema, "foreach lerp": baselines.foreach_ema}
    update = known.get(provider) or compiled(baselines.plain_ema)

    def run() -> list[Tensor]:
        update(teacher, student, momentum)
        return teacher

    return run


@pytest.mark.parametrize("provider", ["ours", "plain", "foreach lerp", "compiled"])
def test_ema_update(provider: str, timed: Any) -> None:
    way = ema_way(provider)
    check(way(), ema_way("plain", torch.float64)(), ema_way("plain")())
    timed(way, n_bytes=12 * N_PARAMS)


def update_way(provider: str, dtype: torch.dtype = torch.float32) -> Way:
    """Clip, AdamW, EMA and bf16 copies of student and teacher."""
    torch.manual_seed(0)
    params, teacher, grads = (weights(dtype) for _ in range(3))
    written = [*params, *teacher]
    low = [torch.empty_like(x, dtype=torch.bfloat16) for x in written]
    for x, grad in zip(params, grads):
        x.requires_grad_().grad = grad
    options = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    if provider == "ours":
        options |= {"clip_grad": CLIP, "momentum": MOMENTUM, "teacher": zip(params, teacher)}
        step = ClipAdamWEMA(params, copies=zip(written, low), **options).step
    else:
        choice = {"plain": {"foreach": False}, "library": {"fused": True}}.get(provider, {})
        adamw = torch.optim.AdamW(params, **options, **choice).step
        adamw = torch.compile(adamw, dynamic=False) if provider == "compiled" and ON_GPU else adamw
        clip = baselines.plain_clip if provider == "plain" else baselines.foreach_clip
        average = baselines.plain_ema if provider == "plain" else baselines.foreach_ema

        def tail() -> None:
            average(teacher, params, MOMENTUM)
            torch._foreach_copy_(low, written)

        tail_way = compiled(tail) if provider == "compiled" else tail

        def step() -> None:
            clip(params, CLIP)
            adamw()
            tail_way()

    @torch.no_grad()
    def run() -> list[Tensor]:
        step()
        return written

    return run


@pytest.mark.parametrize("provider", ["ours", "plain", "library", "compiled"])
def test_clip_adamw_ema(provider: str, timed: Any) -> None:
    way = update_way(provider)
    check(way(), update_way("plain", torch.float64)(), update_way("plain")())
    timed(way, n_bytes=44 * N_PARAMS)
