"""Propagation, J and F against loops over their definitions; films that are odd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastdino import vit_nano
from fastdino.commands.video import voc_palette
from fastdino.data.sequences import SequenceSource
from fastdino.errors import UserError
from fastdino.eval import video
from fastdino.eval.video import (
    Frame,
    Propagation,
    contour_accuracy,
    first_labels,
    frame_scores,
    objects_of,
    propagate,
    region_similarity,
    segment,
    too_small,
)


def slow_propagate(target, sources, labels, neighbourhood, topk):
    """Patch by patch, in fp64."""
    target, sources, labels = target.double(), sources.double(), labels.double()
    rows, columns, _ = target.shape
    found = torch.zeros(rows, columns, labels.shape[-1], dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            votes = []
            for s in range(len(sources)):
                for y in range(rows):
                    for x in range(columns):
                        if not neighbourhood or max(abs(i - y), abs(j - x)) <= neighbourhood:
                            votes.append((float(target[i, j] @ sources[s, y, x]), labels[s, y, x]))
            votes.sort(key=lambda vote: -vote[0])
            weights = [math.exp(cosine / 0.1) for cosine, _ in votes[:topk]]
            found[i, j] = sum(w * label for w, (_, label) in zip(weights, votes)) / sum(weights)
    return found


@pytest.mark.parametrize("tile", [3, 16])
@pytest.mark.parametrize(("neighbourhood", "topk"), [(1, 5), (2, 1), (0, 7), (30, 2), (1, 1000)])
def test_propagation_is_that_of_loops(neighbourhood, topk, tile, monkeypatch):
    monkeypatch.setattr(video, "TILE", tile)
    torch.manual_seed(0)
    target, sources = (F.normalize(torch.randn(*shape, 4), dim=-1) for shape in ((5, 7), (3, 5, 7)))
    labels = torch.rand(3, 5, 7, 2)
    expected = slow_propagate(target, sources, labels, neighbourhood, topk)
    assert torch.allclose(propagate(target, sources, labels, neighbourhood, topk).double(), expected, atol=1e-5)


def test_patches_as_similar_as_the_last_one_vote_too():
    features = F.normalize(torch.ones(1, 4, 2), dim=-1)
    labels = torch.arange(4.0).view(1, 1, 4, 1)
    assert propagate(features, features[None], labels, 0, 2).flatten().tolist() == pytest.approx([1.5] * 4)


def test_frames_are_shown_as_the_original_shows_them():
    assert Frame(480, (480, 854)).shown == (480, 832)
    assert Frame(480, (854, 480)).shown == (832, 480)
    assert Frame(480, (1080, 1920)).shown == (480, 832)
    assert Frame(480, (300, 300)).shown == (480, 448)


def test_labels_of_the_first_frame_are_those_at_the_patches_middle():
    mask = np.zeros((8, 12), np.uint8)
    mask[:4, :4] = 255
    mask[4:, 8:] = 3
    mask[0, 11] = 9  # no patch's middle
    numbers, labels = first_labels(mask, 2, 3)
    assert numbers.tolist() == [0, 3, 255]
    assert labels.argmax(-1).tolist() == [[2, 0, 0], [0, 0, 1]]


def test_objects_that_no_patch_shows_are_told():
    mask = np.zeros((64, 128), np.uint8)
    mask[:20, :20] = 3
    mask[40, 40] = 5
    assert too_small(vit_nano(patch_size=8, img_size=[32]), mask, 64) == [5]


def random_masks(seed, shape=(40, 50)):
    rng = np.random.default_rng(seed)
    blobs = torch.from_numpy(rng.normal(size=(2, 1, 7, 8)))
    found, truth = F.interpolate(blobs, shape, mode="bicubic")[:, 0].numpy()
    return found > 0.2, (truth + 2 * found) > 0.4


def slow_contour(mask):
    height, width = mask.shape
    line = set()
    for y in range(height):
        for x in range(width):
            right, below = min(x + 1, width - 1), min(y + 1, height - 1)
            if len({bool(mask[y, x]), bool(mask[y, right]), bool(mask[below, x]), bool(mask[below, right])}) > 1:
                line.add((y, x))
    return line


def slow_contour_accuracy(found, truth):
    """By distances from every point of a contour to every point of the other."""
    near = math.ceil(0.008 * math.hypot(*found.shape))
    lines = slow_contour(found), slow_contour(truth)

    def share(line, other):
        close = [any((y - v) ** 2 + (x - u) ** 2 <= near**2 for v, u in other) for y, x in line]
        return np.mean(close)

    precision, recall = share(*lines), share(*lines[::-1])
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("shape", [(40, 50), (90, 160)], ids=str)
def test_j_and_f_are_those_of_loops(shape):
    for seed in range(3):
        found, truth = random_masks(seed, shape)
        pairs = list(zip(found.flat, truth.flat))
        expected = sum(a and b for a, b in pairs) / sum(a or b for a, b in pairs)
        assert region_similarity(found, truth) == pytest.approx(expected)
        score = contour_accuracy(found, truth)
        assert score == pytest.approx(slow_contour_accuracy(found, truth))
        assert 0.05 < score < 0.95


def test_empty_masks_agree_with_each_other_alone():
    empty, full = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    full[5:9, 5:9] = True
    for score in (region_similarity, contour_accuracy):
        assert [score(*pair) for pair in ((empty, empty), (empty, full), (full, empty), (full, full))] == [1, 0, 0, 1]


def test_void_counts_for_neither_unless_it_is_the_only_object():
    truth = np.zeros((20, 30), np.uint8)
    truth[:10] = 1
    truth[10:12] = 255
    found = np.zeros((20, 30), np.uint8)
    found[:12] = 1
    assert objects_of(truth) == [1]
    assert frame_scores(found, truth, [1])[0][0] == 1
    assert objects_of(np.array([[0, 255]], np.uint8)) == [255]
    assert frame_scores(truth, truth, [255]) == [(1.0, 1.0)]


@pytest.fixture
def film(photos, tmp_path):
    """Six frames of a photograph that moves, and a mask of the first."""
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(photos[2][50 + 2 * i :, 100 + 3 * i :][:64, :150]).save(paths[-1])
    mask = np.zeros((64, 150), np.uint8)
    mask[10:50, 60:110] = 7
    return paths, mask


def test_a_film_is_followed_whatever_shares_a_batch(film):
    paths, mask = film
    torch.manual_seed(0)
    backbone = vit_nano(patch_size=8, img_size=[32])
    how = Propagation(side=64, n_last_frames=2, neighbourhood=3)
    one, three = (
        list(segment(backbone, SequenceSource(paths), mask, how, batch_size=n, num_workers=n // 2)) for n in (1, 3)
    )
    assert [index for index, _ in one] == [1, 2, 3, 4, 5]
    for (_, a), (_, b) in zip(one, three):
        assert a.shape == mask.shape
        assert np.mean(a != b) < 0.01
        assert set(np.unique(a)) == {0, 7}
        assert region_similarity(a == 7, mask == 7) > 0.2


def test_frames_that_cannot_be_read_are_left_out_and_a_first_one_ends_it(film):
    paths, mask = film
    backbone, bad = vit_nano(patch_size=8, img_size=[32]), {}
    paths[2].write_bytes(b"broken")
    Image.new("RGB", (30, 20)).save(paths[4])
    found = segment(backbone, SequenceSource(paths), mask, Propagation(side=64), batch_size=2, bad=bad)
    assert [index for index, _ in found] == [1, 3, 5]
    assert "is no JPEG" in bad[2]
    assert "has 30 x 20 pixels, the first 150 x 64" in bad[4]
    with pytest.raises(UserError, match=r"the mask has 150 x 60 pixels, the first frame, .*0\.png, 150 x 64"):
        segment(backbone, SequenceSource(paths), mask[:60])
    paths[0].write_bytes(b"broken")
    with pytest.raises(UserError, match="the first frame cannot be read"):
        segment(backbone, SequenceSource(paths), mask)


def test_colors_of_masks_are_pascals():
    colors = np.array(voc_palette()).reshape(256, 3).tolist()
    assert colors[:5] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colors[8:10] + colors[255:] == [[64, 0, 0], [192, 0, 0], [224, 224, 192]]
