"""Checkpoints in the original's format, written whole or not at all, and read without running what they hold."""

import argparse
import math
import pathlib
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
from fastdino.errors import TrainingError, UserError
from fastdino.model import VisionTransformer
from fastdino.model.archs import heads_of
from fastdino.train import distributed
from fastdino.train.config import TrainConfig
from fastdino.train.finite import ADVICE, first_nonfinite
from fastdino.train.optim import state_names

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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours or of the original, on the CPU, read with PyTorch's safe loader.

    Keys: student (names start with `module.`), teacher, optimizer, epoch (finished ones), args (argparse.Namespace),
    dino_loss, fp16_scaler with fp16. Raises UserError where the file is missing, is no checkpoint, or holds pickled
    code, which is refused and not run.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "something that is no file" if path.exists() else "nothing"
        raise UserError(f"no checkpoint at {path}: found {what} there")
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
    return checkpoint


def _check_archive(path: Path) -> None:
    """Refuse what PyTorch would read without a look: flipped bits, and members that are larger unpacked than the file.

    torch.save compresses nothing, and PyTorch does not compare the checksums it writes. Reads the file once.
    """
    if not path.stat().st_size:
        raise UserError(f"{path} is not a checkpoint: it is empty")
    if not zipfile.is_zipfile(path):
        return  # PyTorch's older format, or no checkpoint
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or (
            sum(m.file_size for m in members) > path.stat().st_size
        ):
            raise UserError(f"{path} is not a checkpoint: it is a compressed archive, which PyTorch does not write")
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong")


def _refusal(error: Exception) -> str:
    """Why the safe loader would not have a file, out of its long advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if "GLOBAL" in line:
            return f"holds pickled code, which is refused: {line.split(' was not an allowed')[0]}"
    return f"is not a checkpoint, or is damaged: {lines[0] if lines else type(error).__name__}"


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
) -> None:
    """Write a checkpoint with the original's keys. epoch: finished epochs.

    Keys that the original does not know, and ignores: iteration, steps done of a run stopped inside an epoch; progress,
    plain values that the run has to know besides.
    Raises TrainingError where a number in it is not finite, and OSError; the previous file is as it was then.
    """
    bare = student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student
    # The original wraps the teacher, too, where there is a BatchNorm; read under other names, it would stay random.
    prefix = "module." if distributed.has_batchnorm(bare) else ""
    content = {
        "student": {f"module.{name}": value for name, value in bare.state_dict().items()},
        "teacher": {f"{prefix}{name}": value for name, value in teacher.state_dict().items()},
        "optimizer": optimizer.state_dict(),
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


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> str | None:
    """The first parameter in which two state dicts differ, in words; None where names and shapes agree."""
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if not isinstance(found[name], Tensor):
            return f"{name} is no tensor but {type(found[name]).__name__}"
        if value.shape != found[name].shape:
            return f"{name} is {tuple(found[name].shape)}, expected {tuple(value.shape)}"
    extra = [name for name in found if name not in expected]
    return f"{extra[0]} is not part of this model" if extra else None


def restore(
    checkpoint: Mapping[str, Any],
    *,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Optimizer,
    optimizer_name: str,
    loss: nn.Module,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Put a checkpoint's state into a run's parts. `student` is the bare module, without DDP.

    optimizer_name: of OPTIMIZERS. Raises UserError, naming the first key, for a checkpoint of another model or another
    optimizer, and for numbers that are not finite; nothing is changed then.
    """
    states = {
        "student": (student, {k.removeprefix("module."): v for k, v in _part(checkpoint, "student").items()}),
        "teacher": (teacher, {k.removeprefix("module."): v for k, v in _part(checkpoint, "teacher").items()}),
        "dino_loss": (loss, _part(checkpoint, "dino_loss")),
    }
    for what, (module, state) in states.items():
        if difference := first_difference(module.state_dict(), state):
            raise UserError(f"the checkpoint is of another model: {what}: {difference}")
    kept = _part(checkpoint, "optimizer")
    if problem := _optimizer_problem(kept, optimizer, optimizer_name, student):
        raise UserError(f"the checkpoint's optimizer does not fit this run: {problem}")
    for key, number in (("epoch", checkpoint.get("epoch")), ("iteration", checkpoint.get("iteration", 0))):
        if type(number) is not int or number < 0:
            raise UserError(f"the checkpoint's {key} is {number!r}, expected a whole number")
    checked = {key: checkpoint[key] for key in (*states, "optimizer")}
    if name := first_nonfinite(checked):
        raise UserError(f"{name} holds numbers that are not finite")
    optimizer.load_state_dict(kept)
    for module, state in states.values():
        module.load_state_dict(state)
    if scaler is not None and isinstance(scale := checkpoint.get("fp16_scaler"), dict) and scale:
        scaler.load_state_dict(scale)


