"""The objective of DINOv2 and DINOv3: DINO's on CLS, iBOT's on masked patches, KoLeo, and Gram anchoring.

    loss = dino + ibot_weight * ibot + koleo_weight * (koleo(global 1) + koleo(global 2)) + gram_weight * gram

DINOv2 (arXiv:2304.07193), section 4; DINOv3 (arXiv:2508.10104), sections 3 and 4. Each part is a function or an op of
its own; here is what they share: the centers, the masks, the Gram teacher.
Axes: V student views, B images, N patches of a global crop, M masked patches, K prototypes, D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdino.objectives.base import Evaluated, Objective
from fastdino.objectives.gram import GramTeacher, gram
from fastdino.objectives.koleo import koleo
from fastdino_kernels import (
    LinearLogits,
    batch_center,
    center_ema_,
    dino_loss,
    dino_loss_with_stats,
    patch_loss,
    sinkhorn_center,
)

CENTERINGS = ("center", "sinkhorn")
N_GLOBAL = 2


@dataclass(frozen=True, kw_only=True)
class DINOv2Weights:
    """What the parts of the loss count."""

    ibot: float = 1.0
    koleo: float = 0.1
    """Of the sum over both global crops."""
    reweights_local: bool = False
    """DINOv3: the pairs with a local crop count row["local_weight"] times."""


DINOV2_WEIGHTS = DINOv2Weights()


class Learned(NamedTuple):
    """What `model.masked.MaskedMultiCrop` makes of the student's views."""

    cls: Tensor
    logits: Tensor
    patch_logits: Tensor | LinearLogits
    patches: Tensor | None


class Targets(NamedTuple):
    """What the teacher gives. weights: (M,) of the masked patches, 0 for padding. gram: the Gram teacher's patches."""

    logits: Tensor
    patch_logits: Tensor
    weights: Tensor
    gram: Tensor | None


class Shared(NamedTuple):
    """What a part of a batch takes from the whole of it.

    centers: of CLS and patches. koleo: its value; cls_grad: (2, b, D) its gradient at this part's features, times the
    number of parts, whose losses are averaged.
    """

    centers: tuple[Tensor, Tensor]
    koleo: Tensor
    cls_grad: Tensor


