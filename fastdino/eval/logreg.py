"""Multinomial logistic regression with an L2 penalty on frozen features, as DINOv2 evaluates (arXiv:2304.07193).

scikit-learn's: the sum over images of the cross-entropy, plus |W|^2 / (2 C), by L-BFGS in fp64 on the CPU. Each C
starts from zero. From the last C's weights, 45 fits on 1,293 x 96 features took as many iterations (25,270 for 26,406);
torch.optim.LBFGS took 2 to 3 times as long for the same number
(one core, 2026-11-28).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastdino.errors import UserError
from fastdino.eval.linear import Labelled

C_VALUES = tuple(10.0 ** float(power) for power in np.linspace(-6, 5, 45))
MAX_ITERATIONS = 1000
TOLERANCE = 1e-12
ONE_IN = 10  # training images are for the choice of C


class LogReg(NamedTuple):
    """c: of the final fit. top1, top5: shares of the held-out images in [0, 1]; top5 is 1 below five classes.

    by_c: accuracy of each C on the tenth it was chosen on. iterations: of the final fit; MAX_ITERATIONS means that it
    was stopped there.
    """

    c: float
    top1: float
    top5: float
    by_c: dict[float, float]
    iterations: int


def log_regression(
    train: Labelled,
    test: Labelled,
    values: Sequence[float] = C_VALUES,
    say: Callable[[str], object] = lambda line: None,
) -> LogReg:
    """Choose C on a tenth of `train`, the smallest of the best; fit all of it; test.

    values: to choose from; of a single one nothing is chosen. say: is told of each. The tenth is drawn as DINOv2 does:
    the same in every run. Raises UserError where there are too few images to choose on.
    """
    x, y = train.features.double().cpu().numpy(), train.labels.cpu().numpy()
    best, by_c = values[0], dict[float, float]()
    if len(values) > 1:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).numpy()
        chosen, rest = order[: len(y) // ONE_IN], order[len(y) // ONE_IN :]
        if not len(chosen) or len(np.unique(y[rest])) < 2:
            raise UserError(f"C is chosen on a tenth of the images, and {len(y)} are too few for it: give a single one")
        for c in values:
            by_c[c] = _accuracy(_fit(x[rest], y[rest], c), x[chosen], y[chosen], 1)
            say(f"C = {c:.5g}: {100 * by_c[c]:.2f}% of {len(chosen)} training images")
        best = max(values, key=lambda c: by_c[c])
    model = _fit(x, y, best)
    x_test, y_test = test.features.double().cpu().numpy(), test.labels.cpu().numpy()
    top1, top5 = (_accuracy(model, x_test, y_test, k) for k in (1, 5))
    return LogReg(best, top1, top5, by_c, int(model.n_iter_[0]))


def _fit(x: NDArray[Any], y: NDArray[np.int64], c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # iterations say so
        return LogisticRegression(C=c, max_iter=MAX_ITERATIONS, tol=TOLERANCE).fit(x, y)


def _accuracy(model: Any, x: NDArray[Any], y: NDArray[np.int64], k: int) -> float:
    """Share of images whose class is among the first k."""
    logits = model.decision_function(x)
    if logits.ndim == 1:  # of two classes, the second one's
        logits = np.stack([-logits, logits], axis=1)
    first = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((model.classes_[first] == y[:, None]).any(1).mean())
