"""Kernel tests: uninitialised memory is NaN, so that a word a kernel forgot to write is seen."""

from collections.abc import Iterator

import pytest
import torch
from fake_device import no_host_sync


def pytest_configure(config: pytest.Config) -> None:
    # NumPy, in the interpreter, remarks on the NaN and overflow that some tests are about.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory() -> Iterator[None]:
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty and its kin then fill with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fakegpu() -> Iterator[torch.device]:
    """A device on which any host synchronisation raises; see `fake_device`."""
    with no_host_sync() as fake:
        yield fake
