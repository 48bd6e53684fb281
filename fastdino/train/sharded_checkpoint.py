"""checkpoint.dcp: what a run with --fsdp keeps, each process its part, so that any number of processes can go on.

A folder with run.pth, which holds what is not in parts and names the folder of the parts beside it, in PyTorch's
distributed format. run.pth is replaced once a new folder is complete, and what it named before is removed then: a run
that is killed while it saves has its last checkpoint. No code in any of these files is run.
"""

import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdino.errors import TrainingError, UserError, printable, reason
from fastdino.train import distributed
from fastdino.train.contents import check_counts, first_difference
from fastdino.train.finite import ADVICE, first_nonfinite
from fastdino.train.optim import state_names
from fastdino.train.sharding import local

FOLDER, RUN = "checkpoint.dcp", "run.pth"
_SHARDS = re.compile(r"shards-[0-9a-f]{8}")

# What DCP's metadata are made of. All are plain records, or names of dtypes and layouts.
_OF_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}  # fmt: skip


def _member(of: Any, name: str) -> Any:
    """What getattr would return for the one enumeration: so early versions of Python 3.11 pickle its members."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if of is not _MEM_FORMAT_ENCODING:
        raise UserError("it holds pickled code, which is refused: builtins.getattr")
    return _MEM_FORMAT_ENCODING[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _OF_METADATA.get(module, ()):
            raise UserError(f"it holds pickled code, which is refused: {printable(f'{module}.{name}')}")
        return super().find_class(module, name)


def _reader(folder: Path) -> Any:
    """DCP's reader of a folder, with metadata that are read without running what they name."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with open(folder / ".metadata", "rb") as file:
                return _MetadataUnpickler(file).load()

    return Reader(folder)


