"""fastdino export: each format, read by its own library, gives the backbone's features; mistakes leave nothing behind.

A library that does not import is skipped by name.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdino
from fastdino import VisionTransformer, export, load_backbone, load_checkpoint
from fastdino.cli import main
from fastdino.commands.export import summary
from fastdino.data.augment import center_view, normalize
from fastdino.export import Exported, hf, laid_out_for
from fastdino.export import formats as formats_module
from fastdino.export.check import quiet
from fastdino.export.formats import FORMATS
from fastdino.export.graph import AnySize, resize_weights
from fastdino.export.hf import hf_state
from fastdino.export.kinds import Model
from fastdino.model.archs import PUBLISHED
from fastdino.model.patches import resize
from fastdino.train.checkpoint import eval_size

SIDE, PATCH = 32, 8
OUTPUT = {name: f"{name}{(kind.suffixes or ('',))[0]}" for name, kind in FORMATS.items()}
ROUNDING = 1e-5  # of the largest feature


def needs(format):
    for name in FORMATS[format].needs:
        try:
            importlib.import_module(name)
        except Exception as error:
            pytest.skip(f"needs {name}: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """weights.pth, of a small ViT whose positions matter as much as the patches; photo.png; broken.jpg."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    backbone = VisionTransformer([SIDE], PATCH, embed_dim=96, depth=2, num_heads=3, init_std=0.1)
    for name, parameter in backbone.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    torch.nn.init.normal_(backbone.pos_embed, std=0.5)
    torch.save(backbone.state_dict(), folder / "weights.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 120)).save(folder / "photo.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder / "weights.pth")


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """An empty working folder beside which the fixture's files lie."""
    for name in ("weights.pth", "photo.png", "broken.jpg"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def features_of(exported: Exported):
    with quiet():
        return FORMATS[exported.format].load(exported.model, exported.path).features


def used(exported: Exported):
    """The features that the lines give which are printed, of images."""

    def features(images):
        names = {"images": images}
        with torch.no_grad(), quiet():
            exec("\n".join(exported.use), names)
            return torch.as_tensor(names["features"] if "features" in names else names["backbone"](images))

    return features


@pytest.fixture(scope="module")
def exports(folder):
    """Each format, written once, by name, and once for each other size."""

    @functools.cache
    def written_once(format, size=None):
        needs(format)
        return export(folder / "weights.pth", folder / f"{size or ''}{OUTPUT[format]}", format, size=size)

    return written_once


def assert_same_features(found, expected, images):
    with torch.no_grad():
        expected = expected(images)
        assert float((found(images) - expected).abs().max()) < ROUNDING * float(expected.abs().max())


@pytest.mark.parametrize("format", FORMATS)
def test_its_own_library_gives_the_same_features(format, exports, backbone):
    features = features_of(exports(format))
    for n in (1, 5, 32):
        assert_same_features(features, backbone, torch.randn(n, 3, SIDE, SIDE))
    assert exports(format).checked.differences[0].relative < ROUNDING


@pytest.mark.parametrize("format", [name for name, kind in FORMATS.items() if not kind.own_positions])
def test_other_sizes_give_the_same_features(format, exports, backbone):
    """Of any aspect, and where patches leave something over; 32 x 35 has as many patches as were learned."""
    features = features_of(exports(format))
    for sides in ((24, 24), (48, 48), (16, 40), (32, 35), (33, 47), (35, 35)):
        for n in (1, 5):
            assert_same_features(features, backbone, torch.randn(n, 3, *sides))


@pytest.mark.parametrize("format", FORMATS)
def test_laid_out_for_another_size_it_is_exact_there(format, exports, backbone):
    exported = exports(format, 16)
    features = features_of(exported)
    for n in (1, 5):
        assert_same_features(features, backbone, torch.randn(n, 3, 16, 16))
    assert exported.checked.differences[0].size == 16
    if format in ("onnx", "pt2"):
        with pytest.raises(Exception, match=r"INVALID_ARGUMENT|Guard failed"):
            features(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("format", [name for name, kind in FORMATS.items() if kind.own_positions])
def test_positions_that_a_library_interpolates_its_own_way_are_told(format, folder, here, capsys):
    needs(format)
    words = ["--pretrained_weights", str(folder / "weights.pth"), "--format", format, "--output", OUTPUT[format]]
    assert main(["export", *words]) == 0
    library = {"timm": "timm", "hf": "transformers"}[format]
    out = capsys.readouterr().out
    assert f"{library} interpolates positions its own way, --size 16 is exact" in out
    assert f"{library} interpolates positions its own way, --size 48 is exact" in out


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_a_librarys_own_preprocessing_is_ours(format, exports):
    """Pixel for pixel, or to a level where transformers resizes tensors. With an odd margin it crops a pixel aside."""
    exported = exports(format)
    view = FORMATS[format].load(exported.model, exported.path).view
    for size in ((90, 120), (160, 74), (90, 90), (37, 37)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize(size)
        resized = [int(37 * side / min(size)) for side in size]
        assert [(side - SIDE) % 4 == 3 for side in resized] == [False, False]  # 11.5 is rounded to 12, 2.5 to 2
        ours = normalize(torch.from_numpy(center_view(image, 37, SIDE).copy()).permute(2, 0, 1))
        levels = float((view(image) - ours).abs().max()) * 255 * 0.229
        assert levels < (1.2 if format == "hf" else 0.01)


@pytest.mark.parametrize("format", FORMATS)
def test_the_lines_that_are_printed_run(format, exports, backbone):
    exported = exports(format)
    lines = textwrap.dedent("\n".join(summary(exported)).partition("to use it:\n")[2])
    assert lines.strip().splitlines() == list(exported.use)
    assert_same_features(used(exported), backbone, torch.randn(2, 3, SIDE, SIDE))


def test_the_files_of_an_architecture_of_the_table(here):
    """vit_tiny/32 at 64 pixels: under its own name in the lines that are printed."""
    torch.manual_seed(0)
    torch.save(fastdino.vit_tiny(32, img_size=[64]).state_dict(), "tiny.pth")
    exported = export("tiny.pth", "out.pth", "backbone")
    assert exported.use[-3] == "backbone = vit_tiny(patch_size=32, img_size=[64])"
    model = VisionTransformer([64], 32, embed_dim=192, num_heads=3)
    state = torch.load("out.pth", weights_only=True)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)
    needs("timm")
    exported = export("tiny.pth", "out.safetensors", "timm")
    assert "'vit_tiny_patch16_224'" in exported.use[2]
    assert "patch_size=32, img_size=64" in exported.use[2]


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_names_and_files_for_vit_small(format, here):
    needs(format)
    torch.manual_seed(0)
    model = Model(fastdino.vit_small().eval().requires_grad_(False), fastdino.extract.View(256, 224), fixed=False)
    if format == "timm":
        import timm

        name, arguments = formats_module._timm_arguments(model)
        assert name == "vit_small_patch16_224"
        assert set(arguments) == {"num_classes", "pretrained_cfg_overlay"}
        config = timm.data.resolve_model_data_config(timm.create_model(name, **arguments))
        assert (tuple(config["mean"]), tuple(config["std"])) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (config["crop_pct"], config["interpolation"], config["input_size"]) == (0.875, "bicubic", (3, 224, 224))
    else:
        from transformers import ViTConfig, ViTModel

        theirs = ViTModel(ViTConfig(**hf._config(model)), add_pooling_layer=False)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.backbone.parameters())


def test_the_folder_for_transformers_tells_how_it_was_trained(exports):
    path = exports("hf").path
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    config, images = (json.loads((path / f"{name}config.json").read_text()) for name in ("", "preprocessor_"))
    assert config["layer_norm_eps"] == 1e-6
    assert (config["hidden_size"], config["num_attention_heads"], config["image_size"]) == (96, 3, SIDE)
    assert (images["image_mean"], images["image_std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (images["size"], images["crop_size"]) == ({"shortest_edge": 37}, {"height": SIDE, "width": SIDE})


def test_queries_keys_and_values_are_parted(backbone):
    state = backbone.state_dict()
    renamed = hf_state(backbone)
    parts = [renamed[f"encoder.layer.1.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), state["blocks.1.attn.qkv.weight"])
    assert sum(value.numel() for value in renamed.values()) == sum(value.numel() for value in state.values())


def test_safetensors_tell_what_weights_do_not(here):
    """Heads, image size and resize, which the original's backbone files leave to the reader."""
    needs("safetensors")
    torch.manual_seed(0)
    backbone = VisionTransformer([20], 8, embed_dim=40, depth=1, num_heads=5).eval()
    args = fastdino.train.config.argparse.Namespace(global_crops_size=20, eval_resize=24)
    torch.save({"teacher": backbone.state_dict(), "args": args}, "run.pth")
    export("run.pth", "vit.safetensors", "safetensors", num_heads=5)
    read = load_backbone("vit.safetensors")
    assert (read.num_heads, read.patch_embed.img_size) == (5, 20)
    assert eval_size(load_checkpoint("vit.safetensors"), 20) == 24
    x = torch.randn(3, 3, 20, 28)
    assert torch.equal(read(x), backbone(x))
    export("vit.safetensors", "again.pth", "backbone")  # and is a source for other formats
    assert torch.equal(torch.load("again.pth", weights_only=True)["norm.bias"], backbone.norm.bias)


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "header's length": lambda content: b"\xff" * 8 + content[8:],
    "a header that is no JSON": lambda content: content[:8] + b"\0" * 40 + content[48:],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_safetensors_are_refused_in_one_line(how, exports, here, capsys):
    path = Path("safetensors.safetensors")
    path.write_bytes(DAMAGE[how](exports("safetensors").path.read_bytes()))
    assert main(["export", "--pretrained_weights", str(path), "--format", "backbone", "--output", "x.pth"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdino export: safetensors.safetensors is not a checkpoint, or is damaged")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "metadata", [{}, {"num_heads": "-1"}, {"num_heads": "7", "img_size": "x"}, {"resize": "9" * 99}]
)
def test_odd_metadata_of_others_is_ignored_or_refused(metadata, backbone, here):
    needs("safetensors")
    import safetensors.torch

    safetensors.torch.save_file(backbone.state_dict(), "x.safetensors", metadata)
    if metadata.get("num_heads") == "7":
        with pytest.raises(ValueError, match="num_heads: expected a divisor of the width 96, got 7"):
            load_backbone("x.safetensors")
    else:
        assert load_backbone("x.safetensors").num_heads == 3


@pytest.mark.parametrize("side", [1, 2, 4, 14])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 14, 20, 41])
def test_the_graphs_interpolation_is_pytorchs(side, n):
    """Against what F.interpolate makes of the identity, in fp64."""
    index = torch.arange(n, dtype=torch.float64)
    weights = resize_weights(index, torch.arange(side).double(), torch.arange(-1.0, 3.0).double())
    identity = torch.eye(side * side, dtype=torch.float64)
    expected = resize(identity[None], n, n)[0]
    torch.testing.assert_close(torch.kron(weights, weights), expected, rtol=0, atol=1e-6)  # the scale is fp32 there


@pytest.mark.parametrize("sides", [(32, 32), (32, 39), (39, 39), (8, 8), (8, 24), (100, 20)], ids=str)
def test_the_graph_gives_the_backbones_features_untraced(backbone, sides):
    assert_same_features(AnySize(backbone), backbone, torch.randn(3, 3, *sides))


@pytest.mark.parametrize("size", [(), (16,)], ids=["any size", "one size"])
def test_a_graph_moves_to_another_device(size, exports):
    """To the one without memory, where a tensor that stayed behind would be an error."""
    program = torch.export.load(exports("pt2", *size).path).module().to("meta")
    sides = 2 * size or (48, 40)
    assert program(torch.zeros(3, 3, *sides, device="meta")).shape == (3, 96)


@pytest.mark.parametrize("size", [8, 24, 36, 64])
def test_positions_are_laid_out_as_the_original_interpolates_them(backbone, size):
    laid_out = laid_out_for(backbone, size)
    assert laid_out.pos_embed.shape[1] == 1 + (size // PATCH) ** 2
    images = torch.randn(2, 3, size, size)
    assert torch.equal(laid_out(images), backbone(images))


NEWER = {
    "dinov2": ("dinov2_vits14", {"img_size": [SIDE]}),
    "registers": ("dinov2_vits14_reg", {"img_size": [SIDE]}),
    "swiglu": ("dinov2_vitg14_reg", {"img_size": [SIDE]}),
    "dinov3": ("dinov3_vits16", {}),
    "dinov3 plus": ("dinov3_vits16plus", {}),
}  # fmt: skip


@pytest.fixture(params=NEWER)
def newer(request, here):
    """A small backbone of a newer recipe, in newer.pth, as a run leaves it."""
    name, options = NEWER[request.param]
    torch.manual_seed(0)
    vit = PUBLISHED[name](PATCH, embed_dim=96, depth=2, num_heads=3, **options)
    for name, parameter in vit.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    args = argparse.Namespace(global_crops_size=SIDE, num_heads=3)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in vit.state_dict().items()}, "args": args}, "newer.pth")
    return load_backbone("newer.pth")


# A graph takes seconds to make: of the two that have all parts of the others, and torch.export's is in ONNX's.
GRAPHS = ("onnx", "swiglu", None), ("onnx", "dinov3 plus", 40), ("pt2", "dinov3 plus", None)


@pytest.mark.parametrize(
    ("newer", "format", "size"),
    [
        pytest.param(name, format, size, id=f"{name}-{size}-{format}")
        for name in NEWER
        for format, kind in FORMATS.items()
        for size in (None, 40)
        if (format, name, size) in GRAPHS or (kind.takes_newer and not kind.is_graph)
    ],
    indirect=["newer"],
)
def test_backbones_of_dinov2_and_dinov3(format, size, newer):
    needs(format)
    features = used(export("newer.pth", OUTPUT[format], format, size=size))
    side = size or SIDE
    assert_same_features(features, newer, torch.randn(2, 3, side, side))
    if not (FORMATS[format].is_graph or FORMATS[format].own_positions) and size is None:
        assert_same_features(features, newer, torch.randn(2, 3, 48, 24))


@pytest.mark.parametrize("format", [name for name, kind in FORMATS.items() if not kind.takes_newer])
def test_what_newer_backbones_cannot_be_is_said(format, newer):
    needs(format)
    with pytest.raises(
        fastdino.errors.UserError, match="DINOv3, which can be backbone, safetensors, hf, onnx, pt2 so far"
    ):
        export("newer.pth", OUTPUT[format], format)


# Mistakes


def run(*words, weights="weights.pth"):
    return main(["export", "--pretrained_weights", weights, *words])


@pytest.fixture
def unchanged(here):
    """Nothing in the working folder is made, changed or removed by the test."""

    def state():
        return {path: path.stat().st_mtime_ns for path in here.rglob("*")}

    before = state()
    yield
    assert state() == before


MISTAKES = {
    "unknown format": ("--format tensorrt --output x", "--format: expected one of backbone, safetensors, timm"),
    "no folder": ("--format backbone --output a/b.pth", "--output: there is no folder a"),
    "another suffix": ("--format onnx --output x.pth", "--output: expected a name that ends in .onnx for onnx"),
    "exists": ("--format backbone --output weights.pth", "--output: weights.pth exists; name another, or remove it"),
    "no weights": ("--format backbone --output x.pth --pretrained_weights y.pth", "no checkpoint at y.pth"),
    "no backbone": ("--format backbone --output x.pth --pretrained_weights other.pth", "has no Vision Transformer"),
    "size below the patch": ("--format backbone --output x.pth --size 7", "--size: expected at least the patch size 8"),
    "size of none": ("--format backbone --output x.pth --size 0", "--size: expected at least the patch size 8, got 0"),
    "heads": ("--format backbone --output x.pth --num_heads 5", "num_heads: expected a divisor of the width 96, got 5"),
    "no heads": ("--format backbone --output x.pth --num_heads -3", "expected a divisor of the width 96, got -3"),
    "image": ("--format backbone --output x.pth --images broken.jpg", "--images: broken.jpg: "),
    "no image": ("--format backbone --output x.pth --images none.jpg", "--images: none.jpg: "),
    "timm's ResNet": (
        "--format backbone --output x.pth --pretrained_weights resnet.pth",
        "pos_embed is missing. It was trained as timm:resnet50, which is no Vision Transformer of ours",
    ),
    "one channel": ("--format backbone --output x.pth --pretrained_weights gray.pth", "takes images of 1 channels"),
}  # fmt: skip


@pytest.fixture
def others(here):
    """Weights that cannot be exported."""
    torch.save({"fc.weight": torch.zeros(3, 3)}, "other.pth")
    args = fastdino.train.config.argparse.Namespace(arch="timm:resnet50")
    torch.save({"teacher": {"backbone.conv1.weight": torch.zeros(3, 3)}, "args": args}, "resnet.pth")
    torch.save(VisionTransformer([16], 8, in_chans=1, embed_dim=96, depth=1, num_heads=3).state_dict(), "gray.pth")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(name, others, unchanged, capsys):
    words, message = MISTAKES[name]
    assert run(*words.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("fastdino export: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("format", [name for name, kind in FORMATS.items() if kind.needs])
def test_a_missing_library_is_named_with_how_to_install_it(format, unchanged, monkeypatch, capsys):
    for missing in FORMATS[format].needs:
        with monkeypatch.context() as patched:
            for name in FORMATS[format].needs:
                patched.setitem(sys.modules, name, None if name == missing else math)  # None: as if not installed
            assert run("--format", format, "--output", OUTPUT[format]) == 2
        error = capsys.readouterr().err
        assert f"fastdino export: --format {format} needs {missing}, which cannot be imported" in error
        assert error.endswith(f": pip install {missing}\n")


def test_reading_safetensors_without_the_library_says_so(here, monkeypatch, capsys):
    Path("x.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert run("--format", "backbone", "--output", "x.pth", weights="x.safetensors") == 2
    assert "x.safetensors needs safetensors: pip install safetensors" in capsys.readouterr().err


def broken(monkeypatch, **changes):
    """The format `backbone`, changed."""
    monkeypatch.setitem(FORMATS, "backbone", dataclasses.replace(FORMATS["backbone"], **changes))


def off_by(share):
    def write(model, path):
        state = {name: value.clone() for name, value in model.backbone.state_dict().items()}
        state["norm.bias"] += share
        torch.save(state, path)

    return write


@pytest.mark.parametrize(
    ("share", "message"),
    [(0.01, "at 32 pixels its features differ from the backbone's by"), (math.nan, "by nan of the largest, more than")],
)
def test_a_file_with_other_features_fails_and_is_removed(share, message, unchanged, monkeypatch, capsys):
    broken(monkeypatch, write=off_by(share))
    assert run("--format", "backbone", "--output", "x.pth") == 1
    assert message in capsys.readouterr().err


def test_a_file_that_is_wrong_at_other_sizes_alone_fails_too(unchanged, monkeypatch, capsys):
    """As timm's way with positions would be, from a format that promises every size."""

    def load(model, path):
        return formats_module.Loaded(lambda images: model.backbone(images) + (images.shape[-1] != SIDE))

    broken(monkeypatch, load=load)
    assert run("--format", "backbone", "--output", "x.pth") == 1
    assert "at 16 pixels its features differ" in capsys.readouterr().err


def test_a_file_that_its_library_cannot_read_fails_and_is_removed(unchanged, monkeypatch, capsys):
    broken(monkeypatch, write=lambda model, path: path.write_bytes(b"no weights"))
    assert run("--format", "backbone", "--output", "x.pth") == 1
    assert "the backbone file cannot be read back, and was removed: " in capsys.readouterr().err


def test_an_exporter_that_fails_says_why(unchanged, monkeypatch, capsys):
    def write(model, path):
        path.write_bytes(b"half")
        raise RuntimeError("no such operator")

    broken(monkeypatch, write=write)
    assert run("--format", "backbone", "--output", "x.pth") == 1
    assert "the backbone file cannot be made: RuntimeError: no such operator" in capsys.readouterr().err


def test_a_full_disk_is_one_line(unchanged, monkeypatch, capsys):
    def write(model, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    broken(monkeypatch, write=write)
    assert run("--format", "backbone", "--output", "x.pth") == 2
    assert "--output: x.pth cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_half_way_leaves_nothing(number, unchanged, monkeypatch, capsys):
    def write(model, path):
        path.write_bytes(b"half")
        os.kill(os.getpid(), number)

    broken(monkeypatch, write=write)
    assert run("--format", "backbone", "--output", "x.pth") == 130
    assert capsys.readouterr().err == "fastdino export: interrupted\n"


def test_what_a_killed_export_left_goes_with_the_next(here):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running = (here / f".x.pth.{pid}.partial" for pid in (ended.pid, os.getppid()))
    for folder in (left, running):
        folder.mkdir()
        (folder / "x.pth").write_bytes(b"half")
    assert run("--format", "backbone", "--output", "x.pth") == 0
    assert not left.exists()
    assert (running / "x.pth").exists()


def test_a_broken_link_is_not_overwritten(here, capsys):
    Path("x.pth").symlink_to("nowhere")
    assert run("--format", "backbone", "--output", "x.pth") == 2
    assert "--output: x.pth exists" in capsys.readouterr().err


def test_a_run_of_ours_is_exported_as_it_was_trained(here, photo_folder):
    """The teacher of a checkpoint, at the size of its global crops."""
    words = """--arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 --out_dim 64 --hidden_dim 32
        --bottleneck_dim 16 --epochs 1 --batch_size_per_gpu 8 --attention_images 0 --output_dir run --eval_resize 40"""
    assert main(["train", "--data_path", str(photo_folder), *words.split()]) == 0
    for key in ("teacher", "student"):
        exported = export("run/checkpoint.pth", f"{key}.pth", "backbone", checkpoint_key=key)
        assert (exported.model.view.size, exported.model.view.resize) == (32, 40)
        assert (
            exported.use
            == [
                "import fastdino",
                f"backbone = fastdino.load_backbone('{key}.pth', num_heads=3)",
            ]
            or exported.model.arch == "vit_nano"
        )
        weights = torch.load(f"{key}.pth", weights_only=True)
        trained = load_backbone("run/checkpoint.pth", key).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in trained.items())


def test_the_functions_name_is_the_packages_too(folder, here):
    import fastdino.export as package

    assert package is fastdino.export
    assert fastdino.export(folder / "weights.pth", "x.pth", "backbone").path == Path("x.pth")
