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
from torch import Tensor, nn

from fastdino import MultiCropWrapper, get_params_groups
from fastdino.objectives import DINOLoss
from fastdino.train.schedules import Schedules


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """(V, B, K), (T, B, K), (K,) -> (): over all pairs of different views, one by one."""
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1).detach()
    scaled = student / student_temp
    pairs = [(q, p) for t, q in enumerate(targets) for v, p in enumerate(scaled) if v != t]
    return sum(torch.sum(-q * F.log_softmax(p, dim=-1), dim=-1).mean() for q, p in pairs) / len(pairs)


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


class _Attention(nn.Module):
    """q k^T, softmax, times v, each a tensor in memory; or SDPA."""

    def __init__(self, ours: Any, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj = ours.qkv, ours.proj
        self.n_heads, self.scale, self.fused = ours.num_heads, ours.scale, fused

    def forward(self, x: Tensor) -> Tensor:
        n_images, n_tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n_images, n_tokens, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            out = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n_images, n_tokens, dim))


class _Block(nn.Module):
    def __init__(self, ours: Any, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = ours.norm1, ours.norm2, ours.mlp
        self.attn = _Attention(ours.attn, fused)
        self.drop_path = ours.drop_path

    def _drop(self, x: Tensor) -> Tensor:
        if not self.drop_path or not self.training:
            return x
        keep = 1 - self.drop_path
        return x / keep * torch.floor(keep + torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))


class _Backbone(nn.Module):
    """Our Vision Transformer's parameters in a plain forward: a convolution, then blocks over (B, N, D)."""

    def __init__(self, ours: Any, fused: bool) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = ours.patch_embed, ours.cls_token, ours.pos_embed
        self.blocks = nn.ModuleList(_Block(block, fused) for block in ours.blocks)
        self.norm, self.positions = ours.norm, ours.interpolate_pos_encoding

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), dim=1) + self.positions(*x.shape[-2:])
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


class _Head(nn.Module):
    """Our head's parameters under PyTorch's weight_norm, which writes all normalised prototypes in every forward."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.mlp, self.last_layer = ours.mlp, ours.last_layer

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(self.last_layer.weight_v, self.last_layer.weight_g, 0)
        return F.linear(F.normalize(self.mlp(x), dim=-1, p=2), weight)


class _Network(nn.Module):
    """A backbone pass per resolution, a head pass over all."""

    def __init__(self, ours: MultiCropWrapper, fused: bool) -> None:
        super().__init__()
        self.backbone, self.head = _Backbone(ours.backbone, fused), _Head(ours.head)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        runs = [torch.cat(list(run)) for _, run in groupby(crops, key=lambda x: x.shape[-1])]
        features = torch.cat([self.backbone(run) for run in runs])
        return self.head(features if features.dtype == torch.float64 else features.float())


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
        self.networks = _Network(student, self.fused), _Network(teacher, self.fused)
        how = {"fused": True} if self.fused else {"foreach": False}
        self.optimizer = torch.optim.AdamW(get_params_groups(student), lr=0.0, **how)

    def forward(self, crops: Sequence[Tensor], epoch: int) -> tuple[Tensor, Tensor]:
        """(loss, teacher logits (2 * B, K))."""
        student, teacher = self.networks
        with torch.autocast(self.params[0].device.type, self.amp_dtype) if self.amp_dtype else nullcontext():
            with torch.no_grad():
                targets = teacher(crops[:2])
            logits = student(crops)
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
