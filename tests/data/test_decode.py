"""Decoding sees what the original's `Image.open(f).convert("RGB")` sees, and names what it cannot read."""

import io

import numpy as np
import pytest
from PIL import Image

from fastdino.data.decode import BadImage, decode, decode_array, open_image


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


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "RGB"])
def test_jpeg_colour_spaces_equal_pillows(photos, mode, progressive):
    data = encoded(Image.fromarray(photos[1][:63, :81]).convert(mode), format="JPEG", progressive=progressive)
    assert np.array_equal(np.asarray(decode(data)), as_the_original(data))


def test_rotation_in_exif_is_ignored_as_in_the_original(photos):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    data = encoded(Image.fromarray(photos[0][:40, :60]), format="JPEG", exif=exif.tobytes())
    assert decode(data).size == (60, 40)


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "1"), ("WEBP", "RGB"),
     ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("GIF", "P")],
    ids=lambda value: str(value),
)  # fmt: skip
def test_other_formats_become_rgb(photos, file_format, mode):
    data = encoded(Image.fromarray(photos[2][:50, :70]).convert(mode), format=file_format)
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
    with pytest.raises(BadImage, match=r"\w+") as caught:
        decode(data)
    with pytest.raises(BadImage) as again:
        decode(bytes(bytearray(data)))
    assert str(again.value) == str(caught.value)  # lines about an image are counted once
    assert "0x" not in str(caught.value)


def test_headers_say_what_will_be_decoded(photos):
    for shape in ((1, 1), (10, 30_000), (203, 301)):
        image = Image.fromarray(np.resize(photos[0], (*shape, 3)))
        for kind in ("JPEG", "PNG", "TIFF"):
            data = encoded(image, format=kind)
            opened = open_image(data)
            assert (opened.height, opened.width) == shape
            assert np.array_equal(decode_array(opened), as_the_original(data))


def test_every_pixel_of_the_place_is_written(photos):
    frames = [Image.fromarray(photos[i][:40, :50]).convert("P") for i in (0, 1)]
    animated = encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    transparent = encoded(Image.new("RGBA", (50, 40), (9, 8, 7, 0)), format="PNG")
    jpeg, webp = (encoded(Image.fromarray(photos[0][:40, :50]), format=kind) for kind in ("JPEG", "WEBP"))
    for data in (animated, transparent, jpeg, webp):  # the first frame; names play no part, so none can be wrong
        for stale in (0, 255):
            place = np.full((40, 50, 3), stale, np.uint8)
            open_image(data).write(place)
            assert np.array_equal(place, as_the_original(data))


def test_bombs_are_refused_by_their_header():
    size = (20_000).to_bytes(2, "big")
    start = JPEG.index(b"\xff\xc0") + 5
    for data in (BOMB, JPEG[:start] + size + size + JPEG[start + 4 :]):
        with pytest.raises(BadImage, match=r"pixels"):
            open_image(data)


@pytest.mark.parametrize(("enough", "divisor"), [(0, 1), (200, 1), (150, 2), (75, 4), (37, 8), (1, 8)])
def test_large_jpegs_are_decoded_smaller_where_that_is_asked(photos, enough, divisor):
    photo = Image.fromarray(photos[0][:301, :403])
    data = encoded(photo, format="JPEG", quality=95)
    opened = open_image(data, enough)
    assert (opened.width, opened.height) == (-(-403 // divisor), -(-301 // divisor))
    pixels = decode_array(opened)
    shrunk = np.asarray(photo.resize((opened.width, opened.height), Image.Resampling.BOX))
    assert np.abs(pixels.astype(int) - shrunk).mean() < 8
    if divisor == 1:
        assert np.array_equal(pixels, as_the_original(data))
    with pytest.raises(BadImage):
        decode_array(open_image(data[: len(data) // 2], enough))


GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = {
    "16 bits": GRAY.astype(np.uint16) * 257,
    "32 bits, 16 of them used": GRAY.astype(np.int32) * 257,
    "from 0 to 1": GRAY.astype(np.float32) / 255,
}


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_more_than_eight_bits_are_scaled_not_cut_off(kind, file_format):
    if kind == "from 0 to 1" and file_format == "PNG":
        pytest.skip("PNG has no such numbers")
    pixels = np.asarray(decode(encoded(Image.fromarray(WIDE[kind]), format=file_format)))
    assert np.array_equal(pixels, np.repeat(GRAY[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "values",
    [GRAY.astype(np.float32), GRAY.astype(np.int32) - 1, GRAY.astype(np.int32) << 20],
    ids=["0-255", "<0", "big"],
)
def test_numbers_of_no_known_range_are_refused_with_it(values):
    words = rf"has numbers from {values.min():g} to {values.max():g}, of which no color is known".replace("+", r"\+")
    with pytest.raises(BadImage, match=words):
        decode(encoded(Image.fromarray(values), format="TIFF"))


def test_formats_that_start_other_programs_are_not_opened(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    for data in (encoded(Image.new("RGB", (8, 8)), format="EPS"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"):
        with pytest.raises(BadImage, match="is no JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"):
            decode(data)


def test_a_phones_jpeg_with_a_second_picture_is_read(photos):
    first, second = (Image.fromarray(photos[i][:40, :50]) for i in (0, 1))
    data = encoded(first, format="MPO", save_all=True, append_images=[second])
    assert np.array_equal(np.asarray(decode(data)), as_the_original(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 1}], ids=str)
def test_the_flattest_jpeg_is_read_and_a_claim_beyond_it_is_not(options):
    data = encoded(Image.new("L", (3000, 2000), 128), format="JPEG", optimize=True, **options)
    assert decode(data).size == (3000, 2000)
    start = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0") + 5
    claim = (13_000).to_bytes(2, "big")
    with pytest.raises(BadImage, match=r"bytes cannot hold the 13000 x 13000 pixels that the header claims"):
        open_image(data[:start] + claim + claim + data[start + 4 :])


def test_jpegs_that_pillow_decodes_cannot_claim_more_than_they_hold_either():
    data = encoded(Image.new("CMYK", (64, 64)), format="JPEG")
    start = data.index(b"\xff\xc0") + 5
    with pytest.raises(BadImage, match="bytes cannot hold the 13000 x 13000 pixels"):
        open_image(data[:start] + (13_000).to_bytes(2, "big") * 2 + data[start + 4 :])


def test_a_jpeg_of_endless_scans_is_refused_and_a_progressive_one_is_not():
    """The same scan again and again costs a few bytes each time, and all pixels."""
    data = encoded(Image.new("L", (2000, 2000), 128), format="JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert decode(data).size == (2000, 2000)
    with pytest.raises(BadImage, match=r"2,005 scans of 2000 x 2000 pixels are more than are decoded"):
        open_image(data[:last] + data[last:-2] * 2000 + data[-2:])


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "LA", "RGB"])
def test_conversion_in_strips_is_the_wholes(photos, monkeypatch, mode):
    monkeypatch.setattr("fastdino.data.decode.STRIP", 7 * 70)
    photo = Image.fromarray(photos[2][:50, :70]).convert(mode)
    data = encoded(photo, format="TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(np.asarray(decode(data)), as_the_original(data))
