"""A folder that transformers reads: as its ViTModel, or as its models of DINOv2 and DINOv3."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastdino import files
from fastdino.errors import ExportError
from fastdino.export.kinds import MEAN, STD, Loaded, Model
from fastdino.model import VisionTransformer


@dataclass(frozen=True)
class HfModel:
    """A model of transformers. names: pattern of ours -> theirs, in the order in which they are looked for.

    Those of transformers 4, which 5 reads, too. {} stands for each of the parts that a tensor of ours is cut into.
    """

    model_type: str
    architecture: str
    names: dict[str, str]
    parts: tuple[str, ...] = ("query", "key", "value")


_EMBEDDINGS = {
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^mask_token$": "embeddings.mask_token",
    r"^(register|storage)_tokens$": "embeddings.register_tokens",
}
VIT = HfModel(
    "vit",
    "ViTModel",
    {
        **_EMBEDDINGS,
        r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
        r"^norm\.": "layernorm.",
        r"^blocks\.(\d+)\.norm1\.": r"encoder.layer.\1.layernorm_before.",
        r"^blocks\.(\d+)\.norm2\.": r"encoder.layer.\1.layernorm_after.",
        r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layer.\1.attention.attention.{}.",
        r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.output.dense.",
        r"^blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
        r"^blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
    },
)
_DINOV2_NAMES = {
    **_EMBEDDINGS,
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.(\d+)\.norm(\d)\.": r"encoder.layer.\1.norm\2.",
    r"^blocks\.(\d+)\.ls(\d)\.gamma$": r"encoder.layer.\1.layer_scale\2.lambda1",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layer.\1.attention.attention.{}.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"^blocks\.(\d+)\.mlp\.fc(\d)\.": r"encoder.layer.\1.mlp.fc\2.",
    r"^blocks\.(\d+)\.mlp\.w12\.": r"encoder.layer.\1.mlp.weights_in.",
    r"^blocks\.(\d+)\.mlp\.w3\.": r"encoder.layer.\1.mlp.weights_out.",
}
DINOV2 = HfModel("dinov2", "Dinov2Model", _DINOV2_NAMES)
DINOV2_REGISTERS = HfModel("dinov2_with_registers", "Dinov2WithRegistersModel", _DINOV2_NAMES)
DINOV3 = HfModel(
    "dinov3_vit",
    "DINOv3ViTModel",
    {
        **_EMBEDDINGS,
        r"^patch_embed\.proj\.": "embeddings.patch_embeddings.",
        r"^norm\.": "norm.",
        r"^blocks\.(\d+)\.norm(\d)\.": r"layer.\1.norm\2.",
        r"^blocks\.(\d+)\.ls(\d)\.gamma$": r"layer.\1.layer_scale\2.lambda1",
        r"^blocks\.(\d+)\.attn\.qkv\.": r"layer.\1.attention.{}_proj.",
        r"^blocks\.(\d+)\.attn\.proj\.": r"layer.\1.attention.o_proj.",
        r"^blocks\.(\d+)\.mlp\.(fc1|w2)\.": r"layer.\1.mlp.up_proj.",
        r"^blocks\.(\d+)\.mlp\.(fc2|w3)\.": r"layer.\1.mlp.down_proj.",
        r"^blocks\.(\d+)\.mlp\.w1\.": r"layer.\1.mlp.gate_proj.",
    },
    parts=("q", "k", "v"),
)
# Buffers that are computed there, and a norm of local crops, which training alone looks at.
_LEFT_OUT = re.compile(r"^rope_embed\.|\.bias_mask$|^local_cls_norm\.")


def hf_model_of(backbone: VisionTransformer) -> HfModel:
    """Which of transformers' models it is. Raises ExportError where it is none."""
    if backbone.cls_norm is not None:
        raise ExportError("transformers has no model whose CLS token has a last norm of its own")
    if backbone.is_dinos:
        return VIT
    if backbone.rope_embed is not None:
        return DINOV3
    return DINOV2_REGISTERS if backbone.num_prefix_tokens > 1 else DINOV2


