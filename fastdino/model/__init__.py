"""The networks: images in, logits out. Knows nothing of data or training."""

from fastdino.model.archs import ARCHITECTURES, PUBLISHED, vit_base, vit_large, vit_nano, vit_small, vit_tiny
from fastdino.model.head import DINOHead
from fastdino.model.multicrop import MultiCropWrapper
from fastdino.model.vit import VisionTransformer

__all__ = [
    "ARCHITECTURES",
    "PUBLISHED",
    "DINOHead",
    "MultiCropWrapper",
    "VisionTransformer",
    "vit_base",
    "vit_large",
    "vit_nano",
    "vit_small",
    "vit_tiny",
]
