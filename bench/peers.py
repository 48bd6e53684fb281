"""What others offer for the same work, imported where it is installed and never copied.

$FASTDINO_PEERS names a checkout of the original (main_dino.py, utils.py, vision_transformer.py). Whoever is not here is
absent, by name, with the reason.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import CarefulStep, PlainStep

ORIGINAL = ("vision_transformer", "utils", "main_dino")


class Absent(Exception):
    """A peer that cannot be measured here, and why."""


def need(package: str) -> ModuleType:
    """Import a package. Raises Absent."""
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    try:
        return importlib.import_module(package)
    except Exception as error:  # built for another torch, a missing library ...
        raise Absent(f"{package} cannot be imported: {error}") from error


@cache
def original() -> SimpleNamespace:
    """The original's three modules. Raises Absent."""
    folder = os.environ.get("FASTDINO_PEERS")
    if not folder:
        raise Absent("FASTDINO_PEERS does not name a checkout of the original")
    if missing := [name for name in ORIGINAL if not (Path(folder) / f"{name}.py").is_file()]:
        raise Absent(f"FASTDINO_PEERS={folder} holds no {missing[0]}.py")
    sys.path.insert(0, folder)
    before = {name: sys.modules.pop(name) for name in ORIGINAL if name in sys.modules}
    try:
        found = SimpleNamespace(**{name: importlib.import_module(name) for name in ORIGINAL})
    except Exception as error:
        raise Absent(f"the original cannot be imported: {error}") from error
    finally:  # `utils` is a name that anyone may want
        sys.path.remove(folder)
        for name in ORIGINAL:
            sys.modules.pop(name, None)
        sys.modules.update(before)
    if not torch.distributed.is_initialized():  # its center is all-reduced, by one process too
        store = f"file://{tempfile.mkdtemp()}/store"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
    return found


class OriginalStep(PlainStep):
    """The original's own networks, loss, clip and parameter groups, in its own order."""

    def __init__(self, **options: Any) -> None:
        self.code = original()
        super().__init__(**options)

    def make_networks(self) -> tuple[Any, Any]:
        return self._network(self.student), self._network(self.teacher)

    def _network(self, ours: Any) -> Any:
        backbone, head = ours.backbone, ours.head
        theirs = self.code.vision_transformer.VisionTransformer(
            img_size=[backbone.patch_embed.img_size],
            patch_size=backbone.patch_embed.patch_size,
            embed_dim=backbone.embed_dim,
            depth=len(backbone.blocks),
            num_heads=backbone.blocks[0].attn.num_heads,
            qkv_bias=True,
        )
        first, *_, narrow = (m for m in head.mlp if isinstance(m, torch.nn.Linear))
        their_head = self.code.vision_transformer.DINOHead(
            first.in_features,
            head.out_dim,
            norm_last_layer=not head.last_layer.weight_g.requires_grad,
            hidden_dim=first.out_features,
            bottleneck_dim=narrow.out_features,
        )
        network = self.code.utils.MultiCropWrapper(theirs, their_head).to(self.params[0])
        network.load_state_dict(ours.state_dict())
        for theirs_, ours_ in zip(network.parameters(), ours.parameters()):
            theirs_.requires_grad_(ours_.requires_grad)
        return network

    def prepare(self) -> None:
        """Everything from here on is theirs."""
        temps = self.loss.teacher_temp_schedule
        n_prototypes, n_crops = self.loss.center.shape[1], self.loss.ncrops
        self.criterion = self.code.main_dino.DINOLoss(n_prototypes, n_crops, temps[0], temps[-1], 0, len(temps))
        self.criterion.to(self.params[0]).teacher_temp_schedule = temps
        self.student, self.teacher = self.networks
        self.params = [p for p in self.student.parameters() if p.requires_grad]

    def groups(self) -> Any:
        return self.code.utils.get_params_groups(self.student)

    def compute_loss(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        loss = self.criterion(student, teacher, epoch)  # moves its center
        assert isinstance(loss, Tensor)
        return loss

    def _clip(self) -> None:
        self.code.utils.clip_gradients(self.student, self.clip_grad)

    def freeze(self, epoch: int) -> None:
        self.code.utils.cancel_gradients_last_layer(epoch, self.student, self.freeze_last_layer)

    def move_center(self, teacher_output: Tensor) -> None:
        """The loss has."""


class TimmStep(CarefulStep):
    """The careful step with timm's Vision Transformer and its way to interpolate positions."""

    def make_networks(self) -> tuple[Any, Any]:
        return self._network(self.student), self._network(self.teacher)

    def _network(self, ours: Any) -> Any:
        timm = need("timm")
        backbone = ours.backbone
        theirs = timm.models.vision_transformer.VisionTransformer(
            img_size=backbone.patch_embed.img_size,
            patch_size=backbone.patch_embed.patch_size,
            embed_dim=backbone.embed_dim,
            depth=len(backbone.blocks),
            num_heads=backbone.blocks[0].attn.num_heads,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
        ).to(self.device)
        theirs.load_state_dict(backbone.state_dict())
        for name, param in ours.backbone.named_parameters():  # one set of weights: ours
            parent, _, leaf = name.rpartition(".")
            setattr(theirs.get_submodule(parent), leaf, param)
        network = super().make_networks()[0 if ours is self.student else 1]
        network.backbone = theirs
        return network


def lightly_loss(out_dim: int, student_temp: float, teacher_temp: float, center: Tensor) -> Callable[..., Tensor]:
    """lightly's DINOLoss over (V, B, K) and (T, B, K). Raises Absent."""
    need("lightly")
    try:
        from lightly.loss import DINOLoss
    except Exception as error:
        raise Absent(f"lightly cannot be imported: {error}") from error
    loss = DINOLoss(
        out_dim, warmup_teacher_temp=teacher_temp, teacher_temp=teacher_temp, warmup_teacher_temp_epochs=1,
        student_temp=student_temp,
    ).to(center.device)  # fmt: skip
    state = {name: center.view_as(x) for name, x in loss.state_dict().items() if x.numel() == center.numel()}

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        loss.load_state_dict(state, strict=False)  # it moves its center at every call
        value = loss(list(teacher.float()), list(student.float()), epoch=1)
        assert isinstance(value, Tensor)
        return value

    return run


def liger_loss(student_temp: float, teacher_temp: float, center: Tensor) -> Callable[..., Tensor]:
    """H(q, p) = KL(q, p) + H(q), by Liger's KL for every pair of different views. Raises Absent."""
    if center.device.type != "cuda":
        raise Absent("Liger's kernels need a CUDA device")
    need("liger_kernel")
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean")

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        terms: list[Tensor] = []
        log_probs: Sequence[Tensor] = [F.log_softmax(x.float() / student_temp, dim=-1) for x in student]
        for t, logits in enumerate(teacher):
            log_q = F.log_softmax((logits.float() - center) / teacher_temp, dim=-1)
            q = log_q.exp()
            entropy = -(q * log_q).sum(-1).mean()
            terms += [divergence(p, q) + entropy for v, p in enumerate(log_probs) if v != t]
        return torch.stack(terms).mean()

    return run
