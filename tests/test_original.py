"""The original's files and programs beside ours. What needs its code runs where FASTDINO_PEERS holds `dino/`.

That is facebookresearch/dino at 7c446df. torchvision is played: of it the programs here need Compose, Resize, ToTensor,
Normalize and save_image alone. There is no GPU: processes meet over gloo, and what asks for CUDA is not run.
"""

import argparse
import importlib
import io
import os
import pathlib
import runpy
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import fastdino
from fastdino import VisionTransformer, load_backbone, load_checkpoint
from fastdino.export.formats import FORMATS
from fastdino.model import ARCHITECTURES
from fastdino.train.build import build_step
from fastdino.train.checkpoint import restore, save_checkpoint
from fastdino.train.config import TrainConfig
from fastdino.train.distributed import start
from fastdino.train.flags import ORIGINAL
from fastdino.train.networks import build_networks

ROOT = Path(fastdino.__file__).parent.parent
PEER = Path(os.environ.get("FASTDINO_PEERS", "nowhere")) / "dino"
needs_the_original = pytest.mark.skipif(not PEER.is_dir(), reason="needs FASTDINO_PEERS, a folder that holds dino/")


# The files


def make_step(**flags):
    """(a run's arguments, its step) for three images, of a network that the original builds."""
    given = {
        "arch": "vit_tiny", "patch_size": 32, "out_dim": 64, "batch_size_per_gpu": 3, "epochs": 2, "warmup_epochs": 0,
        "local_crops_number": 1,
    }  # fmt: skip
    config = TrainConfig.from_flags({**given, **flags}, is_demo=False)
    return config, build_step(config, start("cpu", "env://"), 1, build_networks(config), print)


def states(step):
    """Of what a checkpoint holds."""
    return {
        "student": step.student, "teacher": step.teacher, "optimizer": step.update.optimizer, "loss": step.loss,
    }  # fmt: skip


def saved(path, **flags):
    """The step after one iteration on noise, which a checkpoint of a finished epoch holds then."""
    config, step = make_step(**flags)
    step([torch.randn(3, 3, side, side) for side in (224, 224, 96)], 0)
    save_checkpoint(path, epoch=1, config=config, **states(step))
    return step


def resumed(path, **flags):
    """Another step, with what the checkpoint holds."""
    _, step = make_step(**flags, seed=1)
    restore(load_checkpoint(path), optimizer_name="adamw", **states(step))
    return step


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("use_bn", [True, False], ids=["BatchNorm", "none"])
def test_the_teachers_names_are_the_originals(tmp_path, use_bn):
    """It wraps the teacher, too, where there is a BatchNorm; and both kinds of file resume."""
    flags = {"use_bn_in_head": use_bn, "arch": "vit_nano", "hidden_dim": 32, "bottleneck_dim": 16}
    path = tmp_path / "checkpoint.pth"
    expected = saved(path, **flags).teacher.state_dict()
    checkpoint = load_checkpoint(path)
    assert list(checkpoint["teacher"]) == [f"module.{name}" if use_bn else name for name in expected]
    assert_same(load_backbone(path).state_dict(), backbone_of(expected))
    for prefix in ("", "module."):
        torch.save({**checkpoint, "teacher": {prefix + name: value for name, value in expected.items()}}, path)
        assert_same(resumed(path, **flags).teacher.state_dict(), expected)


def backbone_of(state):
    return {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}