def hf_state(backbone: VisionTransformer) -> dict[str, Tensor]:
    """A backbone's weights under the names of transformers' model, which has queries, keys and values apart."""
    kind, state, renamed = hf_model_of(backbone), backbone.state_dict(), dict[str, Tensor]()
    if kind is not VIT:  # their LayerScale is always there
        for i in range(len(backbone.blocks)):
            for n in (1, 2):
                state.setdefault(f"blocks.{i}.ls{n}.gamma", torch.ones(backbone.embed_dim))
    for name, value in state.items():
        if _LEFT_OUT.search(name):
            continue
        pattern = next(pattern for pattern in kind.names if re.match(pattern, name))
        new = re.sub(pattern, kind.names[pattern], name)
        parts = kind.parts if "{}" in new else ("",)
        renamed |= {new.format(part): chunk.clone() for part, chunk in zip(parts, value.chunk(len(parts)))}
    if kind is DINOV3:
        renamed["embeddings.mask_token"] = state["mask_token"][None].clone()
        renamed = {name: x for name, x in renamed.items() if not name.endswith("k_proj.bias")}
        if backbone.num_prefix_tokens == 1:
            renamed["embeddings.register_tokens"] = torch.zeros(1, 0, backbone.embed_dim)
    return renamed


def _config(model: Model) -> dict[str, Any]:
    shape, kind, state = model.shape, hf_model_of(model.backbone), model.backbone.state_dict()
    config: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "hidden_size": shape["embed_dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["num_heads"],
        "image_size": shape["img_size"],
        "patch_size": shape["patch_size"],
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": model.backbone.norm.eps,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind is VIT or kind is DINOV3:
        hidden = next(state[name] for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w1.weight") if name in state)
        config["intermediate_size"] = len(hidden)
    if kind is not DINOV3:
        config |= {"hidden_dropout_prob": 0.0, "qkv_bias": "blocks.0.attn.qkv.bias" in state}
    if kind in (DINOV2, DINOV2_REGISTERS):
        hidden = state.get("blocks.0.mlp.fc1.weight")
        ratio = 4 if hidden is None else len(hidden) // shape["embed_dim"]
        config |= {"mlp_ratio": ratio, "use_swiglu_ffn": hidden is None}
    if kind in (DINOV2_REGISTERS, DINOV3):
        config["num_register_tokens"] = model.backbone.num_prefix_tokens - 1
    if kind is DINOV3:
        is_gated = "blocks.0.mlp.w1.weight" in state
        config |= {
            "use_gated_mlp": is_gated,
            "hidden_act": "silu" if is_gated else "gelu",
            "query_bias": "blocks.0.attn.qkv.bias" in state,
            "value_bias": "blocks.0.attn.qkv.bias" in state,
            "key_bias": False,
            "pos_embed_rescale": None,  # of training
        }
    return config


def _preprocessor(model: Model) -> dict[str, Any]:
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


def write_hf(model: Model, path: Path) -> None:
    """config.json, preprocessor_config.json and model.safetensors. Raises ExportError as `hf_model_of`."""
    import safetensors.torch

    path.mkdir()
    weights = safetensors.torch.save(hf_state(model.backbone), {"format": "pt"})
    files.replace(path / "model.safetensors", lambda file: file.write(weights))
    configs = {"config.json": _config(model), "preprocessor_config.json": _preprocessor(model)}
    for name, content in configs.items():
        text = json.dumps(content, indent=2) + "\n"
        files.replace(path / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def load_hf(model: Model, path: Path) -> Loaded:
    """By transformers. Raises ValueError where a weight is missing there, or left over."""
    from transformers import AutoImageProcessor, AutoModel

    kind = hf_model_of(model.backbone)
    made = {"add_pooling_layer": False} if kind is VIT else {}  # DINO has no pooler
    called = {"interpolate_pos_encoding": True} if kind is VIT else {}
    network, told = AutoModel.from_pretrained(path, output_loading_info=True, local_files_only=True, **made)
    processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(what):
            raise ValueError(f"{what}: {sorted(map(str, told[what]))[0]}")
    network.eval()

    def features(images: Tensor) -> Tensor:
        return network(pixel_values=images, **called).last_hidden_state[:, 0]

    return Loaded(features, lambda image: processor(image, return_tensors="pt")["pixel_values"][0])


def use_hf(model: Model, path: Path) -> list[str]:
    """Lines that load the folder with transformers and compute features."""
    is_vit = hf_model_of(model.backbone) is VIT
    made, called = (", add_pooling_layer=False", ", interpolate_pos_encoding=True") if is_vit else ("", "")
    return [
        "from transformers import AutoImageProcessor, AutoModel",
        f"processor = AutoImageProcessor.from_pretrained({str(path)!r})",
        f"model = AutoModel.from_pretrained({str(path)!r}{made})",
        f"features = model(pixel_values=images{called}).last_hidden_state[:, 0]",
    ]
