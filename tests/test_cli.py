"""The command line: the original's flags, one clear line for every mistake, and nothing written then."""

import argparse
import dataclasses
import os
import pickle
import shlex
import subprocess
import sys

import pytest
import torch

from fastdino.cli import main
from fastdino.train.config import TrainConfig, command_line, config_from_args

ORIGINAL = {  # main_dino.py's flags and defaults; data_path has none here: without it, the digits
    "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True, "momentum_teacher": 0.996,
    "use_bn_in_head": False, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0,
    "use_fp16": True, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64,
    "epochs": 100, "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw",
    "drop_path_rate": 0.1, "global_crops_scale": (0.4, 1.0), "local_crops_number": 8, "local_crops_scale": (0.05, 0.4),
    "output_dir": ".", "saveckp_freq": 20, "seed": 0, "num_workers": 10, "dist_url": "env://", "local_rank": 0,
}  # fmt: skip


def parse(*words):
    from fastdino.cli import _parser

    return config_from_args(_parser().parse_args(["train", *words]))


def test_every_flag_of_the_original_has_its_default():
    config = parse("--data_path", "somewhere")
    for name, default in ORIGINAL.items():
        value = getattr(config, name)
        assert value == default, name
        assert type(value) is type(default), name


def test_a_command_line_of_the_original_means_the_same():
    line = """--arch vit_base --patch_size 8 --out_dim 4096 --norm_last_layer false --use_bn_in_head on --use_fp16 0
        --global_crops_scale 0.25 1 --local_crops_scale 0.05 0.25 --optimizer lars --lr 1e-3
        --data_path x --output_dir y --local_rank 3 --epochs 400"""
    config = parse(*line.split())
    assert (config.arch, config.patch_size, config.out_dim) == ("vit_base", 8, 4096)
    assert (config.norm_last_layer, config.use_bn_in_head, config.use_fp16) == (False, True, False)
    assert config.global_crops_scale == (0.25, 1.0)
    assert (config.optimizer, config.lr, config.local_rank) == ("lars", 1e-3, 3)


def test_a_preset_sets_probabilities_that_nobody_gave():
    names = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob")

    def probabilities(*flags):
        return [getattr(parse("--data_path", "p", *flags), name) for name in names]

    assert probabilities() == probabilities("--augmentation", "dino") == [0.5, 0.8, 0.2, (1.0, 0.1, 0.5), 0.2]
    assert probabilities("--augmentation", "dinov2") == [0.5, 0.8, 0.2, (0.0, 0.9, 0.5), 0.2]
    assert probabilities("--augmentation", "none") == [0.5, 0.0, 0.0, (0.0, 0.0, 0.0), 0.0]
    assert probabilities("--augmentation", "none", "--gray_prob", "0.3") == [0.5, 0.0, 0.3, (0.0, 0.0, 0.0), 0.0]
    assert probabilities("--blur_prob", "1", "1", "1", "--augmentation", "dinov2")[3] == (1.0, 1.0, 1.0)
    recipe = parse("--data_path", "p", "--augmentation", "dinov2").recipe()
    assert [view.blur for view in recipe.views] == [0.0, 0.9, *[0.5] * 8]
    with pytest.raises(ValueError, match="--augmentation: expected one of dino, dinov2, none, got 'dinov3'"):
        parse("--augmentation", "dinov3")


def test_the_command_that_resumes_is_the_run_again():
    config = parse("--data_path", "my photos", "--epochs", "7", "--blur_prob", "0", "0.9", "0.5", "--use_fp16", "off")
    words = shlex.split(command_line(config))
    assert words[:2] == ["fastdino", "train"]
    assert parse(*words[2:]) == config
    assert command_line(config, 4).startswith("torchrun --nproc_per_node=4 -m fastdino.train ")
    demo = parse()
    assert parse(*shlex.split(command_line(demo))[2:]) == dataclasses.replace(demo, resume=True)


def test_a_default_warm_up_fits_a_short_run_and_an_asked_one_does_not():
    assert parse("--data_path", "x", "--epochs", "2").warmup_epochs == 0
    assert parse("--data_path", "x", "--epochs", "50").warmup_epochs == 10
    with pytest.raises(ValueError, match="--warmup_epochs: expected at most --epochs=2, got 10"):
        parse("--data_path", "x", "--epochs", "2", "--warmup_epochs", "10")


