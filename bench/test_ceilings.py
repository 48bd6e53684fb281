"""What the device can do at best: a copy, matmuls, and what a launch costs."""

from typing import Any

import pytest
import torch

from bench.measure import COPY_BYTES, DEVICE, DTYPES, MATMUL_SIDE, copying, multiplying


def test_copy(timed: Any) -> None:
    timed(copying(), n_bytes=2 * COPY_BYTES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul(dtype: str, timed: Any) -> None:
    timed(multiplying(dtype), n_flops=2 * MATMUL_SIDE**3, dtype=dtype)


def test_hundred_launches(timed: Any) -> None:
    """Of an op that does next to nothing: what a launch costs the host."""
    x = torch.zeros(1, device=DEVICE)
    timed(lambda: [x.add_(1) for _ in range(100)])
