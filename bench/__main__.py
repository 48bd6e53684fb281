"""python -m bench PART [--quick] [--out DIR] | report DIR | compare A B.

Parts: ceilings, ops, attention, step, pipeline, train, or all of them. Each record is on disk the moment it is known.
"""

import argparse
import datetime
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from bench.compare import compare
from bench.records import read
from bench.report import PARTS, report

HERE = Path(__file__).parent
PYTEST = [
    "-o",
    "addopts=",
    "--import-mode=importlib",
    "-q",
    "-s",
    "--no-header",
    "--no-summary",
    "--tb=short",
    "--benchmark-quiet",
]


def _measure(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("measuring needs pytest-benchmark: pip install -e '.[bench]'")
    from bench.measure import device_name

    slug = re.sub(r"[^\w]+", "-", device_name()).strip("-")
    out = (args.out or HERE / "results" / f"{datetime.date.today()}-{slug}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = PARTS if args.command == "all" else (args.command,)
    files = [str(HERE / f"test_{part}.py") for part in parts]
    chosen = ["-k", args.only] if args.only else []
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"BENCH_OUT": str(out), "BENCH_QUICK": str(int(args.quick)), "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", *PYTEST, "--benchmark-quiet", *chosen, *files]
    try:
        code = subprocess.run(command, cwd=HERE.parent, env=environment).returncode
    except KeyboardInterrupt:
        print(f"\nstopped; what was measured: python -m bench report {out}")
        return 130
    try:
        print(f"\n{report(read(out), out, readme=args.readme)}\nwrote {out}")
    except (OSError, ValueError) as error:
        print(f"\nno report: {error}")
    return min(code, 1)


def _report(args: argparse.Namespace) -> int:
    print(report(read(args.folder), args.folder, args.link_gbps, args.readme))
    return 0


def _compare(args: argparse.Namespace) -> int:
    slower, notes = compare(read(args.before), read(args.after))
    print("\n".join([*notes, *slower] if slower else [*notes, "nothing of ours got slower by more than the spread"]))
    return 1 if slower else 0


def main() -> int:
    """The exit code. 1: a check failed or something got slower, 2: the command was wrong, 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in (*PARTS, "all"):
        run = commands.add_parser(part, help="everything" if part == "all" else f"measure {part}")
        run.add_argument("--quick", action="store_true", help="small cases, few repeats")
        run.add_argument("--out", type=Path, metavar="DIR", help="folder of the results [bench/results/DATE-DEVICE]")
        run.add_argument("-k", dest="only", metavar="WORDS", help="only what pytest's -k chooses")
        run.add_argument("--readme", type=Path, metavar="FILE", help="put the summary into this file, too")
        run.set_defaults(run=_measure)
    shown = commands.add_parser("report", help="tables and pictures of a folder, and what is missing there")
    shown.add_argument("folder", type=Path, metavar="DIR")
    shown.add_argument("--link_gbps", type=float, metavar="X", help="GB/s of a GPU's link: projects to 8 and 64 GPUs")
    shown.add_argument("--readme", type=Path, metavar="FILE", help="put the summary into this file, too")
    shown.set_defaults(run=_report)
    both = commands.add_parser("compare", help="fails where something of ours got slower")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    both.set_defaults(run=_compare)
    args = parser.parse_args()
    try:
        return int(args.run(args))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
