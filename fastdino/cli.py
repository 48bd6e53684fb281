"""fastdino train | knn | attention | doctor: the only place that reads the command line."""

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastdino import __version__
from fastdino.errors import TrainingError, UserError, printable, some_of

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

DESCRIPTION = """\
Train DINO (self-distillation with no labels, arXiv:2104.14294) on your own images.

  fastdino train                          learn handwritten digits, in minutes, on any machine
  fastdino train --data_path photos/      learn from a folder of images
  fastdino knn --pretrained_weights checkpoint.pth --data_path photos/
  fastdino attention --pretrained_weights checkpoint.pth --images photos/cat.jpg
  fastdino doctor photos/                 what this machine can do, and how fast it reads the folder
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, and where to look."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    from fastdino.train.config import add_flags

    def help_format(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110)

    parser = _Parser(prog="fastdino", description=DESCRIPTION, formatter_class=help_format)
    parser.add_argument("--version", action="version", version=f"fastdino {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | knn | attention | doctor")

    train = commands.add_parser(
        "train",
        help="train a model",
        usage="fastdino train [--data_path FOLDER] [flags]",
        description="Train DINO. Flags are those of the original main_dino.py, with its defaults [in brackets], and "
        "some more.\nBOOL is true/false, on/off or 1/0. Without --data_path: the digits of scikit-learn, with a recipe "
        "of their own.\nSeveral GPUs: torchrun --nproc_per_node=8 -m fastdino.train ...",
        formatter_class=help_format,
    )
    add_flags(train)

    knn = commands.add_parser(
        "knn",
        help="k-NN accuracy of a trained backbone",
        description="Weighted k-NN on frozen features. --data_path holds train/ and val/ with class folders, as the "
        "original expects;\nor class folders alone, evaluated leave-one-out; or is left out, for the digits.",
        formatter_class=help_format,
    )
    _add_checkpoint_flags(knn)
    knn.add_argument("--data_path", metavar="FOLDER", help="labelled images; without it: scikit-learn's digits")
    knn.add_argument(
        "--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], metavar="N", help="neighbours that vote"
    )
    knn.add_argument("--temperature", type=float, default=0.07, metavar="X", help="of the votes' weights [0.07]")
    knn.add_argument("--batch_size_per_gpu", type=int, default=128, metavar="N", help="images at once [128]")
    knn.add_argument(
        "--num_workers", type=int, default=10, metavar="N", help="loading processes, at most one per core [10]"
    )

    attention = commands.add_parser(
        "attention",
        help="where the CLS token looks",
        description="Draw the last block's attention over images.",
        formatter_class=help_format,
    )
    _add_checkpoint_flags(attention)
    attention.add_argument("--images", nargs="+", metavar="FILE", help="image files; without them: a few digits")
    attention.add_argument("--output", default="attention.png", metavar="FILE", help="the picture [attention.png]")

    doctor = commands.add_parser("doctor", help="what this machine can do", formatter_class=help_format)
    doctor.add_argument("folder", nargs="?", metavar="FOLDER", help="images, to time their loading")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Ends with exit code 2 and one line where it cannot be read."""
    from fastdino.train.flags import expand, unrecognized

    words = list(sys.argv[1:] if argv is None else argv)
    training = words[:1] == ["train"]
    args, unknown = _parser().parse_known_args(expand(words) if training else words)
    if unknown:
        message = unrecognized(unknown) if training else f"unrecognized arguments: {' '.join(unknown)}"
        _Parser(prog=f"fastdino {args.command}").error(message)
    return args


def _add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained_weights", required=True, metavar="FILE", help="checkpoint, or backbone weights")
    parser.add_argument("--checkpoint_key", default="teacher", metavar="NAME", help="teacher or student [teacher]")
    parser.add_argument("--num_heads", type=int, metavar="N", help="only for widths that no architecture here has")
    parser.add_argument("--size", type=int, metavar="N", help="side of the center crop [as trained]")
    parser.add_argument("--resize", type=int, metavar="N", help="short side before it [as trained, else 8/7 of --size]")
    parser.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N [auto]")


