"""What a step is measured against: the original's structure, and the best a careful user gets without us.

Both take our networks' weights under the same names and the calls of `fastdino.train.step.TrainStep`, and end the
golden trajectories at the original's weights. Written for the comparison, from the paper's algorithm 1 and the facts
in `tests/golden`; no code of the original is in here.
Axes: V views (two global, then local), T teacher views, B images, N tokens, H heads, K prototypes.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdino import DINOHead, MultiCropWrapper, get_params_groups
from fastdino.model.archs import ARCHITECTURES
from fastdino.objectives import DINOLoss
from fastdino.train.schedules import Schedules


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """(V, B, K), (T, B, K), (K,) -> (): over all pairs of different views, one by one."""
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1).detach()
    scaled = student / student_temp
    pairs = [(q, p) for t, q in enumerate(targets) for v, p in enumerate(scaled) if v != t]
    return sum(torch.sum(-q * F.log_softmax(p, dim=-1), dim=-1).mean() for q, p in pairs) / len(pairs)


def plain_patch_loss(
    student: Tensor, teacher: Tensor, center: Tensor, weights: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """(M, K), (M, K), (K,), (M,) -> (): iBOT's loss as DINOv3 computes it, in fp32."""
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1)
    student = student.to(targets.dtype)
    return -(torch.sum(targets * F.log_softmax(student / student_temp, dim=-1), dim=-1) * weights).sum()


@torch.no_grad()
def plain_sinkhorn_center(teacher: Tensor, temp: float) -> Tensor:
    """(M, K) -> (K,): columns and rows of exp(teacher / temp) divided in turn, three times, as in SwAV and DINOv2.

    Returned is what the columns were divided by, as a center.
    """
    scaled = teacher.to(torch.promote_types(teacher.dtype, torch.float32)) / temp
    log_divisors = scaled.amax()
    probs = torch.exp(scaled - log_divisors)
    for _ in range(3):
        share = probs.mean(0)
        probs = probs / share
        probs = probs / probs.mean(1, keepdim=True)
        log_divisors = log_divisors + share.log()
    return temp * log_divisors


def plain_clip(params: Sequence[Tensor], clip_grad: float) -> None:
    """Each gradient by its own norm; the host waits for every one."""
    for p in params:
        if p.grad is not None:
            coefficient = clip_grad / (p.grad.norm(2) + 1e-6)
            if coefficient < 1:
                p.grad.mul_(coefficient)


def foreach_clip(params: Sequence[Tensor], clip_grad: float) -> None:
    """The same in a few launches, and the host waits for none."""
    grads = [p.grad for p in params if p.grad is not None]
    norms = torch._foreach_norm(grads)
    torch._foreach_add_(norms, 1e-6)
    torch._foreach_reciprocal_(norms)
    torch._foreach_mul_(norms, clip_grad)
    torch._foreach_clamp_max_(norms, 1.0)
    torch._foreach_mul_(grads, norms)


