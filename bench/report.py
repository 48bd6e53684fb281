"""Records as Markdown: a table per part, the step beside its model, what is absent, failed or missing, and pictures.

Nothing is computed here that the records do not hold, but for the model's figures, which are called so.
"""

from pathlib import Path

from bench import model
from bench.records import Record, groups, latest, measured, missing, number, times_baseline

PARTS = ("ceilings", "ops", "attention", "step", "pipeline", "train")  # in the order of `all`
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def header(records: list[Record]) -> str:
    """Where the last record was measured."""
    r = list(measured(records).values())[-1]
    text = f"{r['device']}, power limit {r['power_limit']}, driver {r['driver']}, torch {r['torch']}, "
    text += f"triton {r['triton']}, xformers {r['xformers']}, commit {r['commit']}, {r['date'][:10]}. Ceilings: "
    text += f"copy {number(r['copy_gbps'])} GB/s, matmul {number(r['matmul_bf16_tflops'])} TFLOP/s in bf16 and "
    text += f"{number(r['matmul_fp32_tflops'])} in fp32."
    if any(r["quick"] for r in measured(records).values()):
        whole = dict.fromkeys(r["part"] for r in measured(records).values() if not r["quick"])
        text += f" A quick run, small cases and few repeats{', but for ' if whole else ''}{', '.join(whole)}."
    return text if r["driver"] != "none" else f"{text} CPU figures: nothing here was measured on a GPU."


def _rate(r: Record) -> tuple[str, str]:
    """(what is done per second, share of the ceiling that is nearer)."""
    copy, matmul = r.get("share_of_copy", 0.0), r.get("share_of_matmul", 0.0)
    share = f"{max(copy, matmul):.0%} of {'copy' if copy > matmul else 'matmul'}" if max(copy, matmul) else ""
    if "images_per_s" in r:
        return f"{number(r['images_per_s'])} images/s", share
    if not share:
        return "", ""
    return (f"{number(r['gbps'])} GB/s" if copy > matmul else f"{number(r['tflops'])} TFLOP/s"), share


def table(records: list[Record], part: str) -> str:
    """A part's providers side by side; below it who is absent, and why."""
    lines = [f"| {part} | by | ms | p20 to p80 | | of the ceiling | x baseline |", "|---|---|--:|--:|--:|--:|--:|"]
    absent: dict[str, list[str]] = {}
    for group, rows in groups(records, part).items():
        for r in rows:
            if "absent" in r:
                absent.setdefault(r["absent"], []).append(r["provider"])
            if "median_ms" not in r:
                continue
            rate, share = _rate(r)
            times = times_baseline(r, rows)
            spread = f"{number(r['p20_ms'])} to {number(r['p80_ms'])}"
            cells = [group, r["provider"], number(r["median_ms"]), spread, rate, share, f"{times:.2f}" if times else ""]
            lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"{', '.join(dict.fromkeys(who))} ({why})" for why, who in absent.items()]
    return "\n".join(lines) + (f"\n\nAbsent: {'; '.join(reasons)}." if reasons else "")


def work_of(record: Record) -> model.Workload:
    """The model's view of a step's record."""
    itemsize = 2 if record["dtype"] == "bf16" else 4
    names = ("arch", "batch", "n_local", "out_dim")
    return model.Workload(**{name: record[name] for name in names}, itemsize=itemsize)


def breakdown(records: list[Record]) -> dict[str, tuple[float, float]]:
    """{part of the step: (measured ms, the model's ms)}; attention taken out of the backbone."""
    parts = {
        r["provider"]: r
        for rows in groups(records, "step").values()
        for r in rows
        if r["group"].startswith("part ") and "median_ms" in r
    }
    if not {"backbone", "attention", "head", "loss", "optimizer"} <= parts.keys():
        return {}
    work, ceilings = work_of(parts["head"]), model.Ceilings.of(parts["head"], parts["head"]["dtype"], launches=True)
    least = {name: 1e3 * ceilings.seconds(cost) for name, cost in model.parts(work).items()}
    ms = {name: r["median_ms"] for name, r in parts.items()}
    found = {"linears, norms, GELU": (ms["backbone"] - ms["attention"], least["linears"] + least["pointwise"])}
    return found | {name: (ms[name], least[name]) for name in ("attention", "head", "loss", "optimizer")}


