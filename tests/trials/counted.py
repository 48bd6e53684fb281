"""Counted, not timed: what a step compiles, launches and keeps, as a line of JSON, and such lines side by side.

cd tests && python -m trials.counted ../bench/results/counted/counted-not-timed.jsonl [RUN [NAME=VALUE ...]]

Bytes and launches that a change adds are seen so without a device. A RUN is the prefix of two files that whatever
watched the step left behind.
RUN.kernels.json: {"case": {"arch", "batch", "mode", "dtype", "torch", "phase", "peak_gib", "graph_breaks": {why: n}},
"graphs": [{"backward", "nodes": [{"kind", "reads", "writes" (bytes), "extern" (where no kernel is generated)}]}]}.
RUN.launches.tsv, a line per launch: phase, 1 inside of a graph's replay, kind (kernel, gemm, copy, memset, ...), name;
a gemm goes on with its layout and m=M n=N k=K batch=B. The phase that counts is case["phase"].
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

from bench.records import Record, append, read

RUN = "prefix of RUN.kernels.json and RUN.launches.tsv, described in trials/counted.py: its figures are added to FILE"
CASE = ("torch", "arch", "batch", "mode", "dtype")
VIEW = "NopKernelSchedulerNode"  # of Inductor: nothing is launched for it


def _kind(kind: str, name: str) -> str:
    """Of a launch; kernels that Inductor generates are called triton triton_..., others by their own names."""
    if kind != "kernel":
        return kind
    if name.startswith("triton "):
        return "generated" if name.startswith("triton triton_") else "of the project"
    return "attention" if re.search(r"flash|fmha|attention", name) else "of PyTorch"


def count(prefix: Path, facts: list[str], predicted: tuple[float, float] | None = None) -> Record:
    """The record of a run. facts: NAME=VALUE, added as they are. predicted: ms, ideal and expected.

    Raises ValueError for a fact without a value.
    """
    if wrong := [fact for fact in facts if "=" not in fact]:
        raise ValueError(f"expected NAME=VALUE, got {wrong[0]!r}")
    run = json.loads(Path(f"{prefix}.kernels.json").read_text())
    case = run["case"]
    rows = [line.split("\t") for line in Path(f"{prefix}.launches.tsv").read_text().splitlines()]
    rows = [row for row in rows if row[0] == case["phase"] and (row[1] == "1" or case["mode"] != "graph")]
    rows = [row for row in rows if row[2] not in ("sync", "graph", "host")]
    launches = Counter(_kind(row[2], row[3]) for row in rows)
    found: Record = dict(fact.split("=", 1) for fact in facts) | {name: case[name] for name in CASE}
    found["peak_gib"] = round(case["peak_gib"], 2)
    found |= {"timed": False, "graph breaks": sum(case["graph_breaks"].values()), "launches": len(rows)}
    found |= {f"launches, {kind}": n for kind, n in launches.most_common()}
    for direction in ("forward", "backward"):
        graphs = [graph for graph in run["graphs"] if graph["backward"] == (direction == "backward")]
        nodes = [node for graph in graphs for node in graph["nodes"] if "extern" not in node]
        n_bytes = sum(node.get("reads", 0) + node.get("writes", 0) for node in nodes if node["kind"] != VIEW)
        found[f"generated kernels, GB {direction}"] = round(n_bytes / 1e9, 3)
    sides = [map(int, re.findall(r"=(\d+)", row[5])) for row in rows if row[2] == "gemm"]
    found["GEMM, TFLOP"] = round(sum(2 * math.prod(mnk) for mnk in sides) / 1e12, 3)
    return found | {f"PREDICTED ms, {name}": ms for name, ms in zip(("ideal", "expected"), predicted or ())}


def table(records: list[Record]) -> str:
    """A row per figure, a column per record."""
    names = dict.fromkeys(name for record in records for name in record)
    rows = [[name, *(f"{record.get(name, '')}" for record in records)] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> int:
    """The exit code. 2: a wrong command."""
    parser = argparse.ArgumentParser(prog="python -m trials.counted", description=__doc__)
    parser.add_argument("file", type=Path, help="of JSON lines")
    parser.add_argument("run_prefix", nargs="?", metavar="RUN", help=RUN)
    parser.add_argument("facts", nargs="*", metavar="NAME=VALUE", help="what RUN does not say: commit=4918220")
    parser.add_argument("--predicted", nargs=2, type=float, metavar="MS", help="not measured: ideal, expected")
    args = parser.parse_args()
    try:
        if args.run_prefix:
            append(args.file, count(args.run_prefix, args.facts, args.predicted))
        print(table(read(args.file)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
