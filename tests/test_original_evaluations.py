"""The original's five evaluations, as they stand, on a checkpoint of ours with BatchNorm in the head.

They run where FASTDINO_PEERS holds `dino/` and torchvision imports, each in a process of its own, on a CPU.
"""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from test_original import PEER, needs_the_original, saved
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastdino.cli import main
from fastdino.data.decode import decode
from fastdino.data.params import ViewRecipe, crop_params, draw_crops
from fastdino.data.sources import FolderSource
from fastdino.data.views import random_views
from fastdino.eval.linear import Heads, Input


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


def digit(i):
    """One of scikit-learn's digits as a picture, no two of the same size."""
    small = Image.fromarray((load_digits().images[i] * 255 / 16).astype(np.uint8))
    return small.resize((160 + 8 * (i % 5), 200), Image.Resampling.BICUBIC).convert("RGB")


def labelled(folder):
    """train/ and val/ with five classes; the original's k-NN divides by a hundred test images."""
    digits = load_digits()
    for label in range(5):
        for n, i in enumerate(np.flatnonzero(digits.target == label)[:30]):
            path = folder / ("train" if n < 8 else "val") / str(label) / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            digit(i).save(path)


def oxford(folder):
    """Ten images, of which the first two are queries, too."""
    (folder / "roxford5k/jpg").mkdir(parents=True)
    names = [f"image_{i}" for i in range(10)]
    for i, name in enumerate(names):
        digit(i).save(folder / f"roxford5k/jpg/{name}.jpg")
    relevant = [{"easy": [q], "hard": [q + 2, q + 4], "junk": [9]} for q in range(2)]
    with (folder / "roxford5k/gnd_roxford5k.pkl").open("wb") as file:
        pickle.dump({"imlist": names, "qimlist": names[:2], "gnd": relevant}, file)


def copydays(folder):
    """157 originals, as the program expects, of which every attack is as many (229 strong ones)."""
    attacks = [f"jpegqual/{q}" for q in (3, 5, 8, 10, 15, 20, 30, 50, 75)]
    attacks += [f"crops/{s}" for s in (10, 15, 20, 30, 40, 50, 60, 70, 80)]
    pixels = np.asarray(digit(0).resize((32, 32)))
    for name in ("original", "strong", *attacks):
        (folder / name).mkdir(parents=True)
        for i in range(229 if name == "strong" else 157):
            Image.fromarray(pixels + np.uint8(i)).save(folder / name / f"{2000 + i % 157}{i // 157:02}.jpg")


def davis(folder):
    """A film of three frames; a square is the object."""
    for name in ("JPEGImages/480p/film", "Annotations/480p/film", "ImageSets/2017"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_text("film\n")
    for i in range(3):
        digit(i).resize((128, 128)).save(folder / f"JPEGImages/480p/film/{i:05}.jpg")
    mask = np.zeros((128, 128), np.uint8)
    mask[40:90, 40:90] = 1
    Image.fromarray(mask).save(folder / "Annotations/480p/film/00000.png")


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
    theirs = [float(x) for x in re.findall(r"-NN classifier result: Top1: ([\d.]+)", said)]
    flags = ["--pretrained_weights", checkpoint, "--data_path", tmp_path / "data", "--nb_knn", 5, 10]
    assert main(["knn", *map(str, flags)]) == 0
    ours = [float(x) for x in re.findall(r"-NN classifier result: Top1: ([\d.]+)", capsys.readouterr().out)]
    assert len(ours) == 2
    assert theirs == pytest.approx(ours, rel=1e-12)


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
            assert own[name] == pytest.approx(value, abs=one_image if "acc" in name else 2e-3 * abs(value)), name
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
    ((views, kept),) = random_views(source, np.arange(40), 96, 0, 1, 40, 0, print)
    recipe = ViewRecipe(size=96, scale=(0.08, 1.0))
    images = [decode(source[i]) for i in range(40)]
    widths, heights = zip(*(image.size for image in images))
    interpolation = RandomResizedCrop(96).interpolation
    assert interpolation == InterpolationMode.BILINEAR
    for view, image, params in zip(views, images, crop_params(draw_crops(0, 1, kept, widths, heights, [recipe]))):
        x, y, w, h = params.box
        expected = resized_crop(image, y, x, h, w, [96, 96], interpolation)
        expected = hflip(expected) if params.flip else expected
        assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_retrieval_finds_images(checkpoint, tmp_path):
    oxford(tmp_path / "data")
    said = evaluate("eval_image_retrieval.py", checkpoint, tmp_path / "data", tmp_path)
    assert re.search(r">> roxford5k: mAP M: [\d.]+, H: [\d.]+", said)


def test_copies_are_found(checkpoint, tmp_path):
    copydays(tmp_path / "data")
    said = evaluate("eval_copy_detection.py", checkpoint, tmp_path / "data", tmp_path, "--imsize", 32)
    assert "eval on original mAP=1.000" in said
    assert len(re.findall(r"eval on \S+ mAP=", said)) == 20


def test_a_film_is_segmented(checkpoint, tmp_path):
    davis(tmp_path / "data")
    evaluate("eval_video_segmentation.py", checkpoint, tmp_path / "data", tmp_path)
    first, *others = (np.asarray(Image.open(tmp_path / f"film/{i:05}.png")) for i in range(3))
    assert first[40:90, 40:90].all()
    for mask in others:
        assert 0 < mask.mean() < 1
