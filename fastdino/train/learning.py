"""What is learned and how fast, from a run's arguments: objective, masks, schedules, what an update is tuned by."""

import copy

import numpy as np
import torch
from torch import nn

from fastdino.data.masks import BatchMasks, BlockMasks
from fastdino.errors import UserError
from fastdino.model import MultiCrop
from fastdino.objectives import DINOLoss, DINOv2Loss, DINOv2Weights, GramTeacher, Objective
from fastdino.train.checkpoint import load_backbone
from fastdino.train.config import TrainConfig
from fastdino.train.iteration_schedules import LR_SCALES, IterationSchedules
from fastdino.train.schedules import Schedules
from fastdino.train.tuning import (
    DINOS_TUNING,
    Multipliers,
    Tuning,
    backbone_multipliers,
    dinov2_tuning,
    get_params_groups,
)


def build_objective(
    config: TrainConfig, teacher: MultiCrop, niter_per_ep: int, precision: torch.dtype | None
) -> Objective:
    """The recipe's. precision: that the step computes in. Raises UserError where the Gram teacher cannot be had."""
    if config.recipe == "dino":
        return DINOLoss(
            config.out_dim,
            config.ncrops,
            config.warmup_teacher_temp,
            config.teacher_temp,
            config.warmup_teacher_temp_epochs,
            config.epochs,
        )
    gram_weight = np.full(config.epochs * niter_per_ep, config.gram_weight)
    gram_weight[: config.gram_start * niter_per_ep] = 0.0
    return DINOv2Loss(
        ncrops=config.ncrops,
        out_dim=config.out_dim,
        patch_out_dim=config.ibot_out_dim or config.out_dim,
        centering=config.centering,
        weights=DINOv2Weights(ibot=config.ibot_weight, koleo=config.koleo_weight),
        gram=_gram_teacher(config, teacher, niter_per_ep, precision) if config.gram_start else None,
        gram_weight=gram_weight if config.gram_start else None,
    )


def _gram_teacher(
    config: TrainConfig, teacher: MultiCrop, niter_per_ep: int, precision: torch.dtype | None
) -> GramTeacher:
    """It becomes the EMA teacher at gram_start, unless it is a file's, and after that where it is to be renewed."""
    start, every = config.gram_start * niter_per_ep, config.gram_update_epochs * niter_per_ep
    backbone: nn.Module
    if config.gram_teacher == "ema":
        backbone, n_updates = copy.deepcopy(teacher.backbone), config.epochs if every else 1
        every = every or start
    else:
        try:
            backbone = load_backbone(config.gram_teacher)
        except UserError as error:
            raise UserError(f"--gram_teacher: {error}") from error
        if not hasattr(backbone, "forward_features"):
            raise UserError(f"--gram_teacher: expected a Vision Transformer, got {type(backbone).__name__}")
        if every:
            raise UserError("--gram_update_epochs: a Gram teacher of a file stays as it is; renewals are for ema")
        n_updates = 0
    dtype = torch.bfloat16 if precision == torch.bfloat16 else torch.get_default_dtype()
    return GramTeacher(backbone.to(dtype), first_update=start, update_every=every, max_updates=n_updates)


def build_masks(config: TrainConfig) -> BatchMasks | None:
    """Of the global crops; None for a recipe without."""
    if config.recipe == "dino":
        return None
    side, size = config.global_crops_size // config.patch_size, config.global_crops_size
    low, high = config.mask_ratio
    return BatchMasks(
        BlockMasks(
            height=side,
            width=side,
            max_patches=0.5 * size // config.patch_size * size // config.patch_size,  # in the original's order
            exact=config.mask_count == "exact",
        ),
        probability=config.mask_probability,
        ratio=(low, high),
        n_parts=config.accumulate,
    )


def build_schedules(config: TrainConfig, niter_per_ep: int, world_size: int) -> Schedules:
    """By epochs as in DINO, or by iterations."""
    if config.recipe == "dino":
        return Schedules.of(config, niter_per_ep, world_size)
    scale = LR_SCALES[config.lr_scaling]
    return IterationSchedules.from_settings(
        epochs=config.epochs,
        epoch_length=niter_per_ep,
        lr=config.lr * scale(config.batch_size_per_gpu * world_size),
        min_lr=config.min_lr,
        warmup_epochs=config.warmup_epochs,
        weight_decay=config.weight_decay,
        weight_decay_end=config.weight_decay_end,
        momentum_teacher=config.momentum_teacher,
        final_momentum_teacher=config.final_momentum_teacher,
        warmup_teacher_temp=config.warmup_teacher_temp,
        teacher_temp=config.teacher_temp,
        warmup_teacher_temp_epochs=config.warmup_teacher_temp_epochs,
        freeze_last_layer_epochs=config.freeze_last_layer,
    )


def build_tuning(config: TrainConfig, student: MultiCrop) -> Tuning:
    """How gradients become an update. Raises ValueError for --lr_decay where there are no blocks."""
    if config.recipe == "dino" and config.lr_decay == 1:
        return DINOS_TUNING
    depth = len(getattr(student.backbone, "blocks", ()))
    if not depth:
        raise ValueError(f"lr_decay: expected 1 for {type(student.backbone).__name__}, which has no blocks")
    if config.recipe != "dino":
        return dinov2_tuning(depth, config.lr_decay, config.patch_embed_lr, (0.9, config.adamw_beta2))
    not_decayed = set(get_params_groups(student)[1]["params"])
    weight_decay = {name: float(param not in not_decayed) for name, param in student.named_parameters()}

    def multipliers(name: str) -> Multipliers:
        module, _, rest = name.partition(".")
        lr = backbone_multipliers(rest, depth, config.lr_decay).lr if module == "backbone" else 1.0
        return Multipliers(lr, weight_decay[name], False)

    return Tuning(multipliers=multipliers)
