"""Starting from weights: what a run begins with, what it says of it, and what it cannot start from."""

import json
import re
import shutil
import urllib.error
from unittest import mock

import numpy as np
import pytest
import torch
from train_steps import make_crops, make_step

import fastdino
from fastdino import VisionTransformer, load_backbone, load_checkpoint
from fastdino.cli import main
from fastdino.errors import UserError
from fastdino.model import inferred
from fastdino.model.archs import ARCHITECTURES, PUBLISHED
from fastdino.model.convnext import ConvNeXt
from fastdino.model.inferred import name_of, nearest
from fastdino.train import build, public
from fastdino.train.build import build_step
from fastdino.train.command_line import command_line
from fastdino.train.config import TrainConfig
from fastdino.train.distributed import Process
from fastdino.train.folder import RunFolder
from fastdino.train.initial import start_from
from fastdino.train.interrupt import Stop
from fastdino.train.loop import train
from fastdino.train.networks import build_networks
from fastdino.train.preset import with_preset

FLAGS = {"global_crops_size": 24, "local_crops_size": 12, "out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8}


def vit(name="dinov2_vits14", **options):
    """A published architecture of two blocks; LayerScale and all else random."""
    torch.manual_seed(1)
    small = {"embed_dim": 192, "depth": 2, "num_heads": 3, "patch_size": 6, "img_size": [24]}
    network = PUBLISHED[name](**{**small, **options})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def nano(**options):
    torch.manual_seed(2)
    return ARCHITECTURES["vit_nano"](6, **{"img_size": [24], **options})


def saved(folder, network, wrap=lambda state: state):
    path = folder / "weights.pth"
    torch.save(wrap(network.state_dict()), path)
    return path


def networks_from(path, folder, **flags):
    """(config, student, teacher) of a run that starts from it."""
    config = TrainConfig.from_flags({**FLAGS, "init": str(path), "data_path": "x", **flags})
    config, initial = start_from(config, RunFolder(folder / "run", 0.0, print, Stop(speaks=False)))
    return config, *build_networks(config, None, initial)


@pytest.fixture(scope="module", autouse=True)
def _tables_are_made_once():
    """The names and shapes of each architecture, which the nearest one is looked for among, again in every test."""
    made, make = {}, inferred._shapes_of

    def shapes_of(arch, patch_size):
        if (repr(arch), patch_size) not in made:
            made[repr(arch), patch_size] = make(arch, patch_size)
        return made[repr(arch), patch_size]

    with mock.patch.object(inferred, "_shapes_of", shapes_of):
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, make_tiny, fifth):
    """A finished run on a fifth of the digits."""
    folder = tmp_path_factory.mktemp("pretrained")
    with mock.patch.object(build, "load_digits", return_value=fifth):
        train(make_tiny(folder, epochs=1, warmup_epochs=0, batch_size_per_gpu=50))
    return folder


