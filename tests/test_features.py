"""Features of images: against the network's own tokens, in every format, after a kill, and by two processes."""

import csv
import errno
import os
import shutil
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import fastdino
from fastdino import vit_nano
from fastdino.cli import main
from fastdino.data.decode import decode
from fastdino.data.digits import load_digits
from fastdino.data.sources import FolderSource
from fastdino.data.views import View
from fastdino.errors import UserError
from fastdino.eval import feature_files
from fastdino.eval.features import backbone_features, stream

SIZE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(vit_nano(patch_size=8, img_size=[SIZE]).state_dict(), path)
    return path


@pytest.fixture
def photos_with_two_broken(photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "photos")
    paths = sorted((tmp_path / "photos").rglob("*.jpg"))
    for i in (3, 20):
        paths[i].write_bytes(b"broken")
    return tmp_path / "photos"


def write(weights, data, output, *flags):
    words = ["--pretrained_weights", weights, "--data_path", data, "--output", output, *flags]
    return main(["features", *map(str, words)])


def test_tokens_and_layers_are_the_networks(weights):
    backbone = fastdino.load_backbone(weights)
    images = torch.randn(3, 3, 40, 24)
    found = backbone_features(backbone, images, 2, ("patch", "cls", "avg"))
    before_last, last = backbone.get_intermediate_layers(images, 2)
    assert torch.equal(found["cls"], torch.cat([before_last[:, 0], last[:, 0]], 1))
    assert torch.allclose(found["avg"][:, 96:], last[:, 1:].mean(1), atol=1e-6)
    assert found["patch"].shape == (3, 5, 3, 192)
    assert torch.equal(found["patch"][:, 1, 2, 96:], last[:, 1 + 1 * 3 + 2])
    alone = backbone_features(backbone, images)["cls"]  # by the shorter way through the last block
    assert torch.allclose(alone, last[:, 0], atol=1e-5)


@pytest.mark.parametrize("extension", ["npz", "parquet", "csv", "pth"])
def test_every_format_holds_the_same_rows(weights, photos_with_two_broken, tmp_path, extension, capsys):
    """As `fastdino.features` gives them in memory; small chunks, so that there are several."""
    path = tmp_path / f"features.{extension}"
    tokens = ("cls", "avg") if extension == "csv" else ("cls", "avg", "patch")
    with mock.patch.object(feature_files, "CHUNK_BYTES", 3000):
        assert write(weights, photos_with_two_broken, path, "--tokens", *tokens, "--layers", 2) == 0
    said = capsys.readouterr().out
    expected = fastdino.features(photos_with_two_broken, weights, tokens=tokens, layers=2)
    assert len(expected.names) == 30
    assert "without 2 unreadable of 32 images: " in said
    assert all(line.partition(": ")[0] in said for line in expected.bad)
    if extension == "npz":
        found = dict(np.load(path))
    elif extension == "pth":
        found = {k: np.asarray(v) for k, v in torch.load(path).items()}
    elif extension == "parquet":
        table = pyarrow.parquet.read_table(path)
        found = {k: np.array(table[k].to_pylist(), np.float32) for k in tokens}
        found |= {"names": np.array(table["name"].to_pylist()), "labels": np.array(table["label"].to_pylist())}
        found["patch"] = found["patch"].reshape(30, 4, 4, 192)
        assert table["class"].to_pylist() == [expected.classes[label] for label in expected.labels]
    else:
        head, *rows = csv.reader(path.open(newline=""))
        assert head == ["name", "label", "class", *(f"{t}_{i}" for t in tokens for i in range(192))]
        numbers = np.array([row[3:] for row in rows], np.float32)
        found = {"cls": numbers[:, :192], "avg": numbers[:, 192:]}
        found |= {"names": np.array([r[0] for r in rows]), "labels": np.array([int(r[1]) for r in rows])}
    assert found["names"].tolist() == expected.names
    assert np.array_equal(found["labels"], expected.labels)
    for name in tokens:
        assert np.array_equal(found[name], getattr(expected, name)), name
    assert not list(tmp_path.glob("*.partial"))


def test_images_without_labels_have_features(weights, photo_folder, tmp_path):
    assert write(weights, photo_folder / "class_0", tmp_path / "a.npz", "--normalize", "on") == 0
    found = np.load(tmp_path / "a.npz")
    assert set(found) == {"names", "cls"}
    assert np.allclose(np.linalg.norm(found["cls"], axis=1), 1, atol=1e-6)


