"""Images as people have them: what arrives in a loader, beside what Pillow or tifffile read, scaled."""

import contextlib
import io
import tarfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageOps

from fastdino import EvalTransform
from fastdino.cli import main
from fastdino.data.augment import apply_crop, apply_crop_fast
from fastdino.data.channels import ImageFormat, as_wanted, converted, open_images, orientation_of, read_pixels
from fastdino.data.decode import BadImage
from fastdino.data.levels import read_npy, to_levels
from fastdino.data.loader import CropLoader, EpochSampler
from fastdino.data.params import CropParams, MultiCropRecipe, ViewRecipe
from fastdino.data.remarks import remarks
from fastdino.data.sequences import SequenceSource, dataset_source
from fastdino.errors import UserError

WHOLE = ViewRecipe(size=48, scale=(1.0, 1.0), flip=0, jitter=0, gray=0, blur=0)


def encoded(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, **kwargs)
    return buffer.getvalue()


def tiff(values, **kwargs):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **kwargs)
    return buffer.getvalue()


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def packed_12_bits(values):
    """A TIFF whose BitsPerSample is 12, two numbers in three bytes, as scanners write them."""
    high, low = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    data = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], -1).astype(np.uint8).tobytes()
    height, width = values.shape
    entries = [(256, 3, width), (257, 3, height), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 3, height), (279, 4, len(data))]  # fmt: skip
    table = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, value in entries
    )
    directory = len(entries).to_bytes(2, "little") + table + bytes(4)
    return b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data + directory


@pytest.fixture(scope="module")
def squares(photos):
    """A square photograph: a crop of all of it at its own size is the image itself."""
    return photos[0][100:148, 200:248]


def arrives(source, size=48):
    """(C, S, S): the first global crop of the only image, of all of it."""
    recipe = MultiCropRecipe(globals=(WHOLE, WHOLE), locals=())
    loader = CropLoader(source, recipe, EpochSampler(1, 1, seed=0), augment="exact")
    (batch,) = iter(loader)
    assert not batch.bad
    return batch.global_crops[0, 0].numpy()


def cases(rgb):
    """name -> (an item, format, what Pillow or tifffile read of it, scaled: (H, W, C) floats of 0..255)."""
    gray = rgb[..., 1]
    of_12, of_16 = gray.astype(np.uint16) * 16 + 7, gray.astype(np.uint16) * 251 + 3
    unit = (gray / 255).astype(np.float32)
    cmyk = encoded(Image.fromarray(rgb).convert("CMYK"), format="TIFF")
    palette = encoded(Image.fromarray(rgb).quantize(64), format="PNG")
    twelve = np.stack([(rgb[..., k % 3].astype(np.uint16)) * (40 + k) for k in range(12)])
    four = np.concatenate([rgb, gray[..., None]], -1)

    def by_pillow(data):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)

    def by_tifffile(data):
        return tifffile.imread(io.BytesIO(data)).astype(float)

    png_16, tiff_12, stack = encoded(Image.fromarray(of_16), format="PNG"), packed_12_bits(of_12), tiff(twelve)
    plain = ImageFormat()
    return {
        "12-bit TIFF": (tiff_12, plain, np.asarray(Image.open(io.BytesIO(tiff_12)))[..., None] / 4095 * 255),
        "12 bits in 16": (npy(of_12), ImageFormat(1, (0, 4095)), of_12[..., None] / 4095 * 255),
        "16-bit PNG": (png_16, plain, np.asarray(Image.open(io.BytesIO(png_16)))[..., None] / 65535 * 255),
        "16-bit TIFF": (tiff(of_16), ImageFormat(1), by_tifffile(tiff(of_16))[..., None] / 65535 * 255),
        "float TIFF": (tiff(unit), plain, by_tifffile(tiff(unit))[..., None] * 255),
        "CMYK": (cmyk, plain, by_pillow(cmyk)),
        "palette": (palette, plain, by_pillow(palette)),
        "gray": (encoded(Image.fromarray(gray), format="PNG"), ImageFormat(1), gray[..., None].astype(float)),
        "4 channels": (npy(four), ImageFormat(4), four.astype(float)),
        "12 channels": (stack, ImageFormat(12, (0, 10000)), np.moveaxis(by_tifffile(stack), 0, -1) / 10000 * 255),
    }


NAMES = list(cases(np.zeros((4, 4, 3), np.uint8)))


