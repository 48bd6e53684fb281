"""Crops have Pillow's pixels, or come as close to them as is promised."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import global_augment, multiple_local_augments
from fastdino.data.augment import IMAGENET_MEAN as MEAN
from fastdino.data.augment import IMAGENET_STD as STD
from fastdino.data.augment import apply_crop, apply_crop_fast, center_view, normalize
from fastdino.data.params import CropParams, ViewRecipe, crop_params, draw_crops

spec = importlib.util.spec_from_file_location("pillow_replica", Path(__file__).with_name("pillow_replica.py"))
replica = importlib.util.module_from_spec(spec)
spec.loader.exec_module(replica)

ALL = ViewRecipe(size=48, scale=(0.05, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.5, solarize=0.3)
DINO = ViewRecipe(size=224, scale=(0.4, 1.0), blur=0.5, solarize=0.1)
PLAIN = CropParams(box=(0, 0, 8, 8), flip=False, jitter=(), gray=False, blur=0.0, solarize=False)


def drawn(photos, view, n, seed=0):
    """n crops of each photograph: (pixels, params)."""
    heights, widths = zip(*(photo.shape[:2] for photo in photos))
    crops = draw_crops(seed, 0, range(len(photos)), widths, heights, [view] * n)
    writable = [photo.copy() for photo in photos]  # as the loader's are; PyTorch warns of others
    return [(writable[i], params) for i, params in zip(crops.image.tolist(), crop_params(crops))]


def test_crops_equal_the_integer_replica_bit_for_bit(photos):
    """The replica restates Pillow in NumPy: it knows the order of the steps, and nothing of our code."""
    small = [photo[: 90 + i, : 150 - i] for i, photo in enumerate(photos)]
    for pixels, params in drawn(small, ALL, 10):
        # The replica takes a turn as a part of the circle; half a step more, or its int() may fall one short.
        jitter = [(step, (factor + 0.5) / 255 if step == "hue" else factor) for step, factor in params.jitter]
        expected = replica.augment(pixels, {**vars(params), "jitter": jitter, "size": 48})
        assert np.array_equal(apply_crop(pixels, params, 48), expected), params


@pytest.mark.parametrize("apply", [apply_crop, apply_crop_fast])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2000)], ids=str)
def test_crops_of_extreme_images_are_the_images_colour(shape, apply):
    pixels = np.full((*shape, 3), 200, np.uint8)
    view = ViewRecipe(size=48, scale=(0.05, 1.0), jitter=0.0, blur=0.5)
    for _, params in drawn([pixels], view, 20):
        assert np.array_equal(apply(pixels, params, 48), np.full((48, 48, 3), 200))


def difference(pixels, params, size):
    return np.abs(apply_crop(pixels, params, size).astype(int) - apply_crop_fast(pixels, params, size))


@pytest.mark.parametrize("size", [224, 96])
def test_fast_resize_is_within_two_levels_of_pillows(photos, size):
    plain = ViewRecipe(size=size, scale=(0.05, 1.0), flip=0.5, jitter=0, gray=0, blur=0, solarize=0)
    for pixels, params in drawn(photos, plain, 6):
        assert difference(pixels, params, size).max() <= 2


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 1.41, 1.42, 1.7, 2.0])
def test_fast_blur_is_within_three_levels_of_pillows_up_to_the_borders(photos, radius):
    """Radii to either side of sqrt(2), where the box grows; resized to their own size, images stay as they are."""
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 2, (96, 96, 3)).astype(np.uint8) * 255,
        np.repeat(np.arange(96)[:, None] // 3 % 2, 96 * 3, 1).reshape(96, 96, 3).astype(np.uint8) * 255,
        photos[0][100:196, 200:296].copy(),
    ]
    for pixels in images:
        assert difference(pixels, replace(PLAIN, box=(0, 0, 96, 96), blur=radius), 96).max() <= 3


def test_fast_crops_are_within_a_level_and_a_half_on_average(photos):
    for size, view in ((224, DINO), (96, replace(DINO, size=96, scale=(0.05, 0.4)))):
        means = [difference(pixels, params, size).mean() for pixels, params in drawn(photos, view, 12)]
        assert np.mean(means) <= 0.75
        assert max(means) <= 1.5


@pytest.mark.parametrize(
    "change",
    [
        {"jitter": (("brightness", 0.6),)},
        {"jitter": (("contrast", 1.4),)},
        {"jitter": (("saturation", 0.8),)},
        {"jitter": (("hue", 25.0),)},
        {"jitter": (("hue", 240.0),)},
        {"gray": True},
        {"blur": 1.0},
        {"blur": 2.0},
        {"solarize": True},
        {"flip": True},
    ],
    ids=str,
)
def test_each_fast_alteration_is_pillows_but_for_rounding(photos, change):
    params = replace(PLAIN, box=(20, 10, 180, 200), **change)
    error = np.mean([difference(photo.copy(), params, 96).mean() for photo in photos])
    # An alteration that was left out would be this far away:
    left_out = np.mean([np.abs(untouched(photo, params) - apply_crop(photo, params, 96)).mean() for photo in photos])
    assert error <= 0.75
    assert error < 0.5 * left_out


def untouched(photo, params):
    return apply_crop(photo, replace(PLAIN, box=params.box), 96).astype(int)


def test_center_view_is_the_middle_of_the_resized_image(photos):
    photo = Image.fromarray(photos[0])  # 640 x 427
    view = center_view(photo, 256, 224)
    expected = photo.resize((int(256 * 640 / 427), 256), Image.Resampling.BICUBIC)
    left = round((expected.width - 224) / 2)
    assert np.array_equal(view, np.asarray(expected)[16:240, left : left + 224])


def test_normalize_removes_imagenets_mean_and_deviation():
    pixels = torch.randint(0, 256, (2, 5, 3, 4, 4), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[
        :, None, None
    ]
    assert torch.allclose(normalize(pixels).double(), expected, atol=1e-6)


def test_article_augmentations_take_pil_images_and_tensors(photos):
    pil = [Image.fromarray(photo) for photo in photos[:2]]
    tensors = torch.stack([torch.tensor(photo[:200, :300]).permute(2, 0, 1) for photo in photos[:2]])
    assert global_augment(pil).shape == (2, 3, 224, 224)
    assert multiple_local_augments(pil, num_crops=3).shape == (6, 3, 96, 96)
    assert multiple_local_augments(tensors).shape == (12, 3, 96, 96)
    torch.manual_seed(3)
    from_bytes = global_augment(tensors)
    torch.manual_seed(3)
    from_floats = global_augment(tensors / 255)
    assert torch.equal(from_bytes, from_floats)
    assert not torch.equal(from_bytes, global_augment(tensors))
    assert abs(float(from_bytes.mean())) < 3


def test_local_augmentations_are_crop_major(photos):
    plain = [Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (64, 64), (0, 0, 0))]
    crops = multiple_local_augments(plain, num_crops=4)
    dark = crops.flatten(1).mean(1) < -1.5  # black stays black under every alteration
    assert dark.tolist() == [False, True] * 4


@pytest.mark.parametrize("images", [[], [3], torch.zeros(2, 4, 8, 8), ["a.jpg"]], ids=str)
def test_article_augmentations_refuse_what_is_no_image(images):
    with pytest.raises(ValueError, match="images: expected"):
        global_augment(images)


@pytest.mark.parametrize("apply", [apply_crop, apply_crop_fast])
def test_solarize_and_gray_do_what_they_say(apply):
    pixels = np.arange(0, 192, dtype=np.uint8).reshape(8, 8, 3)
    base = pixels.astype(int)
    solarized = apply(pixels, replace(PLAIN, solarize=True), 8)
    assert np.array_equal(solarized, np.where(base < 128, base, 255 - base))
    gray = apply(pixels, replace(PLAIN, gray=True), 8)
    assert np.ptp(gray, axis=-1).max() == 0