class DINOv2Loss(Objective):
    """From the views of a batch to DINOv2's or DINOv3's loss.

    Views: V crops (B, 3, H, W), globals first; masks of the two global crops, (B, N) bool each; indices and weights
    (1, M) of the masked patches, see `data.masks.MaskedBatch`; and, with a Gram teacher of other crops, those two.
    ncrops: V. out_dim, patch_out_dim: K of CLS and of patches. centering: "center" keeps running means of the teacher's
    logits, buffers center (1, K) and patch_center (1, K') in fp32, as DINO; "sinkhorn" computes each batch's own, over
    all processes. gram: the Gram teacher, None for none; gram_weight: per iteration.
    Raises ValueError for another centering, and where there is no local crop.
    """

    n_teacher_views = N_GLOBAL
    ncrops: int

    def __init__(
        self,
        *,
        ncrops: int,
        out_dim: int,
        patch_out_dim: int,
        centering: str = "sinkhorn",
        weights: DINOv2Weights = DINOV2_WEIGHTS,
        gram: GramTeacher | None = None,
        gram_weight: NDArray[np.float64] | None = None,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if centering not in CENTERINGS:
            raise ValueError(f"centering: expected {' or '.join(CENTERINGS)}, got {centering!r}")
        if ncrops <= N_GLOBAL:
            raise ValueError(f"ncrops: expected a local crop beside the two global ones, got {ncrops} crops")
        self.ncrops, self.centering, self.weights = ncrops, centering, weights
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.gram_teacher, self._gram_weight = gram, gram_weight
        self._is_anchored = gram is not None
        if centering == "center":
            self.register_buffer("center", torch.zeros(1, out_dim))
            self.register_buffer("patch_center", torch.zeros(1, patch_out_dim))
        self.meets_others = centering == "sinkhorn" and dist.is_initialized()
        self.sees_whole_batch = centering == "sinkhorn" or weights.koleo > 0
        names = ("teacher_entropy", "kl", "ibot_loss", "koleo_loss")
        self.metric_names = (*names, "gram_loss") if gram else names

    def columns(self, epochs: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """What Gram anchoring counts, where there is a Gram teacher."""
        return {} if self._gram_weight is None else {"gram_weight": self._gram_weight}

    @property
    def _anchor(self) -> GramTeacher | None:
        """The Gram teacher, once it counts."""
        return self.gram_teacher if self._is_anchored else None

    def before_iteration(self, iteration: int) -> bool:
        """Whether Gram anchoring begins, or ends, with it: until then nothing of it is computed."""
        was, weights = self._is_anchored, self._gram_weight
        self._is_anchored = self.gram_teacher is not None and (weights is None or bool(weights[iteration]))
        return self._is_anchored != was

    def _masked(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (2 * B, N), indices (M,) and weights (M,) of the masked patches."""
        mask1, mask2, indices, weights = views[self.ncrops : self.ncrops + 4]
        return torch.cat((mask1, mask2)), indices.flatten(), weights.flatten()

    def teach(self, teacher: nn.Module, views: Sequence[Tensor]) -> Targets:
        """The teacher's logits, and the Gram teacher's patches."""
        crops, (_, indices, weights), anchor = views[:N_GLOBAL], self._masked(views), self._anchor
        taught = teacher(crops, indices)
        anchored = None if anchor is None else anchor(views[self.ncrops + 4 :] or crops, crops[0].shape[-2:])
        return Targets(taught.logits, taught.patch_logits, weights, anchored)

    def learn(self, student: nn.Module, views: Sequence[Tensor]) -> Learned:
        """The student's features and logits, of masked global crops and of local ones."""
        masks, indices, _ = self._masked(views)
        return Learned(*student(views[: self.ncrops], indices, masks, with_patches=self._anchor is not None))

    def evaluate(
        self, learned: Learned, taught: Targets, row: Mapping[str, Tensor], shared: Shared | None = None
    ) -> Evaluated:
        """Loss; its parts, unweighted, beside entropy and KL in nats; mean teacher logits (K + K',) for the centers."""
        temp, n_crops = row["teacher_temp"], N_GLOBAL * (len(learned.logits) // self.ncrops)
        center, patch_center = shared.centers if shared else self.centers(taught, temp)
        views, targets = learned.logits.unflatten(0, (self.ncrops, -1)), taught.logits.unflatten(0, (N_GLOBAL, -1))
        stats = dino_loss_with_stats(views, targets, center, self.student_temp, temp)
        loss = self._weighed(stats.loss, views, targets, center, row)
        patches = learned.patch_logits, taught.patch_logits
        weights = taught.weights.to(stats.loss.dtype) / n_crops
        ibot = patch_loss(*patches, patch_center, weights, self.student_temp, temp)
        spread, pull = self._koleo(learned.cls[:n_crops], shared)
        metrics = [stats.teacher_entropy, stats.kl, ibot, spread]
        loss = loss + self.weights.ibot * ibot + self.weights.koleo * pull
        if self._anchor is not None:
            assert learned.patches is not None
            assert taught.gram is not None
            anchored = gram(learned.patches, taught.gram, **self._anchor.similarities)
            loss = loss + row["gram_weight"] * anchored
            metrics.append(anchored)
        elif self.gram_teacher is not None:
            metrics.append(torch.zeros_like(ibot))
        return loss, tuple(x.detach() for x in metrics), self._means(taught)

    def _weighed(
        self, loss: Tensor, views: Tensor, targets: Tensor, center: Tensor, row: Mapping[str, Tensor]
    ) -> Tensor:
        """DINO's loss over all pairs of different views; those with a local crop weighed, where that is asked for."""
        if not self.weights.reweights_local:
            return loss
        temps, share = (self.student_temp, row["teacher_temp"]), 1 / (self.ncrops - 1)  # 2 of 2 * (V - 1) pairs
        crossed = share * dino_loss(views[:N_GLOBAL], targets, center, *temps)
        return crossed + row["local_weight"] * (loss - crossed)

    def _koleo(self, cls: Tensor, shared: Shared | None) -> tuple[Tensor, Tensor]:
        """(its value, what has its gradient): the sum over both global crops. cls: (2 * b, D)."""
        if not self.weights.koleo:
            return cls.new_zeros(()), cls.new_zeros(())
        if shared is None:
            value = sum((koleo(x) for x in cls.chunk(N_GLOBAL)), cls.new_zeros(()))
            return value, value
        pull = (cls * shared.cls_grad.flatten(0, 1)).sum()
        return shared.koleo, shared.koleo + (pull - pull.detach())

    def centers(self, taught: Targets, temp: Tensor) -> tuple[Tensor, Tensor]:
        """(K,), (K',): what is subtracted from the teacher's logits of CLS and of patches."""
        if self.centering == "center":
            return self.get_buffer("center")[0], self.get_buffer("patch_center")[0]
        group = dist.group.WORLD if dist.is_initialized() else None
        return (
            sinkhorn_center(taught.logits, temp, group=group),
            sinkhorn_center(taught.patch_logits, temp, weights=taught.weights, group=group),
        )

    def share(self, learned: Sequence[Learned], taught: Sequence[Targets], row: Mapping[str, Tensor]) -> list[Shared]:
        """Centers and KoLeo of a batch as a whole, whatever the parts that it is computed in."""
        logits, patch_logits, weights, _ = zip(*taught)
        whole = Targets(torch.cat(logits), torch.cat(patch_logits), torch.cat(weights), None)
        centers = self.centers(whole, row["teacher_temp"])
        n = N_GLOBAL * len(learned[0].cls) // self.ncrops
        cls = torch.stack([part.cls[:n].unflatten(0, (N_GLOBAL, -1)) for part in learned], 1)  # (2, parts, b, D)
        with torch.enable_grad():
            leaf = cls.detach().requires_grad_()
            value, _ = self._koleo(leaf.flatten(0, 2), None)
            grad = torch.autograd.grad(value, leaf)[0] if self.weights.koleo else torch.zeros_like(cls)
        return [Shared(centers, value.detach(), len(learned) * part) for part in grad.unbind(1)]

    def _means(self, taught: Targets) -> Tensor:
        """(K + K',) mean logits of CLS and of the masked patches, or (0,) where nothing wants them."""
        if self.centering != "center":
            return taught.logits.new_zeros(0)
        logits, counted = taught.patch_logits, taught.weights != 0
        full = torch.promote_types(logits.dtype, torch.float32)
        total = torch.sum(logits * counted[:, None].to(logits.dtype), 0, dtype=full)
        patches = total / counted.sum().clamp(min=1)
        return torch.cat((batch_center(taught.logits[None]), patches))

    @torch.no_grad()
    def after_step(self, mean: Tensor) -> None:
        """The centers move, by the mean over processes of what each of them found."""
        if self.centering != "center":
            return
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        for name, part in zip(("center", "patch_center"), mean.split(self._sizes())):
            center_ema_(self.get_buffer(name)[0], part, self.center_momentum)

    def _sizes(self) -> list[int]:
        return [self.get_buffer(name).shape[1] for name in ("center", "patch_center")]

    def after_iteration(self, teacher: Any, iteration: int) -> None:
        """The Gram teacher is renewed where it is time."""
        if self.gram_teacher is not None:
            self.gram_teacher.after_iteration(teacher.backbone, iteration)
