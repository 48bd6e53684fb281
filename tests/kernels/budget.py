"""How far a result may be from the truth: what plain PyTorch in the same dtype earns, twice, and two roundings."""

import torch
from torch import Tensor


def assert_within_budget(name: str, ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """|ours - truth| <= 2 * max|plain - truth| + 2 * eps(dtype) * max|truth|, for every element.

    truth: fp64. plain: plain PyTorch on the same inputs in the same dtype. dtype: what the result is rounded to.
    """
    assert ours.shape == truth.shape, f"{name}: expected shape {tuple(truth.shape)}, got {tuple(ours.shape)}"
    if truth.numel() == 0:
        return
    allowed = 2 * (plain.double() - truth).abs().max() + 2 * torch.finfo(dtype).eps * truth.abs().max()
    error = (ours.double() - truth).abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"  # a NaN fails: it compares false
