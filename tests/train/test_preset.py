"""--preset: when it is small by itself, which flags win over it, and that such a run can be resumed."""

import json
import shlex
import shutil
import signal

import numpy as np
import pytest
from PIL import ExifTags, Image

import fastdino
from fastdino.cli import main
from fastdino.data.sequences import SequenceSource
from fastdino.train import preset, recipes
from fastdino.train.build import Own
from fastdino.train.command_line import command_line
from fastdino.train.config import TrainConfig
from fastdino.train.loop import train
from fastdino.train.preset import with_preset


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Flags that are no recipe's, for runs of two steps."""
    monkeypatch.setattr(recipes, "SMALL_STEPS", 2)
    monkeypatch.setattr(recipes, "SMALL_EPOCHS", 1)
    return ["--output_dir", str(tmp_path / "run"), "--attention_images", "0", "--num_workers", "0"]


@pytest.mark.parametrize(
    ("given", "is_small"),
    [
        ({}, True),
        ({"seed": 3, "val_path": "x", "saveckp_freq": 5}, True),
        ({"epochs": 100}, True),
        ({"lr": 0.01}, False),
        ({"arch": "vit_small"}, False),
        ({"lr": 0.01, "preset": "small"}, True),
        ({"preset": "none"}, False),
    ],
    ids=str,
)
def test_few_images_and_no_recipe_of_ones_own_are_what_it_takes(given, is_small, photo_folder):
    flags, _ = with_preset({"data_path": str(photo_folder), **given}, 1)
    assert (flags.get("preset") == "small") == is_small
    assert ("out_dim" in flags) == is_small
    assert flags.items() >= given.items()


def test_many_images_have_main_dinos_defaults(photo_folder, monkeypatch):
    monkeypatch.setattr(preset, "SMALL_FOLDER", 31)
    flags, source = with_preset({"data_path": str(photo_folder)}, 1)
    assert flags == {"data_path": str(photo_folder)}
    assert len(source) == 32  # not to be opened twice


def test_a_network_of_ones_own_is_a_recipe():
    images = [np.zeros((8, 8, 3), np.uint8)] * 4
    assert with_preset({}, 1, images, backbone=object())[0] == {}
    assert with_preset({}, 1, images)[0]["preset"] == "small"


def test_the_digits_have_their_own():
    assert with_preset({}, 1) == ({}, None)
    assert TrainConfig.from_flags({}).preset == "none"


