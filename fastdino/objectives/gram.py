"""Gram anchoring: the student's patches keep the similarities among themselves that the Gram teacher's have.

    loss = mean of (X_s X_s^T - X_t X_t^T)^2

DINOv3 (arXiv:2508.10104), equation 2. Axes: B images, N patches, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gram(
    student: Tensor,
    teacher: Tensor,
    apply_norm: bool = True,
    img_level: bool = True,
    remove_neg: bool = False,
    remove_only_teacher_neg: bool = False,
) -> Tensor:
    """Mean squared difference of the similarities of patches; () fp32 (fp64 for fp64 features).

    student, teacher: (B, N, D); the teacher is never differentiated. apply_norm: patches of length 1. img_level: within
    each image, else within the batch. remove_neg: negative similarities of both count as 0; remove_only_teacher_neg:
    the teacher's alone, as the original's code does it. Computed in fp32 under autocast too.
    Raises ValueError where the shapes differ, or both remove_neg and remove_only_teacher_neg are asked for.
    """
    if student.ndim != 3 or student.shape != teacher.shape:
        raise ValueError(f"teacher: expected (B, N, D) like student {tuple(student.shape)}, got {tuple(teacher.shape)}")
    if remove_neg and remove_only_teacher_neg:
        raise ValueError("remove_neg, remove_only_teacher_neg: expected at most one, got both")

    def similarities(x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = F.normalize(x, dim=-1) if apply_norm else x
        x = x if img_level else x.flatten(0, 1)
        return x @ x.transpose(-1, -2)

    with torch.autocast(student.device.type, enabled=False):
        ours, target = similarities(student), similarities(teacher.detach())
        if remove_neg or remove_only_teacher_neg:
            target = target.clamp(min=0)
        return F.mse_loss(ours.clamp(min=0) if remove_neg else ours, target)
