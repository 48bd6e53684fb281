"""What is learned: from logits to a loss, with the state that goes with it. Knows nothing of optimizers and modes."""

from fastdino.objectives.base import Evaluated, Objective
from fastdino.objectives.dino import DINOLoss
from fastdino.objectives.dinov2 import DINOv2Loss, DINOv2Weights
from fastdino.objectives.gram import GramTeacher, gram
from fastdino.objectives.koleo import koleo

__all__ = ["DINOLoss", "DINOv2Loss", "DINOv2Weights", "Evaluated", "GramTeacher", "Objective", "gram", "koleo"]
