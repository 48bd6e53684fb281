"""The networks: images in, logits out. Knows nothing of data or training."""

from fastdino.model.archs import ARCHITECTURES, PUBLISHED, vit_base, vit_large, vit_nano, vit_small, vit_tiny
from fastdino.model.head import DINOHead
from fastdino.model.masked import MaskedMultiCrop
from fastdino.model.multicrop import MultiCrop, MultiCropWrapper
from fastdino.model.vit import VisionTransformer

__all__ = [
    "ARCHITECTURES",
    "PUBLISHED",
    "DINOHead",
    "MaskedMultiCrop",
    "MultiCrop",
    "MultiCropWrapper",
    "VisionTransformer",
    "vit_base",
    "vit_large",
    "vit_nano",
    "vit_small",
    "vit_tiny",
]
