"""What is learned: from logits to a loss, with the state that goes with it. Knows nothing of optimizers and modes."""

from fastdino.objectives.base import Objective
from fastdino.objectives.dino import DINOLoss
from fastdino.objectives.gram import gram
from fastdino.objectives.koleo import koleo

__all__ = ["DINOLoss", "Objective", "gram", "koleo"]
