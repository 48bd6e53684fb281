"""Whole training steps, schedules and checkpoints agree with the original."""

import copy
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from micro import micro_loss, micro_networks

from fastdino import VisionTransformer, cosine_schedule, get_params_groups
from fastdino.model import attention, mlp
from fastdino.train.checkpoint import load_checkpoint, restore
from fastdino.train.config import TrainConfig
from fastdino.train.optim import OPTIMIZERS
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep


def test_schedules_are_the_originals_to_the_bit(golden):
    data = golden("schedules")
    for i, case in enumerate(data["cases"]):
        assert np.array_equal(cosine_schedule(**case), data[f"out{i}"].numpy()), case


def run_trajectory(data, dtype, packed=True, **options):
    """Nine steps with the parts that `fastdino train` uses; (step, losses)."""
    cfg = data["cfg"]
    student, teacher = micro_networks(cfg)
    student.load_state_dict(data.state("init"))
    teacher.load_state_dict(data.state("init"))
    config = TrainConfig(
        **{name: value for name, value in cfg.items() if name in TrainConfig.__dataclass_fields__ and name != "lr"},
        lr=cfg["lr"] * 256 / cfg["batch"],  # the data's rate is for its own batch, ours for 256 images
        batch_size_per_gpu=cfg["batch"],
        global_crops_size=cfg["img_size"],
        local_crops_size=cfg["img_size"] // 2,
    )
    schedules = Schedules.of(config, cfg["steps_per_epoch"], world_size=1)
    assert np.allclose(schedules.lr, data["lr"].numpy(), rtol=1e-12)
    assert np.allclose(schedules.weight_decay, data["wd"].numpy(), rtol=1e-12)
    assert np.allclose(schedules.momentum_teacher, data["momentum"].numpy(), rtol=1e-12)
    student, teacher = student.to(dtype), teacher.to(dtype)
    student.packed = teacher.packed = packed
    step = TrainStep(
        student=student,
        teacher=teacher,
        loss=micro_loss(cfg).to(dtype),
        schedules=schedules,
        niter_per_ep=cfg["steps_per_epoch"],
        clip_grad=cfg["clip_grad"],
        freeze_last_layer=cfg["freeze_last_layer"],
        **{"optimizer": "adamw", **options},
    )
    losses = []
    for i in range(len(data["losses"])):
        crops = [*(data[f"global{i}"].to(dtype) / 16), *(data[f"local{i}"].to(dtype) / 16)]
        losses.append(float(step(crops, i).loss))
    return step, torch.tensor(losses, dtype=torch.float64)


BUDGETS = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-5, 1e-3)}  # of the first loss; of weights after nine steps


def assert_the_originals(data, step, losses, rel):
    dtype = next(step.student.parameters()).dtype
    loss_budget, weight_budget = BUDGETS[dtype]
    assert rel(losses[0], data["losses"][0]) < loss_budget
    assert rel(losses, data["losses"]) < weight_budget
    assert rel(step.loss.center, data["center"]) < weight_budget
    for what, model in (("student", step.student), ("teacher", step.teacher)):
        expected, got = data.state(what), model.state_dict()
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if dtype == torch.float32 and key.endswith("attn.qkv.bias"):
                # The keys' third has a true gradient of zero: AdamW walks on rounding noise there.
                width = len(value) // 3
                keep = torch.cat([torch.arange(width), torch.arange(2 * width, 3 * width)])
                value, got[key] = value[keep], got[key][keep]
            assert rel(got[key], value) < weight_budget, f"{what}.{key}"


TRAJECTORIES = [
    ("trajectory_fp64", torch.float64),
    ("trajectory_free_g_fp64", torch.float64),
    ("trajectory_fp32", torch.float32),
]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize(("name", "dtype"), TRAJECTORIES, ids=[name for name, _ in TRAJECTORIES])
def test_nine_steps_end_at_the_originals_weights(golden, rel, name, dtype, packed):
    data = golden(name)
    assert_the_originals(data, *run_trajectory(data, dtype, packed), rel)