def test_a_run_that_was_ended_goes_on(weights, photos_with_two_broken, tmp_path):
    """And gives what one run gives. With other settings it begins anew."""
    output, n_seen = tmp_path / "a.npz", []

    def counted(self, indices, features, real=feature_files.Rows.write):
        if len(n_seen) == 3 and stops:
            raise KeyboardInterrupt
        n_seen.append(len(indices))
        real(self, indices, features)

    small = ["--batch_size_per_gpu", 4, "--num_workers", 0]
    with (
        mock.patch.object(feature_files.Rows, "write", counted),
        mock.patch.object(feature_files, "SYNC_EVERY", 0),
    ):
        stops = True
        assert write(weights, photos_with_two_broken, output, *small) == 130
        assert (n_seen, output.exists()) == ([3, 4, 4], False)
        stops, n_seen = False, []
        assert write(weights, photos_with_two_broken, output, *small) == 0
        assert sum(n_seen) == 30 - 11
        whole = fastdino.features(photos_with_two_broken, weights)
        assert np.load(output)["names"].tolist() == whole.names
        assert np.allclose(np.load(output)["cls"], whole.cls, atol=1e-5)  # other batches, other sums
        stops, n_seen = True, []
        assert write(weights, photos_with_two_broken, tmp_path / "b.npz", *small) == 130
        stops, n_seen = False, []
        assert write(weights, photos_with_two_broken, tmp_path / "b.npz", *small, "--size", 24) == 0
        assert sum(n_seen) == 30


def test_a_disk_without_room_is_one_line_before_the_first_image(weights, photo_folder, tmp_path, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(os, "posix_fallocate", full):
        assert write(weights, photo_folder, tmp_path / "a.npz") == 1
    assert f"{tmp_path / 'a.npz.partial'} cannot be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_what_one_writes(weights, photos_with_two_broken, tmp_path, forks):
    """As torchrun starts them, which tests/test_readme.py does."""
    words = ["--pretrained_weights", weights, "--data_path", photos_with_two_broken, "--output", tmp_path / "two.npz"]
    root = Path(fastdino.__file__).parent.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    both = forks.run_ranks(2, "-m", "fastdino", "features", *words, env=env | meeting)
    assert [done.returncode for done in both] == [0, 0], both
    said = "".join(done.stdout for done in both)
    assert said.count("wrote ") == 1
    assert said.count("without 2 unreadable of 32") == 1
    assert write(weights, photos_with_two_broken, tmp_path / "one.npz") == 0
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["names"].tolist() == two["names"].tolist()
    assert np.allclose(one["cls"], two["cls"], atol=1e-5)


def test_the_transform_is_the_view_that_features_are_made_of(weights, photo_folder):
    source = FolderSource(photo_folder)
    transform = fastdino.eval_transform(weights)
    assert repr(transform) == "EvalTransform(size=32, resize=37)"
    backbone = fastdino.load_backbone(weights)
    images = torch.stack([transform(decode(source[i])) for i in range(3)])
    [(_, found)] = stream(backbone, source, np.arange(3), View(37, 32))
    with torch.no_grad():
        assert torch.allclose(backbone(images), found["cls"], atol=1e-5)


def test_images_in_memory_and_paths(weights, photo_folder):
    paths = sorted(photo_folder.rglob("*.jpg"))[:5]
    by_path = fastdino.features(paths, weights)
    assert by_path.names == [str(p) for p in paths]
    opened = fastdino.features([Image.open(p) for p in paths], fastdino.load_backbone(weights), resize=37)
    assert np.array_equal(by_path.cls, opened.cls)


def test_a_pipeline_of_scikit_learn_learns_digits(weights):
    train, held_out = load_digits()
    model = make_pipeline(
        fastdino.FeatureExtractor(weights, tokens=("cls", "avg"), size=24, resize=24), LogisticRegression(max_iter=500)
    )
    model.fit(list(train.images[:400]), train.labels[:400])
    assert model.score(list(held_out.images[:100]), held_out.labels[:100]) > 0.4
    assert "FeatureExtractor(layers=2" in repr(model.set_params(featureextractor__layers=2))
    with pytest.raises(UserError, match="1 unreadable of 2 images: item 1"):
        model[0].transform([train.images[0], b"broken"])


MISTAKES = {
    "extension": (["--output", "a.txt"], r"--output: expected a file that ends in .npz, .parquet, .csv, .pth, got a"),
    "no folder": (["--output", "nowhere/a.npz"], "--output: expected a file in a folder that exists, got nowhere/a"),
    "patches in a table": (["--tokens", "patch", "--output", "a.csv"], "--tokens: patch is no single row of numbers"),
    "layers": (["--layers", "5"], "layers: expected 1 to 4, as many as there are blocks, got 5"),
    "exists": (["--output", "there.npz"], "--output: there.npz exists; remove it, or give another name"),
    "size": (["--size", "7"], "--size: expected at least the patch size 8 and at most --resize, got 7 and 8"),
    "patch size": (["--patch_size", "16"], "backbone.pth has 8, got 16"),
    "arch": (["--arch", "vit_base"], "is 96 wide, vit_base 768"),
    "all broken": (["--data_path", "broken"], "none of the images could be read"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_with_one_line(weights, photo_folder, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.npz").write_bytes(b"mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_bytes(b"no")
    assert main(["features", "--pretrained_weights", str(weights), "--data_path", str(photo_folder), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert (tmp_path / "there.npz").read_bytes() == b"mine"
    assert not list(tmp_path.glob("*.partial"))
