"""How many bytes a forward pass leaves behind."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """All storages that operations inside return, but for those of some modules, each counted once."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for m in modules for p in (*m.parameters(), *m.buffers())}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps an address from being used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.weights:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    @property
    def alive_bytes(self) -> int:
        """Of those that somebody still holds: after a forward pass, its output and what autograd keeps."""
        return sum(n_bytes for reference, n_bytes in self.made.values() if not reference.expired())
