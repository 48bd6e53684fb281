"""fastdino attention: the original's visualize_attention.py and video_generation.py."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdino.commands.common import add_view_flags, add_weights_flags, open_backbone
from fastdino.commands.pictures import PICTURES, check_picture, check_size, make_folder, opened_images, resized
from fastdino.data.augment import center_view
from fastdino.data.films import CODECS, frames, rate_of, write_film
from fastdino.errors import UserError, some_of
from fastdino.eval.attention_maps import FilmFrames, attention_figure, look, save_maps
from fastdino.eval.pictures import save_figure, save_png

FPS = 30.0  # of a folder of frames


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Weights, images or a film, and the pictures."""
    parser.description = """\
Draw where the CLS token of the last block looks.
--images: one picture with a row per image; --output_dir: a file per head, named as the original's.
--video: a film, or a folder of frames, to a film with the attention beside each frame."""
    add_weights_flags(parser)
    add_view_flags(parser)
    parser.add_argument(
        "--images", "--image_path", nargs="+", metavar="FILE", help="image files; without them: a few digits"
    )
    parser.add_argument("--video", "--input_path", metavar="PATH", help="a film, or a folder of frames")
    parser.add_argument(
        "--image_size", type=int, nargs="+", metavar="N", help="the whole image: H W, or its short side [center crop]"
    )
    parser.add_argument("--threshold", type=float, metavar="X", help="masks of the patches with this share of the mass")
    parser.add_argument("--output", metavar="FILE", help="the picture [attention.png] or film [attention.mp4]")
    parser.add_argument("--output_dir", metavar="FOLDER", help="a picture of each head, or of each frame, goes there")
    parser.add_argument("--fps", type=float, metavar="X", help="frames a second [as the film; 30 of a folder]")


def run(args: argparse.Namespace) -> int:
    """Write the pictures."""
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise UserError(f"--threshold: expected a share between 0 and 1, got {args.threshold}")
    if args.fps is not None and not 0 < args.fps < 1000:
        raise UserError(f"--fps: expected frames a second, got {args.fps}")
    return _film(args) if args.video else _images(args)


def _images(args: argparse.Namespace) -> int:
    output = check_picture("output", args.output or "attention.png", PICTURES)
    if args.threshold is not None and not args.output_dir:
        raise UserError("--threshold: masks are pictures of their own, and need an --output_dir")
    backbone, view_of, wanted = _opened(args, any_channels=True)
    images = opened_images(args.images, wanted)
    if args.output_dir:
        make_folder("output_dir", args.output_dir)
    looked = [look(backbone, name, view_of(image)) for name, image in images]
    save_figure(output, attention_figure(looked))
    print(f"wrote {output}")
    if args.output_dir:
        for number, each in enumerate(looked):
            folder = args.output_dir if len(looked) == 1 else Path(args.output_dir, f"{number}-{Path(each.name).stem}")
            paths = save_maps(each, make_folder("output_dir", folder), backbone.patch_embed.patch_size, args.threshold)
            print(f"wrote {', '.join(map(str, paths))}")
    return 0


def _opened(args: argparse.Namespace, any_channels: bool = False):  # type: ignore[no-untyped-def]
    """(backbone, what makes a view of an image, how images are read)."""
    opened = open_backbone(args, any_channels=any_channels)
    check_size(args, opened.backbone.patch_embed.patch_size)
    view = partial(center_view, resize=opened.view.resize, size=opened.view.size)
    return opened.backbone, resized(args.image_size) if args.image_size else view, opened.image_format


def _film(args: argparse.Namespace) -> int:
    if args.images:
        raise UserError("--video: give either images or a film")
    output = check_picture("output", args.output or "attention.mp4", tuple(CODECS))
    folder = make_folder("output_dir", args.output_dir) if args.output_dir else None
    backbone, view_of, _ = _opened(args)
    draw, bad = FilmFrames(backbone.patch_embed.patch_size, args.threshold), list[str]()

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for name, image in frames(args.video, bad):
            view = view_of(image)
            picture = draw(look(backbone, name, view))
            if folder:
                save_png(folder / f"{name}.png", picture)
            yield picture

    n = write_film(output, pictures(), args.fps or rate_of(args.video) or FPS)
    if bad:
        print(f"without {some_of(bad)}")
    print(f"wrote {output}: {n} frames")
    return 0
