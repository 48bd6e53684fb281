"""The picture of a run: curves.png."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastdino.eval import EVALUATIONS, TITLES


def draw_curves(entries: Sequence[Mapping[str, Any]], out_dim: int) -> Figure:
    """Of the log's entries: loss with teacher entropy and ln K, learning rate, teacher momentum, evaluations."""
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
    for name, color in zip(EVALUATIONS, ("#2f7d4f", "#8a5aa8", "#c8553d")):
        points = [(entry["epoch"] + 1, entry[name]) for entry in entries if entry.get(name) is not None]
        if entries and entries[0].get(f"{name}_before") is not None:
            points.insert(0, (entries[0]["epoch"], entries[0][f"{name}_before"]))
        if points:
            axes[0, 1].plot(*zip(*points), color=color, marker="o", markersize=3, label=TITLES.get(name, name))
            label = {"textcoords": "offset points", "xytext": (-2, -14), "ha": "right"}
            axes[0, 1].annotate(f"{points[-1][1]:.3f}", points[-1], **label)
    if axes[0, 1].lines:
        axes[0, 1].set_ylim(0, 1)
        axes[0, 1].legend(fontsize=8, loc="lower right")
    else:
        axes[0, 1].text(
            0.5, 0.5, "no labels, no evaluation", ha="center", va="center", color="0.5", transform=axes[0, 1].transAxes
        )
    axes[0, 1].set_title("accuracy of the teacher")
    for ax in axes.flat:
        ax.set_xlabel("epoch")
        ax.set_xlim(0, max(epochs, default=1) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure
