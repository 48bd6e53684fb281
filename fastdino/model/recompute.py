"""What is cheaper to compute again in the backward pass than to keep: norms, GELU, joined outputs of attention.

Autograd keeps the input of every linear map. Where that comes by a few passes from tensors which are kept anyway, what
makes it is kept in its place: of a block's 17 D numbers per token 10 stay. In eager mode only: a compiler decides for
itself what to compute again. Same kernels, same inputs: the gradients' bits do not change.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

Recipe = Callable[[], Tensor]

_RECIPES = WeakTensorKeyDictionary()  # of tensors that `recomputed` returned, for as long as somebody holds them


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), for `keep_recipes`. It must not draw random numbers."""
    y = function(*inputs)
    if not torch.compiler.is_compiling() and y.requires_grad:
        _RECIPES[y] = partial(function, *inputs)
    return y


def _pack(x: Tensor) -> Tensor | Recipe:
    if recipe := _RECIPES.get(x):
        return cast(Recipe, recipe)
    base = x._base  # A linear map of (B, N, D) keeps its input as (B * N, D).
    if base is not None and base.numel() == x.numel() and x.is_contiguous() and (recipe := _RECIPES.get(base)):
        return partial(_viewed, recipe, x.shape)
    return x


def _viewed(recipe: Recipe, shape: torch.Size) -> Tensor:
    return recipe().view(shape)


def _unpack(kept: Tensor | Recipe) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept()


def keep_recipes() -> AbstractContextManager[object]:
    """Inside, autograd keeps how results of `recomputed` are made, not them. Does nothing in a compiler's trace."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return saved_tensors_hooks(_pack, _unpack)