def pickled_elsewhere(path):
    """The file as Python 3.13 would have written it, whose class of paths says that it is of pathlib._local."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = (name for name in members if name.endswith("/data.pkl"))
    assert b"cpathlib\n" in members[name]
    members[name] = members[name].replace(b"cpathlib\n", b"cpathlib._local\n")
    with zipfile.ZipFile(path, "w") as archive:
        for filename, content in members.items():
            archive.writestr(filename, content)


@pytest.mark.parametrize("kind", [pathlib.PosixPath, pathlib.PurePosixPath])
@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_a_checkpoint_of_its_submitit_launcher_is_read(tmp_path, kind, python):
    path = tmp_path / "checkpoint.pth"
    torch.save({"args": argparse.Namespace(output_dir=kind("/checkpoint/me/experiments/7"), gpu=0)}, path)
    if python == "3.13":
        pickled_elsewhere(path)
    assert load_checkpoint(path)["args"].output_dir == kind("/checkpoint/me/experiments/7")


@pytest.mark.parametrize("patch_size", [12, 14, 16])
def test_a_backbone_comes_back_with_the_size_it_was_trained_with(patch_size):
    from fastdino.train.checkpoint import backbone_of as read

    def state(size):
        return VisionTransformer([size], patch_size, embed_dim=192, depth=1, num_heads=3).state_dict()

    assert read({"teacher": state(224)}, "x", "teacher").patch_embed.img_size == 224
    args = argparse.Namespace(global_crops_size=100)
    assert read({"teacher": state(100), "args": args}, "x", "teacher").patch_embed.img_size == 100
    odd = argparse.Namespace(global_crops_size="100")
    assert read({"teacher": state(100), "args": odd}, "x", "teacher").patch_embed.img_size <= 100


# torch.hub

HUB = {"dino_vits16": ("vit_small", 16), "dino_vits8": ("vit_small", 8), "dino_vitb16": ("vit_base", 16)}
HUB["dino_vitb8"] = ("vit_base", 8)


@pytest.mark.parametrize("name", HUB)
def test_torch_hub_gives_the_originals_backbones(name):
    arch, patch_size = HUB[name]
    with torch.device("meta"):
        vit = torch.hub.load(str(ROOT), name, source="local", pretrained=False)
        expected = ARCHITECTURES[arch](patch_size)
    assert {k: v.shape for k, v in vit.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


def test_torch_hub_reads_published_weights_strictly(monkeypatch):
    asked = []
    state = ARCHITECTURES["vit_small"](8).state_dict()

    def published(url, **_):
        asked.append(url)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", published)
    assert_same(torch.hub.load(str(ROOT), "dino_vits8", source="local").state_dict(), state)
    assert asked == ["https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"]
    del state["norm.bias"]
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        torch.hub.load(str(ROOT), "dino_vits8", source="local")


def test_torch_hub_without_a_network_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", mock.Mock(side_effect=URLError("no route to host")))
    with pytest.raises(RuntimeError, match=r"dino_deitsmall16_pretrain\.pth cannot be read: .*pretrained=False"):
        torch.hub.load(str(ROOT), "dino_vits16", source="local")


# The programs


def _transform(function):
    return lambda *args: lambda x: function(x, *args)


def _compose(steps, image):
    for step in steps:
        image = step(image)
    return image


def _normalize(x, mean, std):
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def played_torchvision():
    """torchvision, as far as the programs here go."""
    modules = {n: types.ModuleType(n) for n in ["torchvision"] + [f"torchvision.{n}" for n in PARTS]}
    for name in PARTS:
        setattr(modules["torchvision"], name, modules[f"torchvision.{name}"])
    transforms = modules["torchvision.transforms"]
    transforms.Compose = lambda steps: lambda image: _compose(steps, image)
    transforms.Resize = _transform(lambda image, size: image.resize(tuple(size)[::-1], Image.BILINEAR))
    transforms.ToTensor = _transform(lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255)
    transforms.Normalize = _transform(_normalize)
    modules["torchvision.utils"].make_grid = lambda image, **_: image
    modules["torchvision.utils"].save_image = lambda image, path: Path(path).write_bytes(b"")
    return modules


PARTS = ("datasets", "transforms", "models", "utils")
THEIRS = ("utils", "vision_transformer", "main_dino")


@pytest.fixture
def original(monkeypatch):
    """Its modules: main_dino, utils, vision_transformer; in one process that has met itself."""
    for name, module in played_torchvision().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "requests", types.ModuleType("requests"))
    monkeypatch.setattr(torch.hub, "list", lambda *_: [])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as the PyTorch of its day loaded
    monkeypatch.syspath_prepend(str(PEER))
    for name in THEIRS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in THEIRS})
    for name in THEIRS:
        sys.modules.pop(name, None)


@pytest.fixture
def group(tmp_path):
    """A group of one process, as DistributedDataParallel asks for."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def networks_of(original, arch, patch_size, use_bn):
    """(student, teacher, optimizer, loss) as train_dino makes them, without CUDA and without SyncBatchNorm."""
    vits, utils, parallel = original.vision_transformer, original.utils, torch.nn.parallel.DistributedDataParallel
    backbones = [vits.__dict__[arch](patch_size=patch_size) for _ in range(2)]
    width = backbones[0].embed_dim
    student = utils.MultiCropWrapper(backbones[0], vits.DINOHead(width, 64, use_bn=use_bn))
    teacher = utils.MultiCropWrapper(backbones[1], vits.DINOHead(width, 64, use_bn))
    if utils.has_batchnorms(student):
        teacher = parallel(teacher)
    student = parallel(student)
    teacher.requires_grad_(False)
    loss = original.main_dino.DINOLoss(64, 3, 0.04, 0.04, 0, 2)
    return student, teacher, torch.optim.AdamW(utils.get_params_groups(student)), loss


