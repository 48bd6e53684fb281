"""A field of a run's configuration that is a command-line flag, too: how it is declared, and which values it takes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, field
from typing import Any

GROUPS = ("Recipe", "Model", "Teacher", "Optimisation", "Crops", "Data", "Evaluation", "Run")  # as --help shows them


def flag(
    default: Any, group: str, meaning: str, choices: Sequence[str] | Callable[[], Sequence[str]] | None = None
) -> Any:
    """A field that is also a command-line flag: `--name`, shown under `group`, explained by `meaning`."""
    return field(default=default, metadata={"group": group, "help": meaning, "choices": choices})


def check_value(f: Field[Any], value: Any) -> None:
    """Raise ValueError, naming flag, expected and got, for a value that the field never takes."""
    choices = choices_of(f)
    if not _is_a(value, f):
        raise ValueError(f"--{f.name}: expected {_kind(f)}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"--{f.name}: expected one of {', '.join(choices)}, got {value!r}")
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
        raise ValueError(f"--{f.name}: expected a finite number, got {value}")


def _kind(f: Field[Any]) -> str:
    """What a flag takes, in words."""
    if isinstance(f.default, tuple):
        return "numbers"
    kinds: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    return kinds.get(f.type, "a text")


def _is_a(value: Any, f: Field[Any]) -> bool:
    """Whether a caller in Python gave what the command line would have parsed."""
    if isinstance(f.default, tuple):
        return isinstance(value, tuple) and all(isinstance(x, (int, float)) for x in value)
    if f.type in (int, float):
        return isinstance(value, f.type if f.type is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, bool if f.type is bool else (str, type(f.default)))


def choices_of(f: Field[Any]) -> Sequence[str]:
    """The names that a flag takes; none where it takes anything."""
    choices = f.metadata["choices"] or ()
    return list(choices() if callable(choices) else choices)
