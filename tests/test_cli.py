"""The command line: the original's flags, one clear line for every mistake, and nothing written then."""

import argparse
import dataclasses
import json
import os
import pickle
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastdino
from fastdino.cli import main
from fastdino.cli import parse as parse_words
from fastdino.train import build
from fastdino.train.command_line import command_line, config_from_args
from fastdino.train.config import TrainConfig
from fastdino.train.flags import ORIGINAL as ORIGINAL_NAMES

ORIGINAL = {  # main_dino.py's flags and defaults; data_path has none here: without it, the digits
    "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True, "momentum_teacher": 0.996,
    "use_bn_in_head": False, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0,
    "use_fp16": True, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64,
    "epochs": 100, "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw",
    "drop_path_rate": 0.1, "global_crops_scale": (0.4, 1.0), "local_crops_number": 8, "local_crops_scale": (0.05, 0.4),
    "output_dir": ".", "saveckp_freq": 20, "seed": 0, "num_workers": 10, "dist_url": "env://", "local_rank": 0,
}  # fmt: skip


def parse(*words):
    return config_from_args(parse_words(["train", *words]))


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


def test_abbreviations_that_the_original_takes_mean_the_same():
    """All of them, whatever flags were added; those of our own flags are taken where they are unambiguous."""
    assert set(ORIGINAL_NAMES.split()) == {*ORIGINAL, "data_path", "help"}
    values = {"bool": "off", "int": "3", "float": "0.3", "str": "abc", "tuple": "0.3"}
    n_tried = 0
    for name, default in {**ORIGINAL, "data_path": ""}.items():
        starts = [f"--{name[:end]}" for end in range(1, len(name))]
        short = [x for x in starts if [flag for flag in ORIGINAL_NAMES.split() if f"--{flag}".startswith(x)] == [name]]
        n_tried += len(short)
        value = values[type(default).__name__]
        apart, joined = [word for x in short for word in (x, value)], [f"{x}={value}" for x in short]
        for words in (apart, joined) if short else ():  # each word sets the flag once more, and no other
            assert set(vars(parse_words(["train", *words]))) == {"command", name}, words
    assert n_tried > 150
    assert vars(parse_words(["train", "--knn_f", "2"]))["knn_freq"] == 2


