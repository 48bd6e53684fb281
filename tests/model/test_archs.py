"""The table of architectures, and backbones that are not in it. timm is played: it needs torchvision."""

import json
import re
import sys

import pytest
import torch

import fastdino
from fastdino import DINOHead, MultiCropWrapper
from fastdino.cli import main
from fastdino.commands import linear_probe
from fastdino.model.archs import ARCHITECTURES, check_arch, heads_of, timm_backbone


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_model_of_timms_takes_crops_of_all_sizes(timm, name):
    check_arch(f"timm:{name}")
    backbone = timm_backbone(f"timm:{name}", drop_path_rate=0.1)
    assert backbone.embed_dim == 6
    assert timm[-1]["num_classes"] == 0
    assert timm[-1]["drop_path_rate"] == 0.1
    assert ("dynamic_img_size" in timm[-1]) == name.startswith("vit")
    student = MultiCropWrapper(backbone, DINOHead(6, 5, hidden_dim=4, bottleneck_dim=3))
    crops = [torch.randn(2, 3, side, side) for side in (16, 16, 8)]
    assert student(crops).shape == (6, 5)
    assert student.packing(crops, 2) is None
    assert any(key == "backbone.layer.weight" for key in student.state_dict())  # timm's own names


def test_a_run_with_a_model_of_timms_is_evaluated_and_reported(timm, photo_folder, tmp_path, monkeypatch, capsys):
    small = "--global_crops_size 16 --local_crops_size 8 --out_dim 16 --hidden_dim 8 --bottleneck_dim 4 --epochs 1"
    words = ["--data_path", str(photo_folder), "--output_dir", str(tmp_path / "run"), "--batch_size_per_gpu", "8"]
    assert main(["train", "--arch", "timm:resnet18", "--num_workers", "0", *small.split(), *words]) == 0
    weights = str(tmp_path / "run/checkpoint.pth")
    said = capsys.readouterr().out
    names = {"timm": sys.modules["timm"], "torch": torch}
    exec("\n".join(re.search(r"use it  (network = .*)\n +(network\..*), or\n", said).groups()), names)
    backbone = fastdino.load_checkpoint(weights)["teacher"]
    torch.testing.assert_close(names["network"].layer.weight.data, backbone["backbone.layer.weight"])
    assert f"features | knn | linear | logreg --pretrained_weights {weights}" in said
    assert main(["knn", "--pretrained_weights", weights, "--data_path", str(photo_folder), "--nb_knn", "5"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "No attention, no components: Network is no Vision Transformer of ours" in page
    assert page.count("<img") == 1 + 6 * 8
    found = fastdino.features(photo_folder, weights)
    assert found.cls.shape == (32, 6)
    capsys.readouterr()
    images = ["--pretrained_weights", weights, "--data_path", str(photo_folder)]
    for command in (["logreg", "--C", "1"], ["linear", "--epochs", "1", "--output_dir", str(tmp_path / "linear")]):
        assert main([*command, *images]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert json.loads(line)["train_images"] == 28
        assert main([*command, *images, "--n_last_blocks", "2"]) == 2
        assert f"--n_last_blocks: {weights} gives its output alone, leave it out\n" in capsys.readouterr().err
    sweep = ["linear", "--sweep", "--epochs", "1", "--output_dir", str(tmp_path / "sweep"), "--train_view", "center"]
    monkeypatch.setattr(linear_probe, "SWEEP_STEPS", 3)
    assert main([*sweep, *images]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["heads"]) == 13
    for command in ("attention", "pca"):
        assert main([command, "--pretrained_weights", weights]) == 2
        assert capsys.readouterr().err.endswith("has no Vision Transformer under 'teacher': pos_embed is missing\n")
    words = ["--pretrained_weights", weights, "--tokens", "avg", "--output", str(tmp_path / "a.npz")]
    assert main(["features", *words]) == 2
    assert "Network gives its output alone: one layer, tokens cls" in capsys.readouterr().err


def test_a_name_that_timm_does_not_know_is_refused_with_what_comes_near(timm):
    with pytest.raises(ValueError, match=r"timm has no model 'timm:resnet'; did you mean resnet18, resnet50\?"):
        check_arch("timm:resnet")


def test_without_timm_a_model_of_timms_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:resnet18 needs timm \(pip install timm\)"):
        check_arch("timm:resnet18")


def test_heads_are_told_by_the_width():
    for arch in ARCHITECTURES.values():
        assert heads_of(arch.width) == arch.heads
    assert heads_of(24) is None
