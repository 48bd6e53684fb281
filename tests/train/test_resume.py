"""Going on with a run: what is compared, what is said, what is refused."""

import argparse
import json
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch

from fastdino import load_backbone
from fastdino.errors import UserError
from fastdino.train.build import Own
from fastdino.train.config import TrainConfig
from fastdino.train.loop import train
from fastdino.train.meter import Meter
from fastdino.train.optim import OPTIMIZERS, state_names
from fastdino.train.resume import HARMLESS, IMPOSSIBLE, changes, shown
from fastdino.train.schedules import Schedules
from fastdino.train.sinks import Sink


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
def one_epoch(tiny, tmp_path):
    train(tiny(epochs=1, warmup_epochs=0, saveckp_freq=0))
    return tmp_path / "run"


def test_changes_are_printed_in_one_block_and_kept_in_args_json(one_epoch, tiny, capsys):
    train(tiny(epochs=2, warmup_epochs=0, lr=0.001, num_workers=1, knn_freq=2))
    block = capsys.readouterr().out.partition("resumed ")[2].splitlines()[1:4]
    assert block == [
        "changed --epochs 1 -> 2",
        f"        --lr {tiny().lr} -> 0.001",
        "        --num_workers, --knn_freq, --saveckp_freq changed, too, which makes no difference to what is learned",
    ]
    saved = json.loads((one_epoch / "args.json").read_text())
    assert saved["lr"] == 0.001
    (change,) = saved["history"]
    assert change["epochs"] == 1
    assert change["changed"]["lr"] == [tiny().lr, 0.001]
    train(tiny(epochs=3, warmup_epochs=0, lr=0.002))
    history = json.loads((one_epoch / "args.json").read_text())["history"]
    assert [change["changed"]["lr"] for change in history] == [[tiny().lr, 0.001], [0.001, 0.002]]


def test_a_run_with_fewer_epochs_than_were_trained_says_so(one_epoch, tiny, capsys):
    train(tiny(epochs=2, warmup_epochs=0))
    capsys.readouterr()
    assert train(tiny(epochs=1, warmup_epochs=0)).epochs == 2
    assert "nothing is left to train: 2 epochs of 1 are done" in capsys.readouterr().out


def test_what_cannot_change_is_refused_with_both_values(one_epoch, tiny):
    before = {path.name: path.read_bytes() for path in one_epoch.iterdir()}
    with pytest.raises(
        UserError, match=r"it is of a run with --arch vit_nano -> vit_tiny, --out_dim 64 -> 32\. --resume"
    ):
        train(tiny(arch="vit_tiny", out_dim=32))
    words = (
        r"another model: student: backbone.pos_embed is .*expected .* \(changed since: .*--global_crops_size 24 -> 48\)"
    )
    with pytest.raises(UserError, match=words):
        train(tiny(global_crops_size=48))
    assert before == {path.name: path.read_bytes() for path in one_epoch.iterdir()}


def test_an_epoch_of_another_length_begins_anew_and_says_so(tiny, tmp_path, capsys):
    class StopAtOnce(Sink):
        def step(self, entry):
            signal.raise_signal(signal.SIGINT)

    assert train(tiny(), Own(callbacks=[StopAtOnce()])).interrupted
    train(tiny(batch_size_per_gpu=128))
    output = capsys.readouterr().out
    assert "epoch 1 begins anew: it had 5 steps of 1,437 images, and has 11 of 1,437" in output
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=False)["epoch"] == 3


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
    resumed = Meter(["loss", "kl"])
    resumed.restore(json.loads(json.dumps(cut.state())))
    resumed.step_entry(rows[2:], 6, 0, schedules)
    entries = [meter.epoch_entry(0, 4, schedules) for meter in (whole, resumed)]
    assert entries[0]["train_kl"] == entries[1]["train_kl"] == np.mean([1, 3, 5, 9, 11])
    assert entries[0]["train_loss"] == entries[1]["train_loss"] == rows[:, 0].mean()
    assert resumed.seconds > 0
