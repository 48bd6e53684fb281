"""The architectures by name: one table, which training, checkpoints, doctor and the benchmarks read.

A backbone is any module with an integer `embed_dim` that maps images (B, 3, H, W), of the sizes of all crops, to
features (B, embed_dim). Two things are optional. `packs = True`: it takes a list of such tensors, too, and returns the
features of all of them, and has `packing(shapes, batch)` and `num_heads` (see VisionTransformer).
`get_last_selfattention(x)`: pictures of its attention can be drawn.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastdino.model.layers import NORMS
from fastdino.model.patches import Interpolation
from fastdino.model.vit import VisionTransformer


@dataclass(frozen=True)
class Arch:
    """A Vision Transformer's shape; called, the network. width: D, channels of a token; heads: of D / heads each.

    options: further arguments of VisionTransformer.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 16
    init_std: float = 0.02
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, patch_size: int | None = None, **kwargs: Any) -> VisionTransformer:
        """The network. kwargs: of VisionTransformer; they win over the table."""
        shape = {
            "patch_size": patch_size or self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
            "init_std": self.init_std,
        }
        return VisionTransformer(**{**shape, **self.options, **kwargs})


# A position embedding that starts at 0.02 stays too small to be seen beside the patches for the few hundred steps that
# vit_nano is trained: a bag of patches comes out (k-NN on the digits 0.83, from a start at 0.05 0.93; November 2026).
ARCHITECTURES = {
    "vit_nano": Arch(96, 4, 3, patch_size=4, init_std=0.05),
    "vit_tiny": Arch(192, 12, 3),
    "vit_small": Arch(384, 12, 6),
    "vit_base": Arch(768, 12, 12),
    "vit_large": Arch(1024, 24, 16),
}
SYNONYMS = {"deit_tiny": "vit_tiny", "deit_small": "vit_small"}  # the original's
ARCHITECTURES |= {name: ARCHITECTURES[of] for name, of in SYNONYMS.items()}

# What the published models have that a configuration may change and their files do not tell.
DINOV2 = {"mask_token": True, "interpolation": Interpolation(in_fp32=True)}
DINOV2_REGISTERS = {**DINOV2, "interpolation": Interpolation(offset=0.0, antialias=True, in_fp32=True)}
DINOV3 = {"mask_token": True, "norm_layer": NORMS["layernormbf16"]}


def _dinov2(width: int, depth: int, heads: int, registers: int = 0, ffn: str = "mlp") -> Arch:
    options = DINOV2_REGISTERS if registers else DINOV2
    more = {"img_size": (518,), "init_values": 1.0, "registers": registers, "ffn": ffn}
    return Arch(width, depth, heads, patch_size=14, options={**options, **more})


def _dinov3(width: int, depth: int, heads: int, **options: Any) -> Arch:
    shared = {"registers": 4, "init_values": 1e-5, "mask_k_bias": True, "rope": {"rescale": 2.0}}
    return Arch(width, depth, heads, options={**DINOV3, **shared, **options})


# The Vision Transformers of DINOv2 and DINOv3, under the names of their hubs. A table of its own: `fastdino train`
# runs DINO's recipe, which masks no patches and would leave their mask tokens without a gradient.
_PLUS = {"ffn": "swiglu", "mlp_ratio": 6.0}
_7B = {
    "ffn": "swiglu64",
    "mlp_ratio": 3.0,
    "qkv_bias": False,
    "untie_global_and_local_cls_norm": True,
}
PUBLISHED = {
    "dinov2_vits14": _dinov2(384, 12, 6),
    "dinov2_vits14_reg": _dinov2(384, 12, 6, 4),
    "dinov2_vitb14": _dinov2(768, 12, 12),
    "dinov2_vitb14_reg": _dinov2(768, 12, 12, 4),
    "dinov2_vitl14": _dinov2(1024, 24, 16),
    "dinov2_vitl14_reg": _dinov2(1024, 24, 16, 4),
    "dinov2_vitg14": _dinov2(1536, 40, 24, ffn="swiglufused"),
    "dinov2_vitg14_reg": _dinov2(1536, 40, 24, 4, ffn="swiglufused"),
    "dinov3_vits16": _dinov3(384, 12, 6),
    "dinov3_vits16plus": _dinov3(384, 12, 6, **_PLUS),
    "dinov3_vitb16": _dinov3(768, 12, 12),
    "dinov3_vitl16": _dinov3(1024, 24, 16),
    "dinov3_vitl16plus": _dinov3(1024, 24, 16, **_PLUS),
    "dinov3_vith16plus": _dinov3(1280, 32, 20, **_PLUS),
    "dinov3_vit7b16": _dinov3(4096, 40, 32, **_7B),
    "dinov3_vitl16_sat493m": _dinov3(1024, 24, 16, untie_global_and_local_cls_norm=True),
    "dinov3_vit7b16_sat493m": _dinov3(4096, 40, 32, **_7B),
}