MISTAKES = {
    "missing folder": ("--data_path nowhere", "nothing at nowhere"),
    "empty folder": ("--data_path empty", "no image below empty"),
    "fewer than a batch": ("--data_path few", "3 images in few, no labels: fewer than the 64 of one step"),
    "unknown arch": ("--arch resnet50", "expected one of vit_nano, vit_tiny, vit_small, vit_base, vit_large"),
    "patch and crop": ("--patch_size 5", "--patch_size: expected a divisor of --global_crops_size=24, got 5"),
    "patch and local crop": ("--local_crops_size 10", "expected a divisor of --local_crops_size=10, got 6"),
    "warm-up": ("--epochs 5 --warmup_epochs 6", "--warmup_epochs: expected at most --epochs=5, got 6"),
    "temperature warm-up": ("--epochs 5 --warmup_teacher_temp_epochs 6", "expected at most --epochs=5, got 6"),
    "negative temperature": ("--teacher_temp -0.04", "--teacher_temp: expected a value above 0, got -0.04"),
    "not a number": ("--lr nan", "--lr: expected a finite number, got nan"),
    "momentum": ("--momentum_teacher 1.5", "--momentum_teacher: expected a value in [0, 1], got 1.5"),
    "scale": ("--global_crops_scale 0.9 0.2", "expected two rising values in (0, 1], got 0.9 0.2"),
    "optimizer": ("--optimizer adam", "--optimizer: expected one of adamw, sgd, lars, got 'adam'"),
    "boolean": ("--use_fp16 maybe", "expected true/false, on/off or 1/0, got 'maybe'"),
    "device": ("--device tpu", "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    "attention": (
        "--attention varlen --device cpu",
        "--attention: varlen has kernels for CUDA only, and the model is on",
    ),
    "graph without a GPU": ("--step graph --device cpu", "--step: graph needs a CUDA device; use auto, compiled or"),
    "fp16 without a GPU": ("--amp_dtype fp16 --device cpu", "--amp_dtype: fp16 needs a GPU; on a CPU use bf16"),
    "output is a file": ("--output_dir file", "--output_dir: expected a folder, got the file file"),
    "output below a file": ("--output_dir file/run", "--output_dir: expected a folder, got the file file"),
    "pickled code": ("--output_dir evil --resume true", "holds pickled code, which is refused"),
    "garbage checkpoint": ("--output_dir garbage --resume true", "is not a checkpoint, or is damaged"),
    "unknown flag": ("--learning_rate 1", "unrecognized arguments: --learning_rate 1"),
}


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "few", "evil", "garbage"):
        (tmp_path / folder).mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(f"few/{i}.png")
    (tmp_path / "file").write_text("a file")
    torch.save({"student": RunsCode()}, "evil/checkpoint.pth")
    (tmp_path / "garbage" / "checkpoint.pth").write_bytes(b"garbage")
    before = sorted(tmp_path.rglob("*"))
    words, expected = MISTAKES[name]
    try:
        code = main(["train", *words.split()])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_no_files_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["train", "--output_dir", str(tmp_path / "run")]) == 2
    assert "is not writable" in capsys.readouterr().err


def test_knn_and_attention_refuse_what_is_no_checkpoint(tmp_path, capsys):
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(RunsCode(), protocol=2))
    for command in ("knn", "attention"):
        assert main([command, "--pretrained_weights", str(path)]) == 2
        assert main([command, "--pretrained_weights", str(tmp_path / "missing.pth")]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert "refused" in errors[0]
        assert "no checkpoint at" in errors[1]
        assert len(errors) == 2
    assert not os.path.exists("hacked")


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for title in ("Model:", "Teacher:", "Optimisation:", "Crops:", "Data:", "Evaluation:", "Run:"):
        assert f"\n{title}\n" in text
    assert all(f"--{name}" in text for name in ORIGINAL)
    assert max(map(len, text.splitlines())) <= 120


def test_importing_is_silent_and_leaves_out_what_is_slow_to_import(tmp_path):
    script = """
import fastdino, fastdino_kernels, sys
heavy = {"matplotlib", "sklearn", "xformers", "rich", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_kernels_alone_bring_neither_pillow_nor_xformers(tmp_path):
    script = (
        "import fastdino_kernels, sys; assert not {'PIL', 'xformers', 'fastdino', 'torchvision'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path).returncode == 0


def test_namespace_survives_a_checkpoint(tmp_path):
    config = parse("--data_path", "x")
    torch.save({"args": config.namespace()}, tmp_path / "a.pth")
    from fastdino import load_checkpoint

    args = load_checkpoint(tmp_path / "a.pth")["args"]
    assert isinstance(args, argparse.Namespace)
    assert TrainConfig(**vars(args)) == config
