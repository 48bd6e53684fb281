"""python -m bench step [--quick] [--out DIR] | compare A B | report DIR."""

import argparse
import datetime
import json
import sys
from pathlib import Path

from bench.compare import measured, missing, read, slower
from bench.measure import copy_bandwidth_gbps, environment


def _step(args: argparse.Namespace) -> int:
    from bench import step

    planned = [step.label(name, *case[:3]) for case in step.cases(args.quick) for name in step.PROVIDERS]
    device = environment()["device"].replace(" ", "-")
    out = args.out or Path(__file__).parent / "results" / f"{datetime.date.today()}-{device}"
    out.mkdir(parents=True, exist_ok=True)
    about = environment() | {"copy_gbps": copy_bandwidth_gbps()}
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps({"planned": planned}) + "\n")
        file.flush()
        for record in step.run(args.quick):
            file.write(json.dumps(record | about) + "\n")
            file.flush()  # a run that is killed keeps what it has measured
            if "failed" in record:
                print(f"{record['name']:48} {record['failed']}", flush=True)
            else:
                print(
                    f"{record['name']:48} {record['median_ms']:10.1f} ms {record['images_per_s']:8.2f} images/s",
                    f" {record['times_plain']:5.2f} x plain fp32",
                    flush=True,
                )
    print(f"wrote {out / 'results.jsonl'}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    lines = slower(read(args.before), read(args.after))
    print("\n".join(lines) or "nothing got slower by more than the spread")
    return 1 if lines else 0


def _report(args: argparse.Namespace) -> int:
    from bench.pictures import draw_throughput

    records = read(args.folder)
    print("| what | ms | p20 | p80 | images/s | device |\n|---|---|---|---|---|---|")
    for name, r in measured(records).items():
        print(f"| {name} | {r['median_ms']:.1f} | {r['p20_ms']:.1f} | {r['p80_ms']:.1f} ", end="")
        print(f"| {r.get('images_per_s', float('nan')):.2f} | {r['device']} |")
    for name in missing(records):
        print(f"\nMissing: {name} was planned and not measured.")
    picture = args.folder / "throughput.png"
    if draw_throughput(records, picture):
        print(f"\n![images per second]({picture.name})")
    return 0


def main() -> int:
    """The exit code. 1: something got slower, 2: the command was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="the step beside the baselines")
    step.add_argument("--quick", action="store_true", help="small, few repeats")
    step.add_argument("--out", type=Path, help="folder of the results")
    compare = commands.add_parser("compare", help="fails where something got slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    report = commands.add_parser("report", help="a table, and what is missing")
    report.add_argument("folder", type=Path, help="a folder with results.jsonl")
    args = parser.parse_args()
    try:
        return {"step": _step, "compare": _compare, "report": _report}[args.command](args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