def in_parts(student: nn.Module, teacher: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All that is kept in parts, by name: `student.*`, `teacher.*`, `optimizer.<key of its state>.*`."""
    networks = {"student": student, "teacher": teacher}
    found = {f"{of}.{name}": x for of, network in networks.items() for name, x in network.state_dict().items()}
    for name, param in student.named_parameters():
        found |= {f"optimizer.{key}.{name}": x for key, x in optimizer.state.get(param, {}).items()}
    return found


def _cause(error: BaseException) -> str:
    """DCP raises, on all processes, what went wrong on each."""
    failures = getattr(error, "failures", {})
    return reason(next((wrapped[0] for wrapped in failures.values()), error))


def write(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the parts of all processes into a new folder in `folder`, and return its name. All take part.

    Raises TrainingError, on all of them, where a number is not finite or the folder cannot be written.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    bad = first_nonfinite({name: local(x) for name, x in tensors.items()})
    if name := next(filter(None, distributed.gather(bad)), None):
        raise TrainingError(f"{name} holds numbers that are not finite, and was not saved. {ADVICE}")
    shards = distributed.gather(f"shards-{token_hex(4)}")[0]
    try:
        dcp.save(dict(tensors), checkpoint_id=folder / shards)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise TrainingError(f"{folder / shards} cannot be written: {_cause(error)}") from error
    return shards


def instead(shards: str, student: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What run.pth says of the networks and the optimizer, whose tensors are in parts."""
    names = {id(param): name for name, param in student.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    return {"shards": shards, "optimizer": {"param_groups": groups, "names": [names[id(param)] for param in params]}}


def remove_others(folder: Path, shards: str) -> None:
    """Remove what earlier checkpoints, and runs that were killed, have left beside these parts."""
    for path in folder.glob("shards-*"):
        if _SHARDS.fullmatch(path.name) and path.name != shards:
            with suppress(OSError):
                shutil.rmtree(path)


def _shards(folder: Path, run: Mapping[str, Any]) -> Path:
    name = run.get("shards")
    if not (isinstance(name, str) and _SHARDS.fullmatch(name)):
        raise UserError(f"{folder / RUN} names no parts: it is no checkpoint of a run with --fsdp")
    return folder / name


def _described(shards: Path) -> dict[str, Tensor]:
    """The tensors in a folder of parts, without their numbers. Raises UserError where it holds anything else."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        metadata = _reader(shards).read_metadata().state_dict_metadata
        if not all(isinstance(x, TensorStorageMetadata) for x in metadata.values()):
            raise ValueError("it holds what is no tensor")
        found = {
            str(name): torch.empty(x.size, dtype=x.properties.dtype, device="meta") for name, x in metadata.items()
        }
        n_bytes = sum(x.numel() * x.element_size() for x in found.values())
        if n_bytes > sum(path.stat().st_size for path in shards.iterdir()):
            raise ValueError(f"the {n_bytes:,} bytes that it claims are not there")
        return found
    except Exception as error:  # a damaged pickle makes the loader raise nearly anything
        raise UserError(f"{shards} cannot be read: {reason(error)}") from error


def restore(
    folder: Path,
    run: Mapping[str, Any],
    *,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Optimizer,
    optimizer_name: str,
    loss: nn.Module,
    scaler: None = None,
) -> None:
    """Put a checkpoint into a run's parts, whatever the number of processes that wrote it. All take part.

    run: what run.pth holds. Raises UserError where names or shapes are of another run; nothing is changed then.
    """
    check_counts(run)
    shards = _shards(folder, run)
    found = _described(shards)
    for of, module in (("student", student), ("teacher", teacher)):
        held = {name.removeprefix(f"{of}."): x for name, x in found.items() if name.startswith(f"{of}.")}
        if difference := first_difference(module.state_dict(), held):
            raise UserError(f"the checkpoint is of another model: {of}: {difference}")
    kept = run.get("dino_loss")
    if not isinstance(kept, dict) or (difference := first_difference(loss.state_dict(), kept)):
        raise UserError(f"the checkpoint is of another model: dino_loss: {difference if kept else 'missing'}")
    _make_state(student, optimizer, optimizer_name, found)
    loss.load_state_dict(kept)
    _read(shards, in_parts(student, teacher, optimizer))


def _make_state(student: nn.Module, optimizer: Optimizer, name: str, found: Mapping[str, Tensor]) -> None:
    """State of zeros for the parameters that have some in the checkpoint, to be read into."""
    made: dict[Tensor, dict[str, Tensor]] = {}
    left = {key for key in found if key.startswith("optimizer.")}
    for param_name, param in student.named_parameters():
        names = {key: f"optimizer.{key}.{param_name}" for key in state_names(name)}
        if not left.isdisjoint(names.values()):
            shapes = {key: () if key == "step" else tuple(param.shape) for key in names}
            wrong = [n for key, n in names.items() if n not in found or tuple(found[n].shape) != shapes[key]]
            if wrong:
                raise UserError(f"the checkpoint's optimizer does not fit this run: {wrong[0]}")
            made[param] = {
                key: torch.zeros((), dtype=found[n].dtype) if key == "step" else torch.zeros_like(param)
                for key, n in names.items()
            }
            left.difference_update(names.values())
    if left:
        raise UserError(f"the checkpoint's optimizer does not fit this run: {printable(min(left))}")
    optimizer.state.update(cast(Any, made))


def _read(shards: Path, tensors: dict[str, Tensor], alone: bool = False) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what was asked for
            dcp.load(cast(dict[str, Any], tensors), storage_reader=_reader(shards), no_dist=alone)
    except (Exception, CheckpointException) as error:
        raise UserError(f"{shards} cannot be read: {_cause(error)}") from error
    bad = first_nonfinite({name: local(x) for name, x in tensors.items()})
    if name := next(filter(None, [bad] if alone else distributed.gather(bad)), None):
        raise UserError(f"{shards}: {name} holds numbers that are not finite")


def consolidated(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint in one piece, in the original's format, read by one process. run: what run.pth holds."""
    shards = _shards(folder, run)
    tensors = {name: torch.empty_like(x, device="cpu") for name, x in _described(shards).items()}
    _read(shards, tensors, alone=True)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    optimizer = run.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(names := optimizer.get("names"), list):
        raise UserError(f"{folder / RUN} does not name the optimizer's parameters")
    keys = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    moments = {key: part(f"optimizer.{key}.") for key in sorted(keys)}
    state = {i: {key: of[name] for key, of in moments.items() if name in of} for i, name in enumerate(names)}
    return {
        **{key: value for key, value in run.items() if key != "shards"},
        "student": {f"module.{name}": x for name, x in part("student.").items()},
        "teacher": part("teacher."),
        "optimizer": {
            "state": {i: held for i, held in state.items() if held},
            "param_groups": optimizer.get("param_groups"),
        },
    }
