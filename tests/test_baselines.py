"""The baselines of the benchmark end at the original's weights: what they are compared with is the same training."""

import sys
from pathlib import Path

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
    monkeypatch.setattr(kind, "_clip", lambda self: None)
    data = golden("trajectory_fp64")
    assert largest_error(nine_steps(kind, data)[0], data, rel) > 1e-2


FAKE_UTILS = """
import torch
from bench.baselines import PlainStep
from fastdino import MultiCropWrapper, get_params_groups

def clip_gradients(model, clip):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_((clip / (p.grad.norm(2) + 1e-6)).clamp(max=1.0))

def cancel_gradients_last_layer(epoch, model, freeze):
    if epoch < freeze:
        for name, p in model.named_parameters():
            if "last_layer" in name:
                p.grad = None
"""
FAKE_NETWORKS = """
from functools import partial
from fastdino import DINOHead, VisionTransformer
"""
FAKE_MAIN = """
import utils
from fastdino import DINOLoss
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """What FASTDINO_PEERS may name: three modules of the original's names, made of ours."""
    from bench import peers

    for name, text in (("utils", FAKE_UTILS), ("vision_transformer", FAKE_NETWORKS), ("main_dino", FAKE_MAIN)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("FASTDINO_PEERS", str(tmp_path))
    peers.original.cache_clear()
    yield tmp_path
    peers.original.cache_clear()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["trajectory_fp64", "trajectory_free_g_fp64"])
def test_a_checkout_of_the_original_takes_the_same_nine_steps(golden, rel, checkout, name):
    from bench import peers

    data = golden(name)
    before = set(sys.modules), list(sys.path)
    step, losses = nine_steps(peers.OriginalStep, data)
    assert type(step.student) is step.code.utils.MultiCropWrapper
    assert Path(step.code.utils.__file__).parent == checkout
    assert not {"utils", "main_dino", "vision_transformer"} & (set(sys.modules) - before[0])
    assert sys.path == before[1]
    assert rel(losses, data["losses"]) < 1e-8
    step.loss.center = step.criterion.center
    assert largest_error(step, data, rel) < 1e-8


@pytest.mark.parametrize(
    ("folder", "reason"), [(None, "does not name a checkout"), ("/nowhere", "holds no vision_transformer.py")]
)
def test_an_original_that_is_not_there_is_absent_with_the_reason(monkeypatch, folder, reason):
    from bench import peers

    peers.original.cache_clear()
    monkeypatch.delenv("FASTDINO_PEERS", raising=False)
    if folder:
        monkeypatch.setenv("FASTDINO_PEERS", folder)
    with pytest.raises(peers.Absent, match=reason):
        peers.original()
