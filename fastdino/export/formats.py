"""What a backbone can be written as: one table, from a name to how it is written, and how its library reads it back.

Axes: B images of 3 channels, D features.
"""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastdino import files
from fastdino.data.views import View
from fastdino.export.graph import AnySize
from fastdino.model import VisionTransformer
from fastdino.model.archs import ARCHITECTURES
from fastdino.model.inferred import name_of
from fastdino.train.checkpoint import load_backbone
from fastdino_kernels.augment import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = list(IMAGENET_MEAN), list(IMAGENET_STD)
IMAGES, FEATURES = "images", "features"  # names of a graph's input and output


@dataclass(frozen=True)
class Model:
    """What is exported.

    backbone: frozen, in eval mode, on the CPU; its positions are laid out for view.size. fixed: a graph takes images of
    that size alone.
    """

    backbone: VisionTransformer
    view: View
    fixed: bool

    @property
    def patch_size(self) -> int:
        """In pixels."""
        return self.backbone.patch_embed.patch_size

    @property
    def shape(self) -> dict[str, int]:
        """Of the network, under the names that VisionTransformer and timm have for it."""
        backbone = self.backbone
        return {
            "embed_dim": backbone.embed_dim,
            "depth": len(backbone.blocks),
            "num_heads": backbone.num_heads,
            "patch_size": self.patch_size,
            "img_size": self.view.size,
        }

    @property
    def arch(self) -> str | None:
        """Its name in the table of architectures, whatever the patch; None where it has none."""
        if not self.backbone.is_dinos:
            return name_of(self.backbone.state_dict())
        shape = tuple(self.shape.values())[:3]
        return next((name for name, a in ARCHITECTURES.items() if (a.width, a.depth, a.heads) == shape), None)

    @property
    def facts(self) -> dict[str, str]:
        """What the weights do not tell, for a file's metadata: text alone, as safetensors has it."""
        facts = {"arch": self.arch or "", **self.shape, "resize": self.view.resize, "mean": MEAN, "std": STD}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


@dataclass(frozen=True)
class Loaded:
    """A written file in the hands of its library.

    features: normalised images (B, 3, H, W) -> (B, D). view: the library's own preprocessing, of an image to
    (3, size, size), where the file has one.
    """

    features: Callable[[Tensor], Tensor]
    view: Callable[[Image.Image], Tensor] | None = None


@dataclass(frozen=True)
class Format:
    """One way to write a backbone.

    what: a phrase for the help. suffixes: of the file; none for a folder. needs: packages, by the names they are
    imported under and installed by. write: to a path that does not exist. load: by the library, from that path.
    use: lines of Python that do so, given the path. own_positions: the library interpolates positions its own way.
    takes_newer: backbones of DINOv2 and DINOv3, too. is_graph: of those it takes images of one size alone.
    """

    what: str
    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[Model, Path], None]
    load: Callable[[Model, Path], Loaded]
    use: Callable[[Model, Path], list[str]]
    own_positions: bool = False
    takes_newer: bool = True
    is_graph: bool = False


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


# hf: a folder that transformers reads

# Names in the order they are looked for; those of transformers 4, which 5 reads, too.
HF_NAMES = {
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.(\d+)\.norm1\.": r"encoder.layer.\1.layernorm_before.",
    r"^blocks\.(\d+)\.norm2\.": r"encoder.layer.\1.layernorm_after.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layer.\1.attention.attention.{}.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"^blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"^blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}


def hf_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights under the names of transformers' ViTModel, which has queries, keys and values apart."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        pattern = next(pattern for pattern in HF_NAMES if re.match(pattern, name))
        new = re.sub(pattern, HF_NAMES[pattern], name)
        parts = ("query", "key", "value") if "{}" in new else ("",)
        renamed |= {new.format(part): chunk.clone() for part, chunk in zip(parts, value.chunk(len(parts)))}
    return renamed


def _hf_config(model: Model) -> dict[str, Any]:
    shape = model.shape
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": shape["embed_dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["num_heads"],
        "intermediate_size": model.backbone.blocks[0].mlp.fc1.out_features,  # type: ignore[union-attr]
        "image_size": shape["img_size"],
        "patch_size": shape["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": model.backbone.norm.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _hf_preprocessor(model: Model) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",  # ViT's own cannot crop
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": model.view.resize},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": model.view.size, "width": model.view.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def _write_hf(model: Model, path: Path) -> None:
    import safetensors.torch

    path.mkdir()
    weights = safetensors.torch.save(hf_state(model.backbone.state_dict()), {"format": "pt"})
    files.replace(path / "model.safetensors", lambda file: file.write(weights))
    configs = {"config.json": _hf_config(model), "preprocessor_config.json": _hf_preprocessor(model)}
    for name, content in configs.items():
        text = json.dumps(content, indent=2) + "\n"
        files.replace(path / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def _load_hf(model: Model, path: Path) -> Loaded:
    from transformers import AutoImageProcessor, AutoModel

    network, told = AutoModel.from_pretrained(
        path, add_pooling_layer=False, output_loading_info=True, local_files_only=True
    )
    processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(what):
            raise ValueError(f"{what}: {sorted(map(str, told[what]))[0]}")
    network.eval()

    def features(images: Tensor) -> Tensor:
        return network(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    return Loaded(features, lambda image: processor(image, return_tensors="pt")["pixel_values"][0])


def _use_hf(model: Model, path: Path) -> list[str]:
    return [
        "from transformers import AutoImageProcessor, AutoModel",
        f"processor = AutoImageProcessor.from_pretrained({str(path)!r})",
        f"model = AutoModel.from_pretrained({str(path)!r}, add_pooling_layer=False)  # DINO has no pooler",
        "features = model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, 0]",
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
        _write_hf, _load_hf, _use_hf, own_positions=True, takes_newer=False,
    ),
    "onnx": Format(
        "a graph for onnxruntime and others", (".onnx",), ONNX, _write_onnx, _load_onnx, _use_onnx, is_graph=True
    ),
    "pt2": Format(
        "a graph for torch.export.load", (".pt2",), (), _write_pt2, _load_pt2, _use_pt2, is_graph=True
    ),
}  # fmt: skip
