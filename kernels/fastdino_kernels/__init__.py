"""DINO's fused ops, for anyone's training loop. Imports torch and triton, nothing else."""

from fastdino_kernels.attention import cls_attention, short_attention
from fastdino_kernels.augment import CropTable, PackedImages, multi_crop_augment
from fastdino_kernels.center import batch_center, center_ema_, center_update_
from fastdino_kernels.clip_adamw_ema import clip_adamw_ema_
from fastdino_kernels.dino_loss import DINOLossStats, dino_loss, dino_loss_and_grad_, dino_loss_with_stats
from fastdino_kernels.ema import ema_update_
from fastdino_kernels.layer_norm import layer_norm
from fastdino_kernels.mlp import linear_gelu, mlp
from fastdino_kernels.optim import ClipAdamWEMA
from fastdino_kernels.patch_loss import LinearLogits, patch_loss, patch_loss_and_grad_
from fastdino_kernels.sinkhorn import sinkhorn_center

__version__ = "0.1.0"  # of fastdino, too

__all__ = [
    "ClipAdamWEMA",
    "CropTable",
    "DINOLossStats",
    "LinearLogits",
    "PackedImages",
    "batch_center",
    "center_ema_",
    "center_update_",
    "clip_adamw_ema_",
    "cls_attention",
    "dino_loss",
    "dino_loss_and_grad_",
    "dino_loss_with_stats",
    "ema_update_",
    "layer_norm",
    "linear_gelu",
    "mlp",
    "multi_crop_augment",
    "patch_loss",
    "patch_loss_and_grad_",
    "short_attention",
    "sinkhorn_center",
]
