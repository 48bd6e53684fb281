"""The original's five evaluations, as they stand, on a checkpoint of ours with BatchNorm in the head.

They run where FASTDINO_PEERS holds `dino/` and torchvision imports, each in a process of its own, on a CPU.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_up import copydays, davis, digit, oxford
from PIL import Image
from sklearn.datasets import load_digits
from test_original import PEER, needs_the_original, saved
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastdino import load_backbone
from fastdino.cli import main
from fastdino.data.decode import decode
from fastdino.data.params import ViewRecipe, crop_params, draw_crops
from fastdino.data.sequences import SequenceSource
from fastdino.data.sources import FolderSource
from fastdino.data.views import RandomView, views
from fastdino.eval.copies import BLOCKS, copy_features
from fastdino.eval.linear import Heads, Input
from fastdino.eval.retrieval import read_truth, retrieval_features


def _imports_torchvision() -> bool:
    command = [sys.executable, "-c", "import torchvision.datasets"]
    return subprocess.run(command, capture_output=True).returncode == 0


pytestmark = [
    needs_the_original,
    pytest.mark.skipif(PEER.is_dir() and not _imports_torchvision(), reason="needs a torchvision that imports"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a ViT-Ti/16 after one step."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    saved(path, patch_size=16, use_bn_in_head=True)
    return path


def labelled(folder):
    """train/ and val/ with five classes; the original's k-NN divides by a hundred test images."""
    digits = load_digits()
    for label in range(5):
        for n, i in enumerate(np.flatnonzero(digits.target == label)[:30]):
            path = folder / ("train" if n < 8 else "val") / str(label) / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            digit(i).save(path)


def evaluate(program, checkpoint, data, out, *flags):
    """What the program prints."""
    common = ["--arch", "vit_tiny", "--patch_size", "16", "--pretrained_weights", checkpoint, "--data_path", data]
    common += [] if "video" in program else ["--num_workers", 0]
    command = [sys.executable, Path(__file__).with_name("original_on_cpu.py"), PEER, program, *common, *flags]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=out)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"_IncompatibleKeys\(missing_keys=\[\],", result.stdout), result.stdout[-3000:]
    return result.stdout


def test_knn_gives_our_numbers(checkpoint, tmp_path, capsys):
    labelled(tmp_path / "data")
    said = evaluate("eval_knn.py", checkpoint, tmp_path / "data", tmp_path, "--nb_knn", 5, 10)
    result = r"-NN classifier result: Top1: ([\d.]+), Top5: ([\d.]+)"
    theirs = re.findall(result, said)
    flags = ["--pretrained_weights", checkpoint, "--data_path", tmp_path / "data", "--nb_knn", 5, 10]
    assert main(["knn", *map(str, flags)]) == 0
    ours = re.findall(result, capsys.readouterr().out)
    assert len(ours) == 2
    assert theirs == ours


