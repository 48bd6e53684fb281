"""Going on with a run: from which step, with which arguments changed, and what is left where that cannot be."""

import argparse
import json
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from fastdino.errors import UserError, printable
from fastdino.train import sharded_checkpoint
from fastdino.train.checkpoint import load_checkpoint, restore
from fastdino.train.config import TrainConfig
from fastdino.train.contents import check
from fastdino.train.folder import RunFolder
from fastdino.train.loggers import LOGGERS
from fastdino.train.meter import Meter
from fastdino.train.step import TrainStep

# What a flag may do when a run goes on with another value. All others change what is learned: allowed, and said.
IMPOSSIBLE = {
    "arch", "patch_size", "init", "out_dim", "norm_last_layer", "use_bn_in_head", "hidden_dim", "bottleneck_dim",
    "optimizer", "recipe", "registers", "layerscale", "ffn", "centering", "ibot_out_dim", "ibot_bottleneck_dim",
    "lr_decay", "patch_embed_lr", "gram_start", "gram_teacher",
}  # fmt: skip
HARMLESS = {
    "preset", "step", "compile", "attention", "mlp", "checkpointing", "num_workers", "eval", "knn_freq", "linear_freq",
    "knn_k", "knn_images", "val_path", "eval_resize", "attention_images", "output_dir",
    "saveckp_freq", "disk_wait", "fsdp", "resume", "device", "dist_url", "local_rank", *LOGGERS,
}  # fmt: skip

Changes = dict[str, tuple[Any, Any]]
# What is no flag, and yet may change: kept by checkpoints in `progress`.
IMAGES, BATCH = "images", "images a step"


@dataclass(frozen=True)
class Resumed:
    """Where a run begins. epoch: finished ones. iteration: steps done. changes: flag -> (was, is).

    entry: the last finished epoch's line of the log. Of an epoch that was not finished: meter, its numbers; before,
    those of the evaluations before training, which the log has with the first epoch's.
    notes: what else there is to say, such as why an epoch that was not finished begins anew.
    """

    epoch: int = 0
    iteration: int = 0
    changes: Changes = field(default_factory=dict)
    entry: Mapping[str, Any] | None = None
    meter: Mapping[str, Any] | None = None
    before: Mapping[str, float] | None = None
    notes: Sequence[str] = ()


def in_words(epochs: int, steps: int = 0) -> str:
    """How far a run is."""
    done = f"{epochs} epoch{'' if epochs == 1 else 's'}"
    return f"{done} and {steps} steps" if steps else done


def changes(saved: argparse.Namespace, config: TrainConfig) -> Changes:
    """The flags that have another value than a checkpoint's: flag -> (was, is). Flags it does not have are left out."""
    was, now = {"init": None, **vars(saved)}, asdict(config)
    for name in ("output_dir", "resume"):  # of the file's place, not of the run
        del now[name]
    pairs = {name: (_plain(was[name]), now[name]) for name in now if name in was}
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def _plain(value: Any) -> Any:
    """A saved argument as a flag has it; what no flag can be, in words."""
    if isinstance(value, (list, tuple)) and len(value) <= 3:
        return tuple(map(_plain, value))
    if isinstance(value, float):
        return float(value)
    if isinstance(value, PurePath):
        return str(value)
    is_plain = value is None or isinstance(value, str) or (type(value) in (bool, int) and abs(value) < 2**63)
    return value if is_plain else f"({type(value).__name__})"


def shown(found: Changes, names: Collection[str]) -> list[str]:
    """Those of the changes with one of these names, in words."""
    return [
        f"{name if name in (IMAGES, BATCH) else f'--{name}'} {printable(was)} -> {printable(now)}"
        for name, (was, now) in found.items()
        if name in names
    ]


def resume(config: TrainConfig, folder: RunFolder, step: TrainStep, niter: int, n_images: int, batch: int) -> Resumed:
    """Restore the folder's checkpoint, where there is one, into the step.

    niter: steps of an epoch. batch: images of a step, of all processes. Raises UserError where it cannot be read, or is
    of another run: with the reason, and with what can be used instead.
    """
    if not (config.resume and os.path.lexists(folder.checkpoint)):
        _check_no_other(config, folder)
        return Resumed()
    parts: dict[str, Any] = {
        "student": step.student,
        "teacher": step.teacher,
        "optimizer": step.update.optimizer,
        "optimizer_name": config.optimizer,
        "loss": step.loss,
        "scaler": step.update.scaler,
    }
    cannot, found = f"cannot resume from {folder.checkpoint}: ", Changes()
    try:
        checkpoint = load_checkpoint(folder.checkpoint)
    except UserError as error:
        raise UserError(f"cannot resume: {error}. {_instead(folder, parts)}--resume false starts anew") from error
    if has_args := isinstance(args := checkpoint.get("args"), argparse.Namespace):
        found = changes(args, config)
    if other := shown(found, IMPOSSIBLE):
        raise UserError(f"{cannot}it is of a run with {', '.join(other)}. --resume false starts anew")
    try:
        progress = _progress(checkpoint, step.metric_names)
        if config.fsdp:
            sharded_checkpoint.restore(folder.checkpoint.parent, checkpoint, **parts)
        else:
            restore(checkpoint, **parts)
    except UserError as error:
        since = shown(found, found.keys() - HARMLESS)
        more = f" (changed since: {', '.join(since)})" if since else ""
        instead = _instead(folder, parts)
        raise UserError(f"{cannot}{error}{more}. {instead}--resume false starts anew") from error
    step.run.refresh()
    notes = [] if has_args else ["its arguments are not in it: what has changed since cannot be told"]
    now = {"niter": niter, "n_images": n_images, "batch_size": batch}
    for name, key in ((IMAGES, "n_images"), (BATCH, "batch_size")):
        if progress.get(key, now[key]) != now[key]:
            found[name] = progress[key], now[key]
    return _where(checkpoint, folder, found, now, now | progress, notes)


