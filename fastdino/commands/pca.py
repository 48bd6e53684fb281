"""fastdino pca: patches in colour, as in DINOv2's figures."""

import argparse
from pathlib import Path

import numpy as np

from fastdino.commands.common import add_weights_flags, open_backbone
from fastdino.commands.pictures import PICTURES, check_picture, check_size, make_folder, opened_images, resized
from fastdino.errors import UserError
from fastdino.eval.pca import patch_colors, patch_tokens, pca_figure
from fastdino.eval.pictures import enlarged, save_figure, save_png, whole_patches
from fastdino.train.command_line import boolean

LARGER = 2  # than images were in training: more patches, a finer picture


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Weights, images, and the pictures."""
    parser.description = """\
Draw the principal components of patches. The first component over all images tells foreground from background;
three components of the foreground are red, green and blue, the same in all images."""
    add_weights_flags(parser)
    parser.add_argument("--images", nargs="+", metavar="FILE", help="image files; without them: a few digits")
    parser.add_argument(
        "--image_size", type=int, nargs="+", metavar="N", help="H W, or the short side [twice the size as trained]"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.0, metavar="X", help="of the foreground, in standard deviations [0]"
    )
    parser.add_argument(
        "--flip", type=boolean, default=False, metavar="BOOL", help="the other side is foreground [off]"
    )
    parser.add_argument("--output", default="pca.png", metavar="FILE", help="the picture [pca.png]")
    parser.add_argument("--output_dir", metavar="FOLDER", help="the colours of each image go there, too")


def run(args: argparse.Namespace) -> int:
    """Write the pictures."""
    output = check_picture("output", args.output, PICTURES)
    if not np.isfinite(args.threshold):
        raise UserError(f"--threshold: expected a finite number, got {args.threshold}")
    opened = open_backbone(args, any_channels=True)
    images, backbone = opened_images(args.images, opened.image_format), opened.backbone
    check_size(args, backbone.patch_embed.patch_size)
    folder = make_folder("output_dir", args.output_dir) if args.output_dir else None
    view_of = resized(args.image_size or [LARGER * backbone.patch_embed.img_size])
    views = [whole_patches(backbone.patch_embed, view_of(image)) for _, image in images]
    colors = patch_colors([patch_tokens(backbone, view) for view in views], args.threshold, args.flip)
    names = [name for name, _ in images]
    save_figure(output, pca_figure(names, views, colors))
    print(f"wrote {output}")
    if folder:
        for number, (name, color) in enumerate(zip(names, colors)):
            path = folder / f"{number}-{Path(name).stem}.png"
            save_png(path, enlarged(color, backbone.patch_embed.patch_size))
            print(f"wrote {path}")
    return 0