def test_an_ambiguous_abbreviation_is_refused_as_argparse_does(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--out", "x"])
    assert end.value.code == 2
    assert "ambiguous option: --out could match --out_dim, --output_dir" in capsys.readouterr().err


def test_deit_is_saved_as_the_vit_that_the_original_saves():
    assert parse("--arch", "deit_small", "--data_path", "x").namespace().arch == "vit_small"
    assert parse("--arch", "deit_tiny", "--data_path", "x").namespace().arch == "vit_tiny"


def test_a_preset_sets_probabilities_that_nobody_gave():
    names = ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob")

    def probabilities(*flags):
        return [getattr(parse("--data_path", "p", *flags), name) for name in names]

    assert probabilities() == probabilities("--augmentation", "dino") == [0.5, 0.8, 0.2, (1.0, 0.1, 0.5), 0.2]
    assert probabilities("--augmentation", "dinov2") == [0.5, 0.8, 0.2, (0.0, 0.9, 0.5), 0.2]
    assert probabilities("--augmentation", "none") == [0.5, 0.0, 0.0, (0.0, 0.0, 0.0), 0.0]
    assert probabilities("--augmentation", "none", "--gray_prob", "0.3") == [0.5, 0.0, 0.3, (0.0, 0.0, 0.0), 0.0]
    assert probabilities("--blur_prob", "1", "1", "1", "--augmentation", "dinov2")[3] == (1.0, 1.0, 1.0)
    recipe = parse("--data_path", "p", "--augmentation", "dinov2").crops()
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
    assert "--arch vit_nano" in command_line(demo, 2)  # else two processes were asked for the images


def test_a_file_gives_the_flags_of_another_run_and_the_command_line_wins(tmp_path, monkeypatch):
    config = parse("--data_path", "my photos", "--epochs", "7", "--blur_prob", "0", "0.9", "0.5", "--lr", "0.1")
    path = tmp_path / "args.json"
    path.write_text(json.dumps(dataclasses.asdict(config) | {"history": [{"epochs": 3}]}))
    runs = []
    monkeypatch.setattr("fastdino.train.loop.train", lambda config, own=None: runs.append(config) or mock.MagicMock())
    for words in ([], ["--lr", "0.2"]):
        main(["train", "--config", str(path), *words])
    fastdino.train(config=path, lr=0.2)
    assert runs == [config, dataclasses.replace(config, lr=0.2), dataclasses.replace(config, lr=0.2)]


CONFIGS = {
    "missing": (None, "--config: args.json: No such file or directory"),
    "no JSON": ("epochs: 3", "--config: args.json is no JSON: Expecting value: line 1"),
    "no object": ("[3]", "--config: args.json: expected an object with a value for each flag, got list"),
    "unknown": ('{"epoch": 3}', "--config: args.json: no flag 'epoch'; did you mean 'epochs'?"),
    "kind": ('{"epochs": "many", "data_path": "x"}', "--epochs: expected a whole number, got 'many'"),
}


@pytest.mark.parametrize(("text", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_file_that_holds_no_flags_is_refused(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "args.json").write_text(text)
    assert main(["train", "--config", "args.json"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_default_warm_up_fits_a_short_run_and_an_asked_one_does_not():
    assert parse("--data_path", "x", "--epochs", "2").warmup_epochs == 0
    assert parse("--data_path", "x", "--epochs", "50").warmup_epochs == 10
    with pytest.raises(ValueError, match="--warmup_epochs: expected at most --epochs=2, got 10"):
        parse("--data_path", "x", "--epochs", "2", "--warmup_epochs", "10")


MISTAKES = {
    "missing folder": ("--data_path nowhere", "nothing at nowhere"),
    "empty folder": ("--data_path empty", "no image below empty"),
    "fewer than a batch": ("--data_path few", "3 images in few, no labels: fewer than the 32 of one step"),
    "unknown arch": ("--arch resnet50", "expected one of vit_nano, vit_tiny, vit_small, vit_base, vit_large"),
    "torchvision's": ("--arch resnet50", "got 'resnet50'; here it comes from timm: --arch timm:resnet50"),
    "XCiT": ("--arch xcit_small_12_p8", "here it comes from timm: --arch timm:xcit_small_12_p8_224"),
    "patch and crop": ("--patch_size 25 --arch vit_nano", "expected at most --global_crops_size=24, got 25"),
    "patch and local crop": ("--local_crops_size 5", "--patch_size: expected at most --local_crops_size=5, got 6"),
    "forgot the images": (
        "--arch vit_small --epochs 9",
        "--data_path: none is given, but --arch, as for images",
    ),
    "forgot, large patches": ("--patch_size 16", "--data_path: none is given, but --patch_size"),
    "no held-out images": ("--data_path few --val_path nowhere", "--val_path: expected a folder of images, tar or"),
    "forgot, held-out images": ("--val_path few --lr 0.1", "--data_path: none is given, but --val_path"),
    "seed below zero": ("--seed -1", "--seed: expected 0 to 4294967295, as NumPy takes them, got -1"),
    "seed too large": ("--seed 4294967296", "--seed: expected 0 to 4294967295"),
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
    "nothing to tune": ("--compile max --device cpu", "--compile: max needs a step that is compiled; use --step compi"),
    "fp16 without a GPU": ("--amp_dtype fp16 --device cpu", "--amp_dtype: fp16 needs a GPU; on a CPU use bf16"),
    "output is a file": ("--output_dir file", "--output_dir: expected a folder, got the file file"),
    "output below a file": ("--output_dir file/run", "--output_dir: expected a folder, got the file file"),
    "pickled code": ("--output_dir evil --resume true", "holds pickled code, which is refused"),
    "garbage checkpoint": ("--output_dir garbage --resume true", "is not a checkpoint, or is damaged"),
    "unknown flag": ("--learning_rate 1", "unrecognized arguments: --learning_rate 1 (see fastdino train --help)"),
    "misspelt flag": ("--epohcs 3", "unrecognized arguments: --epohcs 3; did you mean --epochs?"),
    "folder without a flag": ("few", "unrecognized arguments: few; did you mean --data_path few?"),
    "submitit's": (
        "--data_path few --nodes 2 --ngpus=8",
        "run_with_submitit.py are srun's here: srun --nodes",
    ),
    "an evaluation's": ("--pretrained_weights few", "weights are for evaluations (fastdino knn, features ...)"),
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


@pytest.mark.parametrize("flags", [{"arch": "vit_small"}, {"val_path": "x"}], ids=str)
def test_images_forgotten_in_python_are_one_line(flags, tmp_path):
    with pytest.raises(ValueError, match="--data_path: none is given, but"):
        fastdino.train(output_dir=str(tmp_path / "run"), **flags)


def test_several_processes_do_not_learn_the_digits_unasked(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--epochs", "2"]) == 2
    assert "--data_path: none is given, but 2 processes" in capsys.readouterr().err


def test_playing_with_the_digits_needs_no_data(tmp_path, monkeypatch, fifth):
    monkeypatch.setattr(build, "load_digits", lambda: fifth)
    words = "--epochs 1 --batch_size_per_gpu 256 --lr 0.001 --local_crops_number 1 --knn_freq 0 --attention_images 0"
    words += " --out_dim 64 --hidden_dim 32 --bottleneck_dim 16 --patch_size 10 --num_workers 0 --seed 4294967295"
    assert main(["train", *words.split(), "--output_dir", str(tmp_path)]) == 0
    weights = str(tmp_path / "checkpoint.pth")
    assert fastdino.load_backbone(weights).patch_embed.img_size == 24  # not 2 x 10: as trained
    for size in ("24", "23"):
        assert main(["knn", "--pretrained_weights", weights, "--nb_knn", "5", "--size", size]) == 0
    picture = ["--size", "23", "--output", str(tmp_path / "a.png")]
    assert main(["attention", "--pretrained_weights", weights, *picture]) == 0


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
    """And the kernels alone bring neither Pillow nor xFormers."""
    script = """
import fastdino_kernels, sys
assert not {"PIL", "xformers", "fastdino", "torchvision"} & set(sys.modules)
import fastdino
heavy = {"matplotlib", "sklearn", "xformers", "rich", "tensorboard", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_clone_runs_without_being_installed(tmp_path, forks):
    """As the original does: nothing is on the path, and no package is called fastdino."""
    root = Path(fastdino.__file__).parent.parent
    script = f"""
import sys, importlib.metadata, pathlib
sys.path[:] = [{str(root)!r}] + [p for p in sys.path if not (pathlib.Path(p) / "fastdino_kernels").is_dir()]
def missing(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
from fastdino.cli import main
main(["--version"])
"""
    done = forks.run("-c", script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fastdino {fastdino.__version__}\n"), done.stderr


def test_namespace_survives_a_checkpoint(tmp_path):
    config = parse("--data_path", "x")
    torch.save({"args": config.namespace()}, tmp_path / "a.pth")
    from fastdino import load_checkpoint

    args = load_checkpoint(tmp_path / "a.pth")["args"]
    assert isinstance(args, argparse.Namespace)
    assert TrainConfig(**vars(args)) == config


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("knn --datapath x", "--data_path"),
        ("pca --imagesize=3", "--image_size"),
        ("report x --device_ cpu", "--device"),
    ],
)
def test_every_command_names_the_flag_that_comes_near(line, meant, capsys):
    command, *words = line.split()
    weights = [] if command == "report" else ["--pretrained_weights", "x"]
    with pytest.raises(SystemExit) as end:
        main([command, *weights, *words])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"; did you mean {meant}? (see fastdino {command} --help)" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["knn", "linear", "logreg", "features"])
def test_an_evaluation_says_where_held_out_images_lie(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--pretrained_weights", "x", "--val_path", "y"])
    said = "--val_path y; the folder of --data_path holds train/ and val/" in capsys.readouterr().err
    assert said == (command != "features")  # which takes all images that are there


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(tmp_path, capsys):
    torch.save(fastdino.vit_nano(patch_size=8, img_size=[24]).state_dict(), tmp_path / "weights.pth")
    reader, writer = os.pipe()
    os.close(reader)
    # What was not written is written when the file is closed, as when Python ends, and must not raise then.
    with open(writer, "w", buffering=1) as unread, redirect_stdout(unread):
        assert main(["knn", "--pretrained_weights", str(tmp_path / "weights.pth"), "--nb_knn", "1", "2", "3"]) == 141
    assert capsys.readouterr().err == ""
