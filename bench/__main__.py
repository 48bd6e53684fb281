"""python -m bench PART [--quick] [--continue] [--out DIR] [-k WORDS] | report DIR.

Parts: ops, attention, step, pipeline, or all of them. Each record is on disk the moment it is known,
and pytest-benchmark saves each run in DIR, for its own `pytest-benchmark compare`.
"""

import argparse
import datetime
import importlib.util
import os
import sys
from pathlib import Path

from bench.records import read
from bench.report import PARTS, report

HERE = Path(__file__).parent
TODAY = HERE / "results" / str(datetime.date.today())
PYTEST = "-o addopts= --import-mode=importlib -q -s --no-header --no-summary --tb=short --benchmark-quiet "
PYTEST += "--benchmark-autosave --continue-on-collection-errors"


def _measure(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("measuring needs pytest-benchmark: pip install -e '.[bench]'")
    import pytest

    os.environ |= {"BENCH_QUICK": str(int(args.quick)), "BENCH_CONTINUE": str(int(args.go_on))}
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["BENCH_OUT"] = str(out)
    files = [str(HERE / f"test_{part}.py") for part in (PARTS if args.command == "all" else (args.command,))]
    chosen = ["-k", args.only] if args.only else []
    code = pytest.main([*PYTEST.split(), f"--benchmark-storage=file://{out}", *chosen, *files])
    if code == pytest.ExitCode.INTERRUPTED:
        print(f"\nstopped; what was measured: python -m bench report {out}")
        return 130
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        print(f"nothing to measure: -k {args.only!r} chose none of it")
        return int(code)
    try:
        print(f"\n{report(read(out), out, args.readme)}\nwrote {out}")
    except (OSError, ValueError) as error:
        print(f"\nno report: {error}")
    return min(int(code), 1)


def main() -> int:
    """The exit code. 1: a check failed, 2: a wrong command, 5: nothing chosen, 130: stopped."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in (*PARTS, "all"):
        run = commands.add_parser(part, help="everything" if part == "all" else f"measure {part}")
        run.add_argument("--quick", action="store_true", help="few repeats; nothing that a CPU compiles for minutes")
        run.add_argument("--continue", dest="go_on", action="store_true", help="leave out what DIR has of this host")
        run.add_argument("--out", type=Path, metavar="DIR", default=TODAY, help="of the results [bench/results/DATE]")
        run.add_argument("-k", dest="only", metavar="WORDS", help="only what pytest's -k chooses")
        run.add_argument("--readme", type=Path, metavar="FILE", help="put the summary into this file, too")
        run.set_defaults(run=_measure)
    shown = commands.add_parser("report", help="tables and a picture of a folder, and what is missing there")
    shown.add_argument("folder", type=Path, metavar="DIR")
    shown.add_argument("--readme", type=Path, metavar="FILE", help="put the summary into this file, too")
    shown.set_defaults(run=lambda args: print(report(read(args.folder), args.folder, args.readme)))
    args = parser.parse_args()
    try:
        return args.run(args) or 0
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
