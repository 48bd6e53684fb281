"""fastdino export."""

import argparse

from fastdino.commands.common import add_file_flags
from fastdino.export import Exported, export
from fastdino.export.formats import FORMATS, MEAN, STD
from fastdino.train.interrupt import Interrupted, Stop

CLOSE = 2  # levels that resizing with other roundings makes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Weights, format, and the file."""
    formats = "\n".join(
        f"  {name:13}{kind.what}" + (f"; needs {', '.join(kind.needs)}" if kind.needs else "")
        for name, kind in FORMATS.items()
    )
    parser.description = f"""\
Write a trained backbone for another library. What is written is read back by that library, and its features
are compared with the backbone's, before the file gets its name. Formats:

{formats}"""
    add_file_flags(parser)
    parser.add_argument("--format", required=True, metavar="NAME", help="one of those above")
    parser.add_argument("--output", required=True, metavar="PATH", help="the file, or for hf the folder; a new one")
    parser.add_argument(
        "--size", type=int, metavar="N",
        help="side of the images that positions are laid out for [as trained]; exact at that size alone, and onnx and "
        "pt2 take no other",
    )  # fmt: skip
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="FILE", help="to compare features on [two photographs]"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file, say how close it is, and how it is read."""
    stop = Stop()
    try:
        with stop.listening(), stop.interruptible():  # SIGTERM, too: the temporary folder is removed
            exported = export(
                args.pretrained_weights,
                args.output,
                args.format,
                checkpoint_key=args.checkpoint_key,
                num_heads=args.num_heads,
                size=args.size,
                images=args.images,
            )
    except Interrupted:
        raise KeyboardInterrupt from None
    print("\n".join(summary(exported)))
    return 0


def summary(exported: Exported) -> list[str]:
    """Lines for the terminal."""
    model, checked, kind = exported.model, exported.checked, FORMATS[exported.format]
    n_params = sum(p.numel() for p in model.backbone.parameters())
    files = [exported.path] if exported.path.is_file() else list(exported.path.iterdir())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    library = kind.needs[-1] if kind.needs else "torch"
    lines = [
        f"model    {model.arch or 'a ViT'}/{model.patch_size}, {n_params / 1e6:.1f} M parameters",
        f"images   short side to {model.view.resize} px, bicubic, the middle {model.view.size} px, "
        f"mean {' '.join(map(str, MEAN))}, deviation {' '.join(map(str, STD))}",
    ]
    if checked.levels is not None:
        aside = " (it crops a pixel aside where an odd number is left over)" if checked.levels > CLOSE else ""
        lines.append(f"         {library} prepares them so by itself, to {checked.levels:.0f} of 255 levels{aside}")
    if exported.format in ("onnx", "pt2"):
        size = "that size alone" if model.fixed else f"any size from {2 * model.patch_size} px on"
        lines.append(f"         any number at once, of {size}")
    lines.append(f"checked  {checked.n_images} images and their mirror images; largest difference of a feature:")
    for difference in checked.differences:
        digits = f"{difference.largest:.1e}, {difference.relative:.1e} of the largest" if difference.largest else "none"
        own = difference.size != model.view.size and kind.own_positions and not difference.is_small
        advice = f"; {library} interpolates positions its own way, --size {difference.size} is exact" if own else ""
        lines.append(f"  {difference.size:>4} px  {digits}{advice}")
    lines += [f"wrote    {exported.path} ({megabytes:.1f} MB); to use it:", ""]
    return [*lines, *(f"    {line}" for line in exported.use)]
