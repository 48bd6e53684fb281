"""k-NN against a few lines of scikit-learn's, and as a command."""

import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastdino import vit_nano
from fastdino.cli import main
from fastdino.data.augment import normalize
from fastdino.data.digits import load_digits
from fastdino.data.sources import FolderSource
from fastdino.errors import UserError
from fastdino.eval.knn import Features, extract_features, knn_accuracy, knn_votes, n_of_each_class


def random_features(n, n_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    features = torch.randn(n, 8, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 8)
    return Features(torch.nn.functional.normalize(features, dim=1), labels)


def sklearn_accuracy(bank, queries, k):
    def weights(distances):  # Euclidean distances of unit vectors -> exp(cosine / 0.07)
        return np.exp((1 - distances**2 / 2) / 0.07)

    model = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(bank.features, bank.labels)
    return model.score(queries.features, queries.labels)


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_knn_matches_scikit_learn(k):
    bank, queries = random_features(300, 5, 0), random_features(270, 5, 1)
    assert knn_accuracy(bank, queries, k) == pytest.approx(sklearn_accuracy(bank, queries, k), abs=1.1 / 270)
    assert 0.3 < knn_accuracy(bank, queries, k) < 1


def test_top_five_counts_the_classes_with_the_most_votes():
    bank, queries = random_features(300, 8, 0), random_features(250, 8, 1)
    similarity = queries.features @ bank.features.T
    hits = 0
    for row, label in zip(similarity, queries.labels):
        nearest = row.argsort(descending=True)[:30]
        votes = [sum(np.exp(float(row[i]) / 0.07) for i in nearest if bank.labels[i] == c) for c in range(8)]
        hits += int(label) in np.argsort(votes)[-5:] and votes[int(label)] > 0
    top1, top5 = knn_votes(bank, queries, 30)
    assert top1 / 100 == knn_accuracy(bank, queries, 30)
    assert top5 == hits * 100 / 250


def test_a_bank_of_a_few_images_of_each_class():
    bank = random_features(300, 5, 0)
    few = n_of_each_class(bank, 7, seed=3)
    assert torch.equal(few.labels.bincount(), torch.full((5,), 7))
    at = [int((bank.features == row).all(1).nonzero()) for row in few.features]
    assert torch.equal(bank.labels[at], few.labels)
    assert at == sorted(set(at))
    assert not torch.equal(few.features, n_of_each_class(bank, 7, seed=4).features)
    assert len(n_of_each_class(bank, 1000, seed=0).labels) == 300


def test_features_are_dumped_and_loaded_as_the_original_does(photo_folder, tmp_path, capsys):
    """Its class numbers have 10 before 2."""
    for split in ("train", "val"):
        for number, name in enumerate(("2", "10")):
            shutil.copytree(photo_folder / f"class_{number}", tmp_path / "data" / split / name)
    torch.save(vit_nano(patch_size=8, img_size=[16]).state_dict(), tmp_path / "weights.pth")
    dump, log = tmp_path / "dump", tmp_path / "log.jsonl"
    words = ["--pretrained_weights", tmp_path / "weights.pth", "--data_path", tmp_path / "data"]
    common = ["--nb_knn", "3", "--json", log]
    assert main(["knn", *map(str, [*words, *common, "--dump_features", dump])]) == 0
    first = capsys.readouterr().out
    labels = torch.load(dump / "trainlabels.pth")
    assert labels.tolist() == [0] * 8 + [1] * 8
    assert torch.load(dump / "testfeat.pth").shape == (16, 96)
    assert main(["knn", *map(str, ["--load_features", dump, *common])]) == 0
    line = "3-NN classifier result: Top1: 100.0, Top5: 100.0"
    assert line in first
    assert line in capsys.readouterr().out
    entries = [json.loads(text) for text in log.read_text().splitlines()]
    assert [e["3nn_top1"] for e in entries] == [1.0, 1.0]
    assert entries[0]["data"] == str(tmp_path / "data")
    assert main(["knn", "--load_features", str(tmp_path)]) == 2
    assert "has no features of the original's form" in capsys.readouterr().err


def test_leave_one_out_asks_every_image_of_the_others():
    bank = random_features(280, 4, 2)
    hits = 0
    for i in range(280):
        rest = torch.arange(280) != i
        others = Features(bank.features[rest], bank.labels[rest])
        hits += knn_accuracy(others, Features(bank.features[i : i + 1], bank.labels[i : i + 1]), 10)
    assert knn_accuracy(bank, None, 10) == pytest.approx(hits / 280)


def test_a_bank_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        knn_accuracy(random_features(1, 2, 0))


def test_features_follow_the_order_of_the_images_and_leave_the_mode_alone():
    _, held_out = load_digits()
    backbone = vit_nano(img_size=[24]).train()
    features = extract_features(backbone, held_out, resize=24, size=24, limit=50, batch_size=16)
    assert backbone.training
    assert features.features.shape == (50, 96)
    assert torch.allclose(features.features.norm(dim=1), torch.ones(50))
    chosen = np.sort(np.random.default_rng(0).permutation(360)[:50])
    assert np.array_equal(features.labels.numpy(), held_out.labels[chosen])
    pixels = torch.from_numpy(held_out[int(chosen[7])]).permute(2, 0, 1)[None]
    with torch.no_grad():
        alone = torch.nn.functional.normalize(backbone.eval()(normalize(pixels)), dim=1)
    assert torch.allclose(features.features[7], alone[0], atol=1e-5)


def test_images_without_labels_have_no_knn(photo_folder):
    with pytest.raises(UserError, match="needs class folders"):
        extract_features(vit_nano(), FolderSource(photo_folder / "class_0"), resize=32, size=32)


def test_images_that_cannot_be_read_are_named_and_not_silently_left_out(photo_folder, tmp_path, capsys):
    shutil.copytree(photo_folder, tmp_path / "photos")
    for path in sorted((tmp_path / "photos").rglob("*.jpg"))[:2]:
        path.write_bytes(b"broken")
    source = FolderSource(tmp_path / "photos")
    features = extract_features(vit_nano(patch_size=8, img_size=[16]), source, resize=16, size=16)
    assert len(features.labels) == 30
    assert [line.partition(": ")[0] for line in features.bad] == [source.name(0), source.name(1)]
    torch.save(vit_nano(patch_size=8, img_size=[16]).state_dict(), tmp_path / "weights.pth")
    words = ["--pretrained_weights", str(tmp_path / "weights.pth"), "--data_path", str(tmp_path / "photos")]
    assert main(["knn", *words, "--nb_knn", "5"]) == 0
    assert f"bank     without 2 unreadable images: {source.name(0)}: is no JPEG" in capsys.readouterr().out


def test_an_evaluation_that_is_stopped_leaves_the_backbone_in_training(photo_folder):
    class Stopped(BaseException):
        pass

    backbone = vit_nano(patch_size=8, img_size=[16]).train()

    def stop(*_):
        raise Stopped

    backbone.norm.register_forward_hook(stop)
    with pytest.raises(Stopped):
        extract_features(backbone, FolderSource(photo_folder), resize=16, size=16)
    assert backbone.training