def model_table(records: list[Record]) -> str:
    """The breakdown beside the model, and how far the whole step is from it."""
    rows = breakdown(records)
    if not rows:
        return ""
    lines = ["| part of the step | measured ms | model ms | measured / model |", "|---|--:|--:|--:|"]
    total = sum(a for a, _ in rows.values()), sum(b for _, b in rows.values())
    for name, (ms, least) in [*rows.items(), ("sum of the parts", total)]:
        lines.append(f"| {name} | {number(ms)} | {number(least)} | {number(ms / least)} |")
    return "\n".join(lines)


def projection(records: list[Record], link_gbps: float) -> str:
    """Our fastest step of each case on 8 and 64 GPUs."""
    lines = [
        f"PROJECTION, not a measurement: each GPU sends {link_gbps:g} GB/s, as was given; a ring over the gradients.",
        "",
        "| step | GPUs | all-reduce | exposed: efficiency | hidden behind backward |",
        "|---|--:|--:|--:|--:|",
    ]
    for group, rows in groups(records, "step").items():
        ours = [r for r in rows if r["provider"].startswith("ours") and "median_ms" in r]
        if not group.startswith("step ") or not ours:
            continue
        best = min(ours, key=lambda r: float(r["median_ms"]))
        work = work_of(best)
        n_parameters = model.parameters(work.shape, work.out_dim)
        for n in (8, 64):
            p = model.project(n, best["median_ms"] / 1e3, n_parameters, link_gbps, work.itemsize)
            reduce = f"{number(p.allreduce_bytes / 1e9)} GB, {number(1e3 * p.allreduce_seconds)} ms"
            lines.append(
                f"| {best['name']} | {n} | {reduce} | {p.efficiency_exposed:.0%} | {p.efficiency_hidden:.0%} |"
            )
    return "\n".join(lines)


def train_table(records: list[Record]) -> str:
    """What both ended at, seed by seed, and how far their curves are apart."""
    lines = ["| digits | k-NN before | ours | plain | s ours | s plain |", "|---|--:|--:|--:|--:|--:|"]
    for group, rows in groups(records, "train").items():
        by = {r["provider"]: r for r in rows if "knn" in r}
        if {"ours", "plain"} <= by.keys():
            ours, plain = by["ours"], by["plain"]
            knn = f"{ours['knn_before']:.4f} | {ours['knn']:.4f} | {plain['knn']:.4f}"
            lines.append(f"| {group} | {knn} | {ours['seconds']:.0f} | {plain['seconds']:.0f} |")
    text = "\n".join(lines) if len(lines) > 2 else ""
    for r in measured(records).values():
        if "curves_apart" in r:
            text += f"\n\nLoss curves of ours and plain: {r['curves_apart']:.2g} nats apart on average"
            text += f", those of two seeds {r['seeds_apart']:.2g}." if "seeds_apart" in r else "."
    return text


def hottest_table(records: list[Record]) -> str:
    """The ten most expensive kernels of our step, what it launches, and how much of the time the device idles."""
    r = next((r for r in measured(records).values() if "hottest" in r), None)
    if r is None:
        return ""
    lines = [f"| {r['group'].removeprefix('profile ')}, {r['provider']} | ms a step | calls |", "|---|--:|--:|"]
    lines += [f"| `{k['kernel']}` | {number(k['ms'])} | {number(k['calls'])} |" for k in r["hottest"]]
    what = "kernel launches" if r["driver"] != "none" else "ops"
    text = f"{r['launches_per_step']:,.0f} {what} a step, {number(r['device_ms_per_step'])} ms of work"
    text += f"; the device idles {r['idle_share']:.0%} of the time." if "idle_share" in r else "."
    return "\n".join(lines) + f"\n\n{text}"


