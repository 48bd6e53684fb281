"""The records as pictures: ours in blue, others in grey, ceilings dashed. Drawn from records and nothing else."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.records import Record, groups, measured, number, times_baseline

OURS, OTHERS, INK, FAINT = "#1f5fa8", "#b3bac4", "#2b2f36", "#8a919c"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # behind words that a line may cross
WIDTH = 8.4  # inches; 150 dots each: as wide as a README shows
Axes = Any
Lacking = str  # why there is no picture


def _is_ours(provider: str) -> bool:
    return provider.startswith("ours")


def _clean(ax: Axes, title: str, bars: bool = False) -> None:
    """No frame but the axes that are read; bars carry their values, and need none."""
    ax.set_title(title, loc="left", fontsize=9.5, color=INK, pad=8, linespacing=1.4)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=8.5, colors=INK, length=0 if bars else 3)
    if bars:
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.set_xticks([])


def _save(figure: Figure, path: Path, record: Record) -> None:
    about = f"{record['device']} · torch {record['torch']} · commit {record['commit']} · {record['date'][:10]}"
    figure.supxlabel(about, fontsize=7.5, color=FAINT, x=0.99, ha="right")
    figure.savefig(path, dpi=150, facecolor="white")


def _bars(ax: Axes, rows: Sequence[Record], key: str, title: str, ceiling: tuple[float, str] | None = None) -> None:
    """A bar per provider, the fastest on top; a line from p20 to p80; its value, and how many times the baseline's."""
    rows = sorted(rows, key=lambda r: float(r[key]))
    values = [r[key] for r in rows]
    low = [v - v * r["median_ms"] / r["p80_ms"] for v, r in zip(values, rows)]
    high = [v * r["median_ms"] / r["p20_ms"] - v for v, r in zip(values, rows)]
    colors = [OURS if _is_ours(r["provider"]) else OTHERS for r in rows]
    spread = {"ecolor": INK, "elinewidth": 0.8, "capsize": 0}
    ax.barh(range(len(rows)), values, xerr=(low, high), color=colors, height=0.66, error_kw=spread)
    for i, (r, v, above) in enumerate(zip(rows, values, high)):
        times = times_baseline(r, list(rows))
        text = number(v) + (f"   {times:.2f}x" if times and times != 1 else "")
        ax.annotate(
            text, (v + above, i), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK, bbox=PAPER
        )
    ax.set_yticks(range(len(rows)), [r["provider"] for r in rows])
    top = max(v + h for v, h in zip(values, high))
    if ceiling and ceiling[0] < 4 * top:
        ax.axvline(ceiling[0], color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0.5)
        ax.annotate(
            f"{ceiling[1]}, {number(ceiling[0])}", (ceiling[0], 0), (0, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", fontsize=7.5, color=INK,
        )  # fmt: skip
        top = max(top, ceiling[0])
    ax.set_xlim(0, 1.36 * top)
    _clean(ax, title, bars=True)


def _timed(rows: Sequence[Record]) -> list[Record]:
    return [r for r in rows if "median_ms" in r]


def throughput(records: list[Record], path: Path) -> Lacking | None:
    """Images per second: the step with most providers, and the loader with most workers."""
    steps = [_timed(rows) for group, rows in groups(records, "step").items() if group.startswith("step ")]
    loaders = [_timed(rows) for group, rows in groups(records, "pipeline").items() if group.startswith("loader")]
    panels = [max(x, key=len) if x is steps else x[-1] for x in (steps, loaders) if x and any(x)]
    if not panels:
        return "throughput (no step and no loader was measured)"
    tallest = max(len(rows) for rows in panels)
    figure = Figure(figsize=(WIDTH, 1.15 + 0.36 * tallest), layout="constrained")
    for ax, rows in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        first = rows[0]
        if first["part"] == "step":
            limit = 1e12 * first[f"matmul_{first['dtype']}_tflops"] / first["flops_per_image"]
            case = f"{first['arch']}, 2+{first['n_local']} crops, batch {first['batch']}, {first['dtype']}"
            title = f"Training step, images/s\n{case}"
            _bars(ax, rows, "images_per_s", title, (limit, "matmul ceiling"))
        else:
            workers = first["group"].removeprefix("loader ")
            title = f"Loading, images/s\nJPEG 500x375 to 2+8 crops, {workers}"
            _bars(ax, rows, "images_per_s", title)
    _save(figure, path, panels[0][0])
    return None


def _against_its_ceiling(ax: Axes, rows: Sequence[Record]) -> None:
    """In the unit of the ceiling that is nearer."""
    best = max(rows, key=lambda r: float(r["gbps"]))
    name = best["group"].replace("_", " ") if best["part"] == "ops" else f"attention {best['group'].split(' ', 1)[1]}"
    if best["share_of_copy"] > best["share_of_matmul"]:
        _bars(ax, rows, "gbps", f"{name}\nGB/s", (best["copy_gbps"], "copy"))
        return
    in_giga = [r | {"gflops": 1e3 * r["tflops"]} for r in rows]
    peak = 1e3 * best[f"matmul_{best['dtype']}_tflops"]
    _bars(ax, in_giga, "gflops", f"{name}\nGFLOP/s", (peak, "matmul"))


def ops(records: list[Record], path: Path) -> Lacking | None:
    """Each op's providers against the ceiling: the bytes, or the FLOPs, that nobody can avoid, per second."""
    found = [rows for part in ("ops", "attention") for g in groups(records, part).values() if (rows := _timed(g))]
    if not found:
        return "ops (none was measured)"
    found.sort(key=len, reverse=True)
    pairs = [found[i : i + 2] for i in range(0, len(found), 2)]
    heights = [max(map(len, pair)) for pair in pairs]
    figure = Figure(figsize=(WIDTH, 0.3 + sum(0.85 + 0.27 * n for n in heights)), layout="constrained")
    axes = figure.subplots(len(pairs), 2, squeeze=False, height_ratios=[n + 0.3 for n in heights])
    for line, pair in zip(axes, pairs):
        for ax, rows in zip(line, pair):
            _against_its_ceiling(ax, rows)
        for ax in line[len(pair) :]:
            ax.set_visible(False)
    _save(figure, path, found[0][0])
    return None


def _spread(places: list[float], gap: float) -> list[float]:
    """Rising places, moved apart until neighbours are `gap` apart at least."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    return moved


def roofline(records: list[Record], path: Path) -> Lacking | None:
    """FLOP/s over FLOPs per byte that cannot be avoided: ours by name, everyone else beside it."""
    rows = [
        r for r in measured(records).values() if r.get("flops") and r.get("floor_bytes") and r["part"] != "ceilings"
    ]
    if not rows:
        return "roofline (no op with its FLOPs and bytes was measured)"
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    ax, last = figure.subplots(), rows[-1]
    xs = [r["flops"] / r["floor_bytes"] for r in rows]
    left, right = min(xs) / 4, max(xs) * 8
    for dtype in sorted({r["dtype"] for r in rows}):
        peak = 1e3 * last[f"matmul_{dtype}_tflops"]
        knee = peak / last["copy_gbps"]
        ax.plot([left, knee, right], [left * last["copy_gbps"], peak, peak], color=INK, linewidth=1, zorder=0.5)
        words = f"matmul {dtype}, {number(peak)} GFLOP/s"
        ax.annotate(words, (right, peak), (-2, 3), textcoords="offset points", ha="right", fontsize=8, color=INK)
    low = knee / 4
    ax.annotate(
        f"copy, {number(last['copy_gbps'])} GB/s", (low, low * last["copy_gbps"]), (0, 5), textcoords="offset points",
        fontsize=8, color=INK, rotation=45, rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    named: dict[str, tuple[float, float]] = {}
    for x, r in zip(xs, rows):
        part = r["group"].startswith("part ")  # the step's parts are ours, too
        ours = part or _is_ours(r["provider"])
        y = 1e3 * r["tflops"]
        ax.plot(x, y, "o", markersize=6 if ours else 4.5, color=OURS if ours else OTHERS, zorder=2 + ours)
        if ours and r["part"] in ("ops", "step"):
            named.setdefault(r["provider"] if part else r["group"].split()[0].replace("_", " "), (x, y))
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.set_ylim(bottom=min(1e3 * r["tflops"] for r in rows) / 2)
    order = sorted(named, key=lambda name: named[name][1])
    for name, y in zip(order, _spread([math.log10(named[name][1]) for name in order], 0.07)):
        x, above = named[name][0], named[name][1] > named[name][0] * last["copy_gbps"]
        x, side = (x / 1.12, "right") if above else (x * 1.12, "left")
        ax.annotate(name, (x, 10**y), fontsize=8.5, color=OURS, va="center", ha=side)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("FLOPs per byte that cannot be avoided", fontsize=8.5, color=INK)
    _clean(ax, "GFLOP/s of every op and its roof: ours in blue, everyone else in grey")
    _save(figure, path, last)
    return None


def _lines(ax: Axes, rows: Sequence[Record], x: str, y: str) -> None:
    """A line per provider over x, named at its end."""
    by: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        by.setdefault(r["provider"], []).append((r[x], r[y]))
    lines = {provider: sorted(points) for provider, points in by.items() if len(points) > 1}
    top = max(value for points in lines.values() for _, value in points)
    names = sorted(lines, key=lambda name: lines[name][-1][1])
    for name, place in zip(names, _spread([lines[name][-1][1] for name in names], 0.07 * top)):
        color = OURS if _is_ours(name) else FAINT
        ax.plot(*zip(*lines[name]), marker="o", markersize=4, linewidth=1.6, color=color, zorder=2 + _is_ours(name))
        end = (lines[name][-1][0], place)
        ax.annotate(name, end, (7, 0), textcoords="offset points", va="center", fontsize=8.5, color=color)
    ax.margins(x=0.08)
    ax.set_ylim(0, 1.12 * top)
    ax.set_xticks(sorted({r[x] for r in rows}))


def _series(records: list[Record], x: str) -> list[Record]:
    """Steps that differ in x alone: those like the first one in all else."""
    rows = [r for g, rows in groups(records, "step").items() if g.startswith("step ") for r in _timed(rows)]
    names = [name for name in ("arch", "batch", "n_local", "out_dim", "dtype") if name != x]
    return [r for r in rows if all(r[name] == rows[0][name] for name in names)]


def scaling(records: list[Record], path: Path) -> Lacking | None:
    """Images per second over the batch, and over the local crops."""
    panels = [("batch", "images a step"), ("n_local", "local crops beside the two globals")]
    panels = [(x, words) for x, words in panels if len({r[x] for r in _series(records, x)}) > 1]
    if not panels:
        return "scaling (one batch size and one number of crops was measured)"
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    for ax, (x, words) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        rows = _series(records, x)
        _lines(ax, rows, x, "images_per_s")
        first = rows[0]
        fixed = f"2+{first['n_local']} crops" if x == "batch" else f"batch {first['batch']}"
        _clean(ax, f"Training step, images/s\n{first['arch']}, {fixed}, {first['dtype']}")
        ax.set_xlabel(words, fontsize=8.5, color=INK)
    _save(figure, path, _series(records, panels[0][0])[0])
    return None


def memory(records: list[Record], path: Path) -> Lacking | None:
    """Peak memory over the batch on a GPU; what autograd keeps for the backward pass on a CPU."""
    rows = _series(records, "batch")
    key = next((key for key in ("peak_gib", "activations_gib") if sum(key in r for r in rows) > 1), None)
    rows = [r for r in rows if key in r]
    if key is None or len({r["batch"] for r in rows}) < 2:
        return "memory (not measured for two batch sizes)"
    figure = Figure(figsize=(WIDTH * 0.62, 3.0), layout="constrained")
    ax = figure.subplots()
    _lines(ax, rows, "batch", key)
    what = "Peak memory of a step, GiB" if key == "peak_gib" else "Kept for the backward pass, GiB"
    _clean(ax, f"{what}\n{rows[0]['arch']}, 2+{rows[0]['n_local']} crops, {rows[0]['dtype']}")
    ax.set_xlabel("images a step", fontsize=8.5, color=INK)
    _save(figure, path, rows[0])
    return None


def breakdown_picture(records: list[Record], parts: dict[str, tuple[float, float]], path: Path) -> Lacking | None:
    """Each part of the step: measured, and as the model has it below the measured ceilings."""
    if not parts:
        return "breakdown (the step's parts were not measured)"
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    ax = figure.subplots()
    names = list(parts)[::-1]
    for i, name in enumerate(names):
        ms, least = parts[name]
        ax.barh(i + 0.18, ms, height=0.34, color=OURS)
        ax.barh(i - 0.18, least, height=0.34, color=OTHERS)
        ax.annotate(
            f"{number(ms)} ms",
            (ms, i + 0.18),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=OURS,
        )
        words = f"model {number(least)} ms"
        ax.annotate(
            words, (least, i - 0.18), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color=FAINT
        )
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, 1.2 * max(max(pair) for pair in parts.values()))
    part = next(r for r in measured(records).values() if r["part"] == "step" and r["group"].startswith("part "))
    _clean(ax, f"Where the step's time goes: {part['group'].removeprefix('part ')}", bars=True)
    _save(figure, path, part)
    return None


def training(records: list[Record], path: Path) -> Lacking | None:
    """Loss curves of ours and the plain step over each other, k-NN and seconds of both."""
    pairs = []
    for rows in groups(records, "train").values():
        by = {r["provider"]: r for r in rows if "losses" in r}
        if {"ours", "plain"} <= by.keys():
            pairs.append((by["ours"], by["plain"]))
    if not pairs:
        return "training (no seed was trained by both)"
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    for ax, (ours, plain) in zip(axes, pairs):
        ax.plot(ours["losses"], color=OURS, linewidth=4, alpha=0.4, label="ours", solid_capstyle="round")
        ax.plot(plain["losses"], color=INK, linewidth=1, linestyle=(0, (3, 2)), label="plain")
        knn = f"k-NN {ours['knn']:.3f} ours, {plain['knn']:.3f} plain"
        seconds = f"{ours['seconds']:.0f} s ours, {plain['seconds']:.0f} s plain"
        _clean(ax, f"Digits, loss, seed {ours['seed']}\n{knn}\n{seconds}")
        ax.set_xlabel("step", fontsize=8.5, color=INK)
    axes[0].legend(frameon=False, fontsize=8.5, loc="upper right")
    _save(figure, path, pairs[0][0])
    return None


def draw_all(
    records: list[Record], parts: dict[str, tuple[float, float]], folder: Path
) -> tuple[dict[str, str], list[Lacking]]:
    """({file: what it shows}, why the others are not drawn)."""
    pictures: dict[str, tuple[str, Callable[[Path], Lacking | None]]] = {
        "throughput.png": ("images per second, step and loader", lambda path: throughput(records, path)),
        "ops.png": ("bandwidth of the ops against a copy", lambda path: ops(records, path)),
        "roofline.png": ("every op and its roof", lambda path: roofline(records, path)),
        "breakdown.png": (
            "the step's parts beside the model", lambda path: breakdown_picture(records, parts, path),
        ),
        "scaling.png": ("images per second over batch and crops", lambda path: scaling(records, path)),
        "memory.png": ("memory over the batch", lambda path: memory(records, path)),
        "train.png": ("the same training twice", lambda path: training(records, path)),
    }  # fmt: skip
    drawn, lacking = {}, []
    for name, (words, draw) in pictures.items():
        reason = draw(folder / name)
        if reason:
            lacking.append(reason)
        else:
            drawn[name] = words
    return drawn, lacking