@pytest.mark.parametrize("name", NAMES)
def test_what_arrives_is_what_pillow_or_tifffile_read_scaled(name, squares, capsys):
    item, wanted, expected = cases(squares)[name]
    found = arrives(converted(SequenceSource([item]), wanted))
    expected = np.broadcast_to(expected.clip(0, 255), (48, 48, wanted.channels))
    with capsys.disabled():
        row = "  ".join(f"{x.min():3.0f} {x.mean():6.2f} {x.max():3.0f}" for x in (found, expected))
        print(f"\n{name:15} {row}", end="")
    assert np.abs(np.moveaxis(found, 0, -1) - expected).max() <= 0.5 + 1e-9


def test_gray_crops_are_a_channel_of_their_rgb_twins(photos):
    gray = photos[1][:90, :120, :1].copy()
    jitter = (("contrast", 1.3), ("hue", 20.0), ("brightness", 0.7), ("saturation", 1.1))
    params = CropParams(box=(5, 9, 80, 70), flip=True, jitter=jitter, gray=True, blur=1.2, solarize=True)
    assert np.array_equal(apply_crop(gray, params, 40)[..., 0], apply_crop(gray.repeat(3, 2), params, 40)[..., 0])
    fast = apply_crop_fast(gray, params, 40)
    assert np.abs(fast.astype(int) - apply_crop(gray, params, 40)).mean() < 1.5


@pytest.mark.parametrize("apply", [apply_crop, apply_crop_fast], ids=["exact", "fast"])
def test_channels_are_cropped_alike_and_do_not_mix(apply, photos):
    jitter = (("saturation", 1.2), ("brightness", 0.8), ("hue", 9.0), ("contrast", 1.4))
    params = CropParams(box=(5, 9, 80, 70), flip=True, jitter=jitter, gray=True, blur=0.8, solarize=True)
    channels = np.concatenate([photos[0][:90, :120], photos[1][:90, :120]], -1)
    whole = apply(channels, params, 40)
    assert whole.shape == (40, 40, 6)
    for c in range(6):
        assert np.array_equal(whole[..., c : c + 1], apply(np.ascontiguousarray(channels[..., c : c + 1]), params, 40))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((5, 6, 3)), r"has 3 channels, expected 4 \(--channels 3 reads it\)"),
        (np.zeros((4, 6, 6)), "have to come last"),
        (np.full((4, 4, 4), np.nan), "not finite"),
        (np.full((4, 4, 4), -3, np.int16), "numbers from -3 to -3, of which no color is known: --value_range LOW HIGH"),
        (np.full((4, 4, 4), 2.5), "numbers from 2.5 to 2.5"),
        (np.zeros((4, 4, 4), complex), "no levels of brightness"),
        (np.zeros((4,)), "expected an array"),
        (np.zeros((0, 4, 4)), "cut short"),
        (np.array([[{}]], object), "Python objects"),
    ],
    ids=["channels", "first", "nan", "negative", "range", "complex", "line", "empty", "objects"],
)
def test_arrays_that_are_no_images_are_named_with_what_to_do(values, words):
    with pytest.raises(UserError, match=words) as caught:
        converted(SequenceSource([npy(values)]), ImageFormat(4))
    assert "\n" not in str(caught.value)


def test_no_damage_of_an_array_or_a_stack_escapes_as_another_error():
    rng = np.random.default_rng(0)
    data = {
        "npy": npy(np.ones((9, 7, 4), np.uint16)),
        "tiff": tiff(np.ones((4, 9, 7), np.uint8), photometric="minisblack"),
    }
    for whole in data.values():
        for _ in range(200):
            damaged = bytearray(whole[: rng.integers(8, len(whole))] if rng.random() < 0.5 else whole)
            damaged[rng.integers(6, len(damaged))] = rng.integers(256)
            with contextlib.suppress(BadImage):
                as_wanted(bytes(damaged), ImageFormat(4))


def test_a_header_of_more_numbers_than_bytes_takes_no_memory():
    data = npy(np.zeros((4, 4), np.uint8)).replace(b"(4, 4)", b"(4, 9)").replace(b"(4, 9)", b"(9, 9)")
    with pytest.raises(BadImage, match="cut short: its header tells of 9 x 9"):
        read_npy(data)


def test_levels_cut_off_what_lies_outside_the_range():
    assert to_levels(np.array([-5, 0, 40, 100, 900]), (0, 100)).tolist() == [0, 0, 102, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("wanted", [ImageFormat(exif_turn=True), ImageFormat(1, exif_turn=True)], ids=["3", "1"])
def test_images_are_turned_as_pillow_turns_them(photos, orientation, wanted):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(photos[0][:20, :30]).convert("L" if wanted.channels == 1 else "RGB")
    data = encoded(image, format="PNG", exif=exif)
    opened = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(opened)).reshape(*(20, 30)[:: 1 if orientation < 5 else -1], -1)
    source = converted(SequenceSource([data]), wanted)
    assert np.array_equal(read_pixels(source, 0), expected)
    assert isinstance(source[0], bytes) == (orientation == 1 and wanted.channels == 3)  # upright ones stay encoded
    assert np.array_equal(np.asarray(dataset_source([opened], "images", wanted)[0]).reshape(expected.shape), expected)


