"""What a run says and leaves behind: the console, log.txt, curves.png. Only the main process speaks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Entry = dict[str, Any]


class LogFile:
    """log.txt: one JSON object per epoch; train_loss, train_lr, train_wd and epoch as in the original, and more."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Entry]:
        """The entries so far; a line cut short by a kill is left out."""
        entries = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return entries

    def keep_before(self, epoch: int) -> None:
        """Drop entries of epochs that are about to be trained again."""
        kept = [entry for entry in self.read() if entry.get("epoch", -1) < epoch]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def append(self, entry: Entry) -> None:
        """Add an epoch."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class Reporter:
    """The console of a run: lines that stay, and a progress bar on a terminal. Silent where `speaks` is false."""

    def __init__(self, speaks: bool) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=not speaks)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not (speaks and self.console.is_terminal),
            expand=True,
            transient=True,
        )
        self._task: TaskID | None = None

    def say(self, text: str = "") -> None:
        """A line that stays. Square brackets are text, not markup."""
        self.console.print(text, markup=False)

    def start(self, n_iterations: int, done: int) -> None:
        """Open the progress bar."""
        self._task = self.progress.add_task("training", total=n_iterations, completed=done, state="")
        self.progress.start()

    def update(self, done: int, epoch: int, epochs: int, loss: float, images_per_s: float, data_wait: float) -> None:
        """Move the progress bar. data_wait: share of the time spent waiting for data, 0 to 1."""
        if self._task is not None:
            state = f"loss {loss:.3f} · {images_per_s:,.0f} img/s · {data_wait:.0%} waiting for data"
            self.progress.update(self._task, completed=done, description=f"epoch {epoch + 1}/{epochs}", state=state)

    def stop(self) -> None:
        """Close the progress bar."""
        self.progress.stop()


def draw_curves(entries: Sequence[Entry], out_dim: int, path: Path) -> None:
    """curves.png from the log: loss with teacher entropy and ln K, learning rate, teacher momentum, k-NN."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6.4), layout="constrained", dpi=120)
    axes = figure.subplots(2, 2)
    epochs = [entry["epoch"] + 1 for entry in entries]
    marker = "o" if len(epochs) < 12 else ""

    def curve(ax: Any, key: str, label: str, color: str) -> None:
        points = [(entry["epoch"] + 1, entry[key]) for entry in entries if entry.get(key) is not None]
        if points:
            ax.plot(*zip(*points), label=label, color=color, marker=marker, markersize=3)

    curve(axes[0, 0], "train_loss", "loss", "#1f5fa8")
    curve(axes[0, 0], "train_teacher_entropy", "teacher entropy", "#c8553d")
    axes[0, 0].axhline(
        math.log(out_dim), color="0.6", linestyle=":", label=f"ln K = {math.log(out_dim):.2f} (collapse)"
    )
    axes[0, 0].set_title("loss and teacher entropy (nats)")
    axes[0, 0].legend(fontsize=8)
    curve(axes[1, 0], "train_lr", "learning rate", "#1f5fa8")
    axes[1, 0].set_title("learning rate")
    axes[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    curve(axes[1, 1], "train_momentum", "momentum", "#1f5fa8")
    axes[1, 1].set_title("teacher momentum")
    knn = [(entry["epoch"] + 1, entry["knn"]) for entry in entries if entry.get("knn") is not None]
    if entries and entries[0].get("knn_before") is not None:
        knn.insert(0, (entries[0]["epoch"], entries[0]["knn_before"]))
    if knn:
        axes[0, 1].plot(*zip(*knn), color="#2f7d4f", marker="o", markersize=3)
        axes[0, 1].annotate(f"{knn[-1][1]:.3f}", knn[-1], textcoords="offset points", xytext=(-2, -14), ha="right")
        axes[0, 1].set_ylim(0, 1)
    else:
        axes[0, 1].text(
            0.5, 0.5, "no labels, no k-NN", ha="center", va="center", color="0.5", transform=axes[0, 1].transAxes
        )
    axes[0, 1].set_title("k-NN accuracy of the teacher")
    for ax in axes.flat:
        ax.set_xlabel("epoch")
        ax.set_xlim(0, max(epochs, default=1) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.savefig(path)
