"""Encoded bytes to RGB, as the original's `Image.open(f).convert("RGB")` sees them, EXIF rotation ignored included.

With one exception: more than 8 bits a channel are scaled down, where the original cuts off everything above 255 (a
16-bit gray image becomes black and white there). 16 bits lose the lower 8, numbers from 0 to 1 are multiplied by 255,
and of other ranges nobody knows what is white: they are refused.

In two steps, so that the pixels of a batch land in one buffer without a copy: `open_image` reads the header and says
how large the image is, its `write` decodes into the place that was reserved. JPEG goes through simplejpeg, which gives
Pillow's pixels a quarter faster and lets go of the interpreter's lock; everything else goes through Pillow.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# JPEG includes MPO, as phones write it. Not EPS, for which Pillow starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
# A block of 8 x 8 pixels takes a bit at the very least. Flat gray at quality 1 has 256 pixels a byte, in 4:2:0 170.
PIXELS_PER_JPEG_BYTE = 512
# Pixels times scans of a JPEG: each scan goes over all pixels, at 2.5 ns a pixel. Progressive files have about 10.
MAX_SCANNED = 2**32
STRIP = 2**22  # pixels that Pillow converts at once: the whole image would be in memory twice more
MAX_PIXELS = 178_956_970  # an image of more is refused, as Pillow does: 512 MiB of RGB
Pixels = NDArray[np.uint8]

# Palettes with transparency, large images: not a user's concern. Once, because filters are shared by all threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """An image that cannot be decoded. The message says why."""


class Opened(NamedTuple):
    """An image whose header is read. write: fills (height, width, 3) uint8, or raises BadImage."""

    width: int
    height: int
    write: Callable[[Pixels], None]


def open_image(item: bytes | Pixels, enough: int = 0) -> Opened:
    """Read the header of an item of a source. Raises BadImage, with the reason, for what no decoder reads.

    enough: pixels; a JPEG whose short side is at least twice that is decoded at 1/2, 1/4 or 1/8 of its size, as small
    as leaves that many. 0 decodes all in full.
    """
    if not isinstance(item, bytes):
        return _open_array(item)
    if not item:
        raise BadImage("the file is empty")
    opened = _open_jpeg(item, enough) if simplejpeg.is_jpeg(item) else None
    return opened or _open_with_pillow(item)


def decode(item: bytes | Pixels) -> Image.Image:
    """An item of a source -> RGB image. Raises BadImage, with the reason, for what no decoder reads."""
    return Image.fromarray(decode_array(open_image(item)))


def decode_array(opened: Opened) -> Pixels:
    """(height, width, 3) uint8, in memory of its own. Raises BadImage."""
    pixels = np.empty((opened.height, opened.width, 3), np.uint8)
    opened.write(pixels)
    return pixels


def _open_array(array: Pixels) -> Opened:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not array.size:
        raise BadImage(f"expected an array (H, W, 3) of uint8, got {array.shape} of {array.dtype}")

    def write(pixels: Pixels) -> None:
        pixels[:] = array

    return Opened(array.shape[1], array.shape[0], write)


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


def _open_with_pillow(data: bytes) -> Opened:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("is no JPEG, PNG, WebP, GIF, BMP, TIFF or PPM") from error
    except Exception as error:  # a broken file makes codecs raise nearly anything
        raise BadImage(_reason(error)) from error
    if image.format in ("JPEG", "MPO"):
        _check_jpeg(data, *image.size)
    _check_size(*image.size)

    def write(pixels: Pixels) -> None:
        try:
            _write_rgb(image, pixels)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(_reason(error)) from error

    return Opened(*image.size, write)


def _write_rgb(image: Image.Image, pixels: Pixels) -> None:
    image.load()
    if image.mode.startswith(("I", "F")):
        pixels[:] = _scaled(image)
        return
    n_rows = max(1, STRIP // image.width)
    for top in range(0, image.height, n_rows):
        strip = image.crop((0, top, image.width, min(top + n_rows, image.height)))
        pixels[top : top + n_rows] = np.asarray(strip.convert("RGB"))


def _scaled(image: Image.Image) -> Pixels:
    """Gray of more than 8 bits -> (height, width, 1)."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" and 0 <= low <= high <= 1:
        return np.round(values * 255).astype(np.uint8)[..., None]
    if image.mode != "F" and 0 <= low <= high < 2**16:
        return (values >> 8).astype(np.uint8)[..., None]
    raise BadImage(
        f"has numbers from {low:g} to {high:g}, of which no color is known: save it with 8 or 16 bits, or from 0 to 1"
    )
