"""Precision against its definition; what the benchmark's file may hold; images that cannot be read."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastdino import vit_nano
from fastdino.data.augment import normalize
from fastdino.data.sequences import SequenceSource
from fastdino.errors import UserError
from fastdino.eval.retrieval import (
    average_precision,
    mean_precision,
    ranking,
    read_truth,
    retrieval_features,
)


def slow_precision(order, wanted, junk, ks):
    """By going down the list: (AP by trapezoids, precision at each k, or at the last that is wanted)."""
    order = [i for i in order if i not in junk or i in wanted]
    hits = [i in wanted for i in order]
    area = found = 0
    for rank, hit in enumerate(hits):
        if hit:
            before = found / rank if rank else 1
            found += 1
            area += (before + found / (rank + 1)) / 2 / len(wanted)
    last = max(rank for rank, hit in enumerate(hits) if hit) + 1
    return area, [sum(hits[: min(k, last)]) / min(k, last) for k in ks]


def test_precision_is_that_of_going_down_the_list():
    rng = np.random.default_rng(0)
    ranked = np.stack([rng.permutation(30) for _ in range(20)])
    wanted, junk = [], []
    for q in range(20):
        those = rng.permutation(30)
        wanted.append(those[: q % 6])
        junk.append(those[q % 6 : q % 6 + q % 5])
    area, precision = mean_precision(ranked, wanted, junk, (1, 5, 10))
    asked = [q for q in range(20) if len(wanted[q])]
    expected = [slow_precision(ranked[q], set(wanted[q]), set(junk[q]), (1, 5, 10)) for q in asked]
    assert area == pytest.approx(np.mean([a for a, _ in expected]))
    assert precision == pytest.approx(np.mean([p for _, p in expected], axis=0))


@pytest.mark.parametrize(
    ("positions", "n", "expected"),
    [([0, 1, 2], 3, 1.0), ([0], 2, 0.5), ([], 1, 0.0), ([1], 1, 0.25), ([0, 2], 2, 0.5 * (1 + (1 / 2 + 2 / 3) / 2))],
    ids=str,
)
def test_average_precision_by_hand(positions, n, expected):
    assert average_precision(np.array(positions, np.int64), n) == pytest.approx(expected)


def test_queries_with_nothing_to_find_do_not_count():
    ranked, nothing = np.array([[0, 1], [1, 0]]), np.array([], np.int64)
    area, _ = mean_precision(ranked, [np.array([0]), nothing], [nothing, nothing])
    assert area == 1
    with pytest.raises(ValueError, match="for at least one query"):
        mean_precision(ranked, [nothing, nothing], [nothing, nothing])


def test_the_ranking_is_by_cosine_and_lost_images_come_last():
    torch.manual_seed(0)
    database, queries = (F.normalize(torch.randn(n, 5), dim=1) for n in (9, 4))
    found = ranking(database, queries, lost=[3])
    for order, query in zip(found, queries):
        assert order[-1] == 3
        assert np.all(np.diff((database @ query).numpy()[order[:-1]]) <= 0)


GOOD = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [{"easy": [0], "hard": np.array([1]), "junk": [2]}]}


def test_hard_ones_alone_make_easy_ones_not_count(tmp_path):
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(GOOD))
    truth = read_truth(tmp_path / "gnd.pkl")
    (found, ignored), (hard, ignored_with_hard) = truth.medium(), truth.only_hard()
    assert [x[0].tolist() for x in (found, ignored, hard, ignored_with_hard)] == [[0, 1], [2], [1], [2, 0]]


WRONG = {
    "no dictionary": ([1], "expected a dictionary with imlist, qimlist and gnd, got"),
    "no queries": ({**GOOD, "qimlist": []}, "expected names of images as qimlist"),
    "numbers for names": ({**GOOD, "imlist": [1, 2]}, "expected names of images as imlist"),
    "another length": ({**GOOD, "qimlist": ["q", "r"]}, "expected gnd to be a list of 2, as qimlist"),
    "no junk": ({**GOOD, "gnd": [{"easy": [0], "hard": [1]}]}, "expected each query's junk as numbers from 0 to 2"),
    "an image too many": ({**GOOD, "gnd": [{"easy": [3], "hard": [], "junk": []}]}, "easy as numbers from 0 to 2"),
    "nothing hard": ({**GOOD, "gnd": [{"easy": [0], "hard": [], "junk": []}]}, "no query has an image that is hard"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_benchmark_is_one_line(name, tmp_path):
    held, expected = WRONG[name]
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(UserError, match=expected):
        read_truth(tmp_path / "gnd.pkl")


@pytest.fixture
def pictures(photos, tmp_path):
    """Seven parts of photographs, of three sizes."""
    for i in range(7):
        width, height = ((60, 40), (37, 60), (20, 30))[i % 3]
        Image.fromarray(photos[i % 4][10 * i :, 20:][:height, :width]).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(7)]


@pytest.mark.parametrize("multiscale", [False, True], ids=["one", "three"])
def test_images_of_one_size_share_a_batch_and_have_the_features_they_have_alone(multiscale, pictures):
    backbone = vit_nano(patch_size=8, img_size=[32])
    features, bad = retrieval_features(
        backbone, SequenceSource(pictures), 48, multiscale=multiscale, batch_size=4, num_workers=2
    )
    assert not bad
    for path, got in zip(pictures, features):
        image = Image.open(path).convert("RGB")
        image.thumbnail((48, 48), Image.Resampling.LANCZOS)
        pixels = normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]
        shown = [pixels]
        if multiscale:
            shown += [F.interpolate(pixels, scale_factor=s, mode="bilinear") for s in (2**-0.5, 0.5)]
        with torch.no_grad():
            expected = F.normalize(sum(backbone.eval()(x) for x in shown), dim=1)[0]
        assert torch.allclose(got, expected, atol=1e-6)


def test_what_cannot_be_read_has_no_features_and_is_named(pictures):
    pictures[2].write_bytes(b"broken")
    Image.new("RGB", (300, 9)).save(pictures[4])  # shrunk, it is flatter than a patch
    backbone = vit_nano(patch_size=8, img_size=[32])
    features, bad = retrieval_features(backbone, SequenceSource(pictures), 48, batch_size=3)
    assert sorted(bad) == [2, 4]
    assert "2.png: is no JPEG" in bad[2]
    assert "4.png: has 48 x 2 pixels, less than the 8 of a patch" in bad[4]
    assert features.norm(dim=1).tolist() == pytest.approx([1, 1, 0, 1, 0, 1, 1])
    with pytest.raises(UserError, match="none of 1 images can be read: "):
        retrieval_features(backbone, SequenceSource(pictures[2:3]), 48)
