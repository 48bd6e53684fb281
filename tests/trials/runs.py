"""Runs of the trainer in forked processes, to be killed and sabotaged, and what they leave, compared.

A fork has everything imported, and 66 images of noise in memory: a run of three epochs takes half a second.
"""

import argparse
import gc
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch._dynamo  # which optimizers import; before the forks
from matplotlib.figure import Figure  # imported before the forks
from PIL import Image

from fastdino.cli import main
from fastdino.data.sequences import SequenceSource
from fastdino.errors import UserError
from fastdino.model.archs import ARCHITECTURES, Arch
from fastdino.train import build, loop  # noqa: F401
from fastdino.train.checkpoint import load_checkpoint
from fastdino.train.interrupt import SIGNALS

FLAGS = """--epochs 3 --batch_size_per_gpu 16 --patch_size 12 --local_crops_size 12 --out_dim 64 --hidden_dim 32
    --bottleneck_dim 16 --local_crops_number 2 --knn_freq 1 --knn_images 200 --attention_images 1 --num_workers 0
    --saveckp_freq 1 --drop_path_rate 0.2 --warmup_epochs 1 --resume true""".split()  # noqa: SIM905
TIMES = ("images_per_s", "data_wait")


Image.preinit()  # its formats, before the forks
NITER = 3  # steps of an epoch: of 50 images in batches of 16
IMAGES = np.random.default_rng(0).integers(0, 256, (66, 24, 24, 3), dtype=np.uint8)
LABELS = [i % 10 for i in range(66)]
DIGITS = SequenceSource(list(IMAGES[:50]), LABELS[:50]), SequenceSource(list(IMAGES[50:]), LABELS[50:])


def _undrawn(self: Figure, file: Any, *, format: str) -> None:
    """A picture of one pixel: letters would take a third of a run's time."""
    Image.new("RGB", (1, 1)).save(file, format)


def shrink() -> None:
    """What the quick forms do: checkpoints of half a megabyte instead of eight, and no drawing."""
    ARCHITECTURES["vit_nano"] = Arch(24, 2, 2, patch_size=4)
    Figure.savefig = _undrawn  # type: ignore[method-assign]


class Ended(NamedTuple):
    """How a forked run ended. code: its exit code, or minus the signal that ended it."""

    code: int
    output: str
    seconds: float


def start(folder: Path, flags: Sequence[str] = (), sabotage: Callable[[], object] = lambda: None) -> tuple[int, Path]:
    """(process id, file of its output) of a run into `folder`; `sabotage` is called in its process first."""
    handle, name = tempfile.mkstemp(suffix=".txt")
    gc.freeze()  # else the first collection in the fork copies all that is imported
    pid = os.fork()
    if pid:
        os.close(handle)
        return pid, Path(name)
    code = 99
    try:
        os.setsid()
        for number in SIGNALS:  # which nohup, or a shell's `&`, may have made this process ignore
            signal.signal(number, signal.SIG_DFL)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        build.load_digits = lambda: DIGITS
        if "--quick" in sys.argv:
            shrink()
        sabotage()
        code = main(["train", *FLAGS, "--output_dir", str(folder), *flags])
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def wait(pid: int, output: Path, timeout_s: float = 120) -> Ended:
    """The end of a run; one that hangs is killed, which its code shows."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > timeout_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    text = output.read_text(errors="replace")
    output.unlink()
    return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - began)


def run(folder: Path, flags: Sequence[str] = (), sabotage: Callable[[], object] = lambda: None) -> Ended:
    """A run to its end."""
    return wait(*start(folder, flags, sabotage))


def entries(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.txt, without what depends on the clock."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if key not in TIMES} for line in lines]


def differences(expected: Path, found: Path) -> list[str]:
    """What a run that was cut and resumed leaves otherwise than one that never was, in words."""
    words = _checkpoints_that_differ(expected / "checkpoint.pth", found / "checkpoint.pth")
    if entries(expected) != entries(found):
        words.append(f"log.txt has the epochs {[entry['epoch'] for entry in entries(found)]}, or other numbers")
    for kept in sorted(expected.glob("checkpoint????.pth")):
        words += _checkpoints_that_differ(kept, found / kept.name)
    allowed = {path.name for path in expected.iterdir()}
    return words + [f"{path.name} was left" for path in found.iterdir() if path.name not in allowed]


def _checkpoints_that_differ(expected: Path, found: Path) -> list[str]:
    try:
        return [
            f"{found.name}: {name} differs"
            for name in _tensors_that_differ(load_checkpoint(expected), load_checkpoint(found))
        ]
    except UserError as error:
        return [str(error)]


def _tensors_that_differ(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, dict):
        keys = one.keys() | other.keys() if isinstance(other, dict) else one.keys()
        found = [_tensors_that_differ(one.get(key), _get(other, key), f"{name}.{key}") for key in sorted(keys, key=str)]
        return [name for names in found for name in names]
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [name]
    return []


def _get(value: Any, key: Any) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def last_line(output: str) -> str:
    """What a person reads last."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Table:
    """Trials by kind: how many were tried, held, broke."""

    def __init__(self) -> None:
        self.broke: dict[str, dict[str, list[str]]] = {}
        self.tried: dict[str, int] = {}

    def add(self, kind: str, name: str, words: list[str]) -> None:
        """A trial, with what was wrong after it."""
        self.tried[kind] = self.tried.get(kind, 0) + 1
        self.broke.setdefault(kind, {})
        if words:
            self.broke[kind][name] = words
            print(f"{kind}: {name}: {'; '.join(words)}", flush=True)

    def show(self) -> int:
        """Print it; an exit code."""
        print(f"{'':<56}{'tried':>8}{'held':>8}{'broke':>8}")
        for kind, n in self.tried.items():
            print(f"{kind:<56}{n:>8}{n - len(self.broke[kind]):>8}{len(self.broke[kind]):>8}")
        return int(any(self.broke.values()))


def trial_parser(description: str | None) -> argparse.ArgumentParser:
    """For a script of trials."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few of them, in seconds")
    return parser
