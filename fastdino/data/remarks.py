"""What is done to a run's images that its user may not expect, in a line each: said once, at the start."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdino.data.channels import (
    PNG_OF_16_BITS,
    RGB,
    TIFF,
    UPRIGHT,
    Converted,
    ImageFormat,
    is_read_by_pillow,
    orientation_of,
    read_values,
    spread,
)
from fastdino.data.decode import bits_of, loaded, pillow_image
from fastdino.data.levels import NPY, BadImage, to_levels, white_of, with_channels
from fastdino.data.sources import ImageSource

BYTES = np.dtype(np.uint8)
KINDS = {"P": "palette", "PA": "palette", "1": "black and white"}  # what Pillow's modes are called; others as they are


def remarks(source: ImageSource) -> list[str]:
    """Of a few images, spread evenly over the source; those that cannot be read are said where they are counted."""
    wanted = source.wanted if isinstance(source, Converted) else RGB
    stored = source.source if isinstance(source, Converted) else source
    seen: Counter[str] = Counter()
    largest, n_seen = 0.0, 0
    for index in spread(stored):
        try:
            found = _found(stored[index], wanted)
        except (BadImage, OSError):
            continue
        n_seen += 1
        largest = max(largest, found.largest)
        seen.update(found.words(wanted))
    return [
        words + (f" ({n} of {n_seen} looked at)" if n < n_seen else "") + _hint(words, largest)
        for words, n in seen.items()
    ]


def _hint(words: str, largest: float) -> str:
    """Where numbers of 16 bits are so small that crops would be dark: cameras of 10 to 14 bits say it nowhere."""
    if "0..65535" not in words or largest >= 2**14:
        return ""
    bits = max(8, int(largest).bit_length())
    return f"; none is above {largest:.0f}: --value_range 0 {2**bits - 1} if that is white"


class _Found(NamedTuple):
    """An item of a source. kind: Pillow's mode, or array. largest: of its numbers, where they have more than 8 bits."""

    kind: str
    dtype: np.dtype[Any] = BYTES
    bits: int = 0
    largest: float = 0
    is_gray: bool = False
    is_turned: bool = False
    is_transparent: bool = False
    pages: int = 1

    def words(self, wanted: ImageFormat) -> list[str]:
        """A phrase for each thing that is done."""
        said = []
        if wanted.value_range:
            said.append("{:g} is black, {:g} white (--value_range)".format(*wanted.value_range))
        elif self.dtype != BYTES:
            name = f"{self.bits or 8 * self.dtype.itemsize}-bit" if self.dtype.kind in "iu" else "float"
            said.append(f"{name} images: scaled from 0..{white_of(self.dtype, self.bits)}")
        if self.is_gray and wanted.channels == 3:
            said.append("gray images: repeated in 3 channels (--channels 1 reads one)")
        elif not self.is_gray and self.kind in ("RGB", "RGBA", "CMYK", "P") and wanted.channels == 1:
            said.append("color images: weighed into one channel, as Pillow's gray")
        if self.kind in ("CMYK", "P", "PA", "YCbCr", "LAB") and wanted.channels == 3 and not self.is_gray:
            said.append(f"{KINDS.get(self.kind, self.kind)} images: converted to RGB")
        if self.is_transparent and wanted.channels in (1, 3):
            said.append("transparency is left out")
        if self.is_turned and wanted.exif_turn:
            said.append("turned as EXIF says")
        elif self.is_turned:
            said.append("the turn that EXIF asks for is not made, as in the original (--exif_turn true makes it)")
        if self.pages > 1 and not wanted.converts:
            said.append("several pages or frames: the first is read (--channels N reads a TIFF of N)")
        return said


def _found(item: bytes | NDArray[Any], wanted: ImageFormat) -> _Found:
    if not isinstance(item, bytes):
        return _of_array(item, 0, wanted)
    if item.startswith(NPY) or (wanted.converts and item.startswith(TIFF) and not is_read_by_pillow(item)):
        return _of_array(*read_values(item, wanted.channels), wanted)
    image = pillow_image(item)
    found = _Found(
        kind=image.mode,
        is_gray=image.mode in ("L", "LA", "1") or image.mode.startswith(("I", "F")),
        is_turned=orientation_of(image) != UPRIGHT,
        is_transparent=image.has_transparency_data,
        pages=getattr(image, "n_frames", 1),
    )
    if image.mode.startswith(("I", "F")):
        held = _of_array(np.asarray(loaded(image)), bits_of(image), wanted)
        return found._replace(dtype=held.dtype, bits=held.bits, largest=held.largest)
    is_wide = image.format == "PNG" and item[24:26] in PNG_OF_16_BITS
    return found._replace(dtype=np.dtype(np.uint16), largest=np.inf) if is_wide else found


def _of_array(values: NDArray[Any], bits: int, wanted: ImageFormat) -> _Found:
    to_levels(with_channels(values), wanted.value_range, bits)  # raises BadImage for what is not read
    largest = 0.0 if values.dtype == BYTES else float(values.max())
    return _Found("array", values.dtype, bits, largest, values.ndim == 2 or values.shape[2] == 1)
