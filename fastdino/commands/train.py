"""fastdino train."""

import argparse
import signal

from fastdino.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One for each field of TrainConfig."""
    from fastdino.train.command_line import add_flags

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
    from fastdino.train.build import Own
    from fastdino.train.command_line import config_from_args
    from fastdino.train.distributed import launched
    from fastdino.train.flags import check_images, read_config
    from fastdino.train.loop import train
    from fastdino.train.preset import before_images, with_preset

    if path := vars(args).pop("config", None):
        args = argparse.Namespace(**{**read_config(path), **vars(args)})
    n_processes = launched().world_size
    try:
        # What is wrong with the flags is said before the images are looked for.
        config_from_args(argparse.Namespace(**before_images(vars(args))))
        check_images(vars(args), n_processes)
        given, source = with_preset(vars(args), n_processes)
        config = config_from_args(argparse.Namespace(**given))
    except ValueError as error:
        raise UserError(str(error)) from error
    result = train(config, Own(source=source))
    return 128 + (result.signal or signal.SIGINT) if result.interrupted else 0
