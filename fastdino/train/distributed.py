"""Several processes: who am I, and the few collectives that training needs. Everything works with one process too."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.errors import UserError


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0


def _pick_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device: cuda was asked for, and this PyTorch sees no GPU")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device: {device} was asked for, and there are {torch.cuda.device_count()} GPUs")
    return device


def start(device: str, dist_url: str) -> Process:
    """Read the launcher's environment (torchrun, or Slurm) and open the process group where there is more than one.

    NCCL on GPUs, gloo on CPU. Raises UserError for a device that is not there.
    """
    env = os.environ
    if "RANK" in env:
        rank, local_rank, world_size = int(env["RANK"]), int(env.get("LOCAL_RANK", "0")), int(env["WORLD_SIZE"])
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        rank, local_rank, world_size = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_NTASKS"])
    else:
        rank, local_rank, world_size = 0, 0, 1
    process = Process(rank, local_rank, world_size, _pick_device(device, local_rank))
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if process.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=dist_url, rank=rank, world_size=world_size)
    return process


def stop() -> None:
    """Close the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def synchronize_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """BatchNorm over all processes' rows, where there are several. Raises UserError where PyTorch cannot: on CPU."""
    has_batchnorm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if process.world_size == 1 or not has_batchnorm:
        return model
    if process.device.type != "cuda":
        raise UserError(
            "--use_bn_in_head true needs SyncBatchNorm across processes, which PyTorch has on GPUs only; "
            "use one process, or --use_bn_in_head false"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def average(values: Tensor) -> Tensor:
    """Mean over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def average_all(tensors: list[Tensor]) -> None:
    """Mean over processes of many tensors, in place: one collective per dtype, and none that waits for the host."""
    if not dist.is_initialized():
        return
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        part = [x for x in tensors if x.dtype == dtype]
        flat = torch.cat([x.reshape(-1) for x in part])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_(part, [x.view_as(y) for x, y in zip(flat.split([y.numel() for y in part]), part)])


def any_of(flag: bool, device: torch.device) -> bool:
    """True on every process if it is on one."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_lists(items: list[str]) -> list[str]:
    """All processes' lists, joined."""
    if not dist.is_initialized():
        return items
    lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def barrier() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()