def _optimizer_problem(kept: Mapping[str, Any], optimizer: Optimizer, name: str, student: nn.Module) -> str | None:
    """Why an optimizer's saved state cannot be that of this one, in words."""
    groups, state = kept.get("param_groups"), kept.get("state")
    if not (isinstance(groups, list) and isinstance(state, dict) and all(isinstance(g, dict) for g in groups)):
        return "it has no parameter groups and state"
    ours = optimizer.param_groups
    sizes = [len(group.get("params", ())) for group in groups], [len(group["params"]) for group in ours]
    if sizes[0] != sizes[1]:
        return f"its groups have {sizes[0]} parameters, expected {sizes[1]}"
    names = {id(param): param_name for param_name, param in student.named_parameters()}
    expected = state_names(name)
    pairs = [(i, p) for ids, ps in zip(groups, ours) for i, p in zip(ids["params"], ps["params"])]
    for index, param in pairs:
        what = names[id(param)]
        found = state.get(index)
        if found is None and "last_layer" in what:
            continue  # frozen so far
        if not isinstance(found, dict) or not expected <= found.keys():
            held = ", ".join(map(str, found)) if isinstance(found, dict) and found else "nothing"
            return f"of {what} it holds {held}, expected {', '.join(sorted(expected))}"
        for key in expected:
            value = found[key]
            if key != "step" and not (isinstance(value, Tensor) and value.shape == param.shape):
                return f"{key} of {what} is not of the shape {tuple(param.shape)}"
    return None


def _part(checkpoint: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(checkpoint.get(key), dict):
        raise UserError(f"the checkpoint has no {key!r}: it holds {', '.join(map(str, list(checkpoint)[:5]))} ...")
    return checkpoint[key]


def eval_size(checkpoint: Mapping[str, Any], size: int) -> int:
    """Short side in pixels before a center crop of side `size`: as it was trained, else 8/7 of it."""
    args = checkpoint.get("args")
    trained, resize = getattr(args, "global_crops_size", 0), getattr(args, "eval_resize", 0)
    return round(size * resize / trained) if trained and resize else round(size * 8 / 7)


def load_backbone(path: str | Path, key: str = "teacher", num_heads: int | None = None) -> VisionTransformer:
    """The Vision Transformer of a checkpoint, built to fit its weights, in eval mode, frozen, on the CPU.

    key: teacher or student; a file with nothing but a backbone's weights, as the original publishes, works too.
    num_heads: needed only for widths that no architecture here has.
    Raises UserError where the file has no backbone in it.
    """
    return backbone_of(load_checkpoint(path), path, key, num_heads)


def backbone_of(
    checkpoint: Mapping[str, Any], path: str | Path, key: str, num_heads: int | None = None
) -> VisionTransformer:
    """`load_backbone` of a file that has been read already; path: what to call it."""
    state = checkpoint.get(key, checkpoint)
    if not isinstance(state, Mapping):
        raise UserError(f"{path} has no weights under {key!r}, but {type(state).__name__}")
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    prefix = "backbone." if any(name.startswith("backbone.") for name in state) else ""
    state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if missing := [name for name in ("pos_embed", "patch_embed.proj.weight") if name not in state]:
        raise UserError(f"{path} has no Vision Transformer under {key!r}: {missing[0]} is missing")
    for name, rank in (("pos_embed", 3), ("patch_embed.proj.weight", 4)):
        if state[name].ndim != rank or not state[name].numel():
            raise UserError(f"{path} is no Vision Transformer: {name} is {tuple(state[name].shape)}")
    if bad := first_nonfinite(state):
        raise UserError(f"{path}: {bad} holds numbers that are not finite")
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    heads = num_heads or heads_of(embed_dim)
    if heads is None:
        raise UserError(f"{path}: the number of heads cannot be told from a width of {embed_dim}; give num_heads")
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    sizes = (getattr(checkpoint.get("args"), "global_crops_size", None), 224)  # the original's args do not tell: 224
    backbone = VisionTransformer(
        img_size=[next((x for x in sizes if isinstance(x, int) and x // patch_size == side), patch_size * side)],
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=heads,
    )
    if difference := first_difference(backbone.state_dict(), state):
        raise UserError(f"{path} is of another model: {difference}")
    backbone.load_state_dict(state)
    return backbone.eval().requires_grad_(False)
