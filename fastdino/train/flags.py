"""Flags as people give them: abbreviated, written for the original's programs, misspelt, or without --data_path."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdino.errors import UserError
from fastdino.train.config import TrainConfig
from fastdino.train.recipes import DIGITS

# What main_dino.py takes. What abbreviates one of these there means the same here, whatever flags were added.
ORIGINAL = """arch patch_size out_dim norm_last_layer momentum_teacher use_bn_in_head warmup_teacher_temp teacher_temp
    warmup_teacher_temp_epochs use_fp16 weight_decay weight_decay_end clip_grad batch_size_per_gpu epochs
    freeze_last_layer lr warmup_epochs min_lr optimizer drop_path_rate global_crops_scale local_crops_number
    local_crops_scale data_path output_dir saveckp_freq seed num_workers dist_url local_rank help"""
SUBMITIT = "ngpus nodes timeout partition use_volta32 comment"  # of its run_with_submitit.py
WEIGHTS = "pretrained_weights checkpoint_key"  # of its evaluations
# Flags that say what the images are, or which network they are for: not of somebody who plays with the digits.
OF_OWN_IMAGES = "preset arch init val_path dct_scale"


def _name(word: str) -> str:
    """Of `--name`, or `--name=value`."""
    return word[2:].partition("=")[0] if word.startswith("--") else ""


def expand(words: Sequence[str]) -> list[str]:
    """The words with the abbreviations that main_dino.py takes in full; all others are left to argparse."""
    exact = {"", *(f.name for f in fields(TrainConfig))}

    def full(word: str) -> str:
        name = _name(word)
        meant = [flag for flag in ORIGINAL.split() if flag.startswith(name)]
        return f"--{meant[0]}{word[2 + len(name) :]}" if name not in exact and len(meant) == 1 else word

    return [full(word) for word in words]


def unrecognized(words: Sequence[str]) -> str:
    """What argparse says of words that it does not know, and what to write in their place."""
    said, names = f"unrecognized arguments: {' '.join(words)}", [_name(word) for word in words]
    if any(name in SUBMITIT.split() for name in names):
        return (
            f"{said}; those of run_with_submitit.py are srun's here: srun --nodes=N --ntasks-per-node=GPUS "
            "python -m fastdino.train ...; on one machine torchrun --nproc_per_node=GPUS -m fastdino.train ..."
        )
    if any(name in WEIGHTS.split() for name in names):
        return (
            f"{said}; weights are for evaluations (fastdino knn, features ...); training starts from them with "
            "--init FILE, and goes on from checkpoint.pth in --output_dir"
        )
    if not words[0].startswith("-"):
        return f"{said}; did you mean --data_path {words[0]}?"
    close = difflib.get_close_matches(names[0], [f.name for f in fields(TrainConfig)], 1)
    return said + (f"; did you mean --{close[0]}?" if close else "")


def _close(name: str) -> str:
    """What may have been meant by a flag that there is not."""
    close = difflib.get_close_matches(name, [f.name for f in fields(TrainConfig)], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_config(path: str | Path) -> dict[str, Any]:
    """Flags by name from a JSON file: args.json of another run, edited perhaps. Raises UserError where it is none.

    What args.json holds beside flags, its history, is left out.
    """
    try:
        given = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"--config: {path} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise UserError(f"--config: {path}: expected an object with a value for each flag, got {type(given).__name__}")
    names = {f.name for f in fields(TrainConfig)}
    for name in given:
        if name not in names | {"history"}:
            raise UserError(f"--config: {path}: no flag {name!r}{_close(name)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}


def config_from_flags(given: Mapping[str, Any], is_demo: bool) -> TrainConfig:
    """Flags by name, as a caller in Python gives them. Raises UserError for a name or a value that cannot be."""
    names = [f.name for f in fields(TrainConfig)]
    for name in given:
        if name not in names:
            raise UserError(f"no flag {name!r}{_close(name)}")
    try:
        return TrainConfig.from_flags({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, is_demo)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def check_images(given: Mapping[str, Any], n_processes: int) -> None:
    """Raise UserError where a run on images of one's own has forgotten them, and would learn the digits.

    given: the flags that somebody gave. The digits' network, asked for by name, says that they are meant.
    """
    if given.get("data_path") or given.get("arch") == DIGITS["arch"]:
        return
    signs = [f"--{name}" for name in OF_OWN_IMAGES.split() if name in given]
    if given.get("patch_size", 0) > DIGITS["global_crops_size"] // 2:
        signs.append("--patch_size")  # a digit would be a single patch
    if n_processes > 1:
        signs.append(f"{n_processes} processes")
    if signs:
        raise UserError(
            f"--data_path: none is given, but {', '.join(signs)}, as for images of one's own; scikit-learn's digits "
            f"are learned by `fastdino train` alone, or with --arch {DIGITS['arch']}"
        )
