"""The console of a run, as the first of its sinks."""

import sys
import time
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastdino.eval import EVALUATIONS, TITLES
from fastdino.train.sinks import Entry, Sink

PLAIN_EVERY = 10.0  # seconds between lines of progress where the console is no terminal


class _Output:
    """Standard output, that may go away (a closed terminal, `| head`) without ending the run."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


class Console(Sink):
    """Lines that stay, and how far the run is: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, speaks: bool) -> None:
        self._terminal = Terminal(file=cast(IO[str], _Output()), highlight=False, soft_wrap=True, quiet=not speaks)
        self._has_bar = speaks and self._terminal.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._terminal,
            disable=not self._has_bar,
            expand=True,
            transient=True,
        )
        self._task: TaskID | None = None
        self._spoke_at = time.monotonic()

    def say(self, text: str = "") -> None:
        """A line that stays. Square brackets are text, not markup."""
        self._terminal.print(text, markup=False)
        self._spoke_at = time.monotonic()

    def start(self, n_iterations: int, done: int, epochs: int) -> None:
        """Open the bar."""
        self._n_iterations, self._epochs = n_iterations, epochs
        self._task = self._progress.add_task("training", total=n_iterations, completed=done, state="")
        self._progress.start()

    def step(self, entry: Entry) -> None:
        """Move the bar; or a line, where the last one is old."""
        where = f"epoch {entry['epoch'] + 1}/{self._epochs}"
        state = f"loss {entry['loss']:.3f} · {entry['images_per_s']:,.0f} img/s"
        state += f" · {entry['data_wait']:.0%} waiting for data"
        if self._task is not None:
            self._progress.update(self._task, completed=entry["iteration"], description=where, state=state)
        if not self._has_bar and time.monotonic() - self._spoke_at > PLAIN_EVERY:
            self.say(f"{where}  step {entry['iteration']:,}/{self._n_iterations:,}  {state}")

    def epoch(self, entry: Entry) -> None:
        """A line that stays."""
        width = len(str(self._epochs))
        entropy = entry.get("train_teacher_entropy")
        found = ((name, entry.get(name)) for name in EVALUATIONS)
        self.say(
            f"epoch {entry['epoch'] + 1:>{width}}/{self._epochs}  loss {entry['train_loss']:.4f}  "
            + (f"teacher entropy {entropy:.3f}  " if entropy is not None else "")
            + f"{entry['images_per_s']:,.0f} img/s  {entry['data_wait']:.0%} waiting for data"
            + "".join(f"  {TITLES.get(name, name)} {value:.4f}" for name, value in found if value is not None)
        )

    def close(self) -> None:
        """Close the bar."""
        self._progress.stop()
