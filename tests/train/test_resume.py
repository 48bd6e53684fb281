"""Going on with a run: what is compared, what is said, what is refused."""

import argparse
import json
import os
import signal
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from trials.checkpoints import BYTES, RunsCode

from fastdino import load_backbone
from fastdino.errors import UserError
from fastdino.train.build import Own
from fastdino.train.checkpoint import load_checkpoint
from fastdino.train.config import TrainConfig
from fastdino.train.contents import check
from fastdino.train.loop import Run, train
from fastdino.train.meter import Meter
from fastdino.train.optim import OPTIMIZERS, state_names
from fastdino.train.resume import HARMLESS, IMPOSSIBLE, changes, shown
from fastdino.train.schedules import Schedules
from fastdino.train.sinks import Sink
from fastdino.train.tuning import get_params_groups


def test_flags_that_are_classified_exist_and_are_of_one_class():
    names = {field.name for field in fields(TrainConfig)}
    assert names >= IMPOSSIBLE | HARMLESS
    assert not IMPOSSIBLE & HARMLESS


def test_the_originals_arguments_are_compared_where_both_have_them():
    config = TrainConfig(data_path="x", lr=0.001)
    saved = argparse.Namespace(
        lr=0.0005, global_crops_scale=[0.4, 1.0], arch="vit_small", gpu=0, output_dir="elsewhere"
    )
    found = changes(saved, config)
    assert found == {"lr": (0.0005, 0.001)}
    assert shown(found, {"lr", "seed"}) == ["--lr 0.0005 -> 0.001"]


@pytest.fixture
def few(tiny, few_digits):
    """`tiny` with few digits."""
    return partial(tiny, **few_digits)


@pytest.fixture
def one_epoch(few, tmp_path):
    train(few(epochs=1, warmup_epochs=0, saveckp_freq=0))
    return tmp_path / "run"


def test_changes_are_printed_in_one_block_and_kept_in_args_json(one_epoch, few, capsys):
    train(few(epochs=2, warmup_epochs=0, lr=0.001, num_workers=1, knn_freq=2))
    block = capsys.readouterr().out.partition("resumed ")[2].splitlines()[1:4]
    assert block == [
        "changed --epochs 1 -> 2",
        f"        --lr {few().lr} -> 0.001",
        "        --num_workers, --knn_freq, --saveckp_freq changed, too, which makes no difference to what is learned",
    ]
    saved = json.loads((one_epoch / "args.json").read_text())
    assert saved["lr"] == 0.001
    (change,) = saved["history"]
    assert change["epochs"] == 1
    assert change["changed"]["lr"] == [few().lr, 0.001]
    train(few(epochs=3, warmup_epochs=0, lr=0.002))
    history = json.loads((one_epoch / "args.json").read_text())["history"]
    assert [change["changed"]["lr"] for change in history] == [[few().lr, 0.001], [0.001, 0.002]]


def test_a_run_with_fewer_epochs_than_were_trained_says_so(one_epoch, few, capsys):
    train(few(epochs=2, warmup_epochs=0))
    capsys.readouterr()
    assert train(few(epochs=1, warmup_epochs=0)).epochs == 2
    assert "nothing is left to train: 2 epochs of 1 are done" in capsys.readouterr().out


def test_what_cannot_change_is_refused_with_both_values(one_epoch, few):
    before = {path.name: path.read_bytes() for path in one_epoch.iterdir()}
    with pytest.raises(
        UserError, match=r"it is of a run with --arch vit_nano -> vit_tiny, --out_dim 64 -> 32\. --resume"
    ):
        train(few(arch="vit_tiny", out_dim=32))
    words = (
        r"another model: student: backbone.pos_embed is .*expected .* \(changed since: .*--global_crops_size 24 -> 48\)"
    )
    with pytest.raises(UserError, match=words):
        train(few(global_crops_size=48))
    assert before == {path.name: path.read_bytes() for path in one_epoch.iterdir()}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size_per_gpu": 128}, "it had 5 steps of 256 of 1,437 images, and has 11 steps of 128 of 1,437 images"),
        ({"batch_size_per_gpu": 255}, "it had 5 steps of 256 of 1,437 images, and has 5 steps of 255 of 1,437 images"),
        ({"seed": 1}, "its images come in another order"),
    ],
    ids=str,
)
def test_an_epoch_of_other_steps_begins_anew_and_says_so(changed, words, tiny, tmp_path, capsys):
    class StopAtOnce(Sink):
        def step(self, entry):
            signal.raise_signal(signal.SIGINT)

    first = train(tiny(knn_freq=1), Own(callbacks=[StopAtOnce()]))
    capsys.readouterr()
    second = train(tiny(knn_freq=1, **changed), Own(callbacks=[StopAtOnce()]))
    out = capsys.readouterr().out
    assert f"epoch 1 begins anew: {words}" in out
    assert "before training" not in out  # the weights are no longer those of then
    assert first.interrupted
    assert first.knn_before == second.knn_before > 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["iteration"] == 1


def test_a_run_stopped_before_its_first_step_goes_on(few, monkeypatch):
    start = Run._train_epoch

    def stopped(self, sinks):
        signal.raise_signal(signal.SIGTERM)
        return start(self, sinks)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_epoch", stopped)
        assert train(few(epochs=1, warmup_epochs=0)).epochs == 0
    assert train(few(epochs=1, warmup_epochs=0)).epochs == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_backbone_with_a_parameter_that_nothing_uses_goes_on(name, few):
    class Backbone(nn.Module):
        embed_dim = 8

        def __init__(self):
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 8, 3), nn.Linear(2, 2)

        def forward(self, crops):
            crops = crops if isinstance(crops, (list, tuple)) else [crops]
            return torch.cat([self.conv(crop).mean((2, 3)) for crop in crops])

    for epochs in (1, 2):
        config = few(optimizer=name, epochs=epochs, warmup_epochs=0, batch_size_per_gpu=120, attention_images=0)
        assert train(config, Own(backbone=Backbone())).epochs == epochs


REASONS = {
    "empty": "it is empty",
    "a text": "does not begin as torch.save's files do",
    "zeros": "does not begin as torch.save's files do",
    "its first half": "is damaged: its end is missing",
    "all but its last byte": "is damaged: its end is missing",
    "its second half": "does not begin as torch.save's files do",
    "a flipped bit": r"is damaged: the checksum of \S+ is wrong",
    "compressed": "it is a compressed archive",
    "a pickle that runs code": "is not a checkpoint, or is damaged",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_without_pytorchs_advice(kind, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"weights": torch.arange(1000.0)}, path)
    path.write_bytes(BYTES[kind](path.read_bytes()))
    with pytest.raises(UserError, match=REASONS[kind]) as refused:
        load_checkpoint(path)
    assert "weights_only" not in str(refused.value)
    assert str(refused.value).isprintable()


def test_code_is_named_in_either_of_pytorchs_formats(tmp_path):
    for zipped in (True, False):
        torch.save({"x": RunsCode()}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"x.pth holds pickled code, which is refused: posix.system$"):
            load_checkpoint(tmp_path / "x.pth")


