"""Did anything get slower? Two files of records, and the spread that each measured itself."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a folder's results.jsonl, or of a file; a line cut off by a killed run is left out."""
    file = path / "results.jsonl" if path.is_dir() else path
    records = []
    for text in file.read_text().splitlines():
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return records


def measured(records: list[Record]) -> dict[str, Record]:
    """By name, those that carry a time; a name measured twice counts as it was measured last."""
    return {record["name"]: record for record in records if "median_ms" in record}


def slower(before: list[Record], after: list[Record]) -> list[str]:
    """One line per name whose median grew by more than both runs' p20 to p80 spread.

    Raises ValueError where the two share no name, or were measured on different devices.
    """
    old, new = measured(before), measured(after)
    shared = [name for name in old if name in new]
    if not shared:
        raise ValueError(f"records: expected a name in both, got {sorted(old)} and {sorted(new)}")
    lines = []
    for name in shared:
        a, b = old[name], new[name]
        if a["device"] != b["device"]:
            raise ValueError(f"{name}: expected the same device twice, got {a['device']} and {b['device']}")
        spread_ms = (a["p80_ms"] - a["p20_ms"]) + (b["p80_ms"] - b["p20_ms"])
        if b["median_ms"] - a["median_ms"] > spread_ms:
            lines.append(f"{name}: {a['median_ms']:.3f} -> {b['median_ms']:.3f} ms (spread {spread_ms:.3f})")
    return lines


def missing(records: list[Record]) -> list[str]:
    """Names that the run planned, in its first line, and never measured."""
    planned = [name for record in records for name in record.get("planned", [])]
    done = measured(records)
    return [name for name in planned if name not in done]
