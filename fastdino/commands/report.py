"""fastdino report."""

import argparse
from pathlib import Path

from fastdino.commands.common import check_positive
from fastdino.errors import TrainingError, UserError
from fastdino.report import write_report
from fastdino.train.distributed import start


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The run, and its images."""
    parser.description = """\
Write one page about a run: curves, attention, principal components, nearest neighbours, evaluations, arguments.
It needs no other file and no network. Numbers that commands add to a .jsonl file in the folder, with --json, are in
it."""
    parser.add_argument("folder", metavar="RUN", help="the output folder of fastdino train")
    parser.add_argument("--output", metavar="FILE", help="the page [RUN/report.html]")
    parser.add_argument("--data_path", metavar="PATH", help="images to look at [those held out, else those trained on]")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="at most so many are looked at [2000]")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N [auto]")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    check_positive(args, "images")
    if not Path(args.folder).is_dir():
        raise UserError(f"no run in {args.folder}: there is no such folder")
    output = Path(args.output or Path(args.folder, "report.html"))
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output: expected a file in a folder that exists, got {output}")
    device = str(start(args.device, "env://").device)
    try:
        write_report(Path(args.folder), output, args.data_path, args.images, device)
    except OSError as error:
        raise TrainingError(f"{output} cannot be written: {error.strerror or error}") from error
    print(f"wrote {output}")
    return 0