def test_linear_gives_our_accuracies_and_reads_our_file(checkpoint, tmp_path, monkeypatch, capsys):
    """From our weights, before the first epoch, which it finds as a checkpoint; and we find its last one."""
    labelled(tmp_path / "data")
    heads = Heads({Input(4, False): [2.0 * 16 / 256]}, width=192, layers=4, n_classes=5)
    optimizer = heads.optimizer()
    started = {
        "epoch": 0,
        "state_dict": {f"module.{name}": value for name, value in heads.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": CosineAnnealingLR(optimizer, 10).state_dict(),
        "best_acc": 0.0,
    }
    torch.save(started, tmp_path / "checkpoint.pth.tar")
    monkeypatch.setenv("CENTER_CROPS", "1")
    flags = ["--epochs", 10, "--lr", 2.0, "--batch_size_per_gpu", 16, "--val_freq", 3, "--num_labels", 5]
    said = evaluate("eval_linear.py", checkpoint, tmp_path / "data", tmp_path, *flags)
    last = "Training of the supervised linear classifier on frozen features completed.\nTop-1 test accuracy: "
    assert last in said
    words = ["--arch", "vit_tiny", "--pretrained_weights", checkpoint, "--data_path", tmp_path / "data", *flags]
    words += ["--train_view", "center", "--output_dir"]
    assert main(["linear", *map(str, words), str(tmp_path / "ours")]) == 0
    assert last in capsys.readouterr().out
    theirs, ours = (
        [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        for folder in (tmp_path, tmp_path / "ours")
    )
    assert len(theirs) == 10
    for entry, own in zip(theirs, ours):
        assert list(entry) == list(own)
        for name, value in entry.items():
            one_image = 100 / 110 + 1e-9
            assert own[name] == pytest.approx(value, abs=one_image if "acc" in name else 5e-4 * abs(value)), name
    assert theirs[9]["test_acc1"] > 40  # of random features; 20 is chance
    # Ours takes theirs for a run that is done.
    assert main(["linear", *map(str, words), str(tmp_path)]) == 0
    assert last + said.partition(last)[2].split()[0] in capsys.readouterr().out


def test_linear_sees_torchvisions_pixels(tmp_path):
    """Of the same box, as RandomResizedCrop and RandomHorizontalFlip of the original's make them."""
    from torchvision.transforms import InterpolationMode, RandomResizedCrop
    from torchvision.transforms.functional import hflip, resized_crop

    labelled(tmp_path)
    source = FolderSource(tmp_path / "train")
    ((shown, kept),) = views(source, np.arange(40), RandomView(96, 0, 1), 40, 0, print)
    recipe = ViewRecipe(size=96, scale=(0.08, 1.0))
    images = [decode(source[i]) for i in range(40)]
    widths, heights = zip(*(image.size for image in images))
    interpolation = RandomResizedCrop(96).interpolation
    assert interpolation == InterpolationMode.BILINEAR
    for view, image, params in zip(shown, images, crop_params(draw_crops(0, 1, kept, widths, heights, [recipe]))):
        x, y, w, h = params.box
        expected = resized_crop(image, y, x, h, w, [96, 96], interpolation)
        expected = hflip(expected) if params.flip else expected
        assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(expected))


def values(folder):
    """What the original's program computed before it rounded."""
    return torch.load(folder / "values.pth", weights_only=False)


def ours(command, capsys, checkpoint, data, *flags):
    """(the lines that our command prints, the numbers in its last one)."""
    words = [command, "--pretrained_weights", checkpoint, "--data_path", data, *flags]
    assert main(list(map(str, words))) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.parametrize("flags", [("--imsize", 160), ("--imsize", 200, "--multiscale", "true")], ids=["one", "three"])
def test_retrieval_ranks_as_the_original(flags, checkpoint, tmp_path, capsys):
    oxford(tmp_path)
    said = evaluate("eval_image_retrieval.py", checkpoint, tmp_path, tmp_path, *flags)
    theirs = values(tmp_path)
    lines, numbers = ours("retrieval", capsys, checkpoint, tmp_path, *flags)
    assert lines[-2:] == [line for line in said.splitlines() if line.startswith(">>")]
    for level, area, precision in (("medium", "mapM", "mprM"), ("hard", "mapH", "mprH")):
        assert 0.05 < numbers[f"{level}_map"] < 0.9
        assert numbers[f"{level}_map"] == pytest.approx(float(theirs[area]), abs=1e-9)
        assert [numbers[f"{level}_mp{k}"] for k in (1, 5, 10)] == pytest.approx(theirs[precision].tolist(), abs=1e-9)
    folder = tmp_path / "roxford5k"
    truth = read_truth(folder / "gnd_roxford5k.pkl")
    source = SequenceSource([folder / "jpg" / f"{name}.jpg" for name in truth.database])
    backbone, side = load_backbone(checkpoint), flags[1]
    features, _ = retrieval_features(backbone, source, side, multiscale="--multiscale" in flags, batch_size=8)
    assert (features - theirs["train_features"]).abs().max() < 1e-6


@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
def test_copies_are_found_as_by_the_original(whitened, checkpoint, tmp_path, capsys):
    copydays(tmp_path)
    flags = ["--imsize", 32, "--distractors_path", tmp_path / "distractors"]
    flags += ["--whitening_path", tmp_path / "whitening"] if whitened else []
    said = evaluate("eval_copy_detection.py", checkpoint, tmp_path, tmp_path, *flags)
    theirs = values(tmp_path)
    lines, numbers = ours("copies", capsys, checkpoint, tmp_path, *flags)
    expected = [line for line in said.splitlines() if line.startswith("eval on ")]
    assert [line for line in lines if line.startswith("eval on ")] == expected[:20]
    start = 0
    for block in BLOCKS:
        n = 229 if block == "strong" else 157
        area = np.mean(theirs["precisions"][start : start + n])
        assert numbers[f"{block}_map"] == pytest.approx(area, abs=1e-6), block
        start += n
    assert len({numbers[f"{block}_map"] for block in BLOCKS}) > 8
    if not whitened:
        features, _ = copy_features(load_backbone(checkpoint), FolderSource(tmp_path / "original"), 32)
        assert (F.normalize(features, dim=1) - theirs["queries"][:157]).abs().max() < 1e-6


def test_films_are_segmented_as_by_the_original(checkpoint, photos, tmp_path, capsys):
    davis(tmp_path / "data", photos)
    (tmp_path / "theirs").mkdir()
    evaluate("eval_video_segmentation.py", checkpoint, tmp_path / "data", tmp_path / "theirs")
    _, numbers = ours("video", capsys, checkpoint, tmp_path / "data", "--output_dir", tmp_path / "ours")
    assert 0.3 < numbers["J-Mean"] < 0.95
    for film in ("wide", "high"):
        paths = sorted((tmp_path / "theirs" / film).iterdir())
        assert len(paths) == 12
        for path in paths:
            expected, mask = (np.asarray(Image.open(p)) for p in (path, tmp_path / "ours" / film / path.name))
            assert np.count_nonzero(mask != expected) == 0, path
