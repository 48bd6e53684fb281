"""What a trained backbone is worth: k-NN, pictures of its attention. Never imports training."""

from fastdino.eval.evaluations import EVALUATIONS, EvalSettings

__all__ = ["EVALUATIONS", "EvalSettings"]
