"""The baselines of the benchmark end at the original's weights: what they are compared with is the same training."""

import pytest
import torch
from micro import micro_loss, micro_networks

from bench.baselines import CarefulStep, PlainStep
from fastdino.train.config import TrainConfig
from fastdino.train.schedules import Schedules


def nine_steps(kind, data):
    cfg = data["cfg"]
    student, teacher = micro_networks(cfg)
    for model in (student, teacher):
        model.load_state_dict(data.state("init"))
    config = TrainConfig(
        **{name: value for name, value in cfg.items() if name in TrainConfig.__dataclass_fields__ and name != "lr"},
        lr=cfg["lr"] * 256 / cfg["batch"],
        batch_size_per_gpu=cfg["batch"],
        global_crops_size=cfg["img_size"],
        local_crops_size=cfg["img_size"] // 2,
    )
    step = kind(
        student=student.double(),
        teacher=teacher.double(),
        loss=micro_loss(cfg).double(),
        schedules=Schedules.of(config, cfg["steps_per_epoch"], world_size=1),
        niter_per_ep=cfg["steps_per_epoch"],
        clip_grad=cfg["clip_grad"],
        freeze_last_layer=cfg["freeze_last_layer"],
    )
    losses = [
        float(step([*(data[f"global{i}"].double() / 16), *(data[f"local{i}"].double() / 16)], i))
        for i in range(len(data["losses"]))
    ]
    return step, torch.tensor(losses, dtype=torch.float64)


def largest_error(step, data, rel):
    errors = [rel(step.loss.center, data["center"])]
    for what, model in (("student", step.student), ("teacher", step.teacher)):
        expected, got = data.state(what), model.state_dict()
        assert got.keys() == expected.keys()
        errors += [rel(got[key], value) for key, value in expected.items()]
    return max(errors)


@pytest.mark.parametrize("name", ["trajectory_fp64", "trajectory_free_g_fp64"])
@pytest.mark.parametrize("kind", [PlainStep, CarefulStep])
def test_nine_steps_end_at_the_originals_weights(golden, rel, kind, name):
    data = golden(name)
    step, losses = nine_steps(kind, data)
    assert rel(losses, data["losses"]) < 1e-8
    assert largest_error(step, data, rel) < 1e-8


@pytest.mark.parametrize("kind", [PlainStep, CarefulStep])
def test_a_baseline_that_does_not_clip_would_be_noticed(golden, rel, kind, monkeypatch):
    monkeypatch.setattr(kind, "clip", staticmethod(lambda *_: None))
    data = golden("trajectory_fp64")
    assert largest_error(nine_steps(kind, data)[0], data, rel) > 1e-2
