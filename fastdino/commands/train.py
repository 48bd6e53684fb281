"""fastdino train."""

import argparse
import signal

from fastdino.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One for each field of TrainConfig."""
    from fastdino.train.config import add_flags

    parser.usage = "fastdino train [--data_path FOLDER] [flags]"
    parser.description = """\
Train DINO. Flags are those of the original main_dino.py, with its defaults [in brackets], and some more.
BOOL is true/false, on/off or 1/0. Without --data_path: the digits of scikit-learn, with a recipe of their own.
Several GPUs: torchrun --nproc_per_node=8 -m fastdino.train ..."""
    parser.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="flags from a JSON file, as args.json of a run is one; those given here win",
    )
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Train; 128 + the signal where one ended the run."""
    from fastdino.train.config import config_from_args
    from fastdino.train.distributed import launched
    from fastdino.train.flags import check_images, read_config
    from fastdino.train.loop import train

    if path := vars(args).pop("config", None):
        args = argparse.Namespace(**{**read_config(path), **vars(args)})
    try:
        config = config_from_args(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_images(vars(args), launched().world_size)
    result = train(config)
    return 128 + (result.signal or signal.SIGINT) if result.interrupted else 0
