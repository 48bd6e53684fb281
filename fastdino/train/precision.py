"""Which half precision a run computes in, and the copies of the weights that bf16 computes on."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastdino.errors import UserError
from fastdino.train.config import TrainConfig

Network = TypeVar("Network", bound=nn.Module)


def amp_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The half precision to compute in, or None for fp32: where it is switched off, and on a CPU that was not asked.

    Raises UserError for a precision that the device does not have.
    """
    if not config.use_fp16:
        return None
    if device.type != "cuda":
        if config.amp_dtype == "fp16":
            raise UserError("--amp_dtype: fp16 needs a GPU; on a CPU use bf16, or --use_fp16 false")
        return torch.bfloat16 if config.amp_dtype == "bf16" else None
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if config.amp_dtype == "bf16" and not has_bf16:
        raise UserError(f"--amp_dtype: {torch.cuda.get_device_name(device)} has no bf16; use fp16")
    return torch.bfloat16 if has_bf16 and config.amp_dtype != "fp16" else torch.float16


def low_precision_twin(network: Network, dtype: torch.dtype) -> tuple[Network, list[tuple[Tensor, Tensor]]]:
    """(a copy whose parameters are low-precision copies, the pairs (parameter, copy)).

    What the original casts in every forward is cast here once per step, by the optimizer's kernel. Buffers are shared,
    and so is BatchNorm, which keeps fp32 as autocast would.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    memo: dict[int, Tensor] = {
        id(x): x for x in (*network.buffers(), *(p for norm in norms for p in norm.parameters()))
    }
    pairs: list[tuple[Tensor, Tensor]] = []
    for param in network.parameters():
        if id(param) not in memo:
            low = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)
            pairs.append((param, low))
            memo[id(param)] = low  # what deepcopy takes for the copy of param
    return copy.deepcopy(network, memo), pairs