def states_of(networks):
    student, teacher, optimizer, loss = networks
    tensors = {"student": student.state_dict(), "teacher": teacher.state_dict(), "dino_loss": loss.state_dict()}
    return tensors, optimizer.state_dict()


def assert_same_optimizer(one, other):
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert_same(state, other["state"][index])


@needs_the_original
@pytest.mark.parametrize("use_bn", [True, False], ids=["BatchNorm", "none"])
@pytest.mark.parametrize("patch_size", [32, 12])
def test_the_original_resumes_from_our_checkpoint(original, group, tmp_path, use_bn, patch_size):
    path, found = tmp_path / "checkpoint.pth", {"epoch": 0}
    step = saved(path, use_bn_in_head=use_bn, patch_size=patch_size)
    student, teacher, optimizer, loss = networks = networks_of(original, "vit_tiny", patch_size, use_bn)
    original.utils.restart_from_checkpoint(
        str(path), run_variables=found, student=student, teacher=teacher, optimizer=optimizer, fp16_scaler=None,
        dino_loss=loss,
    )  # fmt: skip
    assert found == {"epoch": 1}
    tensors, optimized = states_of(networks)
    ours = load_checkpoint(path)
    for name, state in tensors.items():
        assert_same(state, OrderedDict(ours[name]))
    assert_same_optimizer(optimized, ours["optimizer"])
    assert len(optimized["state"]) > 100
    for bare, network in ((step.student, student), (step.teacher, teacher)):
        assert_same(getattr(network, "module", network).state_dict(), bare.state_dict())


@needs_the_original
@pytest.mark.parametrize("use_bn", [True, False], ids=["BatchNorm", "none"])
@pytest.mark.parametrize("by", ["main_dino", "submitit"])
def test_we_resume_from_a_checkpoint_of_the_original(original, group, tmp_path, use_bn, by):
    student, teacher, optimizer, _ = networks = networks_of(original, "vit_tiny", 32, use_bn)
    student(torch.randn(2, 3, 224, 224)).square().sum().backward()
    optimizer.step()
    args = argparse.ArgumentParser("DINO", parents=[original.main_dino.get_args_parser()]).parse_args([])
    if by == "submitit":
        args.output_dir, args.gpu, args.rank, args.world_size = Path("/checkpoint/me/7"), 0, 0, 1
    tensors, optimized = states_of(networks)
    content = {**tensors, "optimizer": optimized, "epoch": 1, "args": args}
    original.utils.save_on_master(content, str(tmp_path / "checkpoint.pth"))
    step = resumed(tmp_path / "checkpoint.pth", use_bn_in_head=use_bn)
    teacher = getattr(teacher, "module", teacher)
    assert_same(step.student.state_dict(), student.module.state_dict())
    assert_same(step.teacher.state_dict(), teacher.state_dict())
    assert_same_optimizer(step.update.optimizer.state_dict(), optimized)
    x = torch.randn(2, 3, 224, 224)
    backbone = load_backbone(tmp_path / "checkpoint.pth")
    assert backbone.patch_embed.img_size == 224
    torch.testing.assert_close(backbone(x), teacher.backbone(x), rtol=1e-4, atol=1e-5)