@pytest.mark.parametrize(
    ("name", "dtype", "backend"),
    [
        ("trajectory_fp64", torch.float64, "inductor"),
        ("trajectory_free_g_fp64", torch.float64, "aot_eager_decomp_partition"),
        ("trajectory_fp32", torch.float32, "aot_eager_decomp_partition"),
    ],
    ids=["fp64-inductor", "free_g_fp64", "fp32"],
)
def test_nine_compiled_steps_end_there_too(golden, rel, name, dtype, backend, monkeypatch):
    """A minute of a C++ compiler, where nothing is cached; of the others, the graphs as Inductor would get them."""
    data = golden(name)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    step, losses = run_trajectory(data, dtype, mode="compiled", say=pytest.fail)
    assert step.mode == "compiled"  # nothing fell back
    assert_the_originals(data, step, losses, rel)


def test_nine_steps_through_the_interpreted_kernels(golden, rel, ops, monkeypatch):
    """fp32, because the kernels leave fp64 to the reference. Attention and MLP take it, and heads of 8, only here."""
    data = golden("trajectory_fp32")
    monkeypatch.setattr(import_module("fastdino_kernels.attention"), "HEAD_DIMS", (8,))
    monkeypatch.setattr(import_module("fastdino_kernels.mlp"), "KERNEL_DTYPES", {torch.float32})
    monkeypatch.setattr(attention._Current, "backend", attention._Current.backend)
    monkeypatch.setattr(mlp._Current, "way", mlp._Current.way)
    step, losses = run_trajectory(data, torch.float32, attention_backend="ours", mlp="ours")
    assert {str(choice) for choice in step.kernels.values()} == {"ours, as asked"}
    assert_the_originals(data, step, losses, rel)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"checkpointing": True}], ids=str)
def test_accumulation_and_checkpointing_change_nothing(golden, rel, options, monkeypatch):
    data = golden("trajectory_fp64")
    if "checkpointing" in options:
        always = property(lambda self: True, lambda self, value: None)
        monkeypatch.setattr(VisionTransformer, "checkpointing", always, raising=False)
        options = {}
    assert_the_originals(data, *run_trajectory(data, torch.float64, **options), rel)


def test_clipping_the_whole_model_at_once_would_be_noticed(golden, rel, monkeypatch):
    data = golden("trajectory_fp64")
    finish = TrainStep.finish

    def clip_all(self):
        optimizer = self.update.optimizer
        clip, optimizer.clip_grad = optimizer.clip_grad, 0.0
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), clip)
        finish(self)
        optimizer.clip_grad = clip

    monkeypatch.setattr(TrainStep, "finish", clip_all)
    step, _ = run_trajectory(data, torch.float64)
    expected = data.state("student")
    assert max(rel(value, expected[key]) for key, value in step.student.state_dict().items()) > 1e-2


def test_the_originals_checkpoint_loads_and_goes_on(golden_folder, golden):
    checkpoint = load_checkpoint(golden_folder / "checkpoint_micro.pth")
    assert checkpoint["args"].arch == "vit_micro"
    assert checkpoint["epoch"] == 3
    data = golden("trajectory_fp32")
    student, teacher = micro_networks(data["cfg"])
    loss = micro_loss(data["cfg"])
    optimizer = OPTIMIZERS["adamw"](get_params_groups(student))
    restore(checkpoint, student=student, teacher=teacher, optimizer=optimizer, optimizer_name="adamw", loss=loss)
    for key, value in data.state("teacher").items():
        assert torch.equal(teacher.state_dict()[key], value), key
    assert torch.equal(loss.center, data["center"])
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {9.0, 6.0}  # the last layer was frozen for the first three
    before = copy.deepcopy(student.state_dict())
    sum(p.sum() for p in student.parameters() if p.requires_grad).backward()
    optimizer.step()
    assert any(not torch.equal(before[key], value) for key, value in student.state_dict().items())
