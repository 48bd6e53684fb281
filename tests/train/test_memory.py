"""What a step keeps for its backward pass, beside the original's structure; and what is said where memory ends."""

import re
from functools import cache

import pytest
import torch
from kept import Storages

from bench.baselines import PlainStep
from fastdino import DINOHead, DINOLoss, MultiCropWrapper, vit_tiny
from fastdino.cli import main
from fastdino.train.config import TrainConfig
from fastdino.train.memory import advice
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep

BATCH, N_LOCAL, OUT_DIM = 2, 8, 4096
fp32, bf16 = torch.float32, torch.bfloat16


def networks_of(step):
    return step.student, step.teacher, *(step.run.both if isinstance(step, TrainStep) else ())


class BackwardBegins(Exception):
    """With the bytes that are alive."""


@cache
def saved_mib_per_image(kind, dtype):
    """MiB that are alive when the first step's backward pass begins, but for weights and crops."""
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
    crops = [torch.randn(BATCH, 3, side, side) for side in [224] * 2 + [96] * N_LOCAL]

    def backward(loss):
        raise BackwardBegins(storages.alive_bytes)

    with pytest.MonkeyPatch.context() as patch, Storages(*networks_of(step)) as storages:
        patch.setattr(torch.Tensor, "backward", backward)
        with pytest.raises(BackwardBegins) as kept:
            step(crops, 0)
    return kept.value.args[0] / BATCH / 2**20


@pytest.mark.parametrize(("ours", "theirs"), [(fp32, fp32), (bf16, bf16), (bf16, fp32)], ids=str)
def test_at_most_sixty_percent_of_the_plain_steps_memory(ours, theirs, capsys):
    """ViT-tiny, 2 x 224 + 8 x 96 pixels. fp32 is what the original computes in without AMP, bf16 here is autocast there
    and low-precision weights in ours."""
    mine, plain = saved_mib_per_image(TrainStep, ours), saved_mib_per_image(PlainStep, theirs)
    with capsys.disabled():
        print(f"\n[kept per image: {mine:.1f} MiB in {ours}, the plain step {plain:.1f} MiB in {theirs}]", end=" ")
    assert 0 < mine <= 0.6 * plain


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
    "free. Process 1 has 77.85 GiB memory in use. Of the allocated memory 70.00 GiB is allocated by PyTorch"
)
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
)


@pytest.mark.parametrize(
    ("step", "error", "sizes"),
    [
        (
            "eager",
            torch.OutOfMemoryError(CUDA_SAYS),
            r"2\.50 GiB more were asked for, 1\.25 GiB of 79\.10 GiB are free",
        ),
        (
            "compiled",
            RuntimeError(CPU_SAYS + f"{3 * 2**30} bytes."),
            r"3\.00 GiB more were asked for, \d+\.\d\d GiB are free",
        ),
        ("eager", torch.OutOfMemoryError("in other words"), "in other words"),
        ("eager", MemoryError(), "how much was asked for is not known"),
    ],
    ids=["cuda", "cpu-compiled", "unknown", "python"],
)
def test_out_of_memory_is_one_line_with_sizes_and_flags(step, error, sizes, tiny_flags, tmp_path, monkeypatch, capsys):
    """After one epoch, whose checkpoint stays as it is; and nothing falls back to what needs more."""
    command = ["train", *tiny_flags, "--warmup_epochs", "0", "--output_dir", str(tmp_path)]
    assert main([*command, "--epochs", "1"]) == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()

    def fail(self, crops, row, known=None):
        raise error

    monkeypatch.setattr(TrainStep, "forward", fail)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert main([*command, "--epochs", "2", "--step", step]) == 1
    output = capsys.readouterr()
    assert "using eager" not in output.out
    assert re.fullmatch(
        rf"fastdino train: out of memory at epoch 2, step 1 \(iteration 5; .*checkpoint.pth holds 1 epoch\): {sizes}\. "
        r"Try --accumulate 2, --checkpointing true or a smaller --batch_size_per_gpu \(now 6\)\n",
        output.err,
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_a_model_that_does_not_fit_writes_nothing(tiny_flags, tmp_path, capsys):
    """2e13 words of prototypes: the allocator says so itself."""
    folder = tmp_path / "run"
    assert main(["train", *tiny_flags, "--out_dim", str(10**12), "--output_dir", str(folder)]) == 1
    assert re.search(
        "out of memory before the first step: [0-9]+.[0-9]+ GiB more were asked for", capsys.readouterr().err
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "Try --accumulate 2, --checkpointing true or a smaller --batch_size_per_gpu (now 64)"),
        ({"accumulate": 4}, "Try --accumulate 8, --checkpointing true or a smaller --batch_size_per_gpu (now 64)"),
        ({"checkpointing": True}, "Try --accumulate 2 or a smaller --batch_size_per_gpu (now 64)"),
        ({"checkpointing": True, "accumulate": 64}, "Try a smaller --batch_size_per_gpu (now 64)"),
    ],
    ids=str,
)
def test_advice_is_what_is_left_to_try(flags, expected):
    assert advice(TrainConfig(data_path="x", **flags)) == expected