def _check_no_other(config: TrainConfig, folder: RunFolder) -> None:
    """Raise UserError where the folder holds the checkpoint of a run that has --fsdp, and this one not, or reversed."""
    other = folder.path / ("checkpoint.pth" if config.fsdp else f"{sharded_checkpoint.FOLDER}/{sharded_checkpoint.RUN}")
    if config.resume and other.exists():
        raise UserError(
            f"cannot resume from {other}, which is of a run with --fsdp {str(not config.fsdp).lower()}: go on with "
            "that, or --resume false starts anew"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _progress(checkpoint: Mapping[str, Any], metric_names: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint of ours holds beside the original's keys. Raises UserError where it is not what was saved."""
    progress = checkpoint.get("progress", {})
    problem = UserError("the checkpoint's progress is not as it was saved")
    if not isinstance(progress, dict):
        raise problem
    counts = [progress[key] for key in ("niter", "n_images", "batch_size") if key in progress]
    entry, before, epoch = progress.get("entry", {}), progress.get("before", {}), checkpoint.get("epoch")
    if not all(_is_count(n) and n > 0 for n in counts) or not (isinstance(entry, dict) and isinstance(before, dict)):
        raise problem
    if not all(isinstance(key, str) for key in (*entry, *before)):
        raise problem
    if not all(x is None or isinstance(x, float) or _is_count(x) for x in entry.values()):
        raise problem
    if not all(isinstance(x, float) for x in before.values()):
        raise problem
    if entry and type(epoch) is int and entry.get("epoch") != epoch - 1:
        raise problem
    if "meter" in progress:
        try:
            Meter(metric_names).restore(progress["meter"])
        except ValueError as error:
            raise problem from error
    return progress


def _where(
    checkpoint: Mapping[str, Any],
    folder: RunFolder,
    found: Changes,
    now: Mapping[str, int],
    then: Mapping[str, Any],
    notes: list[str],
) -> Resumed:
    epoch = checkpoint["epoch"]
    steps = checkpoint.get("iteration", epoch * then["niter"]) - epoch * then["niter"]
    folder.holds = f"{folder.checkpoint} holds {in_words(epoch, steps)}"
    first = epoch * now["niter"]
    if not steps:
        return Resumed(epoch, first, found, entry=then.get("entry"), notes=notes)
    again = ""
    if any(then[key] != now[key] for key in now) or not 0 <= steps <= now["niter"]:
        had, has = (f"{x['niter']} steps of {x['batch_size']} of {x['n_images']:,} images" for x in (then, now))
        again = f"it had {had}, and has {has}"
    elif found.keys() & {"seed", "data_path"}:
        again = "its images come in another order"
    if again:
        anew = f"epoch {epoch + 1} begins anew: {again}"
        return Resumed(epoch, first, found, before=then.get("before"), notes=[anew, *notes])
    return Resumed(epoch, first + steps, found, meter=then.get("meter"), before=then.get("before"), notes=notes)


def _instead(folder: RunFolder, parts: Mapping[str, Any]) -> str:
    """What else could be resumed from: the newest kept checkpoint that this run can go on from."""
    if folder.checkpoint.parent != folder.path:  # kept ones are in one piece, the run's is in parts
        return ""
    kept = folder.path.glob("checkpoint*.pth")
    numbered = [(re.fullmatch(r"checkpoint(\d{4,})\.pth", path.name), path) for path in kept]
    for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        with suppress(UserError):
            checkpoint = load_checkpoint(path)
            check(checkpoint, **parts)
            epochs = in_words(checkpoint["epoch"])
            return f"{path.name} there holds {epochs}: copy it over checkpoint.pth to go on from it, or "
    return ""


def arguments(folder: Path, config: TrainConfig, resumed: Resumed) -> str:
    """What args.json is to hold: the flags, and under `history` what was changed at which resume."""
    try:
        history = json.loads((folder / "args.json").read_text())["history"] if resumed.iteration else []
    except (OSError, ValueError, LookupError, TypeError):
        history = []
    if not isinstance(history, list):
        history = []
    if resumed.changes:
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        history.append({"when": when, "epochs": resumed.epoch, "changed": resumed.changes})
    return json.dumps(asdict(config) | ({"history": history} if history else {}), indent=2, default=str) + "\n"
