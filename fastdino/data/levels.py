"""Numbers of any kind to levels of 8 bits: which number is black, and which is white.

Crops have 8 bits a channel, as the original's have. What becomes of more looks at the kind of number alone, never at
what an image happens to hold, so that a level means the same in every image, in a resumed run and in its features:

    unsigned integers        0 to the largest of their type, or of a TIFF's BitsPerSample (12-bit files: 4095)
    signed integers          the same, where none is negative; of 32 and 64 bits, where all lie in 0..65535
    floats                   0 to 1
    --value_range LOW HIGH   LOW to HIGH, whatever the type; what lies outside is cut off

Everything else is refused. To stretch each image to its own darkest and brightest number, as viewers do, would make an
empty field of noise and a full one alike, and undo what microscopes, scanners and satellites have measured.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 178_956_970  # an image of more is refused, as Pillow does: 512 MiB of RGB
NPY = b"\x93NUMPY"  # what a file of an array begins with


class BadImage(Exception):
    """An image that cannot be decoded. The message says why."""


def white_of(dtype: np.dtype[Any], bits: int = 0) -> int:
    """The number that is white. bits: those in use, where the file says it; 0 for all of the type's."""
    if dtype.kind in "bf":
        return 1
    return 2 ** (bits or (16 if dtype.itemsize > 2 else 8 * dtype.itemsize - (dtype.kind == "i"))) - 1


def to_levels(values: NDArray[Any], value_range: Sequence[float] = (), bits: int = 0) -> NDArray[np.uint8]:
    """Numbers of any shape -> levels 0..255 of that shape. Raises BadImage where nobody can tell what they mean.

    value_range: what is black and what is white, instead of the rule above. bits: see `white_of`.
    """
    if values.dtype.kind not in "buif" or not values.size:
        raise BadImage(f"holds {values.shape} of {values.dtype}, which are no levels of brightness")
    if values.dtype == np.uint8 and not value_range:
        return values
    least, most = values.min(), values.max()
    if not (np.isfinite(least) and np.isfinite(most)):
        raise BadImage("holds numbers that are not finite (NaN, or infinite)")
    black, white = value_range or (0, white_of(values.dtype, bits))
    if not value_range and not black <= least <= most <= white:
        raise BadImage(
            f"has numbers from {least:g} to {most:g}, of which no color is known: --value_range LOW HIGH says which is "
            f"black and which white; or save it with 8 or 16 bits, or from 0 to 1"
        )
    scaled = (values.astype(np.float64) - black) * (255 / (white - black))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def read_npy(data: bytes) -> NDArray[Any]:
    """The array of a .npy file, without a copy. Nothing in it is run: arrays of Python objects are refused."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        of_version = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = of_version[version](file)
    except Exception as error:  # a damaged header makes its parser raise nearly anything
        raise BadImage("is no array that NumPy reads: its header is damaged") from error
    if dtype.hasobject:
        raise BadImage("holds Python objects, which could run code and are not read: save an array of numbers")
    n_numbers = int(np.prod(shape, dtype=object))
    if min(shape, default=1) < 1 or len(data) - file.tell() < n_numbers * dtype.itemsize:
        raise BadImage(f"is cut short: its header tells of {' x '.join(map(str, shape))} numbers")
    values = np.frombuffer(data, dtype, n_numbers, file.tell())
    return values.reshape(shape[::-1]).T if is_fortran else values.reshape(shape)


def with_channels(values: NDArray[Any]) -> NDArray[Any]:
    """(H, W) or (H, W, C) -> (H, W, C). Raises BadImage for other shapes, and for what is too large."""
    if values.ndim not in (2, 3) or not values.size:
        raise BadImage(f"expected an array (H, W) or (H, W, C), got {values.shape}")
    if values.shape[0] * values.shape[1] > MAX_PIXELS:
        raise BadImage(f"{values.shape[1]} x {values.shape[0]} pixels are more than the {MAX_PIXELS:,} that are read")
    return values if values.ndim == 3 else values[..., None]
