"""NaN and infinity put into a run: it ends with the step named, and what it saved is finite.

cd tests && python -m trials.poison [--quick]
"""

import math
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from trials.runs import NITER, Table, last_line, run, start, trial_parser, wait

from fastdino.objectives import DINOLoss
from fastdino.train import build
from fastdino.train.checkpoint import load_checkpoint
from fastdino.train.finite import first_nonfinite
from fastdino.train.step import TrainStep

PLACES = {"first step": 0, "middle of an epoch": NITER + 1}
PLACES |= {"last step of an epoch": 2 * NITER - 1, "last step of the run": 3 * NITER - 1}
PAIR = ["--arch", "vit_nano", "--batch_size_per_gpu", "24", "--use_bn_in_head", "false"]
Sabotage = Callable[[], None]


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args: around(self, original, *args))


def poison(what: str, iteration: int, value: float) -> Sabotage:
    """Put a value into the input, the loss, a gradient or the center of one iteration."""

    def apply() -> None:
        done = [-1]

        def count(step: TrainStep, original: Any, crops: list[torch.Tensor], now: int) -> Any:
            done[0] = now
            if what == "input" and now == iteration:
                crops[0][0, 0, 0, 0] = value
            return original(step, crops, now)

        def loss(objective: DINOLoss, original: Any, *args: Any) -> Any:
            found, others, mean = original(objective, *args)
            return (found * value if what == "loss" and done[0] == iteration else found), others, mean

        def gradient(step: TrainStep, original: Any, *args: Any) -> None:
            original(step, *args)
            if what == "gradient" and done[0] == iteration:
                next(step.student.parameters()).grad.view(-1)[0] = value

        def center(objective: DINOLoss, original: Any, mean: torch.Tensor) -> None:
            original(objective, mean)
            if what == "center" and done[0] == iteration:
                objective.center[0, 0] = value

        _wrap(TrainStep, "__call__", count)
        _wrap(DINOLoss, "evaluate", loss)
        _wrap(TrainStep, "compute", gradient)
        _wrap(DINOLoss, "after_step", center)

    return apply


def _pair(folder: Path, sabotage: Sabotage) -> tuple[int, str]:
    """Two processes, the second of them poisoned; (exit code, what both said)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def as_rank(rank: int) -> Sabotage:
        def apply() -> None:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
            os.environ["MASTER_PORT"] = port
            if rank:
                sabotage()

        return apply

    ended = [wait(*started) for started in [start(folder, PAIR, as_rank(r)) for r in (0, 1)]]
    return ended[0].code, ended[0].output


def outcome(folder: Path, code: int, output: str, iteration: int, survives: bool = False) -> list[str]:
    """What is wrong with how a poisoned run ended."""
    words = []
    epoch, step = divmod(iteration, NITER)
    if code != (0 if survives else 1):
        words.append(f"exit code {code}: {output[-1500:]}")
    if not survives and not re.search(
        f"became (nan|inf|-inf) at epoch {epoch + 1}, step {step + 1} ", last_line(output)
    ):
        words.append(f"said: {last_line(output)}")
    for path in folder.glob("checkpoint*.pth"):
        if name := first_nonfinite(load_checkpoint(path)):
            words.append(f"{path.name} has {name}")
    saved = [load_checkpoint(path)["epoch"] for path in folder.glob("checkpoint.pth")]
    if not survives and saved != [epoch] * bool(epoch):
        words.append(f"checkpoint.pth holds the epochs {saved}, not {epoch}")
    return words


def fp16(sabotage: Sabotage) -> Sabotage:
    """Sabotage of a run in fp16, with its loss scaler."""

    def apply() -> None:
        build.amp_dtype = lambda *_: torch.float16
        sabotage()

    return apply


def main() -> int:
    parser = trial_parser(__doc__)
    args = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        trials = [
            (optimizer, what, place, value)
            for optimizer, what, place, value in product(
                ("adamw", "sgd", "lars"), ("input", "loss", "gradient", "center"), PLACES, (math.nan, math.inf)
            )
            if optimizer == "adamw" or (what in ("gradient", "center") and value != value)
        ]
        if args.quick:
            # The loss of that step is finite, and what it leads to is about to be saved.
            trials = [t for t in trials if t[1] in ("gradient", "center") and t[2] == "last step of an epoch"][:4]
        for i, (optimizer, what, place, value) in enumerate(trials):
            folder, iteration = Path(name) / f"run{i}", PLACES[place]
            ended = run(folder, ["--optimizer", optimizer], poison(what, iteration, value))
            words = outcome(folder, ended.code, ended.output, iteration)
            table.add(f"{optimizer}: poison", f"{value} in the {what}, {place}", words)
        for what, place in [] if args.quick else product(("gradient", "loss"), PLACES):
            folder, iteration = Path(name) / f"pair-{what}-{place}", PLACES[place]
            words = outcome(folder, *_pair(folder, poison(what, iteration, math.nan)), iteration)
            table.add("two processes, one poisoned", f"{what}, {place}", words)
        for what, place in [] if args.quick else product(("gradient", "loss", "center"), PLACES):
            folder, iteration = Path(name) / f"fp16-{what}-{place}", PLACES[place]
            ended = run(folder, sabotage=fp16(poison(what, iteration, math.inf)))
            words = outcome(folder, ended.code, ended.output, iteration, survives=what == "gradient")
            table.add("fp16 with its scaler, which skips a gradient", f"{what}, {place}", words)
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