def test_crops_are_as_large_as_the_images_and_steps_as_many_for_all():
    for n_images in (100, 544, 10_000):
        values = recipes.small(n_images, 200)
        steps = values["epochs"] * (n_images // values["batch_size_per_gpu"])
        assert values["epochs"] >= recipes.SMALL_EPOCHS
        assert steps > recipes.SMALL_STEPS * 0.9
        assert steps < recipes.SMALL_STEPS * 1.1 or values["epochs"] == recipes.SMALL_EPOCHS
    sides = [recipes.small(500, side)["global_crops_size"] for side in (0, 8, 28, 100, 4000)]
    assert sides == sorted(sides)
    assert recipes.small(500, 64, n_processes=8)["batch_size_per_gpu"] * 8 == recipes.SMALL_BATCH
    images = [np.zeros((20, 30 + i % 3, 3), np.uint8) for i in range(50)]
    assert preset.short_side(SequenceSource(images)) == 20


NO_PRESET = ["--preset", "none", "--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "16"]
NO_PRESET += ["--local_crops_size", "8", "--out_dim", "64", "--batch_size_per_gpu", "16", "--epochs", "1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "turned as EXIF says"),
        (["--exif_turn", "false"], "the turn that EXIF asks for is not made, as in the original (--exif_turn true"),
        (NO_PRESET, "is not made, as in the original"),
    ],
    ids=["preset", "preset, not turned", "no preset"],
)  # fmt: skip
def test_the_preset_turns_photographs(photo_folder, short, flags, words, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in [path for path in photos.rglob("*") if path.is_file()]:
        Image.open(path).convert("RGB").save(path.with_suffix(".jpg"), exif=exif)
    assert main(["train", "--data_path", str(photos), *short, *flags]) == 0
    assert words in capsys.readouterr().out


def test_a_run_says_why_and_how_to_have_the_others(photo_folder, short, tmp_path, capsys):
    assert main(["train", "--data_path", str(photo_folder), *short]) == 0
    assert "preset  small, for 32 images; main_dino's defaults: --preset none\n" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run/args.json").read_text())
    assert saved["preset"] == "small"
    assert saved["arch"] == recipes.SMALL["arch"]
    assert main(["train", "--config", str(tmp_path / "run/args.json"), "--data_path", str(photo_folder)]) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert main(["train", "--data_path", str(photo_folder), *short, "--epochs", "3"]) == 0  # which is no recipe then
    assert "flags that were given win over it: --epochs\n" in capsys.readouterr().out


def test_flags_win_over_the_preset_and_are_named(photo_folder, short, capsys):
    words = ["--preset", "small", "--out_dim", "64", "--epochs", "1", *short]
    assert main(["train", "--data_path", str(photo_folder), *words]) == 0
    out = capsys.readouterr().out
    assert "flags that were given win over it: --out_dim, --epochs\n" in out
    assert ", 64 prototypes" in out


def test_a_small_folder_without_the_preset_is_told_of_it(photo_folder, short, capsys):
    words = shlex.split("--arch vit_nano --epochs 1 --batch_size_per_gpu 16 --global_crops_size 32 --patch_size 8")
    assert main(["train", "--data_path", str(photo_folder), *words, "--out_dim", "64", *short]) == 0
    assert "preset  none, as flags of a recipe are given; --preset small sets the others" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_the_command_it_prints(photo_folder, short, tmp_path, capsys):
    class StopAtOnce(fastdino.Sink):
        def step(self, entry):
            signal.raise_signal(signal.SIGINT)

    flags, source = with_preset({"data_path": str(photo_folder), "output_dir": str(tmp_path / "run")}, 1)
    config = TrainConfig.from_flags(flags)
    assert train(config, Own(callbacks=[StopAtOnce()], source=source)).interrupted
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("resume with: fastdino ")
    assert "--out_dim" not in command
    assert main(shlex.split(command)) == 0
    out = capsys.readouterr().out
    assert "resumed" in out
    assert "changed" not in out


def test_main_dinos_recipe_is_not_for_the_digits(capsys):
    assert main(["train", "--preset", "none"]) == 2
    assert "--data_path: none is given, but --preset" in capsys.readouterr().err


def test_the_command_names_what_differs_from_the_preset(photo_folder):
    flags, _ = with_preset({"data_path": "x", "preset": "small", "out_dim": 64}, 1, [np.zeros((8, 8, 3), np.uint8)] * 9)
    config = TrainConfig.from_flags(flags)
    values = preset.values(SequenceSource([np.zeros((8, 8, 3), np.uint8)] * 9))
    assert command_line(config, preset=values) == "fastdino train --preset small --out_dim 64 --data_path x"


@pytest.mark.parametrize(("saved", "is_small"), [({"preset": "small"}, True), ({"preset": "auto"}, False), ({}, False)])
def test_a_run_that_is_gone_on_with_keeps_what_it_has(saved, is_small, photo_folder, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(saved))
    given = {"data_path": str(photo_folder), "output_dir": str(tmp_path), "epochs": 7}
    assert with_preset(given, 1)[0]["preset"] == "small"  # there is no checkpoint to go on from
    (tmp_path / "checkpoint.pth").touch()
    flags, _ = with_preset(given, 1)
    assert flags["preset"] == ("small" if is_small else "none")
    assert ("out_dim" in flags) == is_small
    assert with_preset({**given, "resume": False}, 1)[0]["preset"] == "small"
    (tmp_path / "args.json").write_text("[]")
    assert with_preset(given, 1)[0]["preset"] == "small"


def test_flags_are_held_against_the_presets_values_and_not_the_defaults(photo_folder, short, capsys):
    """Before the images are seen, too, where they could contradict those of a million images."""
    words = ["train", "--data_path", str(photo_folder), "--preset", "small", "--recipe", "dinov2", *short]
    words += ["--epochs", "2", "--gram_start", "1", "--gram_crops_size"]
    assert main([*words, "96"]) == 0
    assert "Gram of crops of 96 px after 1 epoch, which then takes more time and memory" in capsys.readouterr().out
    assert main([*words, "48"]) == 2
    assert "--gram_crops_size: expected at least --global_crops_size=64, got 48" in capsys.readouterr().err
    assert main([*words, "8", "--data_path", "nowhere"]) == 2
    assert "--gram_crops_size: expected at least --global_crops_size=24, got 8" in capsys.readouterr().err


def test_weights_are_a_recipe_of_ones_own(photo_folder):
    given = {"data_path": str(photo_folder), "init": "weights.pth"}
    assert "preset" not in with_preset(given, 1)[0]
    assert "arch" not in with_preset({**given, "preset": "small"}, 1)[0]  # the weights have theirs


@pytest.mark.parametrize("recipe", ["dinov2", "dinov3"])
def test_newer_recipes_have_values_of_their_own_for_few_images(recipe, photo_folder, short, tmp_path, capsys):
    given = {"data_path": str(photo_folder), "recipe": recipe}
    flags, source = with_preset(given, 1)
    config = TrainConfig.from_flags(flags)
    assert flags["preset"] == "small"
    assert config.recipe == recipe
    assert {name: getattr(config, name) for name in recipes.FEW_OF_NEWER} == recipes.FEW_OF_NEWER
    assert config.local_crops_scale == recipes.SMALL["local_crops_scale"]
    large = TrainConfig.from_flags(with_preset({**given, "preset": "none"}, 1)[0])
    assert large.teacher_temp != config.teacher_temp
    assert with_preset({**given, "lr": 0.1}, 1)[0] == {**given, "lr": 0.1}
    assert command_line(config, preset=preset.values(source, recipe=recipe)).startswith(
        f"fastdino train --preset small --recipe {recipe} --data_path"
    )
    assert main(["train", "--data_path", str(photo_folder), "--recipe", recipe, *short]) == 0
    said = capsys.readouterr().out
    assert f"preset  small, for 32 images; {recipe}'s own defaults: --preset none\nmodel" in said
    assert "sinkhorn" in said
