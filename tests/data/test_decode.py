"""Decoding sees what the original's `Image.open(f).convert("RGB")` sees, and names what it cannot read."""

import io

import numpy as np
import pytest
from PIL import Image

from fastdino.data.decode import BadImage, decode


def encoded(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, **kwargs)
    return buffer.getvalue()


def as_the_original(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
def test_jpeg_pixels_equal_pillows(photos, subsampling, progressive):
    for photo in photos[:3]:
        image = Image.fromarray(photo[:203, :301])  # odd sizes: chroma has a remainder
        data = encoded(image, format="JPEG", quality=85, subsampling=subsampling, progressive=progressive)
        assert np.array_equal(np.asarray(decode(data)), as_the_original(data))


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "RGB"])
def test_jpeg_colour_spaces_equal_pillows(photos, mode):
    data = encoded(Image.fromarray(photos[1][:64, :80]).convert(mode), format="JPEG")
    assert np.array_equal(np.asarray(decode(data)), as_the_original(data))


def test_rotation_in_exif_is_ignored_as_in_the_original(photos):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    data = encoded(Image.fromarray(photos[0][:40, :60]), format="JPEG", exif=exif.tobytes())
    assert decode(data).size == (60, 40)


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("PNG", "1"), ("WEBP", "RGB"),
     ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("GIF", "P")],
    ids=lambda value: str(value),
)  # fmt: skip
def test_other_formats_become_rgb(photos, file_format, mode):
    photo = Image.fromarray(photos[2][:50, :70])
    image = (
        Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) << 8)
        if mode == "I;16"
        else photo.convert(mode)
    )
    data = encoded(image, format=file_format)
    assert np.array_equal(np.asarray(decode(data)), as_the_original(data))
    assert decode(data).mode == "RGB"


def test_arrays_pass_through(photos):
    assert np.array_equal(np.asarray(decode(photos[0])), photos[0])


JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), format="JPEG")
PNG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), format="PNG")
BOMB = encoded(Image.new("1", (20_000, 20_000)), format="PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"not an image",
        JPEG[:20],
        JPEG[: len(JPEG) // 2],
        PNG[: len(PNG) // 2],
        JPEG[:2] + b"\x00" * 500,
        BOMB,
    ],
    ids=["empty", "zeros", "text", "jpeg-header", "jpeg-half", "png-half", "jpeg-zeros", "bomb"],
)
def test_what_cannot_be_read_is_a_bad_image_with_a_reason(data):
    with pytest.raises(BadImage, match=r"\w+"):
        decode(data)
