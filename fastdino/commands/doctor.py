"""fastdino doctor."""

import argparse

from fastdino.doctor import examine


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The folder to look at."""
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="images, to time their loading")


def run(args: argparse.Namespace) -> int:
    """A line for each finding."""
    for what, finding in examine(args.folder):
        print(f"{what:20}{finding}")
    return 0
