"""fastdino attention."""

import argparse
from pathlib import Path

from fastdino.commands.common import add_view_flags, add_weights_flags, open_backbone
from fastdino.data.decode import BadImage, decode
from fastdino.data.digits import load_digits
from fastdino.data.sources import read_file
from fastdino.errors import UserError, printable
from fastdino.eval.attention_maps import draw_attention


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Weights, images, and the picture."""
    parser.description = "Draw the last block's attention over images."
    add_weights_flags(parser)
    add_view_flags(parser)
    parser.add_argument("--images", nargs="+", metavar="FILE", help="image files; without them: a few digits")
    parser.add_argument("--output", default="attention.png", metavar="FILE", help="the picture [attention.png]")


def run(args: argparse.Namespace) -> int:
    """Write the picture."""
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
    opened = open_backbone(args)
    draw_attention(opened.backbone, images, output, opened.view.resize, opened.view.size)
    print(f"wrote {output}")
    return 0
