"""Several processes: who am I, and the few collectives that training needs. Everything works with one process too."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.errors import TrainingError, UserError, reason

T = TypeVar("T")

LONG_WAIT = timedelta(days=7)  # an evaluation on one process may take hours


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 alone prints and writes."""
        return self.rank == 0


class _HostGroup:
    """The processes once more, over gloo: for words and for long waits. None where there is one process."""

    group: dist.ProcessGroup | None = None


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
        n_gpus = torch.cuda.device_count()
        if device.index is None:  # a launcher may show each process its own GPU alone: then that is number 0
            device = torch.device("cuda", 0 if n_gpus == 1 else local_rank)
        if device.index >= n_gpus:
            raise UserError(f"--device: {device} was asked for, and there are {n_gpus} GPUs")
    return device


class Launched(NamedTuple):
    """What a launcher says of this process."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def _said(name: str, default: int | None = None) -> int:
    """A number that the launcher leaves in the environment. Raises UserError where it is missing or is none."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(
            f"the launcher's environment is incomplete: {name} is {text!r}, expected a number; launch with torchrun "
            "--nproc_per_node=GPUS -m fastdino.train ... or with srun, or, for one process, unset RANK"
        )
    return int(text)


def launched() -> Launched:
    """As torchrun or Slurm say it; one process where nobody launched us."""
    if "RANK" in os.environ:
        return Launched(_said("RANK"), _said("LOCAL_RANK", 0), _said("WORLD_SIZE"))
    # Set by srun alone. Inside of sbatch or salloc SLURM_NTASKS says how many could be started, not that they were.
    if (n_tasks := _said("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank = _said("SLURM_PROCID")
        return Launched(rank, _said("SLURM_LOCALID", rank % max(1, torch.cuda.device_count())), n_tasks)
    return Launched()


def _why_apart(dist_url: str, error: Exception) -> str:
    """Why processes cannot meet, and what to do about it."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not missing or not dist_url.startswith("env://"):
        return reason(error)
    return (
        f"{' and '.join(missing)} not set; torchrun sets them, for srun export "
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
    )


def start(device: str, dist_url: str) -> Process:
    """Read the launcher's environment (torchrun, or Slurm) and open the process group where there is more than one.

    NCCL on GPUs, gloo on CPU. Raises UserError for a device that is not there, and where the processes cannot meet.
    """
    rank, local_rank, world_size = launched()
    process = Process(rank, world_size, _pick_device(device, local_rank))
    on_gpu = process.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(process.device)
    if world_size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=dist_url,
                rank=rank,
                world_size=world_size,
                device_id=process.device if on_gpu else None,  # else NCCL guesses it at the first barrier
            )
        except (ValueError, dist.DistError) as error:
            why = _why_apart(dist_url, error)
            raise UserError(f"--dist_url: the {world_size} processes cannot meet: {why}") from error
        _HostGroup.group = dist.new_group(backend="gloo", timeout=LONG_WAIT)
    return process


def stop() -> None:
    """Close the process group, where there is one. Graphs that hold its collectives must have been dropped before."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        # A communicator that is destroyed while work is queued waits for ever. Where the device itself has failed, the
        # error that ends the run is on its way already, and says so.
        with suppress(RuntimeError):
            torch.cuda.synchronize()
    _HostGroup.group = None
    dist.destroy_process_group()


def tell_launcher(text: str) -> None:
    """Why this process ends; torchrun repeats it as the cause in its last lines, below its own traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": text, "timestamp": str(int(time.time()))}))


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there is one, of any kind."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def synchronize_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """BatchNorm over all processes' rows, where there are several. Raises UserError where PyTorch cannot: on CPU."""
    if process.world_size == 1 or not has_batchnorm(model):
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


def any_of(flag: bool, device: torch.device) -> bool:
    """True on every process if it is on one."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def is_alone() -> bool:
    """Whether there are no other processes."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(value: T) -> list[T]:
    """Every process's value, by rank. Waits for all of them."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_HostGroup.group)
    return values


def main_first(do: Callable[[], object]) -> None:
    """Do something on the main process; where that raises UserError or TrainingError, raise it on all."""
    failed: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            do()
        except (UserError, TrainingError) as error:
            failed = error
    for raised in gather(failed):
        if raised:
            raise raised


def barrier() -> None:
    """Wait for the others, as long as it takes: rank 0 may be evaluating."""
    if dist.is_initialized():
        dist.barrier(group=_HostGroup.group)
