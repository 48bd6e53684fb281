"""How far a result may be from the truth: what plain PyTorch in the same dtype earns, twice, and two roundings."""

import torch
from torch import Tensor


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
