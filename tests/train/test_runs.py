"""Whole runs: what they leave behind, that they repeat, and that a stop and a resume change nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import load_backbone, load_checkpoint
from fastdino.cli import main
from fastdino.errors import TrainingError, UserError
from fastdino.eval import EVALUATIONS
from fastdino.train import build, words
from fastdino.train.build import Own, assemble
from fastdino.train.checkpoint import eval_size
from fastdino.train.distributed import start
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop
from fastdino.train.loop import train
from fastdino.train.sinks import LogFile, Sink


def assert_same_state(one, other):
    """Every tensor of two checkpoints, to the bit."""
    for part in ("student", "teacher", "dino_loss"):
        assert one[part].keys() == other[part].keys()
        for key, value in one[part].items():
            assert torch.equal(value, other[part][key]), f"{part}.{key}"
    for index, state in one["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][index][key]), f"optimizer.{index}.{key}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_tiny, fifth):
    """A finished tiny run with k-NN and a checkpoint of every epoch."""
    folder = tmp_path_factory.mktemp("finished")
    with mock.patch.object(build, "load_digits", return_value=fifth):
        result = train(make_tiny(folder, knn_freq=2, batch_size_per_gpu=50))
    return folder, result


@pytest.fixture
def tiny(tiny, few_digits):
    """All runs here are of the digits of `finished`, five steps an epoch."""
    return partial(tiny, **few_digits)


def test_a_run_leaves_checkpoints_log_and_pictures(finished):
    folder, result = finished
    assert result.epochs == 3
    assert 0 < result.knn_before < 1
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    assert {"train_loss", "train_lr", "train_wd", "train_momentum", "train_teacher_entropy"} <= entries[0].keys()
    assert [entry["knn"] is not None for entry in entries] == [False, True, True]
    assert entries[0]["knn_before"] == result.knn_before
    assert entries[2]["knn"] == result.knn_after
    assert all(0 < entry["train_loss"] < 20 and 0 <= entry["data_wait"] <= 1 for entry in entries)
    assert json.loads((folder / "args.json").read_text())["out_dim"] == 64
    for name in ("curves.png", "attention.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 10


def test_a_run_ends_with_how_to_use_it(finished, capsys, tiny):
    """And with the backbone alone in a file of its own, the one that is evaluated."""
    folder, result = finished
    alone, whole = (load_backbone(folder / name).state_dict() for name in ("backbone.pth", "checkpoint.pth"))
    for name, value in result.backbone.state_dict().items():
        assert torch.equal(alone[name], value)
        assert torch.equal(whole[name], value)
    train(tiny("again", epochs=1))
    *_, wrote, python, command = capsys.readouterr().out.splitlines()
    assert "backbone.pth, " in wrote
    assert python.startswith('use it  fastdino.load_backbone("')
    assert command.startswith("        fastdino features | knn | attention | export --pretrained_weights ")


def test_checkpoints_have_exactly_the_originals_keys(finished, golden_folder):
    folder, _ = finished
    theirs = load_checkpoint(golden_folder / "checkpoint_micro.pth")
    for name, epoch in (("checkpoint.pth", 3), ("checkpoint0000.pth", 1), ("checkpoint0001.pth", 2)):
        ours = load_checkpoint(folder / name)
        assert list(ours) == [*(key for key in theirs if key != "fp16_scaler"), "progress"]
        assert ours["epoch"] == epoch
        assert type(ours["args"]) is type(theirs["args"])
        assert all(key.startswith(("module.backbone.", "module.head.")) for key in ours["student"])
        assert all(
            key.startswith(("module.backbone.", "module.head.")) for key in ours["teacher"]
        )  # for BatchNorm's sake
        assert ours["dino_loss"]["center"].shape == (1, 64)
        assert ours["optimizer"]["param_groups"][0].keys() == theirs["optimizer"]["param_groups"][0].keys()


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(tiny, tmp_path):
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(tiny(folder, epochs=1, warmup_epochs=0, seed=seed))
    one, two, three = (load_checkpoint(tmp_path / folder / "checkpoint.pth") for folder in ("one", "two", "three"))
    assert_same_state(one, two)
    with pytest.raises(AssertionError):
        assert_same_state(one, three)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_stopped_after_an_epoch_resumes_to_the_same_bits(finished, tiny, tmp_path, epoch):
    folder, _ = finished
    resumed = tmp_path / "run"
    resumed.mkdir()
    shutil.copy(folder / f"checkpoint{epoch:04}.pth", resumed / "checkpoint.pth")
    lines = (folder / "log.txt").read_text().splitlines(keepends=True)
    (resumed / "log.txt").write_text("".join(lines[:epoch]) + lines[epoch][:40])  # of a run killed while it logged
    result = train(tiny())
    assert result.epochs == 3
    assert_same_state(load_checkpoint(folder / "checkpoint.pth"), load_checkpoint(resumed / "checkpoint.pth"))
    entries = [json.loads(line)["epoch"] for line in (resumed / "log.txt").read_text().splitlines()]
    assert entries == [0, 1, 2]
    assert (resumed / f"checkpoint{epoch:04}.pth").is_file()


def test_going_back_to_a_kept_checkpoint_keeps_the_old_lines_and_draws_the_new(finished, tiny, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.copy(folder / "checkpoint0000.pth", tmp_path / "run" / "checkpoint.pth")
    train(tiny())
    entries = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert entries == [0, 1, 2, 1, 2]
    log = LogFile(RunFolder(tmp_path / "run", 0, print, Stop()))
    assert [entry["epoch"] for entry in log.read()] == [0, 1, 2]
    with (tmp_path / "run" / "log.txt").open("ab") as file:  # of another program
        file.write(b'5\n{"loss": 1}\n\xff\xfe\n{"epoch": "two"}\n')
    assert [entry["epoch"] for entry in log.read()] == [0, 1, 2]


@pytest.mark.parametrize("steps", [3, 5, 7])
def test_a_run_stopped_inside_an_epoch_resumes_to_the_same_bits(finished, tiny, tmp_path, steps, capsys):
    folder, _ = finished

    class StopAfter(Sink):
        def step(self, entry):
            if entry["iteration"] == steps:
                signal.raise_signal(signal.SIGTERM)

    result = train(tiny(knn_freq=2), Own(callbacks=[StopAfter()]))
    assert result.signal == signal.SIGTERM
    assert result.interrupted
    stopped = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert stopped.get("iteration", 5) == steps  # an epoch that was finished needs none
    assert stopped["epoch"] == steps // 5
    assert "resume with: fastdino train --" in capsys.readouterr().out
    assert not train(tiny(knn_freq=2)).interrupted
    final = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert "iteration" not in final
    assert_same_state(load_checkpoint(folder / "checkpoint.pth"), final)
    ours, whole = (json.loads((f / "log.txt").read_text().splitlines()[steps // 5]) for f in (tmp_path / "run", folder))
    assert ours["train_loss"] == whole["train_loss"]  # of the whole epoch, not of what was left of it
    assert ours.get("knn_before") == whole.get("knn_before")  # of the weights before the first step


def test_waiting_for_data_is_said_with_its_cure(tiny, monkeypatch, capsys):
    monkeypatch.setattr(words, "MUCH_WAITING", -1.0)
    monkeypatch.setattr(words, "SHORT_EPOCH", 0.0)
    train(tiny(epochs=1, warmup_epochs=0, augment="exact"))
    expected = r"\d% of the time went into waiting for data: more threads \(--num_workers, now 0\), --augment fast"
    assert re.search(expected, capsys.readouterr().out)


def test_a_finished_run_is_left_as_it_is(finished, tiny, tmp_path):
    folder, before = finished
    shutil.copytree(folder, tmp_path / "run")
    result = train(tiny(knn_freq=2))
    assert result.knn_after == before.knn_after
    assert_same_state(load_checkpoint(folder / "checkpoint.pth"), load_checkpoint(tmp_path / "run" / "checkpoint.pth"))


def test_ctrl_c_saves_and_says_how_to_resume(tiny_flags, tmp_path):
    command = [sys.executable, "-m", "fastdino.train", *tiny_flags, "--epochs", "500", "--num_workers", "1"]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loading process gets it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    resume = re.search(r"resume with: fastdino (train .*)", output).group(1).split()
    saved = load_checkpoint(tmp_path / "checkpoint.pth")
    done = saved.get("iteration", saved["epoch"] * 5)
    assert done >= 5
    assert main([*resume, "--epochs", str(saved["epoch"] + 1)]) == 0
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == saved["epoch"] + 1


def test_a_save_that_dies_half_way_leaves_the_last_checkpoint(finished, tiny, tmp_path, monkeypatch):
    train(tiny(epochs=1, warmup_epochs=0))
    path = tmp_path / "run" / "checkpoint.pth"
    before = path.read_bytes()

    def die(content, file):
        file.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    folder = RunFolder(path.parent, 0, print, Stop())
    parts = assemble(tiny(epochs=1, warmup_epochs=0), start("cpu", "env://"), Own(), folder, print)
    names = sorted(path.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        parts.save(1)
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names


def test_a_backbone_comes_out_of_our_checkpoints_and_the_originals(finished, golden_folder, golden):
    backbone = load_backbone(finished[0] / "checkpoint.pth")
    assert (backbone.embed_dim, len(backbone.blocks), backbone.patch_embed.patch_size) == (96, 4, 12)
    assert not backbone.training
    theirs = load_backbone(golden_folder / "checkpoint_micro.pth", "student", num_heads=3)
    expected = golden("trajectory_fp32").state("student")
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, expected[f"backbone.{key}"])
    with pytest.raises(UserError, match="heads cannot be told from a width of 24"):
        load_backbone(golden_folder / "checkpoint_micro.pth")
    with pytest.raises(UserError, match="no Vision Transformer under 'nobody'"):
        load_backbone(golden_folder / "checkpoint_micro.pth", "nobody")


def test_images_are_resized_as_they_were_in_training(finished):
    """The digits are whole at 24 pixels; anything else has the usual border around its center crop."""
    checkpoint = load_checkpoint(finished[0] / "checkpoint.pth")
    assert [eval_size(checkpoint, size) for size in (24, 48)] == [24, 48]
    assert eval_size({"teacher": {}}, 224) == 256


def test_published_backbone_weights_load(tmp_path, finished):
    backbone = load_backbone(finished[0] / "checkpoint.pth")
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    again = load_backbone(tmp_path / "weights.pth")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in backbone.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_run(tiny, tmp_path):
    train(tiny(epochs=1, warmup_epochs=0))
    before = (tmp_path / "run" / "checkpoint.pth").read_bytes()
    words = (
        r"the loss became nan at epoch 2, step \d \(iteration \d; .*checkpoint.pth holds 1 epoch\). Try a smaller --lr"
    )
    with pytest.raises(TrainingError, match=words):
        train(tiny(lr=1e30, clip_grad=0, warmup_epochs=0))
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == before


def test_bad_images_are_skipped_counted_and_named(photo_folder, tiny, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    paths = sorted(photos.rglob("*.jpg"))
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:700])
    paths[2].write_bytes(b"garbage")
    small = {
        "arch": "vit_nano",
        "patch_size": 8,
        "global_crops_size": 32,
        "local_crops_size": 16,
        "batch_size_per_gpu": 8,
    }
    flags = {"data_path": str(photos), "epochs": 2, "knn_freq": 1, **small}
    result = train(tiny(**flags))
    assert result.epochs == 2
    assert result.knn_after is not None
    output = capsys.readouterr().out
    assert "training skipped 3 unreadable of 32 images" in output
    assert "(bad_images.txt names those it met)\n" in output
    assert output.count("k-NN without 3 unreadable images") == 1  # of three evaluations
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    for entry in entries:
        assert entry["bad_images"] == 3
    named = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in named] == [str(path) for path in paths[:3]]
    paths[3].write_bytes(b"one too many: 4 of 32")
    with pytest.raises(TrainingError, match=r"more than 10% of the images cannot be read \(4 of 32 so far\)"):
        train(tiny("other", **flags))


def test_a_run_that_ends_lower_than_it_began_says_so(tiny, capsys, monkeypatch):
    values = iter([0.25, 0.15])
    monkeypatch.setitem(EVALUATIONS, "knn", lambda *_: {"knn": next(values)})
    train(tiny(epochs=1, knn_freq=1))
    out = capsys.readouterr().out
    assert "\nrun     1 epoch x " in out
    assert "0.2500 before training, 0.1500 after, lower; " in out


@pytest.mark.parametrize("classes", [True, False], ids=["class-folders", "no-classes"])
def test_a_folder_of_photographs_trains(photo_folder, tmp_path, classes, capsys):
    folder = photo_folder if classes else photo_folder / "class_0"
    flags = "--arch vit_nano --patch_size 16 --epochs 1 --batch_size_per_gpu 8 --out_dim 256 --hidden_dim 64"
    flags += " --local_crops_number 2 --global_crops_size 64 --local_crops_size 32 --num_workers 1"
    command = ["train", "--data_path", str(folder), *flags.split(), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert ("4 classes" in output) == classes
    assert ("k-NN before training" in output) == classes
    assert (tmp_path / "out" / "attention.png").is_file()
    knn = [
        "knn",
        "--pretrained_weights",
        str(tmp_path / "out" / "checkpoint.pth"),
        "--data_path",
        str(folder),
        "--nb_knn",
        "5",
    ]
    assert main(knn) == (0 if classes else 2)
    picture = [
        "attention",
        "--pretrained_weights",
        str(tmp_path / "out" / "checkpoint.pth"),
        "--output",
        str(tmp_path / "a.png"),
    ]
    assert main([*picture, "--images", *map(str, sorted(folder.rglob("*.jpg"))[:2])]) == 0
    assert (tmp_path / "a.png").is_file()