@pytest.mark.parametrize("name", ["checkpoint.pth", "backbone.pth", "exported.safetensors"])
def test_student_and_teacher_start_with_the_teachers_backbone_and_fresh_heads(name, pretrained, tmp_path):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
        fastdino.export(pretrained / "checkpoint.pth", pretrained / name, "safetensors")
    config, student, teacher = networks_from(pretrained / name, tmp_path, drop_path_rate=0.2)
    assert (config.arch, config.patch_size) == ("vit_nano", 12)
    expected = load_backbone(pretrained / "checkpoint.pth").state_dict()
    for network in (student, teacher):
        assert all(torch.equal(value, expected[k]) for k, value in network.backbone.state_dict().items())
    for (key, one), two in zip(student.head.state_dict().items(), teacher.head.state_dict().values()):
        assert torch.equal(one, two), key
    assert all(p.requires_grad for p in student.backbone.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert student.training
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    drop_paths = [[block.drop_path for block in network.backbone.blocks] for network in (student, teacher)]
    assert drop_paths[0] == pytest.approx(np.linspace(0, 0.2, 4))
    assert drop_paths[1] == [0.0] * 4


@pytest.mark.parametrize(
    "name", ["dinov2_vits14", "dinov2_vits14_reg", "dinov2_vitg14", "dinov3_vits16", "dinov3_vit7b16"]
)
def test_published_kinds_start_as_they_are_and_train(name, tmp_path, capsys):
    path = saved(tmp_path, vit(name))
    config, student, _ = networks_from(path, tmp_path)
    assert (config.arch, config.patch_size) == ("auto", 6)  # two blocks: none of the table's
    assert torch.equal(student.backbone.blocks[1].ls2.gamma, vit(name).blocks[1].ls2.gamma)
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(load_backbone(path)(images), student.backbone.eval()(images))
    flags = {**FLAGS, "epochs": 1, "batch_size_per_gpu": 8, "knn_freq": 0, "output_dir": str(tmp_path / "run")}
    fastdino.train(dataset=[torch.rand(3, 24, 24) for _ in range(8)], init=str(path), **flags)
    trained = load_backbone(tmp_path / "run" / "checkpoint.pth")
    assert trained.state_dict().keys() == vit(name).state_dict().keys()
    assert "model   a ViT/6" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [*ARCHITECTURES, "dinov2_vits14_reg", "dinov2_vitb14", "dinov3_vits16plus", "dinov3_vitb16"]
)
def test_the_architecture_is_told_by_the_weights(name):
    with torch.device("meta"):
        state = {**ARCHITECTURES, **PUBLISHED}[name]().state_dict()
    found = name_of(state)
    assert found == name.replace("deit", "vit")
    assert nearest({**state, "blocks.0.norm1.bias": torch.zeros(2)}).partition("/")[0] == found


def test_a_classifier_and_a_wrapper_of_others_are_left_out(tmp_path):
    path = saved(tmp_path, nano(num_classes=5), lambda state: {"model": state, "epoch": 3})
    _, student, _ = networks_from(path, tmp_path)
    assert torch.equal(student.backbone.cls_token, nano(num_classes=5).cls_token)


def test_positions_keep_their_grid_and_are_interpolated(tmp_path, capsys):
    path = saved(tmp_path, nano())
    config, student, _ = networks_from(path, tmp_path, global_crops_size=36)
    assert student.backbone.pos_embed.shape == (1, 17, 96)
    with torch.no_grad():
        assert torch.equal(student.backbone.eval()(torch.ones(1, 3, 36, 36)), nano()(torch.ones(1, 3, 36, 36)))
    _, initial = start_from(config, RunFolder(tmp_path / "run", 0.0, print, Stop(speaks=False)))
    words, flags = initial.describe(config)
    assert words == f"{path}; heads are fresh; positions of 4 x 4 patches, interpolated to 6 x 6 and 2 x 2"
    assert "--freeze_backbone_epochs 1 --freeze_last_layer 0" in flags


