"""The step's throughput as bars, with the spread each was measured with."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.compare import Record, measured


def draw_throughput(records: list[Record], path: Path) -> bool:
    """Write a picture of every record that has images_per_s; False, and no file, where there is none."""
    rows = [r for r in measured(records).values() if "images_per_s" in r]
    if not rows:
        return False
    rows.reverse()  # the first measured on top
    speeds = [r["images_per_s"] for r in rows]
    low = [s - s * r["median_ms"] / r["p80_ms"] for s, r in zip(speeds, rows)]
    high = [s * r["median_ms"] / r["p20_ms"] - s for s, r in zip(speeds, rows)]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes.barh([r["name"].removeprefix("step-") for r in rows], speeds, xerr=(low, high), color="#4c78a8", height=0.6)
    for i, (speed, above) in enumerate(zip(speeds, high)):
        axes.annotate(f"{speed:.3g}", (speed + above, i), (6, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    axes.set(xlabel="images/s (bars: median; lines: p20 to p80)", title=f"Training step, {rows[0]['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
