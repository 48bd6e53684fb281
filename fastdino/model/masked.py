"""Backbone and heads over masked global crops and local ones, for DINOv2 and DINOv3.

Axes: V views, B images, N patches of a global crop, M masked patches, D channels, K prototypes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.model.head import DINOHead
from fastdino.model.multicrop import MultiCrop, runs_of
from fastdino.model.vit import VisionTransformer
from fastdino_kernels import LinearLogits
from fastdino_kernels.launch import use_triton


class MaskedOutputs(NamedTuple):
    """Of a student or a teacher, crop-major."""

    cls: Tensor
    """(V * B, D) features of CLS after the last norm."""
    logits: Tensor
    """(V * B, K) of CLS."""
    patch_logits: Tensor | LinearLogits
    """(M, K') of the masked patches, or the product that they are."""
    patches: Tensor | None
    """(2 * B, N, D) features of all patches of the global crops, where they were asked for."""


class MaskedMultiCrop(MultiCrop):
    """A Vision Transformer with a head for CLS and one for masked patches, as DINOv2 and DINOv3 train it.

    ibot_head: None where both share dino_head. State dict: `backbone.*`, `dino_head.*`, `ibot_head.*`, as the
    originals'. whole_logits: those of patches are multiplied here; else, where its loss runs as a kernel, a student
    leaves that to the loss. Source: iBOT (arXiv:2111.07832), section 3; DINOv2 (arXiv:2304.07193), section 4.
    """

    packed = True

    def __init__(self, backbone: VisionTransformer, dino_head: DINOHead, ibot_head: DINOHead | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.whole_logits = False

    @property
    def output_dim(self) -> int:
        """K, the number of prototypes that CLS is compared with."""
        return self.dino_head.out_dim

    def forward(
        self, crops: Sequence[Tensor], indices: Tensor, masks: Tensor | None = None, with_patches: bool = False
    ) -> MaskedOutputs:
        """V crops (B, 3, H, W), the global ones first, to what the heads make of CLS and of the patches at `indices`.

        indices: (M,) among the 2 * B * N patches of the global crops. masks: (2 * B, N) bool, the patches that the mask
        token replaces; None for a teacher, who sees them all.
        """
        runs, patches = runs_of(crops), None
        if with_patches:
            groups = self.backbone.forward_features(runs, [masks, *[None] * (len(runs) - 1)])
            cls, patches = torch.cat([group["cls"] for group in groups]), groups[0]["patch"]
            masked = patches.flatten(0, 1).index_select(0, indices)
        else:
            cls, masked = self.backbone.forward_masked(runs, indices, masks)
        full, (cls, masked) = cls, (x.to(next(self.dino_head.parameters()).dtype) for x in (cls, masked))
        return MaskedOutputs(full, *self._logits(cls, masked), patches)

    def _logits(self, cls: Tensor, masked: Tensor) -> tuple[Tensor, Tensor | LinearLogits]:
        """Of CLS (V * B, D) and of masked patches (M, D)."""
        leaves_product = torch.is_grad_enabled() and not self.whole_logits and use_triton(masked)
        if self.ibot_head is not None:
            return self.dino_head(cls), (self.ibot_head.linear_logits if leaves_product else self.ibot_head)(masked)
        both, sizes = torch.cat((cls, masked)), [len(cls), len(masked)]
        if not leaves_product:
            logits, patch_logits = self.dino_head(both).split(sizes)
            return logits, patch_logits
        z, prototypes = self.dino_head.linear_logits(both)
        cls_z, masked_z = z.split(sizes)
        return F.linear(cls_z, prototypes), LinearLogits(masked_z, prototypes)