def test_what_starts_otherwise_can_be_overridden():
    from_weights = TrainConfig.from_flags({"init": "x"})
    assert (from_weights.freeze_backbone_epochs, from_weights.freeze_last_layer) == (1, 0)
    assert TrainConfig.from_flags({"init": "x", "epochs": 1}).freeze_backbone_epochs == 0
    scratch = TrainConfig.from_flags({})
    assert (scratch.freeze_backbone_epochs, scratch.freeze_last_layer) == (0, 1)
    given = {"freeze_backbone_epochs": 3, "freeze_last_layer": 2, "init": "x"}
    asked = TrainConfig.from_flags(given)
    assert {name: getattr(asked, name) for name in given} == given
    assert "--init x" in command_line(from_weights)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "compiled"}, {"optimizer": "sgd"}, {"amp_dtype": torch.bfloat16}], ids=str
)
def test_a_frozen_backbone_stays_and_heads_move(options, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager"))
    torch._dynamo.reset()
    step = make_step(freeze_backbone=1, freeze_last_layer=0, say=pytest.fail, **options)
    before = {name: p.clone() for name, p in step.student.named_parameters()}
    for i in range(6):  # of four steps an epoch
        step(make_crops(i), i)
        stays = {n for n, p in step.student.named_parameters() if torch.equal(p, before[n])}
        backbone = {n for n in before if n.startswith("backbone.")}
        if i < 4:
            assert backbone <= stays
            torch.testing.assert_close(step.teacher.backbone.state_dict(), step.student.backbone.state_dict())
    assert not backbone & stays
    moments = step.update.optimizer.state_dict()["state"]
    if "exp_avg" in moments[0]:
        counts = {float(state["step"]) for state in moments.values()}
        assert counts == {2.0, 6.0}  # of the backbone and of the heads


def test_a_run_goes_on_when_the_file_is_gone(tiny, few_digits, tmp_path, pretrained):
    path = tmp_path / "weights.pth"
    shutil.copy(pretrained / "backbone.pth", path)
    flags = {"init": str(path), "epochs": 2, "arch": "vit_nano", **few_digits}
    train(tiny("whole", **flags))
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint0000.pth", tmp_path / "run" / "checkpoint.pth")
    path.unlink()
    del flags["arch"]
    train(tiny("run", **flags))
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "run"))
    for part in ("student", "teacher", "dino_loss"):
        assert all(torch.equal(one[part][key], value) for key, value in two[part].items())
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["init"], args["arch"], args["patch_size"]) == (str(path), "vit_nano", 12)


def test_a_run_with_other_weights_or_a_damaged_checkpoint_is_not_gone_on_with(tiny, few_digits, tmp_path, pretrained):
    init = str(pretrained / "backbone.pth")
    train(tiny("run", epochs=1, warmup_epochs=0, patch_size=12, **few_digits))
    with pytest.raises(UserError, match=r"of a run with --init None -> .*backbone\.pth\. --resume false starts anew"):
        train(tiny("run", init=init))
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    checkpoint.write_bytes(b"garbage")
    for name in (init, str(tmp_path / "gone.pth")):
        with pytest.raises(UserError, match=r"cannot resume: .*checkpoint\.pth is not a checkpoint.*--resume false"):
            train(tiny("run", init=name))


def test_a_run_says_how_good_the_weights_are_and_when_it_makes_them_worse(tiny, few_digits, pretrained, capsys):
    flags = {"init": str(pretrained / "backbone.pth"), "knn_freq": 1, "warmup_epochs": 0, **few_digits}
    result = train(tiny("good", epochs=1, lr=0.0, **flags))
    out = capsys.readouterr().out
    assert f"k-NN of the weights as they came: {result.knn_before:.4f}" in out
    assert result.knn_after == result.knn_before
    assert "stay closer" not in out
    result = train(tiny("bad", epochs=2, lr=10.0, min_lr=10.0, freeze_backbone_epochs=0, **flags))
    assert result.knn_after < result.knn_before - 0.02
    out = capsys.readouterr().out
    assert re.search(r"k-NN 0\.\d{4}, 0\.\d{4} as the weights came: a lower --lr, .* stay closer to them", out)


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


CLS = "cls_token is (1, 1, 96), expected (1, 1, 768)"
NEAR = "; the nearest architecture is vit_nano/6"
FILES = {
    "another width": (nano, "--arch vit_base", f"not of --arch vit_base --patch_size 6: {CLS}{NEAR}"),
    "another patch": (
        nano,
        "--patch_size 8",
        f"not of --patch_size 8: patch_embed.proj.weight is (96, 3, 6, 6), expected (96, 3, 8, 8){NEAR}",
    ),
    "four channels": (
        lambda: nano(in_chans=4),
        "",
        f"not of --patch_size 6: patch_embed.proj.weight is (96, 4, 6, 6), expected (96, 3, 6, 6){NEAR}",
    ),
    "unknown arch": (nano, "--arch vit_smal", "--arch: expected one of vit_nano"),
    "a key too few": (
        lambda: without(nano().state_dict(), "blocks.1.norm2.bias"),
        "",
        f"blocks.1.norm2.bias is missing{NEAR}",
    ),
    "another shape": (
        lambda: {**nano().state_dict(), "blocks.2.mlp.fc1.bias": torch.zeros(7)},
        "",
        f"blocks.2.mlp.fc1.bias is (7,), expected (384,){NEAR}",
    ),
    "not finite": (
        lambda: {**nano().state_dict(), "norm.bias": torch.full((96,), torch.nan)},
        "",
        "norm.bias holds numbers that are not finite",
    ),
    "no backbone": (
        lambda: {"student": {"head.mlp.0.weight": torch.zeros(2, 2)}},
        "",
        "has no Vision Transformer under 'teacher'",
    ),
    "a ConvNeXt": (
        lambda: ConvNeXt((1, 1, 1, 1), (8, 12, 16, 24)),
        "",
        "is a ConvNeXt: those of DINOv3 give features here, and cannot be trained",
    ),
    "large patches": (
        nano,
        "--local_crops_size 5 --batch_size_per_gpu 8",
        "--patch_size: expected at most --local_crops_size=5, got 6",
    ),
}


