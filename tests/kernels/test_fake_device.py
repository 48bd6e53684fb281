"""No host synchronisation, without a GPU: the ops and their launchers on a device that has no values to give."""

import pytest
import torch
from fake_device import run_launcher
from torch._subclasses.fake_tensor import DataDependentOutputException

from fastdino_kernels import (
    LinearLogits,
    batch_center,
    center_ema_,
    center_update_,
    dino_loss_and_grad_,
    dino_loss_with_stats,
    patch_loss,
    patch_loss_and_grad_,
    sinkhorn_center,
)
from fastdino_kernels.center import _batch_center, _center_ema_, _center_update_
from fastdino_kernels.dino_loss import _dino_loss, _dino_loss_and_grad_, _dino_loss_backward
from fastdino_kernels.patch_loss import _linear_patch_loss, _patch_loss, _patch_loss_and_grad_, _patch_loss_backward
from fastdino_kernels.sinkhorn import _column_exps, _column_probs


def test_the_fake_device_refuses_what_it_should(fakegpu):
    x = torch.randn(3, device=fakegpu)
    for synchronise in (lambda: x.sum().item(), lambda: bool(x.isfinite().all()), lambda: x[x > 0].tolist()):
        with pytest.raises((DataDependentOutputException, RuntimeError)):
            synchronise()
    for copy in (x.cpu, lambda: x.to("cpu", non_blocking=True), lambda: torch.zeros(3).to(fakegpu)):
        with pytest.raises(AssertionError, match="moves data between"):
            copy()


@pytest.mark.parametrize("on_device", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["kernels", "reference"])
def test_loss_backward_and_center_do_not_synchronise(fakegpu, dtype, on_device):
    def scalar(value: float) -> float | torch.Tensor:
        return torch.full((), value, device=fakegpu) if on_device else value

    student = torch.randn(10, 4, 512, device=fakegpu, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 4, 512, device=fakegpu, dtype=dtype)
    center = torch.zeros(512, device=fakegpu)
    stats = dino_loss_with_stats(student, teacher, center, scalar(0.1), scalar(0.04))
    (stats.loss * scalar(1024.0)).backward()
    assert student.grad.shape == student.shape
    assert student.grad.device.type == fakegpu.type
    center_update_(center, teacher, scalar(0.9))
    center_ema_(center, batch_center(teacher), scalar(0.9))
    loss = dino_loss_and_grad_(student.detach(), teacher, center, scalar(0.1), scalar(0.04), scalar(1.0))
    assert loss.device.type == fakegpu.type


@pytest.mark.parametrize("on_device", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["kernels", "reference"])
def test_patch_loss_and_sinkhorn_do_not_synchronise(fakegpu, dtype, on_device):
    def scalar(value: float) -> float | torch.Tensor:
        return torch.full((), value, device=fakegpu) if on_device else value

    student = torch.randn(6, 512, device=fakegpu, dtype=dtype, requires_grad=True)
    teacher = torch.randn(6, 512, device=fakegpu, dtype=dtype)
    weights = torch.ones(6, device=fakegpu)
    center = sinkhorn_center(teacher, scalar(0.04), weights=weights)
    assert center.shape == (512,)
    loss = patch_loss(student, teacher, center, weights, scalar(0.1), scalar(0.04))
    (loss * scalar(1024.0)).backward()
    assert student.grad.shape == student.shape
    owned = student.detach()
    patch_loss_and_grad_(owned, teacher, center, weights, scalar(0.1), scalar(0.04), scalar(1.0))
    x, prototypes = (torch.randn(n, 8, device=fakegpu, dtype=dtype, requires_grad=True) for n in (6, 512))
    (patch_loss(LinearLogits(x, prototypes), teacher, center, weights, scalar(0.1), scalar(0.04)) * 2).backward()
    assert (x.grad.shape, prototypes.grad.shape) == ((6, 8), (512, 8))


@pytest.mark.parametrize("layout", ["contiguous", "K-strided"])
def test_launchers_of_patches_do_not_synchronise(fakegpu, layout):
    def logits() -> torch.Tensor:
        x = torch.randn(6, 512, device=fakegpu)
        return x if layout == "contiguous" else x.t().contiguous().t()

    student, teacher = logits(), logits()
    center, weights, one = (torch.ones(shape, device=fakegpu) for shape in ((512,), (6,), ()))
    inputs = student, teacher, center, weights, one, one
    _, norm = run_launcher(_patch_loss, *inputs)
    assert run_launcher(_patch_loss_backward, one, *inputs, norm).shape == student.shape
    run_launcher(_patch_loss_and_grad_, student.contiguous(), *inputs[1:], one)
    x, prototypes = (torch.randn(n, 8, device=fakegpu) for n in (6, 512))
    assert run_launcher(_linear_patch_loss, x, prototypes, *inputs[1:])[2].shape == (512, 8)
    assert run_launcher(_column_exps, teacher, weights, one).shape == (2, 512)
    assert run_launcher(_column_probs, teacher, center, weights, one).shape == (512,)


@pytest.mark.parametrize("layout", ["contiguous", "image-major", "K-strided"])
def test_launchers_do_not_synchronise(fakegpu, layout):
    """What runs around the kernels on a real device: allocations, grids, copies of strided inputs."""

    def logits(n_views: int) -> torch.Tensor:
        x = torch.randn(n_views, 4, 512, device=fakegpu)
        axes = {"contiguous": (0, 1), "image-major": (0, 1), "K-strided": (1, 2)}[layout]
        return x if layout == "contiguous" else x.transpose(*axes).contiguous().transpose(*axes)

    student, teacher, center, one = (
        logits(10),
        logits(2),
        torch.zeros(512, device=fakegpu),
        torch.ones((), device=fakegpu),
    )
    inputs = student, teacher, center, one, one
    *_, student_norm, teacher_norm = run_launcher(_dino_loss, *inputs)
    grad = run_launcher(_dino_loss_backward, one, *inputs, student_norm, teacher_norm)
    assert grad.shape == student.shape
    run_launcher(_dino_loss_and_grad_, student.contiguous(), *inputs[1:], one)
    assert run_launcher(_batch_center, teacher).shape == center.shape
    run_launcher(_center_update_, center, teacher, one)
    run_launcher(_center_update_, torch.stack([center, center], 1)[:, 0], teacher, one)
    run_launcher(_center_ema_, center, center, one)