def plain_ema(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    for x, y in zip(teacher, student):
        x.mul_(momentum).add_((1 - momentum) * y)


def foreach_ema(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    torch._foreach_lerp_(teacher, student, 1 - momentum)


def _attention(attn: Any, x: Tensor, fused: bool) -> Tensor:
    """q k^T, softmax, times v, each a tensor in memory; or SDPA."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
    else:
        out = ((q @ k.transpose(-2, -1)) * attn.scale).softmax(dim=-1) @ v
    return attn.proj(out.transpose(1, 2).flatten(2))


def _backbone(vit: Any, x: Tensor, fused: bool) -> Tensor:
    """A convolution, then blocks over (B, N, D); without drop-path."""
    tokens = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat((vit.cls_token.expand(len(x), -1, -1), tokens), dim=1)
    tokens = tokens + vit.interpolate_pos_encoding(tokens, *x.shape[-2:])
    for block in vit.blocks:
        tokens = tokens + _attention(block.attn, block.norm1(tokens), fused)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
    return vit.norm(tokens)[:, 0]


def plain_logits(network: MultiCropWrapper, crops: Sequence[Tensor], fused: bool) -> Tensor:
    """(V * B, K), from a network's own parameters: a backbone pass per resolution, a head pass over all.

    PyTorch's weight_norm writes all normalised prototypes in every forward.
    """
    runs = [torch.cat(list(run)) for _, run in groupby(crops, key=lambda x: x.shape[-1])]
    features = torch.cat([_backbone(network.backbone, run, fused) for run in runs])
    head, last = network.head, network.head.last_layer
    bottleneck = head.mlp(features if features.dtype == torch.float64 else features.float())
    return F.linear(F.normalize(bottleneck, dim=-1), torch._weight_norm(last.weight_v, last.weight_g, 0))


def step_flops(arch: str, batch: int, n_local: int = 8, out_dim: int = 65536) -> int:
    """Of a step with two crops of 224 pixels and n_local of 96; a FLOP is one multiplication or one addition.

    PyTorch counts the products of `plain_logits`, also those that `fastdino.model` leaves out (most of the last block's
    patches, a 16th of a 12-block backbone). Norms, GELU, loss and optimizer are bound by memory and count nothing. A
    student's crop counts three forwards (forward, gradients by input and by weight), a teacher's one.
    """
    with torch.device("meta"):  # shapes alone
        backbone = ARCHITECTURES[arch]()
        network = MultiCropWrapper(backbone, DINOHead(backbone.embed_dim, out_dim))
        crops = [torch.empty(batch, 3, side, side) for side in (224, 224, *[96] * n_local)]

    def forward_flops(crops: Sequence[Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            plain_logits(network, crops, fused=False)
        return counter.get_total_flops()

    return 3 * forward_flops(crops) + forward_flops(crops[:2])


class PlainStep:
    """(a) The original's structure: naive attention, a loop over pairs of views, a loop over parameters for each of
    clip, AdamW and EMA, with the host looking at every norm; autocast where amp_dtype is given.
    """

    fused = False
    clip, average = staticmethod(plain_clip), staticmethod(plain_ema)

    def __init__(
        self, *, student: MultiCropWrapper, teacher: MultiCropWrapper, loss: DINOLoss, schedules: Schedules,
        niter_per_ep: int, clip_grad: float, freeze_last_layer: int, amp_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.loss, self.schedules = student, teacher, copy.deepcopy(loss), schedules
        self.niter_per_ep, self.clip_grad, self.freeze_last_layer = niter_per_ep, clip_grad, freeze_last_layer
        self.amp_dtype = amp_dtype
        self.params = [p for p in student.parameters() if p.requires_grad]
        self.last_layer = [p for name, p in student.named_parameters() if "last_layer" in name]
        how = {"fused": True} if self.fused else {"foreach": False}
        self.optimizer = torch.optim.AdamW(get_params_groups(student), lr=0.0, **how)

    def forward(self, crops: Sequence[Tensor], epoch: int) -> tuple[Tensor, Tensor]:
        """(loss, teacher logits (2 * B, K))."""
        with torch.autocast(self.params[0].device.type, self.amp_dtype) if self.amp_dtype else nullcontext():
            with torch.no_grad():
                targets = plain_logits(self.teacher, crops[:2], self.fused)
            logits = plain_logits(self.student, crops, self.fused)
        if logits.dtype != torch.float64:
            logits, targets = logits.float(), targets.float()
        views = (x.unflatten(0, (-1, len(crops[0]))) for x in (logits, targets))
        temps = self.loss.student_temp, float(self.loss.teacher_temp_schedule[epoch])
        return plain_loss(*views, self.loss.center, *temps), targets

    def __call__(self, crops: Sequence[Tensor], iteration: int) -> Tensor:
        """The loss () of an iteration, after which the weights have changed."""
        epoch = iteration // self.niter_per_ep
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.schedules.lr[iteration])
            if i == 0:
                group["weight_decay"] = float(self.schedules.weight_decay[iteration])
        loss, targets = self.forward(crops, epoch)
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            if self.clip_grad:
                self.clip(self.params, self.clip_grad)
            if epoch < self.freeze_last_layer:
                for p in self.last_layer:
                    p.grad = None
            self.optimizer.step()
            networks = (list(network.parameters()) for network in (self.teacher, self.student))
            self.average(*networks, float(self.schedules.momentum_teacher[iteration]))
            self.loss.center.mul_(0.9).add_(0.1 * targets.mean(dim=0))
        return loss.detach()


class CarefulStep(PlainStep):
    """(b) What PyTorch offers: SDPA, fused AdamW, foreach clip and EMA; forward and loss compiled where asked."""

    fused = True
    clip, average = staticmethod(foreach_clip), staticmethod(foreach_ema)

    def __init__(self, *, compiled: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if compiled:
            self.forward = torch.compile(self.forward, dynamic=False)  # type: ignore[method-assign]
