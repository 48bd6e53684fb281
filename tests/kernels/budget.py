"""How far a result may be from the truth: what plain PyTorch in the same dtype earns, twice, and two roundings."""

import math

import torch
from torch import Tensor

from fastdino_kernels import reference


def budget(plain: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """2 * max|plain - truth| + 2 * eps(dtype) * max|truth|.

    truth: fp64. plain: plain PyTorch on the same inputs in the same dtype. dtype: what the result is rounded to.
    """
    if truth.numel() == 0:
        return 0.0
    plain_error = (plain.double() - truth).abs().max()
    return (2 * plain_error + 2 * torch.finfo(dtype).eps * truth.abs().max()).item()


def assert_error_at_most(name: str, ours: Tensor, truth: Tensor, allowed: float) -> None:
    """For every element; a NaN fails, because it compares false."""
    assert ours.shape == truth.shape, f"{name}: expected shape {tuple(truth.shape)}, got {tuple(ours.shape)}"
    if truth.numel() > 0:
        error = (ours.double() - truth).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_within_budget(name: str, ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert_error_at_most(name, ours, truth, budget(plain, truth, dtype))


def loss_budgets(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[float, float]:
    """Budgets of dino_loss and of the teacher's entropy: a mean may be as wrong as the rows it is the mean of.

    Taken from the rows, because in one number plain PyTorch may be exact by luck. An entropy lies in [0, ln K], and
    that range is what it is rounded against: near one-hot it is a difference that all but vanishes.
    """
    temps = student_temp, teacher_temp
    plain = reference.cross_entropy_pairs(student, teacher, center, *temps)
    truth = reference.cross_entropy_pairs(student.double(), teacher.double(), center.double(), *temps)
    cross_entropy, entropy = (budget(p, t, torch.float32) for p, t in zip(plain, truth))
    return cross_entropy, entropy + 2 * torch.finfo(torch.float32).eps * math.log(student.shape[-1])
