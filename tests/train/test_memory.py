"""What a step keeps for its backward pass, beside the original's structure: counted, on any machine."""

from functools import cache

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bench.baselines import PlainStep
from fastdino import DINOHead, DINOLoss, MultiCropWrapper, vit_tiny
from fastdino.train.config import TrainConfig
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep

BATCH, N_LOCAL, OUT_DIM = 2, 8, 4096
fp32, bf16 = torch.float32, torch.bfloat16


def networks_of(step):
    return step.student, step.teacher, *((step._student, step._teacher) if isinstance(step, TrainStep) else ())


@cache
def saved_mib_per_image(kind, dtype):
    """MiB of the storages that autograd keeps in the first step, each counted once, those of parameters not at all."""
    torch.manual_seed(0)
    student, teacher = (MultiCropWrapper(vit_tiny(), DINOHead(192, OUT_DIM)) for _ in range(2))
    options = {"mode": "eager", "optimizer": "adamw"} if kind is TrainStep else {}
    step = kind(
        student=student,
        teacher=teacher.requires_grad_(False),
        loss=DINOLoss(OUT_DIM, 2 + N_LOCAL, 0.04, 0.04, 0, 1),
        schedules=Schedules.of(TrainConfig(epochs=1, warmup_epochs=0, data_path="x"), 10, 1),
        niter_per_ep=10,
        clip_grad=3.0,
        freeze_last_layer=0,
        amp_dtype=None if dtype == fp32 else dtype,
        **options,
    )
    weights = {p.untyped_storage().data_ptr() for network in networks_of(step) for p in network.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no two have one address
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        step([torch.randn(BATCH, 3, side, side) for side in [224] * 2 + [96] * N_LOCAL], 0)
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / BATCH / 2**20


@pytest.mark.parametrize(("ours", "theirs"), [(fp32, fp32), (bf16, bf16), (bf16, fp32)], ids=str)
def test_at_most_sixty_percent_of_the_plain_steps_memory(ours, theirs, capsys):
    """ViT-tiny, 2 x 224 + 8 x 96 pixels. fp32 is what the original computes in without AMP, bf16 here is autocast there
    and low-precision weights in ours."""
    mine, plain = saved_mib_per_image(TrainStep, ours), saved_mib_per_image(PlainStep, theirs)
    with capsys.disabled():
        print(f"\n[kept per image: {mine:.1f} MiB in {ours}, the plain step {plain:.1f} MiB in {theirs}]", end=" ")
    assert 0 < mine <= 0.6 * plain