def refused(words, capsys):
    """The one line that a command ends with."""
    assert main(["train", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", FILES)
def test_weights_that_cannot_be_started_from_are_one_line(name, tmp_path, photo_folder, capsys):
    content, words, message = FILES[name]
    found = content()
    torch.save(found.state_dict() if isinstance(found, torch.nn.Module) else found, tmp_path / "weights.pth")
    given = ["--init", str(tmp_path / "weights.pth"), *words.split(), "--data_path", str(photo_folder)]
    assert message in refused([*given, "--output_dir", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


NO_NAME = "no file, and no public weights, of the name"
WORDS = {
    "missing": ("gone.pth", "--init: no checkpoint at gone.pth: found nothing there"),
    "a folder": ("folder", "--init: no checkpoint at folder: found a folder there"),
    "garbage": ("garbage.pth", "--init: garbage.pth is not a checkpoint, or is damaged"),
    "misspelt": ("dinov2_vits41", f"{NO_NAME} 'dinov2_vits41'; did you mean dinov2_vits14?"),
    "no such name": ("qqq", f"{NO_NAME} 'qqq'; there are dino_vits16, "),
    "on request": ("dinov3_vitl16", "dinov3_vitl16 is given out on request alone"),
    "a ConvNeXt's name": ("dinov3_convnext_tiny", "dinov3_convnext_tiny is a ConvNeXt"),
    "no network": ("dinov2_vits14", "dinov2_vits14 cannot be fetched from https://dl.fbaipublicfiles.com/dinov2/"),
}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty folder of torch.hub's; its path."""

    def fail(url, *_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name", WORDS)
def test_a_name_that_leads_nowhere_is_one_line(name, offline, tmp_path, photo_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    init, message = WORDS[name]
    assert message in refused(["--init", init, "--data_path", str(photo_folder), "--output_dir", "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_timm_that_cannot_be_fetched_is_one_line(photo_folder, tmp_path, capsys):
    given = ["--init", "timm:resnet10t", "--data_path", str(photo_folder), "--output_dir", str(tmp_path / "run")]
    try:
        import timm
    except ImportError:
        assert "--init: timm:resnet10t needs timm (pip install timm)" in refused(given, capsys)
        return
    assert timm.is_model("resnet10t")
    assert "--init: timm:resnet10t is not of --arch vit_small" in refused([*given, "--arch", "vit_small"], capsys)


def test_a_public_name_is_fetched_once_and_a_file_on_request_is_found(offline, monkeypatch, tmp_path):
    asked = []

    def fetch(url, path, **_):
        asked.append(url)
        torch.save(nano().state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        config, student, _ = networks_from("dinov2_vits14_reg", tmp_path)
    assert asked == ["https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"]
    assert (config.arch, config.init) == ("vit_nano", "dinov2_vits14_reg")
    assert torch.equal(student.backbone.cls_token, nano().cls_token)
    for name in ("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "dinov3_vits16_pretrain_sat493m-0.pth"):
        torch.save(nano().state_dict(), offline / name)
    assert public.public_file("dinov3_vits16").name == "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"


def test_the_small_preset_leaves_the_architecture_to_the_weights(photo_folder):
    given, _ = with_preset({"data_path": str(photo_folder), "init": "x", "preset": "small"}, 1)
    config = TrainConfig.from_flags(given)
    assert (config.arch, config.patch_size, config.out_dim) == ("auto", 0, 1024)
    given, _ = with_preset({"data_path": str(photo_folder), "init": "x"}, 1)  # a recipe of one's own
    assert "preset" not in given


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_learning_rate_falls_from_block_to_block_towards_the_images(optimizer, tmp_path):
    flags = {**FLAGS, "data_path": "x", "arch": "vit_nano", "patch_size": 6, "epochs": 1, "optimizer": optimizer}
    config = TrainConfig.from_flags({**flags, "lr_decay": 0.5, "warmup_epochs": 0})
    process, (student, teacher) = Process(0, 1, torch.device("cpu")), build_networks(config)
    step = build_step(config, process, 4, (student, teacher), print)
    step.schedule.seek(0)
    step.schedule.advance()
    before = {name: p.clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    step.update(step.schedule.row)
    lr, moved = float(step.schedule.row["lr"]), {}
    for name, p in student.named_parameters():
        if name.endswith("bias"):  # which do not decay
            moved[name] = float((before[name] - p).mean()) / lr
    unit = moved["head.mlp.0.bias"] * (1 if optimizer == "adamw" else before["head.mlp.0.bias"].numel() ** 0.5)
    for i in range(4):
        scale = 1 if optimizer == "adamw" else 96**-0.5  # sgd's gradients are clipped to a norm
        assert moved[f"backbone.blocks.{i}.norm1.bias"] == pytest.approx(unit * scale * 0.5 ** (4 - i), rel=1e-3)
    assert moved["backbone.patch_embed.proj.bias"] == pytest.approx(unit * scale * 0.5**5, rel=1e-3)
    assert moved["backbone.norm.bias"] == pytest.approx(unit * scale, rel=1e-3)


def test_layerwise_decay_needs_layers_and_a_sensible_number():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network.embed_dim = 8
    flags = {**FLAGS, "epochs": 1, "lr_decay": 0.9}
    with pytest.raises(UserError, match="--lr_decay: expected 1 for Sequential, which has no blocks"):
        fastdino.train(backbone=network, dataset=[torch.rand(3, 24, 24)] * 64, output_dir="nowhere", **flags)
    with pytest.raises(ValueError, match=r"--lr_decay: expected a value in \[0, 1\], got 1\.5"):
        TrainConfig.from_flags({"lr_decay": 1.5})


def test_a_recipe_that_masks_gives_weights_a_mask_token_and_goes_on(tiny, few_digits, tmp_path, pretrained):
    init = tmp_path / "weights.pth"
    shutil.copy(pretrained / "backbone.pth", init)
    flags = {"init": str(init), "recipe": "dinov2", "patch_size": 12, "global_crops_size": 48, "local_crops_size": 24}
    flags |= {"warmup_teacher_temp_epochs": 0, "drop_path_rate": 0.0, **few_digits}
    train(tiny("run", epochs=1, **flags))
    init.unlink()
    train(tiny("run", epochs=2, **flags))
    trained = load_backbone(tmp_path / "run" / "checkpoint.pth").state_dict()
    assert trained.keys() == load_backbone(pretrained / "backbone.pth").state_dict().keys() | {"mask_token"}
    assert trained["mask_token"].any()
    assert json.loads((tmp_path / "run" / "args.json").read_text())["arch"] == "vit_nano"


def test_a_backbone_of_ones_own_beside_it_is_refused(tmp_path):
    backbone = VisionTransformer([24], 6, embed_dim=96, depth=1, num_heads=3)
    with pytest.raises(UserError, match="--init: expected no backbone of one's own beside it"):
        fastdino.train(backbone=backbone, init="x", dataset=[torch.rand(3, 24, 24)] * 64, output_dir=str(tmp_path))
