"""Records as Markdown: a table per part, the step's hottest kernels, what is absent, failed or missing."""

from pathlib import Path

from bench.records import Record, fastest, groups, latest, measured, missing, number, rate

PARTS = ("ops", "attention", "step", "pipeline")  # in the order of `all`
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def header(records: list[Record]) -> str:
    """Where the last record was measured."""
    rows = measured(records).values()
    r = list(rows)[-1]
    text = f"{r['device']}, power limit {r['power_limit']}, driver {r['driver']}, torch {r['torch']}, "
    text += f"triton {r['triton']}, xformers {r['xformers']}, commit {r['commit']}, {r['date'][:10]}. Ceilings: "
    text += f"copy {number(r['copy_gbps'])} GB/s, matmul {number(r['matmul_bf16_tflops'])} TFLOP/s in bf16 and "
    text += f"{number(r['matmul_fp32_tflops'])} in fp32."
    quick = dict.fromkeys(row["part"] for row in rows if row["quick"])
    text += f" Quick, with few repeats: {', '.join(quick)}." if quick else ""
    return text if r["driver"] != "none" else f"{text} CPU figures: nothing here was measured on a GPU."


def table(records: list[Record], part: str) -> str:
    """A part's providers side by side; below it who is absent, and why."""
    lines = [f"| {part} | by | ms | p20 to p80 | | of the ceiling | x best other |", "|---|---|--:|--:|--:|--:|--:|"]
    absent: dict[str, list[str]] = {}
    for group, rows in groups(records, part).items():
        other = fastest(rows, ours=False)
        for r in rows:
            if "absent" in r:
                absent.setdefault(r["absent"], []).append(r["provider"])
            if "median_ms" not in r:
                continue
            spread = f"{number(r['p20_ms'])} to {number(r['p80_ms'])}"
            times = f"{other['median_ms'] / r['median_ms']:.2f}" if other and len(rows) > 1 else ""
            cells = [group, r["provider"], number(r["median_ms"]), spread, *rate(r), times]
            lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"{', '.join(dict.fromkeys(who))} ({why})" for why, who in absent.items()]
    return "\n".join(lines) + (f"\n\nAbsent: {'; '.join(reasons)}." if reasons else "")


def hottest_table(records: list[Record]) -> str:
    """The ten most expensive kernels of our step, what it launches, and how much of the time the device idles."""
    r = next((r for r in measured(records).values() if "hottest" in r), None)
    if r is None:
        return ""
    lines = [f"| {r['group'].removeprefix('profile ')}, {r['provider']} | ms a step | calls |", "|---|--:|--:|"]
    lines += [f"| `{kernel}` | {number(ms)} | {number(calls)} |" for kernel, ms, calls in r["hottest"]]
    what = "kernel launches" if r["driver"] != "none" else "ops"
    text = f"{r['launches_per_step']:,.0f} {what} a step, {number(r['device_ms_per_step'])} ms of work"
    if r["driver"] != "none":
        text += f"; the device idles {max(0.0, 1 - r['device_ms_per_step'] / r['median_ms']):.0%} of the time"
    return "\n".join(lines) + f"\n\n{text}."


IN_WORDS = {  # providers, to a reader who has not seen the benchmarks
    "plain": "plain PyTorch",
    "compiled": "PyTorch, compiled",
    "fused": "PyTorch, fused calls",
    "fused compiled": "PyTorch, fused calls, compiled",
    "library": "PyTorch, fused AdamW",
    "foreach lerp": "PyTorch, foreach",
}
SUMMARY = (  # part, start of the group, what it is
    ("step", "step ", "training step"),
    ("pipeline", "loader", "JPEG to crops"),
    ("ops", "clip_adamw_ema", "clip, AdamW, EMA"),
    ("ops", "ema_update", "EMA alone"),
    ("ops", "dino_loss", "loss and gradient"),
)


def summary(records: list[Record]) -> str:
    """One table for the README: the first group of each kind, ours beside the fastest other, whoever is faster."""
    first = next(iter(measured(records).values()))
    lines = [
        f"| {first['device']}, {first['date'][:10]} | | fastest other | its speed | fastdino | times as fast |",
        "|---|---|---|--:|--:|--:|",
    ]
    for part, start, what in SUMMARY:
        group, rows = next(((g, rows) for g, rows in groups(records, part).items() if g.startswith(start)), ("", []))
        ours, other = fastest(rows, ours=True), fastest(rows, ours=False)
        if ours and other:
            how = ours["provider"].removeprefix("ours").strip(", ")
            theirs = IN_WORDS.get(other["provider"], other["provider"])
            cells = [what, group.removeprefix(start).strip(), theirs, rate(other)[0], rate(ours)[0]]
            cells[-1] += f" ({how})" if how else ""
            lines.append(f"| {' | '.join(cells)} | {other['median_ms'] / ours['median_ms']:.2f} |")
    return "\n".join(lines)


def put_into(readme: Path, text: str) -> None:
    """Replace what is between the markers. Raises ValueError where they are missing."""
    whole = readme.read_text()
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{readme}: expected the markers {BEGIN} and {END}")
    before, after = whole[: whole.index(BEGIN) + len(BEGIN)], whole[whole.index(END) :]
    readme.write_text(f"{before}\n{text}\n{after}")


def report(records: list[Record], folder: Path, readme: Path | None = None) -> str:
    """The whole report, also written to folder/report.md beside its picture. Raises ValueError without a time."""
    if not measured(records):
        raise ValueError(f"{folder}: expected a record with a time, got none of {len(latest(records))}")
    sections = [header(records), *(table(records, part) for part in PARTS if groups(records, part))]
    sections.append(hottest_table(records))
    try:
        from bench.picture import throughput
    except ImportError as error:
        lacking = str(error)
    else:
        lacking = throughput(records, folder / "throughput.png")
    sections.append(f"Not drawn: {lacking}." if lacking else "![images per second, step and loader](throughput.png)")
    for r in latest(records).values():
        sections += [f"{r['name']}: {r['data_wait']:.1%} of the time waiting for data."] if "data_wait" in r else []
        sections += [f"FAILED: {r['name']}: {r['failed']}"] if "failed" in r else []
    sections += [f"Missing: {name} was planned and not measured." for name in missing(records)]
    text = "\n\n".join(section for section in sections if section)
    (folder / "report.md").write_text(text + "\n")
    if readme:
        put_into(readme, summary(records))
    return text
