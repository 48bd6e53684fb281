"""Encoded bytes to RGB, as the original's `Image.open(f).convert("RGB")` sees them, EXIF rotation ignored included."""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image


class BadImage(Exception):
    """An image that cannot be decoded. The message says why."""


def _decode_jpeg(data: bytes) -> Image.Image | None:
    """A plain JPEG (the same pixels as Pillow's, a quarter faster), or None where Pillow should judge."""
    try:
        if simplejpeg.decode_jpeg_header(data)[2] not in ("YCbCr", "Gray"):
            return None
        return Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    except ValueError:
        return None


def decode(item: bytes | NDArray[np.uint8]) -> Image.Image:
    """An item of a source -> RGB image. Raises BadImage, with the reason, for what no decoder reads."""
    if not isinstance(item, bytes):
        return Image.fromarray(item)
    if not item:
        raise BadImage("the file is empty")
    image = _decode_jpeg(item) if simplejpeg.is_jpeg(item) else None
    if image is not None:
        return image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palettes with transparency, large images: not a user's concern
            return Image.open(io.BytesIO(item)).convert("RGB")
    except Exception as error:  # a broken file makes codecs raise nearly anything
        raise BadImage(str(error).replace("<_io.BytesIO object at ", "<bytes at ") or type(error).__name__) from error
