"""What a backbone's weights tell of the network they belong to, by names and shapes alone."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdino.model.archs import ARCHITECTURES, DINOV2, DINOV2_REGISTERS, DINOV3, PUBLISHED, Arch
from fastdino.model.layers import NORMS


def without_chunks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose blocks are all in one list: DINOv2's `block_chunks` calls them `blocks.<chunk>.<number>`."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in state.items()}


def heads_by_rope(state: Mapping[str, Tensor]) -> int | None:
    """Heads of a network with rotary positions, which has a period for every four channels; None for others."""
    periods = state.get("rope_embed.periods")
    if periods is None or not periods.numel():
        return None
    return state["patch_embed.proj.weight"].shape[0] // (4 * periods.numel()) or None


def vit_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of VisionTransformer, beside img_size and num_heads, for the weights of DINO, DINOv2 or DINOv3.

    What is not in the weights is as in the published models: how positions are interpolated (DINOv2: by registers),
    the norms' epsilon, LayerScale's start.
    """
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    is_rotary = "rope_embed.periods" in state
    tokens = state.get("storage_tokens" if is_rotary else "register_tokens")
    options: dict[str, Any] = {
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
    }
    if is_rotary:
        options |= {**DINOV3, "rope": {}}
    elif "mask_token" in state:
        options |= DINOV2 if tokens is None else DINOV2_REGISTERS
    if "blocks.0.norm1.weight" in state and "blocks.0.norm1.bias" not in state:
        options["norm_layer"] = NORMS["rmsnorm"]
    return options | {
        "mask_token": "mask_token" in state,
        "registers": 0 if tokens is None or tokens.ndim != 3 else tokens.shape[1],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "untie_cls_and_patch_norms": "cls_norm.weight" in state,
        "untie_global_and_local_cls_norm": "local_cls_norm.weight" in state,
        **_feed_forward(state, embed_dim),
    }


def _feed_forward(state: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """Kind, width and biases of the first block's MLP."""
    # Of a SwiGLU a GELU MLP as large is half as wide again; w12 has two such layers.
    for name, ffn, share in (("fc1", "mlp", 1.0), ("w12", "swiglufused", 0.75), ("w1", "swiglu", 1.5)):
        weight = state.get(f"blocks.0.mlp.{name}.weight")
        if weight is not None and weight.ndim == 2:
            ratio = (weight.shape[0] * share + 0.5) / width  # half a channel against rounding; the network cuts it off
            return {"ffn": ffn, "mlp_ratio": ratio, "ffn_bias": f"blocks.0.mlp.{name}.bias" in state}
    return {}


def img_size_of(state: Mapping[str, Tensor], trained_at: Any) -> int:
    """The side in pixels that a network was made for: of its position table, or 224.

    trained_at: the side of its global crops, where somebody wrote it down; 224 else: both may have left a rest.
    """
    if "pos_embed" not in state:
        return trained_at if isinstance(trained_at, int) else 224
    side, patch_size = math.isqrt(state["pos_embed"].shape[1] - 1), state["patch_embed.proj.weight"].shape[-1]
    return next((x for x in (trained_at, 224) if isinstance(x, int) and x // patch_size == side), patch_size * side)


def convnext_stages(state: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Blocks and channels of each stage of a ConvNeXt."""
    stages = sorted({int(found[1]) for name in state if (found := re.match(r"stages\.(\d+)\.", name))})
    depths = [len({name.split(".")[2] for name in state if name.startswith(f"stages.{stage}.")}) for stage in stages]
    gammas = [state.get(f"stages.{stage}.0.gamma") for stage in stages]
    return depths, [0 if gamma is None else gamma.numel() for gamma in gammas]


def _shapes(state: Mapping[str, Tensor]) -> set[tuple[str, torch.Size]]:
    """Names and shapes but for what training may change: the grid of positions, and whether patches can be masked."""
    grid_of = {"pos_embed": 2}
    return {(name, x.shape[grid_of.get(name, 0) :]) for name, x in state.items() if name != "mask_token"}


def _patch_size(state: Mapping[str, Tensor]) -> int | None:
    weight = state.get("patch_embed.proj.weight")
    return weight.shape[-1] if weight is not None and weight.ndim == 4 else None


def _shapes_of(arch: Arch, patch_size: int | None) -> set[tuple[str, torch.Size]]:
    with torch.device("meta"):
        return _shapes(arch(patch_size, img_size=[patch_size or arch.patch_size]).state_dict())


def name_of(state: Mapping[str, Tensor]) -> str | None:
    """The architecture whose names and shapes a backbone's weights have; None where it is none of these here.

    DINO's are of any patch size, those of DINOv2 and DINOv3 of their own.
    """
    patch_size, found = _patch_size(state), _shapes(state)
    for name, arch in {**ARCHITECTURES, **PUBLISHED}.items():
        is_near = (
            "norm.weight",
            torch.Size([arch.width]),
        ) in found and f"blocks.{arch.depth - 1}.norm1.weight" in state
        has_its_patches = name in ARCHITECTURES or patch_size == arch.patch_size
        if is_near and has_its_patches and _shapes_of(arch, patch_size) == found:
            return name
    return None


def nearest(state: Mapping[str, Tensor]) -> str | None:
    """The architecture, and its patch size, that shares most names and shapes with these weights; None with none."""
    found, patch_size = _shapes(state), _patch_size(state)
    shared: dict[str, float] = {}
    for name, arch in {**ARCHITECTURES, **PUBLISHED}.items():
        patches = patch_size if name in ARCHITECTURES else arch.patch_size
        shapes = _shapes_of(arch, patches)
        if shapes & found:
            shared[f"{name}/{patches}"] = len(shapes & found) / len(shapes | found)
    return max(shared, key=lambda name: shared[name]) if shared else None