# DINOv3's students of another kind: (blocks, channels) of their four stages.
CONVNEXTS = {
    "dinov3_convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "dinov3_convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "dinov3_convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "dinov3_convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def recipe_options(recipe: str, registers: int, layerscale: float, ffn: str) -> dict[str, Any]:
    """What a recipe, dino, dinov2 or dinov3, adds to a Vision Transformer of any shape: arguments of it."""
    if recipe == "dino":
        return {}
    options = {"registers": registers, "init_values": layerscale or None, "ffn": ffn, "drop_path_uniform": True}
    options["fp32_residual"] = True  # else KoLeo has nothing to go by, see its docstring
    if recipe == "dinov2":
        return {**(DINOV2_REGISTERS if registers else DINOV2), **options}
    return {**DINOV3, "mask_k_bias": True, "rope": {"rescale": 2.0}, **options}


TIMM = "timm:"  # what a name of a model of timm's begins with


def vit_nano(patch_size: int = 4, **kwargs: Any) -> VisionTransformer:
    """96 wide, 4 deep, 3 heads: not of the paper; small enough to learn the digits on two CPU cores in minutes."""
    return ARCHITECTURES["vit_nano"](patch_size, **kwargs)


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """192 wide, 12 deep, 3 heads (5.5 M parameters)."""
    return ARCHITECTURES["vit_tiny"](patch_size, **kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """384 wide, 12 deep, 6 heads (21.7 M parameters)."""
    return ARCHITECTURES["vit_small"](patch_size, **kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """768 wide, 12 deep, 12 heads (85.8 M parameters)."""
    return ARCHITECTURES["vit_base"](patch_size, **kwargs)


def vit_large(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """1024 wide, 24 deep, 16 heads (303.3 M parameters)."""
    return ARCHITECTURES["vit_large"](patch_size, **kwargs)


def heads_of(width: int) -> int | None:
    """Attention heads of the architectures that are so wide: weights do not tell. None where there are none."""
    known = (*ARCHITECTURES.values(), *PUBLISHED.values())
    return next((arch.heads for arch in known if arch.width == width), None)


def _in_timm(name: str) -> str | None:
    """What timm calls a network that the original has from torchvision, or from XCiT's authors; None for others."""
    if re.fullmatch(r"(wide_)?res(net|next)\d+\w*", name):
        return TIMM + name
    return f"{TIMM}{name}_224" if re.fullmatch(r"xcit_[a-z]+_\d+_p\d+", name) else None


def check_arch(name: str, recipe: str = "dino") -> None:
    """Raises ValueError unless there is an architecture of that name that a recipe trains, here or in timm."""
    if name in ARCHITECTURES or (name in PUBLISHED and name.startswith(f"{recipe}_")):
        return
    if name in CONVNEXTS:
        raise ValueError(f"{name}: the ConvNeXts of DINOv3 were distilled; their files load, nothing trains them")
    if name in PUBLISHED:
        raise ValueError(f"{name} is trained by --recipe {name.partition('_')[0]}, got {recipe}")
    if not name.startswith(TIMM):
        there = _in_timm(name)
        raise ValueError(
            f"expected one of {', '.join(ARCHITECTURES)}, or {TIMM}NAME, got {name!r}"
            + (f"; here it comes from timm: --arch {there}" if there else "")
        )
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{name} needs timm (pip install timm): {error}") from error
    if not timm.is_model(name.removeprefix(TIMM)):
        close = timm.list_models(f"*{name.removeprefix(TIMM)}*")[:3]
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))


def timm_backbone(name: str, drop_path_rate: float, pretrained: bool = False, channels: int = 3) -> nn.Module:
    """A model of timm's without its classifier, under timm's own parameter names.

    name: `timm:resnet50`. One that has another input size than the crops', and cannot change it, will say so.
    """
    import timm

    options: dict[str, Any] = {
        "pretrained": pretrained,
        "num_classes": 0,
        "drop_path_rate": drop_path_rate,
        "in_chans": channels,
    }
    backbone: Any = None
    # Its ViTs take one size of images, unless they are told otherwise; others do not know this option.
    with suppress(TypeError):
        backbone = timm.create_model(name.removeprefix(TIMM), dynamic_img_size=True, **options)
    if backbone is None:
        backbone = timm.create_model(name.removeprefix(TIMM), **options)
    assert isinstance(backbone, nn.Module)
    backbone.embed_dim = backbone.num_features
    return backbone
