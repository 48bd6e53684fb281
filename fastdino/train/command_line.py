"""The flags of `fastdino train`: generated from the configuration, read, and written as a command again."""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import Any

from fastdino.train.checks import in_words
from fastdino.train.config import TrainConfig
from fastdino.train.fields import GROUPS, choices_of


def boolean(text: str) -> bool:
    if text.lower() in ("true", "on", "1"):
        return True
    if text.lower() in ("false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true/false, on/off or 1/0, got {text!r}")


def _parsing(f: Field[Any]) -> dict[str, Any]:
    """What argparse needs to read a field."""
    if f.type is bool:
        return {"type": boolean, "metavar": "BOOL"}
    if f.type in (int, float):
        return {"type": f.type, "metavar": "N" if f.type is int else "X"}
    if isinstance(f.default, tuple):
        return {"type": float, "nargs": "+", "metavar": "X"}
    return {"type": str, "metavar": "NAME" if f.metadata["choices"] else "TEXT"}


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return in_words(default) if isinstance(default, tuple) else str(default)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field, in its group; flags not given leave nothing behind."""
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for f in fields(TrainConfig):
        default = "" if f.default in (None, ()) else f" [{_shown(f.default)}]"
        text, choices = f.metadata["help"], choices_of(f)
        text += "" if all(name in text for name in choices) else f" ({', '.join(choices)})"
        names = [f"--{f.name}"] + (["--local-rank"] if f.name == "local_rank" else [])
        groups[f.metadata["group"]].add_argument(
            *names,
            dest=f.name,
            default=argparse.SUPPRESS,
            help=(text + default).replace("%", "%%"),
            **_parsing(f),
        )


def config_from_args(args: argparse.Namespace) -> TrainConfig:
    """The parsed flags as a run. Raises ValueError for values that cannot work."""
    names = {f.name for f in fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return TrainConfig.from_flags({k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def command_line(config: TrainConfig, n_processes: int = 1, preset: Mapping[str, Any] = {}) -> str:
    """The command that starts this run again where it stopped. preset: what --preset gives, and need not be said."""
    known = {name: value for name in ("data_path", "init") if (value := getattr(config, name))}
    known |= {"recipe": config.recipe} if config.recipe != TrainConfig.recipe else {}
    defaults = TrainConfig.from_flags({**known, **(preset if config.data_path else {})})
    resumed = replace(config, resume=True)
    words = ["fastdino", "train"] if n_processes == 1 else []
    words = words or ["torchrun", f"--nproc_per_node={n_processes}", "-m", "fastdino.train"]
    always = {*known, *({"preset"} & preset.keys())} | ({"arch"} if not config.data_path else set())
    for f in fields(config):
        value = getattr(resumed, f.name)
        if value != getattr(defaults, f.name) or f.name in always:
            words += [f"--{f.name}", *(_shown(value).split() if isinstance(value, tuple) else [_shown(value)])]
    return shlex.join(words)
