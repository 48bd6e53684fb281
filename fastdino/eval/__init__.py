"""What a trained backbone is worth, and what it sees. Never imports training."""

from fastdino.eval.evaluations import EVALUATIONS, TITLES, EvalSettings, evaluate

__all__ = ["EVALUATIONS", "TITLES", "EvalSettings", "evaluate"]
