"""Images per second as a picture: ours in blue, others in grey. Drawn from records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.records import Record, groups, number

OURS, OTHERS, INK, FAINT = "#1f5fa8", "#b3bac4", "#2b2f36", "#8a919c"


def _bars(ax: Any, rows: Sequence[Record], title: str) -> None:
    """A bar per provider, the fastest on top; a line from p20 to p80; its value."""
    rows = sorted(rows, key=lambda r: float(r["images_per_s"]))
    for i, r in enumerate(rows):
        v, low, high = (r["images_per_s"] * r["median_ms"] / r[key] for key in ("median_ms", "p80_ms", "p20_ms"))
        ax.barh(i, v, color=OURS if r["provider"].startswith("ours") else OTHERS, height=0.66)
        ax.plot((low, high), (i, i), color=INK, linewidth=0.8)
        ax.annotate(number(v), (high, i), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)
    ax.set_xlim(0, 1.36 * max(r["images_per_s"] * r["median_ms"] / r["p20_ms"] for r in rows))
    ax.set_yticks(range(len(rows)), [r["provider"] for r in rows])
    ax.set_title(title, loc="left", fontsize=9.5, color=INK, pad=8, linespacing=1.4)
    ax.spines[:].set_visible(False)
    ax.tick_params(labelsize=8.5, colors=INK, length=0)
    ax.set_xticks([])


def throughput(records: list[Record], path: Path) -> str | None:
    """The step with most providers and the loader with most workers; returns why there is no picture, if so."""
    steps, loaders = (
        [[r for r in rows if "median_ms" in r] for group, rows in groups(records, part).items() if group[:4] == start]
        for part, start in (("step", "step"), ("pipeline", "load"))
    )
    panels = sorted(filter(None, steps), key=len, reverse=True)[:1] + list(filter(None, loaders))[-1:]
    if not panels:
        return "throughput (no step and no loader was measured)"
    figure = Figure(figsize=(8.4, 1.15 + 0.36 * max(map(len, panels))), layout="constrained")
    for ax, rows in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        what, _, case = rows[0]["group"].partition(" ")
        title = f"Training step, images/s\n{case}"
        _bars(ax, rows, title if what == "step" else f"Loading, images/s\nJPEG 500x375 to 2+8 crops, {case}")
    r = panels[0][0]
    about = f"{r['device']} · torch {r['torch']} · commit {r['commit']} · {r['date'][:10]}"
    figure.supxlabel(about, fontsize=7.5, color=FAINT, x=0.99, ha="right")
    figure.savefig(path, dpi=150, facecolor="white")
    return None
