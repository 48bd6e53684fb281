"""The command line: which commands there are, and what becomes of a mistake."""

import argparse
import difflib
import importlib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from fastdino import __version__
from fastdino.errors import ExportError, TrainingError, UserError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141

# fastdino.commands has a module for each.
COMMANDS = {
    "train": "train a model",
    "features": "write features of images to a file",
    "knn": "k-NN accuracy of a trained backbone",
    "linear": "accuracy of linear classifiers on its features",
    "logreg": "accuracy of logistic regression on its features",
    "retrieval": "mAP of image retrieval on Oxford or Paris, revisited",
    "copies": "mAP of copy detection on Copydays",
    "video": "follow objects through a film from a mask of its first frame (DAVIS 2017)",
    "attention": "draw where the CLS token looks, in images and films",
    "pca": "draw what patches have in common",
    "report": "one HTML page about a run",
    "export": "write a trained backbone for timm, transformers, ONNX ...",
    "doctor": "what this machine can do",
}

DESCRIPTION = """\
Train DINO (self-distillation with no labels, arXiv:2104.14294) on your own images, and use what it learned.

  fastdino train                          learn handwritten digits, in minutes, on any machine
  fastdino train --data_path photos/      learn from a folder of images
  fastdino knn --pretrained_weights checkpoint.pth --data_path photos/
  fastdino doctor photos/                 what this machine can do, and how fast it reads the folder

Commands, each with a --help of its own:
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, and where to look."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110)


def parser(*commands: str) -> argparse.ArgumentParser:
    """All commands by name, and the flags of those that are asked for: theirs alone are imported."""
    listed = "\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())
    whole = _Parser(prog="fastdino", description=DESCRIPTION + listed, formatter_class=_help_format)
    whole.add_argument("--version", action="version", version=f"fastdino {__version__}")
    below = whole.add_subparsers(dest="command", required=True, metavar="COMMAND", help="one of them")
    for name in COMMANDS:
        command = below.add_parser(name, formatter_class=_help_format)
        if name in commands:
            _module(name).add_flags(command)
    return whole


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"fastdino.commands.{command}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Ends with exit code 2 and one line where it cannot be read."""
    from fastdino.train.flags import expand, unrecognized

    words = list(sys.argv[1:] if argv is None else argv)
    training = words[:1] == ["train"]
    args, unknown = parser(*words[:1]).parse_known_args(expand(words) if training else words)
    if unknown:
        message = unrecognized(unknown) if training else _unrecognized(args.command, unknown)
        _Parser(prog=f"fastdino {args.command}").error(message)
    return args


def _unrecognized(command: str, words: Sequence[str]) -> str:
    """What argparse says of words that it does not know, and the flag that comes near."""
    from fastdino.commands.common import HELD_OUT

    asked = _Parser()
    _module(command).add_flags(asked)
    if words[0].partition("=")[0] == "--val_path" and HELD_OUT in (asked.description or ""):
        return f"unrecognized arguments: {' '.join(words)}; the folder of --data_path holds train/ and val/"
    close = difflib.get_close_matches(words[0].partition("=")[0], re.findall(r"--\w+", asked.format_usage()), 1)
    return f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {close[0]}?" if close else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 1 it failed, 2 it was wrong, 130 interrupted, 141 nobody reads what it prints."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files in an alphabet that the terminal does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse(argv)
    try:
        return int(_module(args.command).run(args))
    except UserError as error:
        return _end(args.command, str(error), EXIT_USAGE)
    except (TrainingError, ExportError) as error:
        return _end(args.command, str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _end(args.command, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # of a reader such as `head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return EXIT_PIPE


def _end(command: str, message: str, code: int) -> int:
    """One line on standard error, from one process; the exit code."""
    from fastdino.train.distributed import tell_launcher

    if os.environ.get("RANK", "0") != "0":
        # The first process to end makes torchrun end the others: rank 0 speaks before, unless it is not what failed.
        time.sleep(5)
    print(f"fastdino {command}: {message}", file=sys.stderr, flush=True)
    tell_launcher(f"fastdino {command}: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
