"""A backbone in scikit-learn's pipelines. Imported when it is asked for: scikit-learn takes most of a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from torch import nn

from fastdino.errors import UserError, some_of
from fastdino.eval.features import BATCH
from fastdino.extract import features


class FeatureExtractor(TransformerMixin, BaseEstimator):
    """Images to rows of features, as a step of scikit-learn's pipelines.

    `make_pipeline(FeatureExtractor("checkpoint.pth"), LogisticRegression()).fit(images, labels)`. X: a path, or a
    sequence of PIL images, arrays, tensors or paths. Parameters as for `features`; tokens: cls, avg, or both, joined.
    Raises UserError where an image cannot be read: a row for each is what scikit-learn expects.
    """

    def __init__(
        self,
        weights: str | Path | nn.Module,
        tokens: Sequence[str] = ("cls",),
        layers: int = 1,
        normalize: bool = False,
        size: int | None = None,
        resize: int | None = None,
        batch_size: int = BATCH,
        num_workers: int = 10,
        device: str = "auto",
    ) -> None:
        self.weights = weights
        self.tokens = tokens
        self.layers = layers
        self.normalize = normalize
        self.size = size
        self.resize = resize
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = device

    def fit(self, X: Any, y: Any = None) -> "FeatureExtractor":
        """Nothing to learn."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def transform(self, X: Any) -> NDArray[np.float32]:
        """(n, features) fp32."""
        found = features(X, **self.get_params(deep=False))
        if found.bad:
            raise UserError(some_of(found.bad, len(found.bad) + len(found.names)))
        joined: NDArray[np.float32] = np.concatenate([getattr(found, name) for name in self.tokens], axis=1)
        return joined