@needs_the_original
def test_its_programs_draw_attention_and_take_features_of_our_checkpoint(original, tmp_path, monkeypatch):
    """visualize_attention.py as it stands; and load_pretrained_weights, by which all its evaluations begin."""
    path = tmp_path / "checkpoint.pth"
    saved(path, use_bn_in_head=True)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 80, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    drawn, out = [], tmp_path / "maps"
    monkeypatch.setattr("matplotlib.pyplot.imsave", lambda fname, arr, format: drawn.append(arr))
    line = f"visualize_attention.py --arch vit_tiny --patch_size 32 --pretrained_weights {path} --image_size 96 160"
    monkeypatch.setattr(sys, "argv", [*line.split(), "--image_path", f"{tmp_path}/image.png", "--output_dir", str(out)])
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", said)
    runpy.run_path(str(PEER / "visualize_attention.py"), run_name="__main__")
    assert "loaded with msg: _IncompatibleKeys(missing_keys=[], unexpected_keys=['head.mlp" in said.getvalue()
    pixels = np.asarray(image.resize((160, 96), Image.BILINEAR)).copy()
    x = _normalize(torch.from_numpy(pixels).permute(2, 0, 1) / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]
    backbone = load_backbone(path)
    maps = backbone.get_last_selfattention(x)[0, :, 0, 1:].unflatten(1, (3, 5))
    assert len(drawn) == 3
    for theirs, ours in zip(drawn, maps):
        torch.testing.assert_close(torch.from_numpy(theirs[::32, ::32].copy()), ours, rtol=1e-4, atol=1e-6)

    model = original.vision_transformer.vit_tiny(patch_size=32, num_classes=0).eval()
    original.utils.load_pretrained_weights(model, str(path), "teacher", "vit_tiny", 32)
    torch.testing.assert_close(model(x), backbone(x), rtol=1e-4, atol=1e-5)
    layers = zip(model.get_intermediate_layers(x, 4), backbone.get_intermediate_layers(x, 4), strict=True)
    for theirs, ours in layers:
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@needs_the_original
@pytest.mark.parametrize("format", ["backbone", "safetensors", "onnx", "pt2"])
def test_an_exported_backbone_is_the_originals(original, rel, tmp_path, format):
    """The weights alone are loaded strictly by its class; the graphs interpolate positions as it does."""
    torch.manual_seed(0)
    theirs = original.vision_transformer.vit_tiny(patch_size=32).eval()
    torch.nn.init.normal_(theirs.pos_embed, std=0.3)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    kind = FORMATS[format]
    for library in kind.needs:
        pytest.importorskip(library)
    exported = fastdino.export(tmp_path / "published.pth", tmp_path / f"vit{kind.suffixes[0]}", format)
    features = kind.load(exported.model, exported.path).features
    with torch.no_grad():
        for sides in ((224, 224), (96, 96), (100, 333), (224, 230), (320, 320)):
            for n in (1, 3):
                x = torch.randn(n, 3, *sides)
                assert rel(features(x), theirs(x)) < 1e-5, sides
        if format == "backbone":
            again = original.vision_transformer.vit_tiny(patch_size=32).eval()
            again.load_state_dict(torch.load(exported.path, weights_only=True))
            assert torch.equal(again(x), theirs(x))


@needs_the_original
@pytest.mark.parametrize("patch_size", [8, 12, 14, 16])
@pytest.mark.parametrize("shape", [(224, 224), (96, 96), (100, 100), (97, 130), (225, 231)], ids=str)
def test_any_patch_and_image_size_gives_the_originals_numbers(original, rel, patch_size, shape):
    torch.manual_seed(0)
    shared = {"embed_dim": 24, "depth": 2, "num_heads": 3, "qkv_bias": True}
    norm = {"norm_layer": lambda dim: torch.nn.LayerNorm(dim, eps=1e-6)}
    theirs = original.vision_transformer.VisionTransformer([224], patch_size, **shared, **norm).double().eval()
    ours = VisionTransformer([224], patch_size, **shared).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    seen = []
    for vit in (theirs, ours):
        vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, given, out: seen.append(out))
    assert rel(ours(x), theirs(x)) < 1e-10
    assert rel(*seen) < 1e-10
    assert rel(ours([x]), theirs(x)) < 1e-10
    assert rel(ours.get_last_selfattention(x), theirs.get_last_selfattention(x)) < 1e-10
    tokens = theirs.prepare_tokens(x)
    assert rel(ours.interpolate_pos_encoding(tokens, *shape), theirs.interpolate_pos_encoding(tokens, *shape)) < 1e-10
    assert rel(ours.blocks[0](tokens), theirs.blocks[0](tokens)) < 1e-10
    for one, other in zip(ours.blocks[0].attn(tokens), theirs.blocks[0].attn(tokens)):
        assert rel(one, other) < 1e-10


@needs_the_original
def test_the_flags_are_those_of_its_parser(original):
    """Names and defaults; that abbreviations mean the same, test_cli shows of all of these names."""
    parser = argparse.ArgumentParser("DINO", parents=[original.main_dino.get_args_parser()])
    assert {s for a in parser._actions for s in a.option_strings} == {"-h", *(f"--{n}" for n in ORIGINAL.split())}
    ours = TrainConfig.from_flags({"data_path": "x"})
    for name, default in vars(parser.parse_args(["--data_path", "x"])).items():
        assert getattr(ours, name) == default, name


@needs_the_original
def test_our_hub_is_a_part_of_its_hub(monkeypatch):
    text = (PEER / "hubconf.py").read_text()
    spec = importlib.util.spec_from_file_location("our_hubconf", ROOT / "hubconf.py")
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    for name in HUB:
        assert f"def {name}(pretrained=True, **kwargs):" in text
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: pytest.fail(f"not theirs: {url}")
                            if url not in text else {})  # fmt: skip
        with torch.device("meta"), pytest.raises(RuntimeError, match="Missing key"):
            getattr(ours, name)()
