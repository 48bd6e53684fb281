"""Which kernels a step computes with: each chosen once, for the crops it will see, on the device at hand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdino.model import attention_choice, mlp
from fastdino.model.multicrop import MultiCrop
from fastdino.model.timing import Choice

CHOICES = {"attention": attention_choice.choose_for, "MLP": mlp.choose_for}


def choose_kernels(
    student: MultiCrop,
    crops: Sequence[Tensor],
    n_teacher_views: int,
    dtype: torch.dtype,
    asked: Sequence[str],
    compiled: bool,
) -> dict[str, Choice]:
    """By name; without those that the backbone has no use for. asked: for attention and MLP, a name or auto.

    A collective, where there are several processes: the choices are the same on all.
    """
    choices = (
        (name, choose_for(student, crops, n_teacher_views, dtype, name_asked, compiled))
        for (name, choose_for), name_asked in zip(CHOICES.items(), asked, strict=True)
    )
    return {name: choice for name, choice in choices if choice}