def test_damaged_exif_turns_nothing_and_ends_no_run(photos):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(Image.fromarray(photos[0][:20, :30]), format="JPEG", exif=exif)
    start, rng = data.index(b"Exif"), np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(start, start + 60, 4):
            broken[at] = rng.integers(256)
        assert orientation_of(bytes(broken)) in range(1, 9)


def test_the_transform_turns_as_the_run_did(photos):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(io.BytesIO(encoded(Image.fromarray(photos[0][:40, :40]), format="JPEG", exif=exif)))
    plain, turns = (EvalTransform(32, 36, exif_turn=does)(image) for does in (False, True))
    assert torch.allclose(plain.rot90(-1, (1, 2)), turns, atol=0.05)


def test_remarks_say_once_what_is_done(photos):
    dark = [Image.fromarray(photo[:20, :30, 0].astype(np.uint16) * 16) for photo in photos[:2]]
    said = remarks(SequenceSource([encoded(image, format="PNG") for image in dark]))
    assert said[0].startswith("16-bit images: scaled from 0..65535; none is above ")
    assert said[0].endswith("--value_range 0 4095 if that is white")
    assert said[1] == "gray images: repeated in 3 channels (--channels 1 reads one)"
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(photos[0][:20, :30]), format="JPEG", exif=exif)
    plain = encoded(Image.fromarray(photos[0][:20, :30]), format="JPEG")
    assert remarks(SequenceSource([turned, plain])) == [
        "the turn that EXIF asks for is not made, as in the original (--exif_turn true makes it) (1 of 2 looked at)"
    ]
    assert remarks(converted(SequenceSource([turned]), ImageFormat(exif_turn=True))) == ["turned as EXIF says"]
    assert remarks(SequenceSource([plain, photos[0]])) == []


def test_arrays_lie_in_folders_and_in_shards(tmp_path, squares):
    four = np.concatenate([squares, squares[..., :1]], -1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.npy").write_bytes(npy(four))
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(tmp_path / "folder" / "a.npy", "a.npy")
    for path in (tmp_path / "folder", tmp_path / "a.tar"):
        assert np.array_equal(read_pixels(open_images(path, ImageFormat(4)), 0), four)


FLAGS = (
    "--arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 --local_crops_number 1 --out_dim 32 "
    "--batch_size_per_gpu 4 --epochs 1 --num_workers 0 --attention_images 2"
)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_run_and_what_follows_it_have_the_channels_of_the_checkpoint(channels, tmp_path, photos, capsys):
    for i in range(8):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        values = photos[i % 3][20 * i : 20 * i + 60, :70].astype(np.uint16) * 16
        values = np.concatenate([values, values[..., :1]], -1)[..., :channels]
        np.save(tmp_path / "in" / "ab"[i % 2] / f"{i}.npy", values)
    data, out = ["--data_path", str(tmp_path / "in")], tmp_path / "out"
    asked = ["--channels", str(channels), "--value_range", "0", "4095"]
    assert main(["train", *data, *asked, *FLAGS.split(), "--output_dir", str(out)]) == 0
    assert "0 is black, 4095 white (--value_range)" in capsys.readouterr().out
    assert (out / "attention.png").is_file()
    weights = ["--pretrained_weights", str(out / "checkpoint.pth"), "--num_workers", "0"]
    assert main(["features", *weights, *data, "--output", str(tmp_path / "f.npz")]) == 0
    assert np.load(tmp_path / "f.npz")["cls"].shape == (8, 96)
    assert main(["knn", *weights, *data, "--nb_knn", "2"]) == 0
    images = ["--images", str(tmp_path / "in" / "a" / "0.npy"), "--output", str(tmp_path / "a.png")]
    assert main(["attention", *weights[:2], *images]) == 0
    capsys.readouterr()
    film = ["--video", str(tmp_path / "in" / "a"), "--output", str(tmp_path / "a.mp4")]
    assert main(["attention", *weights[:2], *film]) == 2
    assert f"takes images of {channels} channel" in capsys.readouterr().err


def test_a_gpu_hands_other_channels_to_the_cpu_and_says_so():
    source = converted(SequenceSource([np.zeros((9, 9, 5), np.uint8)] * 2), ImageFormat(5))
    loader = CropLoader(
        source, MultiCropRecipe(globals=(WHOLE, WHOLE), locals=()), EpochSampler(2, 2, 0), device=torch.device("cuda")
    )
    assert "crops on the CPU (the GPU's kernels take 3 channels, these have 5)" in loader.describe()
