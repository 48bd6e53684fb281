"""What the commands that draw share: the images of a command line, as views, and the names of pictures."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.augment import by_pillow
from fastdino.data.channels import RGB, ImageFormat, as_wanted
from fastdino.data.decode import BadImage
from fastdino.data.digits import load_digits
from fastdino.data.sources import read_file
from fastdino.errors import UserError, printable
from fastdino.eval.pictures import row_labels

PICTURES = (".png", ".pdf", ".svg", ".jpg")
N_DIGITS = 6  # that are drawn where no image is given
Pixels = NDArray[np.uint8]


def check_picture(flag: str, name: str, endings: tuple[str, ...] = PICTURES) -> Path:
    """The path. Raises UserError where no such picture can be written there."""
    path = Path(name)
    if path.suffix.lower() not in endings or not path.parent.is_dir() or path.is_dir():
        raise UserError(f"--{flag}: expected a file {', '.join(endings)} in a folder that exists, got {path}")
    return path


def make_folder(flag: str, folder: str | Path) -> Path:
    """The folder. Raises UserError where it cannot be made."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}: {folder}: {error.strerror or error}") from error
    return Path(folder)


def opened_images(names: list[str] | None, wanted: ImageFormat = RGB) -> list[tuple[str, Pixels]]:
    """(name, (H, W, C)) of files, or of a few digits. Raises UserError where one cannot be read."""
    if not names:
        held_out = load_digits()[1]
        return [(f"image{i}", as_wanted(held_out[i], wanted)) for i in range(N_DIGITS)]
    images = []
    for name in names:
        try:
            data = read_file(name)
            images.append(as_wanted(data, wanted))
        except (OSError, BadImage) as error:
            raise UserError(f"--images: {printable(name)}: {error}") from error
    return list(zip(row_labels(names), images))


def check_size(args: argparse.Namespace, patch_size: int) -> None:
    """Raises UserError where --image_size is not one or two numbers that hold a patch."""
    if args.image_size and (len(args.image_size) > 2 or min(args.image_size) < patch_size):
        got = " ".join(map(str, args.image_size))
        raise UserError(f"--image_size: expected one or two numbers of at least the patch size {patch_size}, got {got}")


def resized(image_size: list[int]) -> Callable[[Image.Image | Pixels], Pixels]:
    """The whole image: H W exactly, or one number for the short side. Bilinear, as the original's pictures are."""

    def view(image: Image.Image | Pixels) -> Pixels:
        pixels = np.asarray(image)
        short = min(pixels.shape[:2])
        if len(image_size) == 2:
            height, width = image_size
        else:
            height, width = (int(image_size[0] * side / short) for side in pixels.shape[:2])
        return by_pillow(pixels, lambda whole: whole.resize((width, height), Image.Resampling.BILINEAR))

    return view
