"""Images of other than 3 channels of 8 bits: arrays, TIFF stacks, gray, numbers of any range.

`converted` puts them between a source and everything that reads it, as arrays (H, W, C) of uint8: loaders, features and
pictures need not know what the files were.

Channels are what the file has. Gray is repeated where 3 are asked for, RGB weighed into one where 1 is, and an alpha is
left out that is not asked for. No other channel is made up or dropped.
"""

import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE
from torch import nn

from fastdino.data.decode import bits_of, decode_array, loaded, open_image, pillow_image
from fastdino.data.levels import NPY, BadImage, read_npy, to_levels, with_channels
from fastdino.data.sources import ARRAYS, EXTENSIONS, MAX_BYTES, ImageSource, open_source
from fastdino.errors import UserError

MAX_CHANNELS = 16
UPRIGHT = 1
N_LOOKED_AT = 16  # images, spread evenly over a source, that tell what is in it
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_OF_16_BITS = (b"\x10\x02", b"\x10\x06")  # RGB and RGBA, at byte 24


@dataclass(frozen=True)
class ImageFormat:
    """How images are read. channels: C, 1 to 16. value_range: numbers that are black and white; () for `levels`'s.

    exif_turn: turned as EXIF says. Raises ValueError for other channels and ranges.
    """

    channels: int = 3
    value_range: tuple[float, ...] = ()
    exif_turn: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"channels: expected 1 to {MAX_CHANNELS}, got {self.channels}")
        if self.value_range and not (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]):
            raise ValueError(f"value_range: expected two rising numbers, got {' '.join(map(str, self.value_range))}")

    @property
    def converts(self) -> bool:
        """Whether images are other than the original has them."""
        return self.channels != 3 or bool(self.value_range)

    @classmethod
    def of(cls, backbone: nn.Module, args: Any = None) -> "ImageFormat":
        """What a backbone takes, as its first convolution tells. args: of its checkpoint, which tell the rest."""
        first = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
        told: Any = getattr(args, "value_range", ())  # anything may stand there
        is_range = isinstance(told, tuple) and len(told) == 2 and all(type(x) in (int, float) for x in told)
        turns = getattr(args, "exif_turn", False) is True
        return cls(first if first <= MAX_CHANNELS else 3, told if is_range and told[0] < told[1] else (), turns)


RGB = ImageFormat()


class Converted:
    """A source whose items are (H, W, C) uint8, whatever the files hold; BadImage where they cannot be.

    Where no more is wanted than the turns that EXIF asks for, images that have none are left encoded.
    """

    def __init__(self, source: ImageSource, wanted: ImageFormat) -> None:
        self.source, self.wanted, self.channels = source, wanted, wanted.channels
        self.labels, self.classes = source.labels, source.classes
        self.damage: Sequence[str] = getattr(source, "damage", ())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes | NDArray[Any]:
        item = self.source[index]
        if not self.wanted.converts and orientation_of(item) == UPRIGHT:
            return item
        return as_wanted(item, self.wanted)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def describe(self) -> str:
        return self.source.describe()


def as_wanted(item: bytes | Image.Image | NDArray[Any], wanted: ImageFormat) -> NDArray[np.uint8]:
    """An encoded image, an image or an array -> (H, W, C) uint8. Raises BadImage, with the reason."""
    if isinstance(item, bytes) and wanted.converts:
        values, bits = read_values(item, wanted.channels)
    elif isinstance(item, bytes):
        values, bits = decode_array(open_image(item)), 0
    elif isinstance(item, Image.Image):
        values, bits = values_of(item, wanted.channels), bits_of(item)
    else:
        values, bits = item, 0
    levels = fitted(to_levels(with_channels(values), wanted.value_range, bits), wanted.channels)
    return turned(levels, orientation_of(item)) if wanted.exif_turn else levels


def orientation_of(item: bytes | Image.Image | NDArray[Any]) -> int:
    """EXIF's number for how an image lies, 1 to 8; 1, upright, where nothing says otherwise."""
    told: Any = None
    with suppress(Exception):  # damaged EXIF makes Pillow raise nearly anything; what else is wrong, the decoder says
        image = pillow_image(item) if isinstance(item, bytes) else item
        told = image.getexif().get(ExifTags.Base.Orientation) if isinstance(image, Image.Image) else None
    return int(told) if isinstance(told, int) and told in range(1, 9) else UPRIGHT


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """(H, W, C) as it is to be looked at: EXIF 2.3, tag 274."""
    if orientation in (2, 4, 5, 7):  # mirrored; what is left is a rotation
        pixels = pixels[:, ::-1]
    n_quarters = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]  # against the clock
    return np.ascontiguousarray(np.rot90(pixels, n_quarters))


def converted(source: ImageSource, wanted: ImageFormat) -> ImageSource:
    """The source as `wanted`. Raises UserError where none of the first images can be read that way."""
    if not wanted.converts and not wanted.exif_turn:
        return source
    made, reason = Converted(source, wanted), ""
    for index in spread(source):
        try:
            made[index]
            return made
        except (BadImage, OSError) as error:
            reason = reason or f"{source.name(index)}: {error}"
    raise UserError(f"none of {len(spread(source))} images looked at can be read; the first: {reason}")


