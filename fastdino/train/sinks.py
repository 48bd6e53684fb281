"""Where a run's numbers go: log.txt, curves.png, callbacks; `console` and `loggers`, too.

The loop tells all of them the same: an entry every few steps, one at the end of each epoch. Only the main process has
any.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdino import files
from fastdino.errors import TrainingError
from fastdino.eval import EVALUATIONS
from fastdino.eval.pictures import save_figure
from fastdino.train.folder import RunFolder

Entry = dict[str, Any]
LOG = "log.txt"
DRAWN = ["epoch", "train_loss", "train_teacher_entropy", "train_lr", "train_momentum"]
DRAWN += [f"{name}{when}" for name in EVALUATIONS for when in ("", "_before")]
REDRAW_AFTER = 60.0  # seconds between drawings of the curves during a run


class Sink:
    """What is told the numbers of a run; derive from it for a callback. What is not overridden does nothing.

    A step's entry: iteration (done so far), epoch (from 0), loss, kl and teacher_entropy in nats, grad_norm (of all
    gradients, before the clip), lr, images_per_s, data_wait (share of the time). An epoch's entry: the line of log.txt.
    """

    def step(self, entry: Entry) -> None:
        """After every few steps; their means."""

    def epoch(self, entry: Entry) -> None:
        """After an epoch, its evaluations included."""

    def close(self) -> None:
        """At the end of the run, however it ends."""


class Sinks(Sink):
    """Several as one. Raises TrainingError, naming the sink, where one of them raises; all are told before."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def _tell(self, what: str, *arguments: Any) -> None:
        failures: list[tuple[str, Exception]] = []
        for sink in self._sinks:
            try:
                getattr(sink, what)(*arguments)
            except TrainingError as error:
                failures.append((str(error), error))
            except Exception as error:
                failures.append((f"{type(sink).__name__}.{what} raised {type(error).__name__}: {error}", error))
        for words, first in failures[:1]:
            raise TrainingError(words) from first

    def step(self, entry: Entry) -> None:
        """To all, in order."""
        self._tell("step", entry)

    def epoch(self, entry: Entry) -> None:
        """To all, in order."""
        self._tell("epoch", entry)

    def close(self) -> None:
        """To all, in order."""
        self._tell("close")


class LogFile(Sink):
    """log.txt: one JSON object per epoch; train_loss, train_lr, train_wd and epoch as in the original, and more.

    Lines are added and never changed, as in the original. Epochs that were trained again have two: the later counts.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def read(self) -> list[Entry]:
        """`read_log` of the folder."""
        return read_log(self._folder.path)

    def mend(self) -> None:
        """Cut off a last line that a crash left unfinished."""

        def cut(path: Path) -> None:
            if path.is_file() and (whole := path.read_bytes().rfind(b"\n") + 1) < path.stat().st_size:
                os.truncate(path, whole)

        self._folder.write(LOG, cut)

    def epoch(self, entry: Entry) -> None:
        """Add a line."""
        self._folder.write(LOG, lambda path: files.append(path, json.dumps(entry) + "\n"))


def read_log(folder: Path) -> list[Entry]:
    """An entry per epoch of the last run in the folder: an epoch that was trained again ends what followed it.

    Lines that are no entries are left out; no log, no entries.
    """
    entries: list[Entry] = []
    path = folder / LOG
    if not path.is_file():
        return entries
    with path.open(errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("epoch"), int):
                    add(entries, entry)
    return entries


def add(entries: list[Entry], entry: Entry) -> None:
    """Put an epoch's entry behind those of the epochs before it; later ones are to be trained again."""
    while entries and entries[-1]["epoch"] >= entry["epoch"]:
        entries.pop()
    entries.append(entry)


class Curves(Sink):
    """curves.png: now and then, and at the end. Knows of each epoch what it draws, those in log.txt included."""

    def __init__(self, log: LogFile, out_dim: int, folder: RunFolder) -> None:
        self._entries = [self._drawn(entry) for entry in log.read()]
        self._out_dim, self._folder = out_dim, folder
        self._drawn_at = time.monotonic()

    @staticmethod
    def _drawn(entry: Entry) -> Entry:
        return {key: entry[key] for key in DRAWN if entry.get(key) is not None}

    def epoch(self, entry: Entry) -> None:
        """Draw, where the last picture is old."""
        add(self._entries, self._drawn(entry))
        if time.monotonic() - self._drawn_at > REDRAW_AFTER:
            self.close()

    def close(self) -> None:
        """Draw."""
        from fastdino.train.curves import draw_curves  # matplotlib takes a while to import

        figure = draw_curves(self._entries, self._out_dim)
        self._folder.write("curves.png", lambda path: save_figure(path, figure))
        self._drawn_at = time.monotonic()
