"""One format for every figure: a JSON object a line, appended the moment it is known.

A record has name (part/group/provider), part, group and provider, and either a time (median_ms, p20_ms, p80_ms, and the
rates that follow from it), or `failed` with what its check found, or `absent` with why there is nothing to measure. A
line `{"planned": [names]}` opens each run, so that one that was killed can say what it lacks.
"""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(file: Path, record: Record) -> None:
    """Add a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def read(path: Path) -> list[Record]:
    """The lines of a folder's results.jsonl, or of a file; one cut off by a killed run is left out."""
    file = path / "results.jsonl" if path.is_dir() else path
    records = []
    for text in file.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(text))
    return records


def latest(records: list[Record]) -> dict[str, Record]:
    """By name; one measured twice counts as it was the last time."""
    return {record["name"]: record for record in records if "name" in record}


def measured(records: list[Record]) -> dict[str, Record]:
    """By name, those that carry a time."""
    return {name: record for name, record in latest(records).items() if "median_ms" in record}


def missing(records: list[Record]) -> list[str]:
    """Names that were planned and never came to anything."""
    done = latest(records)
    planned = dict.fromkeys(name for record in records for name in record.get("planned", []))
    return [name for name in planned if name not in done]


def groups(records: list[Record], part: str) -> dict[str, list[Record]]:
    """A part's records side by side: {group: one per provider}, those without a time included."""
    found: dict[str, list[Record]] = {}
    for record in latest(records).values():
        if record["part"] == part:
            found.setdefault(record["group"], []).append(record)
    return found


def fastest(group: list[Record], ours: bool) -> Record | None:
    """Of the providers of a group that are ours, or of all others; None where there is none."""
    found = [r for r in group if "median_ms" in r and r["provider"].startswith("ours") == ours]
    return min(found, key=lambda r: float(r["median_ms"]), default=None)


def number(x: float) -> str:
    """Three digits, whatever the size."""
    return f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x)))) if x else 0}f}"


def rate(record: Record) -> tuple[str, str]:
    """(what is done per second, share of the ceiling that is nearer), for a reader."""
    copy, matmul = record.get("share_of_copy", 0.0), record.get("share_of_matmul", 0.0)
    share = f"{max(copy, matmul):.0%} of {'copy' if copy > matmul else 'matmul'}" if copy or matmul else ""
    if "images_per_s" in record:
        return f"{number(record['images_per_s'])} images/s", share
    if not share:
        return "", ""
    return (f"{number(record['gbps'])} GB/s" if copy > matmul else f"{number(record['tflops'])} TFLOP/s"), share