def open_images(path: str | Path, wanted: ImageFormat = RGB) -> ImageSource:
    """`open_source`, `converted`: .npy files are images where the format is not the original's."""
    return converted(open_source(path, (*EXTENSIONS, *ARRAYS) if wanted.converts else EXTENSIONS), wanted)


def channels_of(source: ImageSource) -> int:
    """C of a source's arrays."""
    return int(getattr(source, "channels", 3))


def read_pixels(source: ImageSource, index: int) -> NDArray[np.uint8]:
    """(H, W, C) of an image of a source. Raises BadImage, OSError."""
    return decode_array(open_image(source[index], channels=channels_of(source)))


def in_colors(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, C) -> (H, W, 3), to be looked at: the first three channels; of fewer the first, gray."""
    return pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, 2)


def spread(source: ImageSource) -> list[int]:
    """Which images are looked at."""
    return np.linspace(0, len(source) - 1, min(N_LOOKED_AT, len(source))).astype(int).tolist()


def fitted(levels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """(H, W, C) -> (H, W, channels): gray repeated, RGB weighed into gray as Pillow does. Raises BadImage else."""
    found = levels.shape[2]
    if found == channels:
        return levels
    if found == 1 and channels == 3:
        return levels.repeat(3, 2)
    if found == 3 and channels == 1:
        return np.asarray(Image.fromarray(np.ascontiguousarray(levels)).convert("L"))[..., None]
    come_first = levels.shape[0] == channels
    hint = "; they have to come last: numpy.moveaxis(array, 0, -1)" if come_first else f" (--channels {found} reads it)"
    raise BadImage(f"has {found} channel{'s' if found > 1 else ''}, expected {channels}{hint}")


def read_values(data: bytes, channels: int) -> tuple[NDArray[Any], int]:
    """((H, W) or (H, W, C) as the file holds them, bits in use of each number or 0 for all). Raises BadImage.

    channels: where that is not what an image with transparency has, its alpha is left out.
    Raises UserError where it takes tifffile, and that is not installed.
    """
    if data.startswith(NPY):
        return read_npy(data), 0
    if data.startswith(TIFF) and not is_read_by_pillow(data):
        return _read_tiff(data)
    image = loaded(pillow_image(data))
    values = values_of(image, channels)
    if image.format == "PNG" and data[24:26] in PNG_OF_16_BITS:  # which Pillow cuts to 8
        pixels = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
        return pixels[..., [2, 1, 0, 3][: values.shape[2]]], 0
    return values, bits_of(image)


def values_of(image: Image.Image, channels: int) -> NDArray[Any]:
    """An image's bands, (H, W) or (H, W, C); palettes and color spaces that are not bands become RGB or RGBA."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("1", "YCbCr", "LAB", "HSV") or (image.mode == "CMYK" and channels != 4):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "RGBX") and len(image.getbands()) != channels:
        image = image.convert("L" if image.mode[0] == "L" else "RGB")
    return np.asarray(image)


def is_read_by_pillow(data: bytes) -> bool:
    """Of a TIFF: one page, gray of any numbers or colors of 8 bits."""
    try:
        image = pillow_image(data)
        bits = set(getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (1,)))
        return getattr(image, "n_frames", 1) == 1 and (image.mode.startswith(("I", "F")) or bits <= {1, 8})
    except Exception:  # it says in many ways that it does not know so many channels
        return False


def _read_tiff(data: bytes) -> tuple[NDArray[Any], int]:
    """As `read_values`: the channels of each pixel, or the pages of a stack, with whatever else the file calls them."""
    try:
        import tifffile
    except ImportError as error:
        words = "TIFF stacks and TIFFs of many channels need tifffile: pip install tifffile imagecodecs"
        raise UserError(words) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file, we say
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series, page = file.series[0], file.pages.first
            axes, shape = series.axes, series.shape
            if series.size * series.dtype.itemsize > MAX_BYTES:
                raise BadImage(f"{' x '.join(map(str, shape))} numbers are more than are read")
            values = series.asarray()
            bits = page.bitspersample if page.bitspersample < 8 * series.dtype.itemsize else 0
    except BadImage:
        raise
    except Exception as error:  # a damaged file makes codecs raise nearly anything
        raise BadImage(f"tifffile cannot read it: {str(error).splitlines()[0] if str(error) else error!r}") from error
    kept = [(axis, n) for axis, n in zip(axes, shape) if n > 1 or axis in "YX"]
    values = values.reshape([n for _, n in kept])
    others = [i for i, (axis, _) in enumerate(kept) if axis not in "YX"]
    if len(others) > 1 or values.ndim != 2 + len(others):
        raise BadImage(f"is {' x '.join(map(str, shape))} ({axes}): expected rows, columns, and channels or pages")
    return (np.moveaxis(values, others[0], -1) if others else values), bits
