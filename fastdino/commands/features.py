"""fastdino features."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdino.commands.common import add_view_flags, add_weights_flags, loading, open_backbone
from fastdino.data.channels import converted, open_images
from fastdino.data.digits import load_digits
from fastdino.data.remarks import remarks
from fastdino.errors import TrainingError, some_of
from fastdino.eval.feature_files import FORMATS, check_output
from fastdino.eval.features import TOKENS
from fastdino.extract import extract_to_file
from fastdino.train import distributed
from fastdino.train.command_line import boolean

PLAIN_EVERY = 10.0  # seconds between lines of progress where standard error is no terminal


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which images, which features, and the file."""
    parser.description = f"""\
Write the features of images to a file: {", ".join(FORMATS)}. Memory does not grow with the number of images, and a
run that was ended goes on where it was. Several GPUs: torchrun --nproc_per_node=8 -m fastdino features ..."""
    add_weights_flags(parser)
    add_view_flags(parser)
    parser.add_argument(
        "--data_path", metavar="PATH", help="folder, tar or parquet files; without it: scikit-learn's digits"
    )
    parser.add_argument("--output", default="features.npz", metavar="FILE", help="the file [features.npz]")
    parser.add_argument(
        "--tokens",
        nargs="+",
        default=["cls"],
        metavar="NAME",
        choices=TOKENS,
        help="cls: the CLS token; avg: mean of the patches; patch: each of them [cls]",
    )
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="the last N blocks, joined [1]")
    parser.add_argument("--normalize", type=boolean, default=False, metavar="BOOL", help="to unit length [off]")


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    output = Path(args.output)
    check_output(output, args.tokens)
    opened = open_backbone(args, of_any_kind=True, together=True, any_channels=True)
    wanted = opened.image_format
    source = converted(load_digits()[0], wanted) if args.data_path is None else open_images(args.data_path, wanted)
    process = distributed.start(args.device, "env://")
    bar = _Bar(process.is_main)
    try:
        bar.say(f"images   {source.describe()}")
        for line in remarks(source):
            bar.say(f"         {line}")
        n, bad = extract_to_file(
            output,
            source,
            opened.backbone,
            opened.view,
            process,
            bar.move,
            tokens=list(dict.fromkeys(args.tokens)),
            layers=args.layers,
            normalize=args.normalize,
            **loading(args),
        )
    except OSError as error:
        raise TrainingError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        bar.close()
        distributed.stop()
    if bad:
        bar.say(f"without {some_of(bad, len(source))}")
    bar.say(f"wrote {output}: {n:,} images, {', '.join(args.tokens)}")
    return 0


class _Bar:
    """How far it is, on standard error: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._console = Console(stderr=True, quiet=not speaks)
        self._progress = Progress(
            TextColumn("{task.fields[state]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (speaks and self._console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("features", total=None, state="")
        self._progress.start()
        self._spoke_at = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._speaks:
            print(text, flush=True)

    def move(self, done: int, total: int, images_per_s: float) -> None:
        """So many of this process's images are done."""
        state = f"{images_per_s:,.0f} images/s"
        self._progress.update(self._task, completed=done, total=total, state=state)
        if self._speaks and self._progress.disable and time.monotonic() - self._spoke_at > PLAIN_EVERY:
            print(f"{done:,} of {total:,}  {state}", file=sys.stderr, flush=True)
            self._spoke_at = time.monotonic()

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()
