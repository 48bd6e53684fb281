"""Crops have Pillow's pixels and the original's probabilities."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import global_augment, multiple_local_augments
from fastdino.data.augment import (
    MEAN,
    STD,
    CropParams,
    ViewRecipe,
    apply_crop,
    center_view,
    draw_box,
    draw_crop,
    normalize,
)

spec = importlib.util.spec_from_file_location("pillow_replica", Path(__file__).with_name("pillow_replica.py"))
replica = importlib.util.module_from_spec(spec)
spec.loader.exec_module(replica)

ALL = ViewRecipe(size=48, scale=(0.05, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.5, solarize=0.3)


def test_crops_equal_the_integer_replica_bit_for_bit(photos):
    """The replica restates Pillow in NumPy: it knows the order of the steps, and nothing of our code."""
    rng = np.random.default_rng(0)
    for i in range(60):
        photo = photos[i % len(photos)][: 90 + i, : 150 - i]
        params = draw_crop(rng, photo.shape[1], photo.shape[0], ALL)
        expected = replica.augment(photo, vars(params))
        assert np.array_equal(apply_crop(Image.fromarray(photo), params), expected), params


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2000)], ids=str)
def test_crops_of_extreme_images_have_the_asked_size(shape):
    image = Image.fromarray(np.full((*shape, 3), 200, np.uint8))
    rng = np.random.default_rng(0)
    for _ in range(20):
        params = draw_crop(rng, image.width, image.height, ALL)
        x, y, w, h = params.box
        assert x >= 0
        assert y >= 0
        assert w >= 1
        assert h >= 1
        assert x + w <= image.width
        assert y + h <= image.height
        assert apply_crop(image, params).shape == (48, 48, 3)


def test_alterations_happen_as_often_as_the_original_does_them():
    rng, n = np.random.default_rng(1), 20_000
    recipe = ViewRecipe(size=8, scale=(0.4, 1.0), flip=0.5, jitter=0.8, gray=0.2, blur=0.1, solarize=0.2)
    crops = [draw_crop(rng, 640, 480, recipe) for _ in range(n)]
    for name, expected in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2), ("blur", 0.1), ("solarize", 0.2)):
        seen = np.mean([bool(getattr(crop, name)) for crop in crops])
        assert abs(seen - expected) < 4 * math.sqrt(expected * (1 - expected) / n), name
    factors = {name: [] for name in ("brightness", "contrast", "saturation", "hue")}
    first = dict.fromkeys(factors, 0)
    for crop in crops:
        for name, factor in crop.jitter:
            factors[name].append(factor)
        if crop.jitter:
            first[crop.jitter[0][0]] += 1
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = np.array(factors[name])
        width = high - low
        assert low <= values.min() < low + 0.01 * width
        assert high - 0.01 * width < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * width / math.sqrt(12 * len(values))
        assert abs(first[name] / len(values) - 0.25) < 4 * math.sqrt(0.1875 / len(values))
    radii = np.array([crop.blur for crop in crops if crop.blur])
    assert 0.1 <= radii.min() < 0.13
    assert 1.97 < radii.max() <= 2.0


def test_boxes_have_the_asked_areas_and_shapes():
    rng, n = np.random.default_rng(2), 20_000
    boxes = np.array([draw_box(rng, 1000, 1000, (0.05, 0.4)) for _ in range(n)], dtype=float)
    area, ratio = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 2] / boxes[:, 3]
    assert abs(area.mean() - 0.225) < 4 * 0.35 / math.sqrt(12 * n)
    assert 0.0495 < area.min() < 0.052
    assert 0.398 < area.max() < 0.4005
    assert abs(np.log(ratio).mean()) < 4 * np.log(16 / 9) / math.sqrt(12 * n)
    assert 0.745 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.34
    free = 1000 - boxes[:, 2]
    assert abs((boxes[:, 0] / free).mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (100, 100, (0, 0, 100, 100))],
)
def test_a_box_that_never_fits_falls_back_to_the_middle(width, height, expected):
    class TooLarge:
        def uniform(self, low, high):
            return high * 4

    assert draw_box(TooLarge(), width, height, (0.9, 1.0)) == expected


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


def test_solarize_and_gray_do_what_they_say():
    image = Image.fromarray(np.arange(0, 192, dtype=np.uint8).reshape(8, 8, 3))
    plain = {"box": (0, 0, 8, 8), "size": 8, "flip": False, "jitter": (), "blur": 0.0}
    base = np.asarray(image).astype(int)
    solarized = apply_crop(image, CropParams(**plain, gray=False, solarize=True))
    assert np.array_equal(solarized, np.where(base < 128, base, 255 - base))
    gray = apply_crop(image, CropParams(**plain, gray=True, solarize=False))
    assert np.ptp(gray, axis=-1).max() == 0
