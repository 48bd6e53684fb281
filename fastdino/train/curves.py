"""The picture of a run: curves.png."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastdino.eval import EVALUATIONS, TITLES

BLUE, RED, GREEN, PURPLE = "#1f5fa8", "#c8553d", "#2f7d4f", "#8a5aa8"
MANY = 12  # points: more are a line without dots

Points = Sequence[tuple[float, float]]


def draw_curves(entries: Sequence[Mapping[str, Any]], out_dim: int) -> Figure:
    """Of the log's entries: loss with teacher entropy and ln K, evaluations, learning rate, teacher momentum.

    Where nothing was evaluated, the KL divergence takes the evaluations' place. Legends hold the last values.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained", dpi=120)
    (losses, accuracy), (rate, momentum) = figure.subplots(2, 2)

    def points(key: str) -> Points:
        return [(entry["epoch"] + 1, entry[key]) for entry in entries if entry.get(key) is not None]

    _curve(losses, points("train_loss"), "loss {:.3f}", BLUE)
    _curve(losses, points("train_teacher_entropy"), "teacher entropy {:.3f}", RED)
    most = math.log(out_dim)
    losses.axhline(most, color="0.6", linestyle=":", label=f"ln K = {most:.2f} (no preference)")
    losses.set(title="loss and teacher entropy (nats)", ylim=(0, 1.05 * max([most, *_heights(losses)])))
    found = [(name, _with_before(entries, name, points(name))) for name in EVALUATIONS]
    for (name, values), color in zip(found, (GREEN, PURPLE, RED)):
        _curve(accuracy, values, TITLES.get(name, name) + " {:.4f}", color)
    if accuracy.lines:
        accuracy.set(title="accuracy of the teacher", ylim=(0, 1.02))
    else:
        entropies = dict(points("train_teacher_entropy"))
        kl = [(epoch, loss - entropies[epoch]) for epoch, loss in points("train_loss") if epoch in entropies]
        _curve(accuracy, kl, "KL {:.3f} (nothing is evaluated)", GREEN)
        accuracy.set(title="KL of teacher and student (nats)", ylim=(0, 1.05 * max([*_heights(accuracy), 0.1])))
    _curve(rate, points("train_lr"), "lr {:.3g}", BLUE)
    rate.set(title="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _curve(momentum, points("train_momentum"), "momentum {:.5f}", BLUE)
    lowest = min([0.999, *_heights(momentum)])
    momentum.set(title="teacher momentum", ylim=(lowest - 0.05 * (1 - lowest), 1 + 0.05 * (1 - lowest)))
    momentum.ticklabel_format(axis="y", useOffset=False)
    for ax in (losses, accuracy, rate, momentum):
        if ax.lines:
            ax.legend(fontsize=8)
        ax.set(xlabel="epoch", xlim=(0, max((entry["epoch"] + 1 for entry in entries), default=1) * 1.02))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure


def _curve(ax: Any, points: Points, label: str, color: str) -> None:
    """label: with a place for the last value."""
    if points:
        marker = "o" if len(points) < MANY else ""
        ax.plot(*zip(*points), label=label.format(points[-1][1]), color=color, marker=marker, markersize=4)


def _heights(ax: Any) -> list[float]:
    return [float(y) for line in ax.lines for y in line.get_ydata()]


def _with_before(entries: Sequence[Mapping[str, Any]], name: str, points: Points) -> Points:
    """The points behind the one from before training, where there is one."""
    before = entries[0].get(f"{name}_before") if entries else None
    return points if before is None else [(entries[0]["epoch"], before), *points]
