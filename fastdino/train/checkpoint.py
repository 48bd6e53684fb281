"""Checkpoints in the original's format, written whole or not at all, and read without running what they hold."""

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdino import files
from fastdino.data.channels import MAX_CHANNELS
from fastdino.errors import TrainingError, UserError, printable
from fastdino.model import VisionTransformer
from fastdino.model.archs import TIMM, check_arch, heads_of, timm_backbone
from fastdino.model.convnext import ConvNeXt
from fastdino.model.inferred import convnext_stages, heads_by_rope, img_size_of, vit_options, without_chunks
from fastdino.train import distributed, sharded_checkpoint
from fastdino.train.config import TrainConfig
from fastdino.train.contents import check, first_difference, odd_tensor, unwrapped
from fastdino.train.finite import ADVICE, first_nonfinite

# What the original's checkpoints hold beside tensors: `args`, and learning rates as NumPy scalars (from its
# schedules), pickled under one module name by NumPy 1 and another by NumPy 2. None of them can run code.
_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    # Of its submitit launcher. Python 3.13 pickles paths under a module name of its own.
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PurePosixPath"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(t)) for t in (np.float64, np.float32, np.int64)),
]

WRAPPERS = ("model", "state_dict")  # what others call the weights that are all of their files


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours or of the original, on the CPU, read with PyTorch's safe loader.

    Keys: student (names start with `module.`), teacher, optimizer, epoch (finished ones), args (argparse.Namespace),
    dino_loss, fp16_scaler with fp16. Raises UserError where the file is missing, cannot be read, is no checkpoint, is
    damaged, or holds pickled code, which is refused and not run.
    Of `fastdino export --format safetensors`: the weights by name, and args with what its metadata tell.
    Of the folder checkpoint.dcp that a run with --fsdp writes: the same keys, from the parts of all processes.
    """
    path = Path(path)
    if (path / sharded_checkpoint.RUN).is_file():
        return sharded_checkpoint.consolidated(path, load_checkpoint(path / sharded_checkpoint.RUN))
    if not path.is_file():
        is_link = path.is_symlink() and not path.exists()
        what = "a link to nothing" if is_link else "a folder" if path.is_dir() else "no file" if path.exists() else ""
        raise UserError(f"no checkpoint at {path}: found {what or 'nothing'} there")
    if path.suffix.lower() == ".safetensors":
        return _load_safetensors(path)
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, on the way to refusing the file
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle makes the loader raise nearly anything
        raise UserError(f"{path} {_refusal(error)}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} is not a checkpoint: expected a dictionary, got {type(checkpoint).__name__}")
    if odd := odd_tensor(checkpoint):
        raise UserError(f"{path} is not a checkpoint: {printable(odd)}")
    return checkpoint


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # its own kinds, and what PyTorch makes of odd dtypes
        raise UserError(f"{path} {_refusal(error)}") from error
    # Under the names that a run has for them. Others' metadata may hold anything.
    names = {"img_size": "global_crops_size", "resize": "eval_resize", "num_heads": "num_heads"}
    numbers = {names[key]: value for key, value in metadata.items() if key in names}
    known = {name: int(value) for name, value in numbers.items() if re.fullmatch(r"[1-9][0-9]{0,4}", value)}
    return {**weights, "args": argparse.Namespace(**known)}


def _check_archive(path: Path) -> None:
    """Refuse what PyTorch would read without a look: flipped bits, and members that are larger unpacked than the file.

    torch.save compresses nothing, and PyTorch does not compare the checksums it writes. Reads the file once, at 0.3
    seconds per GB where the load takes 0.6 (one core of a 2-core virtual machine, 2026-11-28).
    """
    with path.open("rb") as file:
        first = file.read(2)
    if not first:
        raise UserError(f"{path} is not a checkpoint: it is empty")
    if first == b"\x80\x02":
        return  # a pickle: PyTorch's older format
    if first != b"PK":
        raise UserError(f"{path} is not a checkpoint, or is damaged: it does not begin as torch.save's files do")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged: its end is missing, or overwritten") from error
    with archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or (
            sum(m.file_size for m in members) > path.stat().st_size
        ):
            raise UserError(f"{path} is not a checkpoint: it is a compressed archive, which PyTorch does not write")
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged: the checksum of {printable(damaged)} is wrong")


def _refusal(error: Exception) -> str:
    """Why a file could not be loaded. PyTorch's own words advise to load it unsafely, and are left out."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"holds pickled code, which is refused: {printable(code[1])}"
    if isinstance(error, pickle.UnpicklingError):
        return "is not a checkpoint, or is damaged: it is no pickle that PyTorch writes"
    first = (str(error).splitlines() or [""])[0].partition(". ")[0]
    return f"is not a checkpoint, or is damaged: {printable(first) or type(error).__name__}"


def save_checkpoint(
    path: Path,
    *,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Optimizer,
    loss: nn.Module,
    epoch: int,
    config: TrainConfig,
    scaler: torch.amp.GradScaler | None = None,
    iteration: int | None = None,
    progress: Mapping[str, Any] | None = None,
    shards: str | None = None,
) -> None:
    """Write a checkpoint with the original's keys. epoch: finished epochs. shards: where networks in parts lie already.

    Keys that the original does not know, and ignores: iteration, steps done of a run stopped inside an epoch; progress,
    plain values that the run has to know besides.
    Raises TrainingError where a number in it is not finite, and OSError; the previous file is as it was then.
    """
    bare = student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student
    # The original wraps the teacher, too, where there is a BatchNorm; read under other names, it would stay random.
    prefix = "module." if distributed.has_batchnorm(bare) else ""
    content: dict[str, Any] = {
        "student": {f"module.{name}": value for name, value in bare.state_dict().items()},
        "teacher": {f"{prefix}{name}": value for name, value in teacher.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }
    if shards:
        content = sharded_checkpoint.instead(shards, student, optimizer)
    content |= {
        "epoch": epoch,
        "args": config.namespace(),
        "dino_loss": loss.state_dict(),
    }
    if scaler is not None:
        content["fp16_scaler"] = scaler.state_dict()
    if iteration is not None:
        content["iteration"] = iteration
    if progress:
        content["progress"] = dict(progress)
    if name := first_nonfinite(content):
        raise TrainingError(f"{name} holds numbers that are not finite, and was not saved. {ADVICE}")
    files.replace(path, lambda file: torch.save(content, file))


def restore(checkpoint: Mapping[str, Any], **parts: Any) -> None:
    """Put a checkpoint's state into a run's parts, which `check` names. Raises as it does; nothing is changed then."""
    found = check(checkpoint, **parts)
    parts["optimizer"].load_state_dict(found.optimizer)
    for name in ("student", "teacher", "loss"):
        parts[name].load_state_dict(getattr(found, name))
    if found.scaler and parts.get("scaler") is not None:
        parts["scaler"].load_state_dict(found.scaler)


def eval_size(checkpoint: Mapping[str, Any], size: int) -> int:
    """Short side in pixels before a center crop of side `size`: as it was trained, else 8/7 of it."""
    args = checkpoint.get("args")
    sizes = [getattr(args, name, 0) for name in ("eval_resize", "global_crops_size")]
    if all(type(side) is int and 0 < side < 2**16 for side in sizes):
        return round(size * sizes[0] / sizes[1])
    return round(size * 8 / 7)


def load_backbone(path: str | Path, key: str = "teacher", num_heads: int | None = None) -> VisionTransformer | ConvNeXt:
    """The Vision Transformer of a checkpoint, built to fit its weights, in eval mode, frozen, on the CPU.

    Or the ConvNeXt that is in it: DINOv3 has them, too.

    key: teacher or student; a file with nothing but a backbone's weights, as the originals publish, works too. Of
    DINO, DINOv2 and DINOv3: registers, LayerScale, SwiGLU and rotary positions are told from the names.
    num_heads: needed only for widths that no architecture here has.
    Raises UserError where the file has no backbone in it.
    """
    checkpoint = load_checkpoint(path)
    return convnext_of(checkpoint, path, key) or backbone_of(checkpoint, path, key, num_heads)


def convnext_of(checkpoint: Mapping[str, Any], path: str | Path, key: str) -> ConvNeXt | None:
    """The ConvNeXt of a file, frozen; None where there is none. Raises UserError where weights of it are missing."""
    state = backbone_state(checkpoint, path, key)
    if "downsample_layers.0.0.weight" not in state:
        return None
    depths, dims = convnext_stages(state)
    if len(dims) != 4 or 0 in dims:
        raise UserError(f"{path} is no ConvNeXt of four stages: found {len(dims)}, of {dims} channels")
    backbone = ConvNeXt(depths, dims)
    if difference := first_difference(backbone.state_dict(), state):
        raise UserError(f"{path} is of another model: {difference}")
    backbone.load_state_dict(state)
    return backbone.eval().requires_grad_(False)


def backbone_of(
    checkpoint: Mapping[str, Any], path: str | Path, key: str, num_heads: int | None = None
) -> VisionTransformer:
    """`load_backbone` of a file that has been read already; path: what to call it."""
    state = without_chunks(backbone_state(checkpoint, path, key))
    arguments = vit_arguments(state, checkpoint.get("args"), path, key, num_heads)
    # DINOv3's largest has 7e9 weights: drawn first, and copied over, they would take minutes and twice the memory.
    is_drawn = "mask_token" not in state
    with torch.device("cpu" if is_drawn else "meta"):
        backbone = VisionTransformer(**arguments)
    full = {name: value.to(torch.get_default_dtype()) for name, value in state.items()}
    backbone.load_state_dict(state if is_drawn else full, assign=not is_drawn)
    return backbone.eval().requires_grad_(False)


def vit_arguments(
    state: Mapping[str, Tensor], args: Any, path: str | Path, key: str, num_heads: int | None = None
) -> dict[str, Any]:
    """What VisionTransformer is to be called with, so that it fits a backbone's weights.

    args: the checkpoint's. path, key: what to call them. Raises UserError where no Vision Transformer has such weights.
    """
    positions = "rope_embed.periods" if "rope_embed.periods" in state else "pos_embed"
    if missing := [name for name in (positions, "patch_embed.proj.weight") if name not in state]:
        raise UserError(f"{path} has no Vision Transformer under {key!r}: {missing[0]} is missing")
    for name, rank in ((positions, 3 if positions == "pos_embed" else 1), ("patch_embed.proj.weight", 4)):
        if state[name].ndim != rank or not state[name].numel():
            raise UserError(f"{path} is no Vision Transformer: {name} is {tuple(state[name].shape)}")
    options = vit_options(state)
    embed_dim, told = options["embed_dim"], getattr(args, "num_heads", None)
    heads = num_heads or (told if type(told) is int else None) or heads_by_rope(state) or heads_of(embed_dim)
    if heads is None:
        raise UserError(f"{path}: the number of heads cannot be told from a width of {embed_dim}; give num_heads")
    if heads < 1 or embed_dim % heads:
        raise UserError(f"{path}: num_heads: expected a divisor of the width {embed_dim}, got {heads}")
    img_size = img_size_of(state, getattr(args, "global_crops_size", None))
    arguments = {"img_size": [img_size], "num_heads": heads, **options}
    try:
        with torch.device("meta"):
            expected = VisionTransformer(**arguments).state_dict()
    except ValueError as error:
        raise UserError(f"{path} is of another model: {error}") from error
    if difference := first_difference(expected, state):
        raise UserError(f"{path} is of another model: {difference}")
    return arguments


def backbone_state(checkpoint: Mapping[str, Any], path: str | Path, key: str) -> dict[str, Tensor]:
    """The backbone's weights under their own names. Raises UserError where there are none, or one is not finite."""
    state = next((checkpoint[name] for name in (key, *WRAPPERS) if name in checkpoint), checkpoint)
    if not isinstance(state, Mapping):
        raise UserError(f"{path} has no weights under {key!r}, but {type(state).__name__}")
    state = unwrapped({name: value for name, value in state.items() if isinstance(value, Tensor)})
    prefix = "backbone." if any(name.startswith("backbone.") for name in state) else ""
    state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if bad := first_nonfinite(state):
        raise UserError(f"{path}: {bad} holds numbers that are not finite")
    return state


def any_backbone_of(
    checkpoint: Mapping[str, Any], path: str | Path, key: str, num_heads: int | None = None
) -> nn.Module:
    """`load_backbone` of a file that has been read; or the network of timm's that a run with --arch timm:NAME trained.

    Raises UserError as it does, and where timm is missing, or has another network under that name by now.
    """
    name = getattr(checkpoint.get("args"), "arch", None)
    if not (isinstance(name, str) and name.startswith(TIMM)):
        return convnext_of(checkpoint, path, key) or backbone_of(checkpoint, path, key, num_heads)
    state = backbone_state(checkpoint, path, key)
    try:
        check_arch(name)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    channels = getattr(checkpoint.get("args"), "channels", 3)
    backbone = timm_backbone(
        name, 0.0, channels=channels if type(channels) is int and 0 < channels <= MAX_CHANNELS else 3
    )
    if difference := first_difference(backbone.state_dict(), state):
        raise UserError(f"{path} does not fit {name} of this timm: {difference}")
    backbone.load_state_dict(state)
    return backbone.eval().requires_grad_(False)