def test_few_bytes_that_stand_for_terabytes_are_refused(tmp_path):
    torch.save({"teacher": {"pos_embed": torch.zeros(1).expand(2**38)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"teacher.pos_embed is larger than what is stored of it"):
        load_backbone(tmp_path / "x.pth")


def test_places_that_are_no_file_are_named(tiny, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="found no file there"):
        load_checkpoint(tmp_path / "fifo")
    with pytest.raises(UserError, match="found a folder there"):
        load_checkpoint(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").symlink_to(tmp_path / "unmounted" / "checkpoint.pth")
    with pytest.raises(UserError, match="found a link to nothing there"):
        train(tiny())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pth"]


def test_only_a_kept_checkpoint_that_fits_is_advised(few, tmp_path):
    train(few(epochs=2, warmup_epochs=0))
    run = tmp_path / "run"
    (run / "checkpoint.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint0001.pth there holds 2 epochs: copy it over"):
        train(few(epochs=3))
    torch.save(
        torch.load(run / "checkpoint0001.pth", weights_only=False) | {"epoch": "two"}, run / "checkpoint0001.pth"
    )
    with pytest.raises(UserError, match=r"checkpoint0000.pth there holds 1 epoch: copy it over"):
        train(few(epochs=3))
    with pytest.raises(UserError, match=r"it is empty. --resume false starts anew"):
        train(few(epochs=3, hidden_dim=8))


def test_other_images_and_another_batch_are_said_and_so_are_missing_arguments(one_epoch, few, capsys):
    content = torch.load(one_epoch / "checkpoint.pth", weights_only=False)
    content["progress"] |= {"n_images": 1000, "batch_size": 512}
    torch.save(content, one_epoch / "checkpoint.pth")
    train(few(epochs=1, warmup_epochs=0, saveckp_freq=0))
    block = capsys.readouterr().out.partition("resumed ")[2].splitlines()[1:3]
    assert block == ["changed images 1000 -> 256", "        images a step 512 -> 50"]
    del content["args"]
    torch.save(content, one_epoch / "checkpoint.pth")
    train(few(epochs=1, warmup_epochs=0, saveckp_freq=0))
    assert "its arguments are not in it: what has changed since cannot be told" in capsys.readouterr().out


def test_a_loss_scale_that_is_none_is_refused():
    student = nn.Linear(2, 2)
    parts = {"student": student, "teacher": nn.Linear(2, 2), "loss": nn.Linear(1, 1), "optimizer_name": "sgd"}
    parts["optimizer"] = OPTIMIZERS["sgd"](get_params_groups(student))
    state = {name: parts[name].state_dict() for name in ("student", "teacher", "optimizer")}
    content = {"epoch": 0, "dino_loss": parts["loss"].state_dict(), **state}
    scaler = torch.amp.GradScaler("cpu")
    check(content | {"fp16_scaler": scaler.state_dict()}, scaler=scaler, **parts)
    with pytest.raises(UserError, match="the checkpoint's fp16_scaler has nan as its scale, expected a number"):
        check(content | {"fp16_scaler": scaler.state_dict() | {"scale": torch.nan}}, scaler=scaler, **parts)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_read_from_itself(name):
    expected = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}, "lars": {"mu"}}
    assert state_names(name) == expected[name]


def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(one_epoch):
    content = torch.load(one_epoch / "checkpoint.pth", weights_only=False)
    content["teacher"]["module.backbone.norm.weight"][3] = torch.nan  # the digits' head has BatchNorm
    torch.save(content, one_epoch / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint.pth: norm.weight holds numbers that are not finite"):
        load_backbone(one_epoch / "checkpoint.pth")


def test_an_epochs_means_go_on_where_they_were():
    schedules = Schedules.of(TrainConfig(data_path="x", epochs=2, warmup_epochs=0), 4, 1)
    rows = np.arange(12.0).reshape(6, 2)
    rows[3, 1] = np.inf  # of a step that fp16 skipped
    whole, cut = Meter(["loss", "kl"]), Meter(["loss", "kl"])
    whole.step_entry(rows, 6, 0, schedules)
    cut.step_entry(rows[:2], 2, 0, schedules)
    state = json.loads(json.dumps(cut.state() | {"seconds": 100.0}))
    resumed = Meter(["loss", "kl"])
    resumed.restore(state)
    resumed.step_entry(rows[2:], 6, 0, schedules)
    entries = [meter.epoch_entry(0, 4, schedules) for meter in (whole, resumed)]
    assert entries[0]["train_kl"] == entries[1]["train_kl"] == np.mean([1, 3, 5, 9, 11])
    assert entries[0]["train_loss"] == entries[1]["train_loss"] == rows[:, 0].mean()
    assert 100 <= resumed.seconds < 200