def _train(args: argparse.Namespace) -> int:
    from fastdino.train.config import config_from_args
    from fastdino.train.distributed import launched
    from fastdino.train.flags import check_images
    from fastdino.train.loop import train

    try:
        config = config_from_args(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_images(vars(args), launched().world_size)
    result = train(config)
    return 128 + (result.signal or signal.SIGINT) if result.interrupted else 0


def _backbone(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The checkpoint's backbone on its device, and (resize, size) in pixels."""
    from fastdino.train.checkpoint import backbone_of, eval_size, load_checkpoint
    from fastdino.train.distributed import start

    checkpoint = load_checkpoint(args.pretrained_weights)
    backbone = backbone_of(checkpoint, args.pretrained_weights, args.checkpoint_key, args.num_heads)
    size = args.size or backbone.patch_embed.img_size
    resize = args.resize or eval_size(checkpoint, size)
    if not backbone.patch_embed.patch_size <= size <= resize:
        raise UserError(
            f"--size: expected at least the patch size {backbone.patch_embed.patch_size} "
            f"and at most --resize, got {size} and {resize}"
        )
    return backbone.to(start(args.device, "env://").device), resize, size


def _knn(args: argparse.Namespace) -> int:
    from fastdino.data.digits import load_digits
    from fastdino.data.loader import useful_workers
    from fastdino.data.sources import ImageSource, open_source
    from fastdino.eval.knn import extract_features, knn_accuracy

    if min(args.nb_knn) < 1 or not args.temperature > 0 or args.batch_size_per_gpu < 1 or args.num_workers < 0:
        raise UserError("--nb_knn, --batch_size_per_gpu and --temperature: expected values above 0")
    held_out: ImageSource | None = None
    source: ImageSource
    if args.data_path is None:
        source, held_out = load_digits()
    elif (Path(args.data_path) / "train").is_dir() and (Path(args.data_path) / "val").is_dir():
        source, held_out = open_source(Path(args.data_path) / "train"), open_source(Path(args.data_path) / "val")
    else:
        source = open_source(args.data_path)
    backbone, resize, size = _backbone(args)
    options = {
        "resize": resize,
        "size": size,
        "batch_size": args.batch_size_per_gpu,
        "num_workers": useful_workers(args.num_workers, 1) if args.data_path else 0,
    }
    print(f"bank     {source.describe()}")
    print(f"queries  {held_out.describe() if held_out else 'the same, leave-one-out'}")
    bank = extract_features(backbone, source, **options)
    queries = extract_features(backbone, held_out, **options) if held_out else None
    for what, found in (("bank", bank), ("queries", queries)):
        if found and found.bad:
            print(f"{what:8} without {some_of(found.bad)}")
    for k in args.nb_knn:
        print(f"{k:>4}-NN   {knn_accuracy(bank, queries, k, args.temperature):.4f}")
    return 0


def _attention(args: argparse.Namespace) -> int:
    from fastdino.data.decode import BadImage, decode
    from fastdino.data.digits import load_digits
    from fastdino.data.sources import read_file
    from fastdino.eval.attention_maps import draw_attention

    output = Path(args.output)
    if output.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg") or not output.parent.is_dir():
        raise UserError(f"--output: expected a .png, .pdf, .svg or .jpg in a folder that exists, got {output}")
    if args.images:
        images = []
        for name in args.images:
            try:
                images.append(decode(read_file(name)))
            except (OSError, BadImage) as error:
                raise UserError(f"--images: {printable(name)}: {error}") from error
    else:
        held_out = load_digits()[1]
        images = [decode(held_out[i]) for i in range(6)]
    backbone, resize, size = _backbone(args)
    draw_attention(backbone, images, output, resize, size)
    print(f"wrote {output}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastdino.doctor import examine

    for what, finding in examine(args.folder):
        print(f"{what:20}{finding}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. 1: the run failed, 2: the command was wrong, 130: interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files in an alphabet that the terminal does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse(argv)
    command = {"train": _train, "knn": _knn, "attention": _attention, "doctor": _doctor}[args.command]
    try:
        return command(args)
    except UserError as error:
        return _end(args.command, str(error), EXIT_USAGE)
    except TrainingError as error:
        return _end(args.command, str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _end(args.command, "interrupted", EXIT_INTERRUPTED)


def _end(command: str, message: str, code: int) -> int:
    """One line on standard error, from one process; the exit code."""
    from fastdino.train.distributed import tell_launcher

    if os.environ.get("RANK", "0") != "0":
        # The first process to end makes torchrun end the others: rank 0 speaks before, unless it is not what failed.
        time.sleep(5)
    print(f"fastdino {command}: {message}", file=sys.stderr, flush=True)
    tell_launcher(f"fastdino {command}: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
