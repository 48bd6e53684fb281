"""Runs killed at random moments, and at every point around saving, logging and evaluating; each is resumed.

cd tests && python -m trials.kills [--random 40] [--calls 3] [--seed 0] [--quick]
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from trials.runs import Table, differences, run, start, trial_parser, wait

from fastdino import files
from fastdino.train.build import Parts
from fastdino.train.folder import RunFolder
from fastdino.train.judge import Judge
from fastdino.train.sinks import Curves, LogFile


def die() -> None:
    """As by the out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: object, name: str, when: str, n: int) -> Callable[[], None]:
    """Sabotage: die before or after the n-th call of a function, or when half of what it writes is written."""

    def apply() -> None:
        original, calls = getattr(owner, name), [0]

        def sabotaged(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] < n:
                return original(*args, **kwargs)
            if when == "before":
                die()
            if when == "half":
                path, text = args
                with open(path, "a") as file:
                    file.write(text[: len(text) // 2])
                die()
            original(*args, **kwargs)
            return die()

        setattr(owner, name, sabotaged)

    return apply


def half_a_checkpoint(n: int) -> Callable[[], None]:
    """Sabotage: die in the n-th torch.save, with half of the bytes on the disk."""

    def apply() -> None:
        original, calls = torch.save, [0]

        def save(content: object, file: object) -> None:
            calls[0] += 1
            original(content, file)
            if calls[0] == n:
                file.flush()
                file.truncate(file.tell() // 2)
                die()

        torch.save = save

    return apply


CALLS = [(os, "replace"), (os, "fsync"), (Parts, "save"), (Parts, "keep"), (LogFile, "epoch"), (Curves, "close")]
POINTS: dict[str, Callable[[int], Callable[[], None]]] = {
    **{
        f"{when} {name if owner is os else f'{owner.__name__}.{name}'}": partial(at_call, owner, name, when)
        for (owner, name), when in product(CALLS, ["before", "after"])
    },
    "after RunFolder.make": partial(at_call, RunFolder, "make", "after"),
    "after LogFile.mend": partial(at_call, LogFile, "mend", "after"),
    "before Judge.evaluate": partial(at_call, Judge, "evaluate", "before"),
    "after Judge.evaluate": partial(at_call, Judge, "evaluate", "after"),
    "half of a log line": partial(at_call, files, "append", "half"),
    "half of a checkpoint": half_a_checkpoint,
}

QUICK = ["half of a checkpoint", "before replace", "before LogFile.epoch", "half of a log line", "before Parts.keep"]


def killed_at(point: str, calls: Sequence[int], expected: Path, folder: Path) -> list[str]:
    """What is wrong after a run that died at a point, at its n-th call; as often as there are n; and then went on."""
    for n in calls:
        died = run(folder, sabotage=POINTS[point](n))
        if died.code not in (0, -signal.SIGKILL):
            return [died.output]
    resumed = run(folder)
    return differences(expected, folder) if resumed.code == 0 else [resumed.output]


def killed_after(seconds: float, expected: Path, folder: Path) -> list[str]:
    """What is wrong after a run that was killed so many seconds after its start, and went on."""
    pid, output = start(folder)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    wait(pid, output)
    resumed = run(folder)
    return differences(expected, folder) if resumed.code == 0 else [resumed.output]


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--random", type=int, default=40)
    parser.add_argument("--calls", type=int, default=3, help="each point, at its first to this call")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        expected = root / "expected"
        whole = run(expected)
        assert whole.code == 0, whole.output
        rng = random.Random(args.seed)
        table = Table()
        for i in range(3 if args.quick else args.random):
            seconds = rng.uniform(0, 1.1 * whole.seconds)
            table.add("kill -9 at a random moment", f"{seconds:.2f} s", killed_after(seconds, expected, root / f"r{i}"))
        cases = [(point, (2,)) for point in QUICK] if args.quick else []
        # A resume that is killed, too, finds what the first kill left.
        cases = cases or [(point, (n, 1)) for point, n in product(POINTS, range(1, args.calls + 1))]
        for i, (point, calls) in enumerate(cases):
            words = killed_at(point, calls, expected, root / f"p{i}")
            table.add("kill -9 around saving, logging, evaluating", f"{point}, call {calls[0]}", words)
        return table.show()


if __name__ == "__main__":
    sys.exit(main())
