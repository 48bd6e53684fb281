"""What a backbone can be written as: one table, from a name to how it is written, and how its library reads it back.

Axes: B images of 3 channels, D features.
"""

import io
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdino import files
from fastdino.export.graph import AnySize
from fastdino.export.hf import load_hf, use_hf, write_hf
from fastdino.export.kinds import MEAN, STD, Format, Loaded, Model
from fastdino.model import VisionTransformer
from fastdino.train.checkpoint import load_backbone

IMAGES, FEATURES = "images", "features"  # names of a graph's input and output


# backbone: the original's file of nothing but weights


def _write_backbone(model: Model, path: Path) -> None:
    files.replace(path, partial(torch.save, model.backbone.state_dict()))


def _load_backbone(model: Model, path: Path) -> Loaded:
    if not model.backbone.is_dinos:
        return Loaded(load_backbone(path, num_heads=model.backbone.num_heads))
    shape = model.shape
    backbone = VisionTransformer([shape.pop("img_size")], **shape)  # type: ignore[arg-type]
    backbone.load_state_dict(torch.load(path, weights_only=True))
    return Loaded(backbone.eval())


def _use_backbone(model: Model, path: Path) -> list[str]:
    if model.arch is None or not model.backbone.is_dinos:
        heads = model.shape["num_heads"]
        return ["import fastdino", f"backbone = fastdino.load_backbone({str(path)!r}, num_heads={heads})"]
    size = "" if model.view.size == 224 else f", img_size=[{model.view.size}]"
    return [
        "import torch",
        f"from fastdino import {model.arch}  # or the original's, from vision_transformer",
        f"backbone = {model.arch}(patch_size={model.patch_size}{size})",
        f"backbone.load_state_dict(torch.load({str(path)!r}, weights_only=True))",
        "backbone.eval()",
    ]


# safetensors: the same weights, with what they do not tell as metadata


def _write_safetensors(model: Model, path: Path) -> None:
    import safetensors.torch

    metadata = {"format": "pt", **model.facts}
    content = safetensors.torch.save(model.backbone.state_dict(), metadata)
    files.replace(path, lambda file: file.write(content))


def _load_safetensors(model: Model, path: Path) -> Loaded:
    return Loaded(load_backbone(path))


def _use_safetensors(model: Model, path: Path) -> list[str]:
    return ["import fastdino", f"backbone = fastdino.load_backbone({str(path)!r})"]


# timm: its Vision Transformers have the same names


def _timm_arguments(model: Model) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) of timm.create_model, without the file."""
    import timm

    name, shape = f"{model.arch}_patch{model.patch_size}_{model.view.size}", model.shape
    if timm.is_model(name):
        shape = {}
    else:
        name = f"{model.arch}_patch16_224"
        if timm.is_model(name):
            standard = {"patch_size": 16, "img_size": 224}
            shape = {key: shape[key] for key, value in standard.items() if shape[key] != value}
        else:
            name = "vit_base_patch16_224"
    resize, size = model.view.resize, model.view.size
    crop_pct = size / resize
    if math.floor(size / crop_pct) != resize:  # timm rounds down
        crop_pct = math.nextafter(crop_pct, 0)
    # Without it, timm normalises by the mean and deviation of other weights of that name.
    config = {"input_size": (3, size, size), "crop_pct": crop_pct, "interpolation": "bicubic", "mean": MEAN, "std": STD}
    return name, {"num_classes": 0, **shape, "pretrained_cfg_overlay": config}


def _load_timm(model: Model, path: Path) -> Loaded:
    import timm

    name, arguments = _timm_arguments(model)
    # dynamic_img_size: so that other sizes can be compared, too
    network = timm.create_model(name, checkpoint_path=str(path), dynamic_img_size=True, **arguments).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    return Loaded(network, transform)


def _use_timm(model: Model, path: Path) -> list[str]:
    name, arguments = _timm_arguments(model)
    words = "".join(f", {key}={value!r}" for key, value in arguments.items() if key != "pretrained_cfg_overlay")
    return [
        "import timm",
        f"images_as_trained = {arguments['pretrained_cfg_overlay']!r}",
        f"backbone = timm.create_model({name!r}, checkpoint_path={str(path)!r}{words}, "
        "pretrained_cfg_overlay=images_as_trained)",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))",
        "backbone.eval()",
    ]


# onnx, pt2: the network as a graph


def _graph(model: Model) -> tuple[nn.Module, Tensor, dict[int, Any]]:
    """(module, images to trace it with, its open sizes)."""
    batch, least = {0: torch.export.Dim("batch")}, 2 * model.patch_size
    if model.fixed:
        return model.backbone, torch.zeros(2, 3, model.view.size, model.view.size), batch
    open_sides = {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
    # Sides that differ from all other sizes here: a tracer may take equal ones for one.
    return AnySize(model.backbone), torch.zeros(2, 3, 4 * model.patch_size, 5 * model.patch_size), batch | open_sides


def _write_onnx(model: Model, path: Path) -> None:
    module, images, sizes = _graph(model)
    program = torch.onnx.export(
        module, (images,), dynamo=True, verbose=False, input_names=[IMAGES], output_names=[FEATURES],
        dynamic_shapes=(sizes,),
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for name, value in model.facts.items():
        proto.metadata_props.add(key=name, value=value)
    content = proto.SerializeToString()
    files.replace(path, lambda file: file.write(content))


def _load_onnx(model: Model, path: Path) -> Loaded:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run([FEATURES], {IMAGES: images.numpy()})[0]))

    return Loaded(features)


def _use_onnx(model: Model, path: Path) -> list[str]:
    return [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({str(path)!r})",
        f'features = session.run(None, {{"{IMAGES}": images.numpy()}})[0]',
    ]


def _write_pt2(model: Model, path: Path) -> None:
    module, images, sizes = _graph(model)
    program = torch.export.export(module, (images,), dynamic_shapes=(sizes,))
    # Not to the file itself: where the disk is full, PyTorch's writer ends the process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"fastdino.json": json.dumps(model.facts)})
    files.replace(path, lambda file: file.write(content.getbuffer()))


def _load_pt2(model: Model, path: Path) -> Loaded:
    return Loaded(torch.export.load(path).module())


def _use_pt2(model: Model, path: Path) -> list[str]:
    return [
        f"import torch  # written by {torch.__version__.partition('+')[0]}; another version may refuse it",
        f"backbone = torch.export.load({str(path)!r}).module()",
    ]


ONNX = ("onnx", "onnxscript", "onnxruntime")

FORMATS = {
    "backbone": Format(
        "weights alone, as the original publishes them", (".pth", ".pt"), (),
        _write_backbone, _load_backbone, _use_backbone,
    ),
    "safetensors": Format(
        "weights, with architecture and image size as metadata", (".safetensors",), ("safetensors",),
        _write_safetensors, _load_safetensors, _use_safetensors,
    ),
    "timm": Format(
        "the same file, checked with timm", (".safetensors",), ("safetensors", "timm"),
        _write_safetensors, _load_timm, _use_timm, own_positions=True, takes_newer=False,
    ),
    "hf": Format(
        "a folder for transformers (AutoModel, AutoImageProcessor)", (), ("safetensors", "transformers"),
        write_hf, load_hf, use_hf, own_positions=True,
    ),
    "onnx": Format(
        "a graph for onnxruntime and others", (".onnx",), ONNX, _write_onnx, _load_onnx, _use_onnx, is_graph=True
    ),
    "pt2": Format(
        "a graph for torch.export.load", (".pt2",), (), _write_pt2, _load_pt2, _use_pt2, is_graph=True
    ),
}  # fmt: skip
