"""Student and teacher of a run, from its arguments."""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdino.errors import UserError
from fastdino.model import DINOHead, MaskedMultiCrop, MultiCrop, MultiCropWrapper
from fastdino.model.archs import ARCHITECTURES, PUBLISHED, TIMM, recipe_options, timm_backbone
from fastdino.train.config import TrainConfig
from fastdino.train.initial import Initial


def build_networks(
    config: TrainConfig, backbone: nn.Module | None = None, initial: Initial | None = None
) -> tuple[MultiCrop, MultiCrop]:
    """(student, its frozen copy as teacher): only the student has drop-path and a say about the prototypes' lengths.

    backbone: the student's, instead of config.arch; the teacher gets a copy. initial: weights to start from. Raises
    UserError where the backbone has no embed_dim, or takes no masks and the recipe has some.
    """
    if backbone is not None and not isinstance(getattr(backbone, "embed_dim", None), int):
        raise UserError(
            f"backbone: expected a module with an integer embed_dim, the width of its features; "
            f"got {type(backbone).__name__}"
        )
    torch.manual_seed(config.seed)
    build = _with_head if config.recipe == "dino" else _with_heads
    student = build(config, backbone or _backbone(config, config.drop_path_rate, initial), config.norm_last_layer)
    teacher = build(config, copy.deepcopy(backbone) if backbone else _backbone(config, 0.0, initial), True)
    teacher.load_state_dict(student.state_dict())
    if isinstance(teacher, MaskedMultiCrop):  # it draws no rescaled positions, and has one norm for CLS
        teacher.backbone.eval()
    return student, teacher.requires_grad_(False)


def _backbone(config: TrainConfig, drop_path_rate: float, initial: Initial | None) -> nn.Module:
    if config.arch.startswith(TIMM):
        build = initial.backbone if initial else partial(timm_backbone, config.arch, channels=config.channels)
        return build(drop_path_rate)
    for name, size in (("global", config.global_crops_size), ("local", config.local_crops_size)):
        if config.patch_size > size and (name == "global" or config.local_crops_number):
            raise UserError(f"--patch_size: expected at most --{name}_crops_size={size}, got {config.patch_size}")
    if initial:
        return initial.backbone(drop_path_rate)
    return {**ARCHITECTURES, **PUBLISHED}[config.arch](
        config.patch_size,
        img_size=[config.global_crops_size],
        in_chans=config.channels,
        drop_path_rate=drop_path_rate,
        drop_path_mode=config.drop_path_mode,
        checkpointing=config.checkpointing,
        **recipe_options(config.recipe, config.registers, config.layerscale, config.ffn),
    )


def _head(config: TrainConfig, backbone: Any, norm_last_layer: bool, **sizes: int) -> DINOHead:
    default = {"out_dim": config.out_dim, "hidden_dim": config.hidden_dim, "bottleneck_dim": config.bottleneck_dim}
    return DINOHead(
        backbone.embed_dim,
        use_bn=config.use_bn_in_head,
        norm_last_layer=norm_last_layer,
        weight_norm=config.recipe != "dinov3",
        **{**default, **sizes},
    )


def _with_head(config: TrainConfig, backbone: nn.Module, norm_last_layer: bool) -> MultiCrop:
    return MultiCropWrapper(backbone, _head(config, backbone, norm_last_layer))


def _with_heads(config: TrainConfig, backbone: Any, norm_last_layer: bool) -> MultiCrop:
    if getattr(backbone, "mask_token", None) is None:
        what = "it has no mask token" if hasattr(backbone, "prepare_tokens") else "it takes no masks"
        raise UserError(f"backbone: expected one for --recipe {config.recipe}, got {type(backbone).__name__}: {what}")
    sizes = {"out_dim": config.ibot_out_dim, "bottleneck_dim": config.ibot_bottleneck_dim}
    ibot_head = _head(config, backbone, norm_last_layer, **sizes) if config.ibot_out_dim else None
    return MaskedMultiCrop(backbone, _head(config, backbone, norm_last_layer), ibot_head)
