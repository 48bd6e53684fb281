"""DINO (self-distillation with no labels, arXiv:2104.14294) on your own images."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("fastdino_kernels") is None:  # run from a clone that nobody installed
    sys.path.append(str(Path(__file__).parent.parent / "kernels"))

from fastdino.data.augment import global_augment, multiple_local_augments
from fastdino.data.sequences import SequenceSource
from fastdino.dino import DINO, distillation_loss, train_dino
from fastdino.extract import EvalTransform, Features, eval_transform, features
from fastdino.model import (
    DINOHead,
    MultiCropWrapper,
    VisionTransformer,
    vit_base,
    vit_large,
    vit_nano,
    vit_small,
    vit_tiny,
)
from fastdino.objectives import DINOLoss
from fastdino.train.checkpoint import load_backbone, load_checkpoint
from fastdino.train.optim import clip_gradients
from fastdino.train.schedules import cosine_schedule
from fastdino.train.sinks import Sink
from fastdino.train.tuning import get_params_groups
from fastdino_kernels import __version__ as __version__

if TYPE_CHECKING:
    from fastdino.export import export
    from fastdino.feature_extractor import FeatureExtractor
    from fastdino.train import train
else:  # packages that can be called
    from fastdino import export, train

__all__ = [
    "DINO",
    "DINOHead",
    "DINOLoss",
    "EvalTransform",
    "FeatureExtractor",
    "Features",
    "MultiCropWrapper",
    "SequenceSource",
    "Sink",
    "VisionTransformer",
    "clip_gradients",
    "cosine_schedule",
    "distillation_loss",
    "eval_transform",
    "export",
    "features",
    "get_params_groups",
    "global_augment",
    "load_backbone",
    "load_checkpoint",
    "multiple_local_augments",
    "train",
    "train_dino",
    "vit_base",
    "vit_large",
    "vit_nano",
    "vit_small",
    "vit_tiny",
]


def __getattr__(name: str) -> Any:
    if name == "FeatureExtractor":  # imports scikit-learn
        from fastdino.feature_extractor import FeatureExtractor

        return FeatureExtractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
