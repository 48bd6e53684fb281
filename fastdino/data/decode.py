"""Encoded bytes to RGB, as the original's `Image.open(f).convert("RGB")` sees them, EXIF rotation ignored included.

With one exception: gray of more than 8 bits is scaled down, as `levels` says, where the original cuts off everything
above 255 (a 16-bit image becomes black and white there). Images of other than 3 channels are `channels`'.

In two steps, so that the pixels of a batch land in one buffer without a copy: `open_image` reads the header and says
how large the image is, its `write` decodes into the place that was reserved. JPEG goes through simplejpeg, which gives
Pillow's pixels a quarter faster and lets go of the interpreter's lock; everything else goes through Pillow.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from fastdino.data.levels import MAX_PIXELS, NPY, BadImage, read_npy, to_levels, with_channels

# JPEG includes MPO, as phones write it. Not EPS, for which Pillow starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
# A block of 8 x 8 pixels takes a bit at the very least. Flat gray at quality 1 has 256 pixels a byte, in 4:2:0 170.
PIXELS_PER_JPEG_BYTE = 512
# Pixels times scans of a JPEG: each scan goes over all pixels, at 2.5 ns a pixel. Progressive files have about 10.
MAX_SCANNED = 2**32
STRIP = 2**22  # pixels that Pillow converts at once: the whole image would be in memory twice more
Pixels = NDArray[np.uint8]

# Palettes with transparency, large images: not a user's concern. Once, because filters are shared by all threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Opened(NamedTuple):
    """An image whose header is read. write: fills (height, width, channels) uint8, or raises BadImage."""

    width: int
    height: int
    write: Callable[[Pixels], None]
    channels: int = 3


def open_image(item: bytes | NDArray[Any], enough: int = 0, channels: int = 3) -> Opened:
    """Read the header of an item of a source. Raises BadImage, with the reason, for what no decoder reads.

    enough: pixels; a JPEG whose short side is at least twice that is decoded at 1/2, 1/4 or 1/8 of its size, as small
    as leaves that many. 0 decodes all in full. channels: of arrays; encoded images have 3.
    """
    if not isinstance(item, bytes):
        return _open_array(item, channels)
    if not item:
        raise BadImage("the file is empty")
    if item.startswith(NPY):
        return _open_array(read_npy(item), channels)
    opened = _open_jpeg(item, enough) if simplejpeg.is_jpeg(item) else None
    return opened or _open_with_pillow(item)


def decode(item: bytes | NDArray[Any]) -> Image.Image:
    """An item of a source -> RGB image. Raises BadImage, with the reason, for what no decoder reads."""
    return Image.fromarray(decode_array(open_image(item)))


def decode_array(opened: Opened) -> Pixels:
    """(height, width, channels) uint8, in memory of its own. Raises BadImage."""
    pixels = np.empty((opened.height, opened.width, opened.channels), np.uint8)
    opened.write(pixels)
    return pixels


def _open_array(array: NDArray[Any], channels: int) -> Opened:
    levels = to_levels(with_channels(array))
    if levels.shape[2] not in {channels, 1}:  # gray is repeated
        raise BadImage(
            f"expected an array (H, W, {channels}), got {array.shape} (--channels {levels.shape[2]} reads it)"
        )

    def write(pixels: Pixels) -> None:
        pixels[:] = levels

    return Opened(levels.shape[1], levels.shape[0], write, channels)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are decoded")


def _check_jpeg(data: bytes, width: int, height: int) -> None:
    """Refuse what would take memory or time out of all proportion to its bytes."""
    _check_size(width, height)
    if width * height > PIXELS_PER_JPEG_BYTE * len(data):
        raise BadImage(f"{len(data):,} bytes cannot hold the {width} x {height} pixels that the header claims")
    if _may_have_many_scans(data) and (n_scans := data.count(b"\xff\xda\0")) * width * height > MAX_SCANNED:
        raise BadImage(f"{n_scans:,} scans of {width} x {height} pixels are more than are decoded")


def _may_have_many_scans(data: bytes) -> bool:
    """Not where the frame is sequential and the first scan holds all its components, as in most files."""
    start, frame = 2, b""
    while (segment := data[start : start + 10])[:1] == b"\xff" and len(segment) == 10:
        if segment[1] == 0xDA:
            return frame[1:2] not in (b"\xc0", b"\xc1") or segment[4] < frame[9]
        if segment[1] in (0xC0, 0xC1, 0xC2):
            frame = segment
        start += 2 + int.from_bytes(segment[2:4], "big")
    return True


def _open_jpeg(data: bytes, enough: int) -> Opened | None:
    """A plain JPEG, or None where Pillow should judge."""
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if color not in ("YCbCr", "Gray"):
        return None
    _check_jpeg(data, width, height)
    divisor = next((d for d in (8, 4, 2) if enough and min(width, height) >= d * enough), 1)
    width, height = -(-width // divisor), -(-height // divisor)
    least = {"min_height": height, "min_width": width} if divisor > 1 else {}

    def write(pixels: Pixels) -> None:
        try:
            decoded = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=pixels.reshape(-1), **least)
            assert decoded.shape == pixels.shape
        except ValueError:  # broken, or odd: Pillow forgives more
            whole = Image.fromarray(decode_array(_open_with_pillow(data)))
            pixels[:] = np.asarray(whole.resize((width, height), Image.Resampling.BOX))

    return Opened(width, height, write)


def _reason(error: Exception) -> str:
    """The same words for the same image every time: no address in memory."""
    return re.sub(r"<_io\.BytesIO object at \w+>", "of these bytes", str(error)) or type(error).__name__


def pillow_image(data: bytes) -> Image.Image:
    """An image whose header Pillow has read. Raises BadImage, with the reason."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("is no JPEG, PNG, WebP, GIF, BMP, TIFF or PPM") from error
    except Exception as error:  # a broken file makes codecs raise nearly anything
        raise BadImage(_reason(error)) from error
    if image.format in ("JPEG", "MPO"):
        _check_jpeg(data, *image.size)
    _check_size(*image.size)
    return image


def loaded(image: Image.Image) -> Image.Image:
    """The same, its pixels decoded. Raises BadImage, with the reason."""
    try:
        image.load()
    except Exception as error:
        raise BadImage(_reason(error)) from error
    return image


def _open_with_pillow(data: bytes) -> Opened:
    image = pillow_image(data)

    def write(pixels: Pixels) -> None:
        loaded(image)
        try:
            _write_rgb(image, pixels)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(_reason(error)) from error

    return Opened(*image.size, write)


def _write_rgb(image: Image.Image, pixels: Pixels) -> None:
    if image.mode.startswith(("I", "F")):
        pixels[:] = to_levels(np.asarray(image), bits=bits_of(image))[..., None]
        return
    n_rows = max(1, STRIP // image.width)
    for top in range(0, image.height, n_rows):
        strip = image.crop((0, top, image.width, min(top + n_rows, image.height)))
        pixels[top : top + n_rows] = np.asarray(strip.convert("RGB"))


def bits_of(image: Image.Image) -> int:
    """How many bits of a gray image's numbers are in use, where the file says so: fewer than 16 in a TIFF; else 0."""
    bits = image.tag_v2.get(BITSPERSAMPLE, (0,))[0] if isinstance(image, TiffImageFile) else 0
    return int(bits) if image.mode.startswith("I") and 8 < bits < 16 else 0
