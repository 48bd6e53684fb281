"""Networks in parts, one on each process, for models that one GPU cannot hold: PyTorch's FSDP2 (arXiv:2304.11277).

Each process keeps its part of every weight, gradient, moment and teacher's weight. A block's weights come together when
it is computed, in the dtype it computes in, and are let go afterwards; gradients are averaged into the parts.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.model import MultiCrop
from fastdino.model.masked import MaskedMultiCrop
from fastdino.train.distributed import Process


def shard(network: MultiCrop, process: Process, dtype: torch.dtype | None) -> None:
    """Leave each process its part of the network's parameters, in place. dtype: to compute in; None for their own.

    All processes must have the same weights. Blocks keep the dtype of what comes in, for a residual stream in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(process.device.type, (process.world_size,))
    full = None if dtype is None else torch.float32  # of sums over processes
    casts, keeps = (MixedPrecisionPolicy(dtype, full, cast_forward_inputs=does) for does in (True, False))
    # The teacher has no backward pass that would let go of what its forward pass has brought together.
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    # It warns of outputs that are views, as the logits of a head for CLS and patches are. Nothing writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in getattr(network.backbone, "blocks", ()):
        fully_shard(block, mp_policy=keeps, **how)
    if isinstance(network, MaskedMultiCrop):
        network.whole_logits = True  # a head has its prototypes while it is computed, and not when the loss is
    for head in (child for name, child in network.named_children() if name != "backbone"):
        fully_shard(head, mp_policy=casts, **how)
    fully_shard(network, mp_policy=casts, **how)


def is_sharded(network: nn.Module) -> bool:
    """Whether it has been through `shard`."""
    return any(map(is_in_parts, network.parameters()))


def is_in_parts(x: Any) -> bool:
    """Whether a tensor is."""
    return hasattr(x, "to_local")


def local(x: Any) -> Tensor:
    """This process's part of a tensor; a tensor that is not in parts as it is."""
    part: Tensor = x.to_local() if is_in_parts(x) else x
    return part


@torch.no_grad()
def gather_into(network: nn.Module, whole: nn.Module | None) -> None:
    """Copy a network in parts into one in a piece, on the processes that have such a one. All take part."""
    target = {} if whole is None else whole.state_dict()
    for name, value in network.state_dict().items():
        full = value.full_tensor() if is_in_parts(value) else value
        if name in target:
            target[name].copy_(full)
