"""Checkpoints with one value exchanged for another, each restored into a step: refused in a line, or harmless.

cd tests && python -m trials.contents [--seed N] [--quick]
"""

import argparse
import copy
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trials.runs import FLAGS, Table, shrink, trial_parser

from fastdino.cli import parse
from fastdino.errors import UserError
from fastdino.train import distributed, resume
from fastdino.train.build import build_step
from fastdino.train.checkpoint import save_checkpoint
from fastdino.train.command_line import config_from_args
from fastdino.train.config import TrainConfig
from fastdino.train.contents import odd_tensor
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop
from fastdino.train.meter import Meter
from fastdino.train.networks import build_networks
from fastdino.train.step import TrainStep

NITER, N_IMAGES, BATCH = 5, 256, 48
VALUES: dict[str, Any] = {
    "None": None, "a text": "x\x1b[2J", "-1": -1, "0": 0, "1e18": 10**18, "10**5000": 10**5000, "nan": float("nan"),
    "1.5": 1.5, "True": True, "[]": [], "[1]": [1], "{}": {}, "{5: tensor}": {5: torch.zeros(2)}, "()": (),
    "bytes": b"x", "a set": {1}, "a namespace": argparse.Namespace(a=1), "a number as tensor": torch.zeros(()),
    "nan as tensor": torch.tensor(float("nan")), "a vector": torch.zeros(2), "an empty tensor": torch.zeros(0),
    "whole numbers": torch.tensor([1, 2]), "2**38 zeros in 4 bytes": torch.zeros(1).expand(2**38),
    "a tensor without data": torch.zeros(3, device="meta"), "a sparse tensor": torch.zeros(3, 3).to_sparse(),
}  # fmt: skip


def alike(old: Any) -> dict[str, Any]:
    """Tensors of the old one's shape, of other kinds."""
    if not isinstance(old, Tensor):
        return {}
    return {
        "the same in int64": torch.zeros_like(old, dtype=torch.int64),
        "the same in bool": torch.zeros_like(old, dtype=torch.bool),
        "the same in float8": torch.zeros_like(old).float().to(torch.float8_e4m3fn),
        "the same, complex": torch.zeros_like(old, dtype=torch.complex64),
        "the same without data": torch.zeros_like(old, device="meta"),
        "the same, infinite": torch.full_like(old, torch.inf, dtype=torch.float32),
        "the same, negative": torch.full_like(old, -1, dtype=torch.float32),
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a checkpoint."""
    if path:
        yield path
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def exchanged(content: dict[str, Any], path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    """A copy with another value at a place."""
    changed: Any = copy.deepcopy(content)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
        inner = vars(inner) if isinstance(inner, argparse.Namespace) else inner
    inner[path[-1]] = new
    return changed


def at(content: Any, path: tuple[Any, ...]) -> Any:
    """The value at a place."""
    for key in path:
        content = (vars(content) if isinstance(content, argparse.Namespace) else content)[key]
    return content


class Bench:
    """A step, and the checkpoint it has: at the end of an epoch, and inside of one."""

    def __init__(self, folder: Path, optimizer: str) -> None:
        words = ["train", *FLAGS, "--output_dir", str(folder), "--optimizer", optimizer]
        self.config: TrainConfig = config_from_args(parse(words))
        self.folder = RunFolder(folder, 0, print, Stop(speaks=False))
        self.step: TrainStep = build_step(
            self.config, distributed.start("cpu", "env://"), NITER, build_networks(self.config), print
        )
        sizes = [24, 24] + [12] * self.config.local_crops_number
        self.crops = [torch.randn(4, 3, side, side) for side in sizes]
        for iteration in range(NITER + 2):  # the prototypes have state, too
            self.step(self.crops, iteration)
        names = self.step.metric_names
        common = {"niter": NITER, "n_images": N_IMAGES, "batch_size": BATCH}
        self.contents = {
            "after an epoch": self._saved(None, common | {"entry": {"epoch": 1, "train_loss": 4.0, "knn": None}}),
            "inside of one": self._saved(2 * NITER + 2, common | {"meter": Meter(names).state()}),
        }
        self.folder.checkpoint.touch()

    def _saved(self, iteration: int | None, progress: dict[str, Any]) -> dict[str, Any]:
        step = self.step
        save_checkpoint(
            self.folder.checkpoint,
            student=step.student,
            teacher=step.teacher,
            optimizer=step.update.optimizer,
            loss=step.loss,
            epoch=2,
            config=self.config,
            iteration=iteration,
            progress=progress,
        )
        return resume.load_checkpoint(self.folder.checkpoint)

    def restore(self, content: dict[str, Any]) -> resume.Resumed:
        """As a run does that finds it. Raises what it does."""
        if odd := odd_tensor(content):
            raise UserError(odd)
        load, resume.load_checkpoint = resume.load_checkpoint, lambda path: content
        try:
            return resume.resume(self.config, self.folder, self.step, NITER, N_IMAGES, BATCH)
        finally:
            resume.load_checkpoint = load

    def state(self) -> list[Any]:
        """What a refusal must not change."""
        step = self.step
        modules = [module.state_dict() for module in (step.student, step.teacher, step.loss)]
        return [*modules, step.update.optimizer.state_dict()["state"]]

    def trial(self, good: dict[str, Any], path: tuple[Any, ...], new: Any) -> list[str]:
        """What is wrong with how an exchanged value is met."""
        before = copy.deepcopy(self.state())
        try:
            found = self.restore(exchanged(good, path, new))
        except UserError as error:
            wrong = [] if str(error).isprintable() and len(str(error)) < 1000 else [f"said: {error!s:.300}"]
            return wrong + ([] if equal(before, self.state()) else ["refused, and yet changed"])
        except Exception as error:
            return [f"{type(error).__name__}: {error!s:.300}"]
        resume.arguments(self.folder.path, self.config, found)
        metrics = self.step(self.crops, min(found.iteration, 3 * NITER - 1))
        self.restore(good)
        return [] if all(map(torch.isfinite, metrics)) else ["accepted, and then not finite"]


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def sample(content: dict[str, Any], draw: random.Random, n: int) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """(path, the name of a value, the value): n drawn ones, every part of a checkpoint as often as any other."""
    parts: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for path in places(content):
        parts.setdefault(path[: 2 if path[0] in ("optimizer", "progress") else 1], []).append(path)
    for _ in range(n):
        path = draw.choice(parts[draw.choice(list(parts))])
        name, new = draw.choice(list((VALUES | alike(at(content, path))).items()))
        yield path, name, new


def run_trials(folder: Path, n: int, seed: int) -> Table:
    """n exchanged values for each optimizer, after an epoch and inside of one."""
    table, draw = Table(), random.Random(seed)
    for optimizer in ("adamw", "sgd", "lars"):
        bench = Bench(folder, optimizer)
        for when, content in bench.contents.items():
            bench.restore(content)
            for path, name, new in sample(content, draw, n):
                where = ".".join(map(str, path))
                table.add(f"{optimizer}, {when}", f"{where} <- {name}", bench.trial(content, path, new))
    return table


def main() -> int:
    args = trial_parser(__doc__).parse_args()
    if args.quick:
        shrink()
    with tempfile.TemporaryDirectory() as name:
        return run_trials(Path(name), 40 if args.quick else 1000, args.seed).show()


if __name__ == "__main__":
    sys.exit(main())
