"""Did anything of ours get slower? Two runs, the spread that each measured, and what else changed between them.

A machine may be slower today than yesterday. What is not ours (plain PyTorch, peers, ceilings) did not change, so the
median of its ratios is how much slower the machine is; the old times are stretched by that before they are compared.
"""

from statistics import median

from bench.records import Record, latest, measured

TOLERANCE = 0.03  # below this nothing is called a change: clocks and neighbours do as much
MIN_CONTROLS = 3  # records that are not ours, before their median says anything of the machine


def is_ours(record: Record) -> bool:
    return str(record["provider"]).startswith("ours")


def machine(old: dict[str, Record], new: dict[str, Record]) -> float:
    """How many times as slow the machine itself was in the second run; 1 where too little tells."""
    ratios = [new[n]["median_ms"] / old[n]["median_ms"] for n in old if n in new and not is_ours(new[n])]
    return median(ratios) if len(ratios) >= MIN_CONTROLS else 1.0


def compare(before: list[Record], after: list[Record]) -> tuple[list[str], list[str]]:
    """(a line per record of ours that got slower, notes).

    Slower: the new median above the old p80, the new p20 above the old median, and by more than TOLERANCE; or a
    measurement that now fails its check. Raises ValueError where the two share no name, or not the device.
    """
    old, new = measured(before), measured(after)
    shared = [name for name in old if name in new]
    if not shared:
        raise ValueError(f"records: expected a name in both, got {sorted(old)} and {sorted(new)}")
    devices = {str(side[name]["device"]) for side in (old, new) for name in shared}
    if len(devices) > 1:
        raise ValueError(f"expected the same device twice, got {' and '.join(sorted(devices))}")
    factor = machine(old, new)
    notes = [f"the machine: {factor:.2f} times the time of the first run, by what is not ours"]
    notes += [f"only in the first: {name}" for name in old if name not in new]
    notes += [f"only in the second: {name}" for name in new if name not in old]
    lines = []
    for name in shared:
        a, b = old[name], new[name]
        slower = b["median_ms"] > factor * a["p80_ms"] and b["p20_ms"] > factor * a["median_ms"]
        if is_ours(b) and slower and b["median_ms"] > (1 + TOLERANCE) * factor * a["median_ms"]:
            ratio = b["median_ms"] / a["median_ms"] / factor
            lines.append(f"slower: {name}: {a['median_ms']:.3f} -> {b['median_ms']:.3f} ms ({ratio:.2f} times)")
    failed = [r for r in latest(after).values() if "failed" in r and r["name"] in old]
    return lines + [f"no longer right: {r['name']}: {r['failed']}" for r in failed], notes
