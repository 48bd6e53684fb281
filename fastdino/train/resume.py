"""Going on with a run: from which step, with which arguments changed, and what is left where that cannot be."""

import argparse
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdino.errors import UserError
from fastdino.train.checkpoint import load_checkpoint, restore
from fastdino.train.config import TrainConfig
from fastdino.train.folder import RunFolder
from fastdino.train.step import TrainStep

# What a flag may do when a run goes on with another value. All others change what is learned: allowed, and said.
IMPOSSIBLE = {
    "arch", "patch_size", "out_dim", "norm_last_layer", "use_bn_in_head", "hidden_dim", "bottleneck_dim", "optimizer",
}  # fmt: skip
HARMLESS = {
    "step", "attention", "checkpointing", "num_workers", "knn_freq", "knn_k", "knn_images", "val_path", "eval_resize",
    "attention_images", "output_dir", "tensorboard", "wandb", "mlflow", "saveckp_freq", "disk_wait", "resume", "device",
    "dist_url", "local_rank",
}  # fmt: skip

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Resumed:
    """Where a run begins. epoch: finished ones. iteration: steps done. changes: flag -> (was, is).

    entry: the last finished epoch's line of the log. meter: the numbers of an epoch that was not finished.
    again: why an epoch that was not finished begins anew.
    """

    epoch: int = 0
    iteration: int = 0
    changes: Changes = field(default_factory=dict)
    entry: Mapping[str, Any] | None = None
    meter: Mapping[str, Any] | None = None
    again: str = ""


def in_words(epochs: int, steps: int = 0) -> str:
    """How far a run is."""
    done = f"{epochs} epoch{'' if epochs == 1 else 's'}"
    return f"{done} and {steps} steps" if steps else done


def changes(saved: argparse.Namespace, config: TrainConfig) -> Changes:
    """The flags that have another value than a checkpoint's: flag -> (was, is). Flags it does not have are left out."""
    was = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(saved).items()}
    now = asdict(config)
    for name in ("output_dir", "resume"):  # of the file's place, not of the run
        del now[name]
    return {name: (was[name], now[name]) for name in now if name in was and was[name] != now[name]}


def shown(found: Changes, names: Collection[str]) -> list[str]:
    """Those of the changes with one of these names, in words."""
    return [f"--{name} {was} -> {now}" for name, (was, now) in found.items() if name in names]


def resume(config: TrainConfig, folder: RunFolder, step: TrainStep, niter: int, n_images: int) -> Resumed:
    """Restore the folder's checkpoint, where there is one, into the step.

    Raises UserError where it cannot be read, or is of another run: with the reason, and with what can be used instead.
    """
    if not (config.resume and folder.checkpoint.exists()):
        return Resumed()
    cannot, found = f"cannot resume from {folder.checkpoint}: ", Changes()
    try:
        checkpoint = load_checkpoint(folder.checkpoint)
    except UserError as error:
        raise UserError(f"cannot resume: {error}. {_instead(folder.path)}--resume false starts anew") from error
    if isinstance(args := checkpoint.get("args"), argparse.Namespace):
        found = changes(args, config)
    if other := shown(found, IMPOSSIBLE):
        raise UserError(f"{cannot}it is of a run with {', '.join(other)}. --resume false starts anew")
    try:
        restore(
            checkpoint,
            student=step.student,
            teacher=step.teacher,
            optimizer=step.update.optimizer,
            optimizer_name=config.optimizer,
            loss=step.loss,
            scaler=step.update.scaler,
        )
    except UserError as error:
        since = shown(found, found.keys() - HARMLESS)
        more = f" (changed since: {', '.join(since)})" if since else ""
        raise UserError(f"{cannot}{error}{more}. {_instead(folder.path)}--resume false starts anew") from error
    step.run.refresh()
    return _where(checkpoint, folder, found, niter, n_images)


def _where(checkpoint: Mapping[str, Any], folder: RunFolder, found: Changes, niter: int, n_images: int) -> Resumed:
    epoch, progress = int(checkpoint["epoch"]), checkpoint.get("progress", {})
    steps = int(checkpoint.get("iteration", epoch * niter)) - epoch * progress.get("niter", niter)
    folder.holds = f"{folder.checkpoint} holds {in_words(epoch, steps)}"
    first = epoch * niter
    if not steps:
        return Resumed(epoch, first, found, entry=progress.get("entry"))
    then = progress.get("niter", niter), progress.get("n_images", n_images)
    if then != (niter, n_images) or not 0 <= steps <= niter:
        again = f"epoch {epoch + 1} begins anew: it had {then[0]} steps of {then[1]:,} images, and has {niter} "
        return Resumed(epoch, first, found, again=f"{again}of {n_images:,}")
    return Resumed(epoch, first + steps, found, meter=progress.get("meter"))


def _instead(folder: Path) -> str:
    """What else could be resumed from: the newest kept checkpoint that can be read."""
    for path in sorted(folder.glob("checkpoint????*.pth"), reverse=True):
        try:
            epochs = load_checkpoint(path)["epoch"]
        except (UserError, KeyError):
            continue
        return f"{path.name} there holds {in_words(epochs)}: copy it over checkpoint.pth to go on from it, or "
    return ""


def arguments(folder: Path, config: TrainConfig, resumed: Resumed) -> str:
    """What args.json is to hold: the flags, and under `history` what was changed at which resume."""
    try:
        history = json.loads((folder / "args.json").read_text())["history"] if resumed.iteration else []
    except (OSError, ValueError, KeyError):
        history = []
    if resumed.changes:
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        history.append({"when": when, "epochs": resumed.epoch, "changed": resumed.changes})
    return json.dumps(asdict(config) | ({"history": history} if history else {}), indent=2) + "\n"
