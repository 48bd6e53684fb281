"""Did anything of ours get slower? Two runs, the spread that each measured, and what else changed between them.

A machine may be slower today than yesterday, or for the minute that one group took. What is not ours (plain PyTorch,
peers, ceilings) did not change: its ratios say how much slower the machine was, and their scatter how much two runs
differ for no reason. The old times are stretched by the one, and the other is no change.
"""

from statistics import median, quantiles

from bench.records import Record, latest, measured

TOLERANCE = 0.03  # below this nothing is called a change, however little a run scatters: clocks do as much
MIN_CONTROLS = 3  # records that are not ours, before they say anything of the machine


def is_ours(record: Record) -> bool:
    return str(record["provider"]).startswith("ours")


class Machine:
    """How many times as slow the machine was in the second run, by what is not ours in both."""

    def __init__(self, old: dict[str, Record], new: dict[str, Record]) -> None:
        self.ratios: dict[tuple[str, str], list[float]] = {}
        for name, record in old.items():
            if name in new and not is_ours(record):
                where = (record["part"], record["group"])
                self.ratios.setdefault(where, []).append(new[name]["median_ms"] / record["median_ms"])
        every = [ratio for ratios in self.ratios.values() for ratio in ratios]
        known = len(every) >= MIN_CONTROLS
        self.factor = median(every) if known else 1.0
        scatter = [abs(ratio / self.factor - 1) for ratio in every]
        self.tolerance = max(TOLERANCE, quantiles(scatter, n=5)[-1]) if known else TOLERANCE

    def during(self, record: Record) -> float:
        """While a record's group was measured: as in the whole run, or slower if its neighbours were."""
        ratios = self.ratios.get((record["part"], record["group"]))
        return max(self.factor, median(ratios)) if ratios else self.factor


def compare(before: list[Record], after: list[Record]) -> tuple[list[str], list[str]]:
    """(a line per record of ours that got slower, notes).

    Slower: the new median above the old p80, the new p20 above the old median, and by more than what is not ours
    scatters; or a measurement that now fails its check. Raises ValueError where the two share no name or no device.
    """
    old, new = measured(before), measured(after)
    shared = [name for name in old if name in new]
    if not shared:
        raise ValueError(f"records: expected a name in both, got {sorted(old)} and {sorted(new)}")
    elsewhere = [name for name in shared if old[name]["device"] != new[name]["device"]]
    if elsewhere == shared:
        devices = sorted({str(side[name]["device"]) for side in (old, new) for name in shared})
        raise ValueError(f"expected the same device twice, got {' and '.join(devices)}")
    for name in elsewhere:
        shared.remove(name)
        del old[name], new[name]
    machine = Machine(old, new)
    notes = [f"on another device: {name}" for name in elsewhere]
    notes += [f"what is not ours took {machine.factor:.2f} times as long, give or take {machine.tolerance:.0%}"]
    notes += [f"only in the first: {name}" for name in old if name not in new]
    notes += [f"only in the second: {name}" for name in new if name not in old]
    lines = []
    for name in filter(lambda name: is_ours(new[name]), shared):
        a, b, factor = old[name], new[name], machine.during(new[name])
        ratio = b["median_ms"] / a["median_ms"] / factor
        beyond_spread = b["median_ms"] > factor * a["p80_ms"] and b["p20_ms"] > factor * a["median_ms"]
        if beyond_spread and ratio > 1 + machine.tolerance:
            lines.append(f"slower: {name}: {a['median_ms']:.3f} -> {b['median_ms']:.3f} ms ({ratio:.2f} times)")
    failed = [r for r in latest(after).values() if "failed" in r and r["name"] in old]
    return lines + [f"no longer right: {r['name']}: {r['failed']}" for r in failed], notes
