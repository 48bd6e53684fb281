"""python -m bench PART [--quick] [--continue] [--out DIR] | report DIR | compare A B | counted FILE [RUN].

Parts: ceilings, ops, attention, step, pipeline, train, or all of them. Each record is on disk the moment it is known.
"""

import argparse
import datetime
import importlib.util
import os
import re
import sys
from pathlib import Path

from bench import counted
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
    "--continue-on-collection-errors",
]
NOTHING_CHOSEN = 5  # as pytest has it


def _measure(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("measuring needs pytest-benchmark: pip install -e '.[bench]'")
    import pytest

    os.environ |= {"BENCH_QUICK": str(int(args.quick)), "BENCH_CONTINUE": str(int(args.go_on))}
    from bench.measure import device_name  # which looks at them

    slug = re.sub(r"[^\w]+", "-", device_name()).strip("-")
    out = (args.out or HERE / "results" / f"{datetime.date.today()}-{slug}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = PARTS if args.command == "all" else (args.command,)
    files = [str(HERE / f"test_{part}.py") for part in parts]
    chosen = ["-k", args.only] if args.only else []
    os.environ["BENCH_OUT"] = str(out)
    code = pytest.main([*PYTEST, *chosen, *files])
    if code == pytest.ExitCode.INTERRUPTED:
        print(f"\nstopped; what was measured: python -m bench report {out}")
        return 130
    if code == NOTHING_CHOSEN:
        print(f"nothing to measure: -k {args.only!r} chose none of it")
        return NOTHING_CHOSEN
    try:
        print(f"\n{report(read(out), out, readme=args.readme)}\nwrote {out}")
    except (OSError, ValueError) as error:
        print(f"\nno report: {error}")
    return min(int(code), 1)


def _report(args: argparse.Namespace) -> int:
    print(report(read(args.folder), args.folder, args.link_gbps, args.readme))
    return 0


def _compare(args: argparse.Namespace) -> int:
    slower, notes = compare(read(args.before), read(args.after))
    print("\n".join([*notes, *slower] if slower else [*notes, "nothing of ours got slower by more than the spread"]))
    return 1 if slower else 0


def _counted(args: argparse.Namespace) -> int:
    if args.run_prefix:
        counted.append(args.file, counted.count(args.run_prefix, args.facts, args.predicted))
    print(counted.table(read(args.file)))
    return 0


def main() -> int:
    """The exit code. 1: a check failed or something got slower, 2: a wrong command, 5: nothing chosen, 130: stopped."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in (*PARTS, "all"):
        run = commands.add_parser(part, help="everything" if part == "all" else f"measure {part}")
        run.add_argument("--quick", action="store_true", help="small cases, few repeats")
        run.add_argument("--continue", dest="go_on", action="store_true", help="leave out what DIR has of this host")
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
    shown = commands.add_parser("counted", help="counted figures of a step side by side, nothing timed")
    shown.add_argument("file", type=Path, help="of JSON lines")
    shown.add_argument("run_prefix", nargs="?", metavar="RUN", help=counted.RUN)
    shown.add_argument("facts", nargs="*", metavar="NAME=VALUE", help="what RUN does not say: commit=4918220")
    shown.add_argument(
        "--predicted", nargs=2, type=float, metavar="MS", help="a time that was not measured: ideal, expected"
    )
    shown.set_defaults(run=_counted)
    args = parser.parse_args()
    try:
        return int(args.run(args))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
