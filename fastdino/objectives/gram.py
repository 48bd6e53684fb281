"""Gram anchoring: the student's patches keep the similarities among themselves that the Gram teacher's have.

    loss = mean of (X_s X_s^T - X_t X_t^T)^2

DINOv3 (arXiv:2508.10104), equation 2. Axes: B images, N patches, D channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class GramTeacher(nn.Module):
    """Whose patches the student's are held against: a frozen backbone.

    backbone: any with `forward_features`, in the dtype it computes in. first_update, update_every, max_updates: once
    first_update iterations are done, after every update_every-th and at most max_updates times, it becomes the
    EMA teacher as that is by then; update_every 0 for never. similarities: keyword arguments of `gram`.
    Source: DINOv3 (arXiv:2508.10104), section 4.
    """

    n_updates: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        first_update: int = 0,
        update_every: int = 0,
        max_updates: int = 0,
        **similarities: bool,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone.eval().requires_grad_(False)
        self.first_update, self.update_every, self.max_updates = first_update, update_every, max_updates
        self.similarities = similarities
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, crops: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """(2 * B, N, D) patches of the two global crops (B, 3, H, W), or of larger ones of the same places.

        size: of the student's crops in pixels, to whose grid patches are resized, bicubic.
        """
        images = torch.cat(list(crops))
        patches: Tensor = self.backbone.forward_features([images])[0]["patch"]
        theirs, ours = (self.backbone.patch_embed.grid(*sides) for sides in (images.shape[-2:], size))
        if theirs == ours:
            return patches
        maps = patches.transpose(1, 2).unflatten(2, theirs)
        return F.interpolate(maps, size=ours, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def after_iteration(self, teacher: nn.Module, iteration: int) -> None:
        """Become `teacher`, the EMA teacher's backbone, where it is time. In place: a captured graph reads it."""
        done = iteration + 1
        is_due = self.update_every and done >= self.first_update and done % self.update_every == 0
        if not is_due or int(self.n_updates) >= self.max_updates:
            return
        for mine, new in zip(self.backbone.parameters(), teacher.parameters()):
            mine.copy_(new.full_tensor() if hasattr(new, "full_tensor") else new)  # of parts on several processes
        self.n_updates += 1
