"""The step without us, twice: as the original is structured, and as a careful user of PyTorch would write it.

Both start from the state of our networks, take the same crops and end at the original's weights
(tests/test_baselines.py), so a difference in time is a difference in how, not in what.
Axes: V views, B images, N tokens, H heads, D channels, K prototypes.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.loss import N_TEACHER_VIEWS, DINOLoss
from fastdino.model.multicrop import MultiCropWrapper
from fastdino.model.vit import VisionTransformer
from fastdino.train.optim import get_params_groups
from fastdino.train.schedules import Schedules


class PlainAttention(nn.Module):
    """q k^T, softmax, v: every matrix written to memory. naive=False: PyTorch's fused attention instead."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, naive: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.naive = num_heads, (dim // num_heads) ** -0.5, naive
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n_images, n_tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n_images, n_tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.naive:
            out = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(n_images, n_tokens, dim))


def rewrite(network: MultiCropWrapper, naive: bool) -> MultiCropWrapper:
    """A copy of the network, same names and weights, with the attention above in every block."""
    network = copy.deepcopy(network)
    assert isinstance(network.backbone, VisionTransformer)
    for block in network.backbone.blocks:
        ours = block.attn
        plain = PlainAttention(ours.proj.in_features, ours.num_heads, ours.qkv.bias is not None, naive)
        plain.to(ours.qkv.weight.device, ours.qkv.weight.dtype).load_state_dict(ours.state_dict())
        for param, mine in zip(plain.parameters(), ours.parameters(), strict=True):
            param.requires_grad = mine.requires_grad
        block.attn = plain
    return network


class _Step:
    """What both share: networks, schedules, optimizer and center."""

    def __init__(
        self,
        *,
        student: MultiCropWrapper,
        teacher: MultiCropWrapper,
        loss: DINOLoss,
        schedules: Schedules,
        niter_per_ep: int,
        clip_grad: float,
        freeze_last_layer: int,
        amp_dtype: torch.dtype | None = None,
        naive: bool,
        optimizer_options: dict[str, bool],
    ) -> None:
        self.student, self.teacher = rewrite(student, naive), rewrite(teacher, naive)
        self.loss = copy.deepcopy(loss)
        self.optimizer = torch.optim.AdamW(get_params_groups(self.student), lr=0.0, **optimizer_options)
        self.schedules, self.niter_per_ep = schedules, niter_per_ep
        self.clip_grad, self.freeze_last_layer, self.amp_dtype = clip_grad, freeze_last_layer, amp_dtype

    def _forward(self, network: nn.Module, crops: Sequence[Tensor]) -> Tensor:
        # (V*B, K): one pass of the backbone per resolution, one of the head over all.
        assert isinstance(network, MultiCropWrapper)
        features = [network.backbone(torch.cat(list(run))) for _, run in groupby(crops, key=lambda x: x.shape[-1])]
        joined = torch.cat(features)
        return network.head(joined if joined.dtype == torch.float64 else joined.float())

    def _loss(self, student: Tensor, teacher: Tensor, n_views: int, temp: float) -> Tensor:
        # The double loop over pairs of views; (V*B, K), (2B, K) -> ().
        student_views = (student / 0.1).chunk(n_views)
        teacher_views = F.softmax((teacher - self.loss.center) / temp, dim=-1).detach().chunk(N_TEACHER_VIEWS)
        total, n_terms = torch.zeros((), device=student.device, dtype=student.dtype), 0
        for t, probs in enumerate(teacher_views):
            for v, logits in enumerate(student_views):
                if t != v:
                    total = total + torch.sum(-probs * F.log_softmax(logits, dim=-1), dim=-1).mean()
                    n_terms += 1
        return total / n_terms

    def _clip(self) -> None:
        raise NotImplementedError

    def _ema(self, momentum: float) -> None:
        raise NotImplementedError

    def __call__(self, crops: Sequence[Tensor], iteration: int) -> Tensor:
        """V normalised crops (B, 3, H, W) and the iteration over the whole run -> the loss, 0-D."""
        epoch = iteration // self.niter_per_ep
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.schedules.lr[iteration])
            if i == 0:
                group["weight_decay"] = float(self.schedules.weight_decay[iteration])
        device = crops[0].device.type
        cast: AbstractContextManager[object] = (
            torch.autocast(device, self.amp_dtype) if self.amp_dtype else nullcontext()
        )
        with cast:
            with torch.no_grad():
                teacher = self._forward(self.teacher, crops[:N_TEACHER_VIEWS])
            student = self._forward(self.student, crops)
            temp = float(self.loss.teacher_temp_schedule[epoch])
            loss = self._loss(student, teacher, len(crops), temp)
        with torch.no_grad():
            mean = teacher.to(self.loss.center.dtype).mean(dim=0, keepdim=True)
            self.loss.center.copy_(self.loss.center * 0.9 + mean * (1 - 0.9))
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_grad:
            self._clip()
        if epoch < self.freeze_last_layer:
            for name, param in self.student.named_parameters():
                if "last_layer" in name:
                    param.grad = None
        self.optimizer.step()
        self._ema(float(self.schedules.momentum_teacher[iteration]))
        return loss.detach()


class PlainStep(_Step):
    """As the original is structured: naive attention, a host sync per clipped tensor, loops over parameters."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options, naive=True, optimizer_options={})  # type: ignore[arg-type]

    def _clip(self) -> None:
        for param in self.student.parameters():
            if param.grad is not None:
                coef = self.clip_grad / (param.grad.norm().item() + 1e-6)
                if coef < 1:
                    param.grad.mul_(coef)

    @torch.no_grad()
    def _ema(self, momentum: float) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.mul_(momentum).add_((1 - momentum) * theirs.detach())


class CarefulStep(_Step):
    """The best without us: SDPA, fused AdamW, foreach clip and EMA. compiled: the two networks under torch.compile."""

    def __init__(self, *, compiled: bool = False, **options: object) -> None:
        super().__init__(**options, naive=False, optimizer_options={"fused": True})  # type: ignore[arg-type]
        if compiled:
            self._forward = torch.compile(self._forward, dynamic=False)  # type: ignore[method-assign]

    def _clip(self) -> None:
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        torch._foreach_mul_(grads, list((self.clip_grad / (norms + 1e-6)).clamp(max=1.0).unbind()))

    @torch.no_grad()
    def _ema(self, momentum: float) -> None:
        mine, theirs = list(self.teacher.parameters()), [p.detach() for p in self.student.parameters()]
        torch._foreach_mul_(mine, momentum)
        torch._foreach_add_(mine, theirs, alpha=1 - momentum)
