"""fastdino doctor."""

import argparse

from fastdino.doctor import examine


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The images to look at."""
    parser.add_argument(
        "folder", nargs="?", metavar="PATH", help="folder, tar or parquet files: loading and a run are timed"
    )


def run(args: argparse.Namespace) -> int:
    """A line for each finding."""
    for what, finding in examine(args.folder):
        print(f"{what:20}{finding}")
    return 0
