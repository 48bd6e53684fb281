"""A GPU that is not there, on which a host synchronisation raises: proof without hardware that a step has none.

Under FakeTensorMode tensors have shapes and no values, so `.item()`, `if tensor:` and `isfinite` checks on the host
have nothing to answer with and raise DataDependentOutputException. A copy to another device would pass silently;
`RefuseCopies` makes it raise as well. Where PyTorch was built without CUDA a FakeTensor on `cuda` aborts in autograd,
so there the device is PyTorch's out-of-tree backend: registered on import, because autograd counts the devices at the
first backward of the process. On a GPU host it would displace CUDA (in `pin_memory`, say), and `cuda` does.

An op's fake stands in for its launcher here. `run_launcher` runs the launcher itself, kernels left out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdino_kernels import launch


class _Backend(backend_registration._DummyBackendModule):
    """The dummy, and what opcheck and checkpointing ask whatever accelerator there is."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self) -> None:
        return None

    def set_rng_state(self, state: None) -> None:
        pass


NAME = "cuda" if torch.cuda.is_available() else "fakegpu"
if NAME == "fakegpu":
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


class RefuseCopies(TorchDispatchMode):
    """Raises where one operation touches two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {str(x.device) for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1:
            raise AssertionError(f"{func} moves data between {sorted(devices)}")
        return out


@contextmanager
def no_host_sync() -> Iterator[torch.device]:
    """Inside, tensors on the yielded device take the ops' kernels, and a host synchronisation raises."""
    with mock.patch.object(launch, "TRITON_DEVICES", launch.TRITON_DEVICES | {NAME}), FakeTensorMode(), RefuseCopies():
        yield torch.device(NAME)


def run_launcher(op: Callable[..., Any], *args: Any) -> Any:
    """What a custom op's launcher does, every kernel launch left out."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    with (
        mock.patch("triton.runtime.interpreter.GridExecutor.__call__", nothing),
        mock.patch("triton.runtime.jit.JITFunction.run", nothing),
    ):
        return op._init_fn(*args)  # type: ignore[attr-defined]
