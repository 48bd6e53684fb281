"""Parameters have the original's distributions, and depend on seed, epoch, sample and view alone."""

import math

import numpy as np
import pytest
import torch

from fastdino.data.params import JITTER, RATIO, ViewRecipe, crop_params, draw_boxes, draw_crops, philox

N = 100_000
VIEW = ViewRecipe(size=8, scale=(0.05, 0.4), flip=0.5, jitter=0.8, gray=0.2, blur=0.1, solarize=0.3)


@pytest.fixture(scope="module")
def table():
    """100,000 crops of an image of 640 x 480."""
    return draw_crops(1, 0, np.arange(N), np.full(N, 640), np.full(N, 480), [VIEW])


def the_originals_box(rng, width, height, scale):
    """torchvision's RandomResizedCrop.get_params, one crop at a time."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    if width / height < min(RATIO):
        w, h = width, round(width / min(RATIO))
    elif width / height > max(RATIO):
        w, h = round(height * max(RATIO)), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def same_distribution(one, other):
    """Kolmogorov-Smirnov: the largest distance of the distribution functions, against its bound for p = 1e-4."""
    at = np.union1d(one, other)
    one, other = np.sort(one), np.sort(other)
    distance = np.abs(
        np.searchsorted(one, at, "right") / len(one) - np.searchsorted(other, at, "right") / len(other)
    ).max()
    return distance < 2.23 * math.sqrt(1 / len(one) + 1 / len(other))


def uniform(values, low, high):
    """Mean, variance and extremes of `values` are those of a uniform distribution."""
    n, width = len(values), high - low
    assert low <= values.min() < low + 20 * width / n
    assert high - 20 * width / n < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 4 * width / math.sqrt(12 * n)
    assert abs(values.var() / (width**2 / 12) - 1) < 4 / math.sqrt(n)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected):
    words = philox([np.array([word], np.uint64) for word in counter], key)
    assert " ".join(f"{int(word):08x}" for word in words[:, 0]) == expected


def test_alterations_happen_as_often_as_the_original_does_them(table):
    seen = {
        "flip": table.flip,
        "jitter": table.order[:, 0] >= 0,
        "gray": table.gray,
        "blur": table.blur > 0,
        "solarize": table.solarize,
    }
    flags = torch.stack(list(seen.values())).double()
    for name, flag in zip(seen, flags):
        p = getattr(VIEW, name)
        assert abs(float(flag.mean()) - p) < 4 * math.sqrt(p * (1 - p) / N), name
    independent = torch.corrcoef(flags) - torch.eye(5)
    assert independent.abs().max() < 4.5 / math.sqrt(N)


def test_factors_turns_and_radii_are_uniform(table):
    for i, spread in enumerate(JITTER[:3]):
        uniform(table.factor[:, i].double().numpy(), np.float32(1 - spread), np.float32(1 + spread))
    uniform(table.blur[table.blur > 0].double().numpy(), np.float32(0.1), 2.0)


def test_turns_are_the_originals_int_of_255_parts(table):
    hue = table.hue.numpy()
    signed = np.where(hue < 128, hue, hue - 256)
    assert (signed.min(), signed.max()) == (-25, 25)
    counts = np.bincount(signed + 25, minlength=51)
    step = 1 / (2 * 0.1 * 255)  # int() rounds towards zero: 0 has two steps, the ends half of one
    expected = np.array([step / 2, *[step] * 24, 2 * step, *[step] * 24, step / 2])
    assert expected.sum() == pytest.approx(1)
    assert (np.abs(counts / N - expected) < 4.5 * np.sqrt(expected / N)).all()


def test_every_order_of_the_colour_steps_is_as_likely(table):
    order = table.order[table.order[:, 0] >= 0].long()
    assert (order.sort(1).values == torch.arange(4)).all()
    counts = torch.bincount((order * torch.tensor([64, 16, 4, 1])).sum(1))
    counts = counts[counts > 0].double()
    assert len(counts) == 24
    expected = len(order) / 24
    assert ((counts - expected).abs() < 4.5 * math.sqrt(expected)).all()
    assert (table.order[table.order[:, 0] < 0] == -1).all()


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [
        (640, 480, (0.05, 0.4)),
        (500, 375, (0.4, 1.0)),
        (300, 900, (0.4, 1.0)),
        (40, 30, (0.05, 1.0)),
        (7, 2, (0.05, 0.4)),
    ],
    ids=str,
)
def test_boxes_are_distributed_as_the_originals(width, height, scale):
    n, n_plain = N, 20_000
    view = ViewRecipe(size=8, scale=scale)
    ours = draw_crops(3, 0, np.arange(n), np.full(n, width), np.full(n, height), [view]).box.numpy()
    rng = np.random.default_rng(0)
    theirs = np.array([the_originals_box(rng, width, height, scale) for _ in range(n_plain)])
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= (width, height)).all()
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column]), "xywh"[column]
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])


def test_boxes_have_the_asked_areas_and_shapes():
    boxes = draw_crops(2, 0, np.arange(N), np.full(N, 5000), np.full(N, 5000), [VIEW]).box.double().numpy()
    area, ratio = boxes[:, 2] * boxes[:, 3] / 25e6, boxes[:, 2] / boxes[:, 3]
    assert abs(area.mean() - 0.225) < 4 * 0.35 / math.sqrt(12 * N)
    assert area.min() == pytest.approx(0.05, abs=2e-4)
    assert area.max() == pytest.approx(0.4, abs=5e-4)
    assert abs(np.log(ratio).mean()) < 4 * np.log(16 / 9) / math.sqrt(12 * N)
    assert ratio.min() == pytest.approx(3 / 4, rel=2e-3)
    assert ratio.max() == pytest.approx(4 / 3, rel=2e-3)
    for side in (0, 1):
        assert abs((boxes[:, side] / (5000 - boxes[:, 2 + side])).mean() - 0.5) < 4 / math.sqrt(12 * N)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (100, 100, (0, 0, 100, 100)), (1, 1, (0, 0, 1, 1))],
)
def test_a_box_that_never_fits_falls_back_to_the_middle(width, height, expected):
    areas_too_large = np.full((2, 1), 4.0)
    box = draw_boxes(np.full((22, 1), 0.999), np.array([width]), np.array([height]), areas_too_large)
    assert tuple(box[0]) == expected


def test_a_crop_depends_on_seed_epoch_sample_and_view_alone():
    samples = np.array([5, 900, 17, 3_000_000_000])
    views = [VIEW, VIEW, VIEW]
    whole = draw_crops(7, 2, samples, [100] * 4, [80] * 4, views)
    for v in range(3):
        for b in range(4):
            alone = draw_crops(7, 2, samples[[b]], [100], [80], [VIEW], first_view=v)
            for name, one, row in zip(whole._fields, alone, whole):
                assert name == "image" or torch.equal(one[0], row[v * 4 + b]), name
    assert whole.image.tolist() == [0, 1, 2, 3] * 3
    factors = {tuple(row) for row in whole.factor.tolist()}
    for seed, epoch in ((8, 2), (7, 3), (7 + 2**32, 2)):
        factors |= {tuple(row) for row in draw_crops(seed, epoch, samples, [100] * 4, [80] * 4, views).factor.tolist()}
    assert len(factors) == 4 * 12  # nothing is drawn twice


def test_rows_say_what_the_table_says(table):
    rows = crop_params(type(table)(*(column[:50] for column in table)))
    for i, row in enumerate(rows):
        assert list(row.box) == table.box[i].tolist()
        assert (row.flip, row.gray, row.solarize) == (table.flip[i], table.gray[i], table.solarize[i])
        assert row.blur == table.blur[i]
        for (name, factor), step in zip(row.jitter, table.order[i].tolist()):
            assert name == ("brightness", "contrast", "saturation", "hue")[step]
            assert factor == (table.hue[i] if step == 3 else table.factor[i, step])
        assert len(row.jitter) == (4 if table.order[i, 0] >= 0 else 0)
