"""What the device can do at best: a copy, matmuls, and what a launch costs."""

from typing import Any

import pytest
import torch

from bench.measure import COPY_BYTES, MATMUL_SIDE, copying, launching, multiplying


def test_copy(timed: Any) -> None:
    timed(copying(), n_bytes=2 * COPY_BYTES)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_matmul(dtype: str, timed: Any) -> None:
    run = multiplying({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    timed(run, n_flops=2 * MATMUL_SIDE**3, n_bytes=3 * MATMUL_SIDE**2 * (2 if dtype == "bf16" else 4), dtype=dtype)


def test_hundred_launches(timed: Any) -> None:
    timed(launching())
