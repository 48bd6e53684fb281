"""Multinomial logistic regression with an L2 penalty on frozen features, as DINOv2 evaluates (arXiv:2304.07193).

Minimises sum over images of the cross-entropy, plus |W|^2 / (2 C); biases are not penalised. That is what scikit-learn
and cuML call LogisticRegression.
Axes: N images, D channels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ITERATIONS = 1000
TOLERANCE = 1e-12


def fit_torch(x, y, n_classes, c, start=None, max_iter=MAX_ITERATIONS, tol=TOLERANCE, history=10):
    n, d = x.shape
    w = torch.zeros(n_classes, d + 1, dtype=x.dtype, device=x.device) if start is None else start.clone()
    w.requires_grad_(True)
    opt = torch.optim.LBFGS([w], lr=1, max_iter=max_iter, max_eval=max_iter * 5 // 4, tolerance_grad=tol, tolerance_change=tol*1e-3, history_size=history, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(F.linear(x, w[:, :-1], w[:, -1]), y) + w[:, :-1].square().sum() / (2 * c * n)
        loss.backward()
        return loss

    opt.step(closure)
    return w.detach(), opt.state[w]["n_iter"], opt.state[w]["func_evals"]
