"""`fastdino.train(...)`: flags by name, images and a backbone of one's own, and who is told the numbers."""

import json
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastdino
from fastdino.errors import TrainingError

SMALL = {
    "epochs": 2,
    "batch_size_per_gpu": 4,
    "out_dim": 32,
    "hidden_dim": 16,
    "bottleneck_dim": 8,
    "global_crops_size": 16,
    "local_crops_size": 8,
    "local_crops_number": 1,
    "num_workers": 0,
    "knn_freq": 1,
}


class Stripes(torch.utils.data.Dataset):
    """Ten images of horizontal, ten of vertical stripes, as a dataset of somebody else's gives them."""

    targets = tuple(i % 2 for i in range(20))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        pixels = np.zeros((24, 24, 3), np.uint8)
        pixels[:: 2 + index // 4] = 255
        return Image.fromarray(pixels if index % 2 else pixels.swapaxes(0, 1)), index % 2


class Convolution(nn.Module):
    """One resolution at a time, like a ResNet of torchvision's: knows nothing of lists, tokens or attention."""

    embed_dim = 12

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


class Watching(fastdino.Sink):
    def __init__(self):
        self.steps, self.epochs, self.closed = [], [], 0

    def step(self, entry):
        self.steps.append(entry)

    def epoch(self, entry):
        self.epochs.append(entry)

    def close(self):
        self.closed += 1


def run(folder, **flags):
    return fastdino.train(**{**SMALL, "output_dir": str(folder), "dataset": Stripes(), **flags})


@pytest.mark.parametrize("step", ["eager", "compiled"])
def test_any_backbone_learns_from_any_dataset(tmp_path, capsys, step, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    watching = Watching()
    result = run(tmp_path, backbone=Convolution(), callbacks=[watching], val_dataset=Stripes(), step=step)
    assert (result.epochs, result.interrupted) == (2, False)
    assert result.after == {"knn": result.knn_after}
    assert result.backbone(torch.zeros(2, 3, 24, 24)).shape == (2, 12)
    assert [entry["iteration"] for entry in watching.steps] == list(range(1, 11))
    assert all(entry["grad_norm"] > 0 for entry in watching.steps)
    assert all(
        entry["kl"] == pytest.approx(entry["loss"] - entry["teacher_entropy"], abs=1e-5) for entry in watching.steps
    )
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert watching.epochs == lines
    assert watching.closed == 1
    said = capsys.readouterr().out
    assert "model   Convolution, " in said
    assert "no attention.png: Convolution has no attention of a CLS token" in said
    assert not (tmp_path / "attention.png").exists()


def test_a_run_with_ones_own_backbone_resumes_to_the_same_bits(tmp_path):
    torch.manual_seed(3)
    start = Convolution().state_dict()

    def fresh():
        backbone = Convolution()
        backbone.load_state_dict(start)
        return backbone

    run(tmp_path / "whole", backbone=fresh())
    run(tmp_path / "halves", backbone=fresh(), saveckp_freq=1)
    (tmp_path / "halves" / "checkpoint0000.pth").replace(tmp_path / "halves" / "checkpoint.pth")
    run(tmp_path / "halves", backbone=Convolution())
    whole, halves = (fastdino.load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "halves"))
    assert all(torch.equal(value, halves["student"][key]) for key, value in whole["student"].items())


def test_the_norm_of_the_gradients_is_that_before_the_clip(tmp_path):
    """Of both kinds of update, with and without a clip."""
    norms = []
    for name, flags in {"a": {}, "b": {"clip_grad": 0}, "c": {"optimizer": "sgd"}}.items():
        watching = Watching()
        run(tmp_path / name, callbacks=[watching], arch="vit_nano", patch_size=8, epochs=1, **flags)
        norms.append(watching.steps[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) == pytest.approx(norms[2], rel=1e-5)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, backbone=Convolution(), tensorboard=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "train/lr", "epoch/train_loss", "epoch/knn"} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    entries = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    knn = events.Scalars("epoch/knn")
    assert [event.step for event in knn] == [5, 10]
    assert [event.value for event in knn] == pytest.approx([entry["knn"] for entry in entries])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_loggers_get_the_same_numbers(tmp_path, monkeypatch, name):
    """The packages are played: what is called on them is what their documentation shows."""
    module = mock.MagicMock(__spec__=SimpleNamespace(name=name))
    monkeypatch.setitem(sys.modules, name, module)
    run(tmp_path, backbone=Convolution(), **{name: "stripes"})
    if name == "wandb":
        assert module.init.call_args.kwargs["project"] == "stripes"
        calls = [(call.args[0], call.kwargs["step"]) for call in module.init.return_value.log.call_args_list]
        assert module.init.return_value.finish.called
    else:
        assert module.set_experiment.call_args.args == ("stripes",)
        calls = [(call.args[0], call.kwargs["step"]) for call in module.log_metrics.call_args_list]
        assert module.end_run.called
    assert [step for values, step in calls if "train/loss" in values] == list(range(1, 11))
    assert [step for values, step in calls if "epoch/knn" in values] == [5, 10]


class Failing(fastdino.Sink):
    def step(self, entry):
        raise KeyError("my bug")


def test_a_callback_that_raises_ends_the_run_and_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"Failing.step raised KeyError: 'my bug'"):
        run(tmp_path, backbone=Convolution(), callbacks=[Failing()])


class FailingAtTheEnd(fastdino.Sink):
    def step(self, entry):
        raise RuntimeError("in a step")

    def close(self):
        raise RuntimeError("at the end")


def test_what_ended_a_run_is_said_and_everybody_is_closed(tmp_path):
    watching = Watching()
    with pytest.raises(TrainingError, match=r"FailingAtTheEnd\.step raised RuntimeError: in a step"):
        run(tmp_path, backbone=Convolution(), callbacks=[FailingAtTheEnd(), watching])
    assert len(watching.steps) == 1
    assert watching.closed == 1


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"backbone": nn.Linear(3, 4)}, "backbone: expected a module with an integer embed_dim, .* got Linear"),
        ({"dataset": Numbers()}, r"dataset: expected images .*; item 0 is int"),
        ({"dataset": iter([1])}, r"dataset: expected images .*; item 0 is int"),
        ({"dataset": []}, "dataset: images: expected at least one, got none"),
        ({"val_dataset": Numbers()}, "val_dataset: expected images"),
        ({"callbacks": [print]}, "callbacks: expected instances of classes derived from fastdino.Sink, got builtin"),
        ({"epoch": 3}, "no flag 'epoch'; did you mean 'epochs'?"),
        ({"lr": "fast"}, "--lr: expected a number, got 'fast'"),
        ({"epochs": 1.5}, "--epochs: expected a whole number, got 1.5"),
        ({"use_fp16": 1}, "--use_fp16: expected true or false, got 1"),
        ({"blur_prob": 1.0}, "--blur_prob: expected numbers, got 1.0"),
        ({"arch": "resnet"}, "--arch: expected one of"),
        ({"wandb": "p"}, "--wandb: wandb is not installed: pip install wandb"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message) as raised:
        run(tmp_path / "run", **flags)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_tensor_dataset_in_either_range_is_the_same_images():
    from fastdino.data.sequences import SequenceSource

    pixels = torch.randint(0, 256, (3, 5, 4), dtype=torch.uint8)
    whole, scaled = SequenceSource([pixels]), SequenceSource([(pixels / 255, 0)])
    assert np.array_equal(whole[0], pixels.permute(1, 2, 0).numpy())
    assert np.array_equal(whole[0], scaled[0])
