"""What `fastdino linear` writes, and reads again: the original's checkpoint and log."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastdino import files
from fastdino.commands.linear_probe import Probe
from fastdino.errors import UserError, reason
from fastdino.eval.linear import Heads
from fastdino.train.checkpoint import load_checkpoint
from fastdino.train.contents import first_difference, unwrapped
from fastdino.train.finite import first_nonfinite
from fastdino.train.folder import RunFolder

CHECKPOINT, LOG = "checkpoint.pth.tar", "log.txt"


def save(folder: RunFolder, probe: Probe, epoch: int, optimizer: torch.optim.SGD, scheduler: CosineAnnealingLR) -> None:
    """The original's checkpoint, with two more keys that it ignores; then the log, which the checkpoint holds, too.

    In this order, so that the log is that of the checkpoint whenever a run is killed and goes on.
    """
    content = {
        "epoch": epoch,
        "state_dict": {f"module.{name}": value for name, value in probe.heads.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "best_acc": probe.best_acc,
        "settings": probe.settings,
        "log": probe.log,
    }
    folder.write(CHECKPOINT, lambda path: files.replace(path, lambda file: torch.save(content, file)))
    write_log(folder, probe)


def write_log(folder: RunFolder, probe: Probe) -> None:
    folder.replace(LOG, "".join(json.dumps(entry) + "\n" for entry in probe.log))


def resume(probe: Probe, folder: Path, optimizer: torch.optim.SGD, scheduler: CosineAnnealingLR) -> int:
    """Finished epochs, of a checkpoint of ours or of the original that is loaded; 0 without one.

    Raises UserError where the checkpoint cannot be read, or is of another run; nothing was written then.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        if (folder / LOG).exists():
            raise UserError(f"--output_dir: {folder} holds the log.txt of something else; take another folder")
        return 0
    saved = load_checkpoint(path)
    instead = "take another --output_dir, or remove the file"
    try:
        for name, value in saved.get("settings", {}).items():
            if probe.settings.get(name, value) != value:
                raise UserError(f"--{name}: {path} was made with {value}, got {probe.settings[name]}; {instead}")
        expected, found = scheduler.state_dict(), saved["scheduler"]
        for name, flag in (("T_max", "epochs"), ("base_lrs", "lr")):
            if found[name] != expected[name]:
                raise UserError(f"--{flag}: {path} was made with {found[name]}, got {expected[name]}; {instead}")
        epoch, probe.best_acc = int(saved["epoch"]), float(saved["best_acc"])
        if not 0 <= epoch <= probe.args.epochs:
            raise ValueError(f"{epoch} epochs are done, of {probe.args.epochs}")
        load_heads(probe.heads, saved, path)
        moments = {i: state["momentum_buffer"] for i, state in saved["optimizer"]["state"].items()}
        for i, parameter in enumerate(probe.heads.parameters()):
            if moments[i].shape != parameter.shape:
                raise ValueError(f"momentum {i} is {tuple(moments[i].shape)}, expected {tuple(parameter.shape)}")
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict({name: found[name] for name in expected if name in found})
        probe.log = list(saved["log"]) if "log" in saved else _read_log(folder / LOG, epoch)
        json.dumps(probe.log)
    except UserError:
        raise
    except Exception as error:  # anything may be in a file
        raise UserError(f"{path} is no checkpoint of a linear classifier, or is damaged: {reason(error)}") from error
    return epoch


def _read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The entries of the original's log, up to its checkpoint."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["epoch"] < epochs]


def load_heads(heads: Heads, saved: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the file holds other heads."""
    state = saved.get("state_dict")
    if not isinstance(state, Mapping):
        raise UserError(f"{path} is no checkpoint of a linear classifier: it has no state_dict")
    state = unwrapped(state)
    if difference := first_difference(heads.state_dict(), state):
        raise UserError(f"{path} is of another linear classifier: {difference}")
    if bad := first_nonfinite(state):
        raise UserError(f"{path}: {bad} holds numbers that are not finite")
    heads.load_state_dict(state)