def waiting(records: list[Record]) -> str:
    """How long training from files waits for them."""
    rows = [r for r in measured(records).values() if "data_wait" in r]
    return "\n".join(f"{r['name']}: {r['data_wait']:.1%} of the time waiting for data." for r in rows)


SUMMARY = (  # part, start of the group, ours, theirs, what it is
    ("step", "step ", ("ours graph", "ours eager"), "plain", "the step"),
    ("pipeline", "loader 0 workers", ("ours fast",), "Pillow", "JPEG to crops, one core"),
    ("pipeline", "augment", ("ours fast",), "Pillow", "crops of decoded photographs, one core"),
    ("pipeline", "decode", ("ours",), "Pillow", "JPEG to pixels, one core"),
    ("ops", "clip_adamw_ema", ("ours",), "plain", "clip, AdamW, EMA"),
    ("ops", "ema_update", ("ours",), "plain", "EMA alone"),
    ("ops", "dino_loss", ("ours",), "plain", "loss and gradient"),
)


def summary(records: list[Record]) -> str:
    """One table for the README: the first group of each kind, whichever way it went."""
    r = list(measured(records).values())[-1]
    lines = [f"| {r['device']} | | plain or Pillow | ours | times as fast |", "|---|---|--:|--:|--:|"]
    for part, start, ours, theirs, what in SUMMARY:
        for group, rows in groups(records, part).items():
            by = {r["provider"]: r for r in rows if "median_ms" in r}
            mine = next((by[name] for name in ours if name in by), None)
            if not group.startswith(start) or mine is None or theirs not in by:
                continue
            key, unit = ("images_per_s", "images/s") if "images_per_s" in mine else ("gbps", "GB/s")
            case = group.removeprefix(start).strip() or ""
            speed = f"{number(by[theirs][key])} {unit} | {number(mine[key])} {unit}"
            lines.append(f"| {what} | {case} | {speed} | {by[theirs]['median_ms'] / mine['median_ms']:.2f} |")
            break
    for r in measured(records).values():
        if "knn_ours" in r:
            what = f"digits, {r['n_steps']} steps, {r['n_seeds']} seed{'' if r['n_seeds'] == 1 else 's'}"
            lines.append(f"| k-NN of equal training | {what} | {r['knn_plain']:.4f} | {r['knn_ours']:.4f} | |")
    return "\n".join(lines)


def put_into(readme: Path, text: str) -> None:
    """Replace what is between the markers. Raises ValueError where they are missing."""
    whole = readme.read_text()
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{readme}: expected the markers {BEGIN} and {END}")
    before, after = whole[: whole.index(BEGIN) + len(BEGIN)], whole[whole.index(END) :]
    readme.write_text(f"{before}\n{text}\n{after}")


def report(records: list[Record], folder: Path, link_gbps: float | None = None, readme: Path | None = None) -> str:
    """The whole report, also written to folder/report.md beside its pictures. Raises ValueError without a time."""
    if not measured(records):
        raise ValueError(f"{folder}: expected a record with a time, got none of {len(latest(records))}")
    sections = [header(records), *(table(records, part) for part in PARTS if groups(records, part))]
    sections += [train_table(records), model_table(records), hottest_table(records), waiting(records)]
    if link_gbps:
        sections.append(projection(records, link_gbps))
    try:
        from bench.pictures import draw_all
    except ImportError as error:
        drawn, lacking = {}, [f"{error}"]
    else:
        drawn, lacking = draw_all(records, breakdown(records), folder)
    sections += [f"![{words}]({name})" for name, words in drawn.items()]
    sections += [f"Not drawn: {reason}." for reason in lacking]
    sections += [f"FAILED: {r['name']}: {r['failed']}" for r in latest(records).values() if "failed" in r]
    sections += [f"Missing: {name} was planned and not measured." for name in missing(records)]
    text = "\n\n".join(section for section in sections if section)
    (folder / "report.md").write_text(text + "\n")
    if readme:
        put_into(readme, summary(records))
    return text
