"""SIGINT, SIGTERM and SIGHUP in every phase of a run: it saves, says how to go on, and ends, within seconds.

cd tests && python -m trials.signals [--quick]
"""

import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from trials.runs import Table, differences, last_line, run, trial_parser

from fastdino.data.sequences import SequenceSource
from fastdino.eval import EVALUATIONS
from fastdino.train.sinks import Curves
from fastdino.train.step import TrainStep

LIMIT_S = 5.0
AFTER = 0.2  # seconds from the beginning of a phase to the signal
LONG = 20.0  # seconds that a phase would take if nobody stopped it
Sabotage = Callable[[], None]


def _send(number: int, then: Callable[[], object] = lambda: None) -> None:
    """A signal to this process a moment from now, which also notes when."""

    def kill() -> None:
        print(f"SENT {time.monotonic()}", flush=True)
        os.kill(os.getpid(), number)

    threading.Timer(AFTER, kill).start()


def _at(n: int, do: Callable[[], object]) -> Callable[[], None]:
    calls = [0]

    def count() -> None:
        calls[0] += 1
        if calls[0] == n:
            do()

    return count


def in_evaluation(number: int, n: int) -> Sabotage:
    """The signal in the n-th evaluation, which takes long."""

    def apply() -> None:
        def slow() -> None:
            _send(number)
            time.sleep(LONG)

        original, count = EVALUATIONS["knn"], _at(n, slow)
        EVALUATIONS["knn"] = lambda *args: (count(), original(*args))[1]

    return apply


def _before(owner: Any, name: str, n: int, do: Callable[[], object]) -> None:
    original, count = getattr(owner, name), _at(n, do)
    setattr(owner, name, lambda *args, **kwargs: (count(), original(*args, **kwargs))[1])


def in_step(number: int) -> Sabotage:
    """The signal in a step, which takes a moment."""
    return lambda: _before(TrainStep, "compute", 7, lambda: (_send(number), time.sleep(2 * AFTER)))


def in_loading(number: int) -> Sabotage:
    """The signal while a slow disk is waited for."""
    return lambda: _before(SequenceSource, "__getitem__", 235, lambda: (_send(number), time.sleep(LONG / 10)))


def in_saving(number: int) -> Sabotage:
    """The signal while a checkpoint is written."""
    return lambda: _before(torch, "save", 2, lambda: (_send(number), time.sleep(2 * AFTER)))


def in_drawing(number: int) -> Sabotage:
    """The signal while the curves are drawn, after the last epoch."""
    return lambda: _before(Curves, "close", 1, lambda: (_send(number), time.sleep(2 * AFTER)))


PHASES: dict[str, Callable[[int], Sabotage]] = {
    "before training": lambda number: in_evaluation(number, 1),
    "loading": in_loading,
    "a step": in_step,
    "an evaluation": lambda number: in_evaluation(number, 3),
    "saving": in_saving,
    "drawing": in_drawing,
}


def stopped(phase: str, number: int, expected: Path, folder: Path) -> list[str]:
    """What is wrong with a run that was stopped in a phase, and resumed."""
    ended = run(folder, ["--num_workers", "1"], lambda: (PHASES[phase](number)(), _note_the_end()))
    words = []
    sent, over = re.search(r"SENT (\S+)", ended.output), re.search(r"OVER (\S+)", ended.output)
    if not sent or not over:
        return [ended.output[-2000:]]
    if (took := float(over[1]) - float(sent[1])) > LIMIT_S:
        words.append(f"took {took:.1f} s")
    said = last_line(ended.output.replace(over[0], ""))
    if phase == "drawing":  # everything is saved by then
        if ended.code:
            words.append(f"exit code {ended.code}: {said}")
    elif ended.code != 128 + number or not said.startswith("resume with: fastdino train "):
        words.append(f"exit code {ended.code}: {said}")
    resumed = run(folder)
    return words + (differences(expected, folder) if resumed.code == 0 else [resumed.output])


def _note_the_end() -> None:
    from trials import runs

    original = runs.main
    runs.main = lambda args: (original(args), print(f"OVER {time.monotonic()}", flush=True))[0]


def main() -> int:
    args = trial_parser(__doc__).parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        expected = Path(name) / "expected"
        assert run(expected).code == 0
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        cases = list(product(PHASES, numbers))
        if args.quick:
            cases = [("an evaluation", signal.SIGTERM), ("loading", signal.SIGHUP), ("saving", signal.SIGINT)]
        for phase, number in cases:
            folder = Path(name) / f"{phase}-{number}"
            words = stopped(phase, number, expected, folder)
            table.add("a signal, saved within 5 s, resumed", f"{signal.Signals(number).name} in {phase}", words)
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
