"""Which parameters share a learning rate and a weight decay, and what the schedules are multiplied with for each.

DINO has two groups; DINOv2 (arXiv:2304.07193) and DINOv3 a factor per parameter: layer-wise decay of the learning rate
as in BEiT (arXiv:2106.08254), the deeper, the faster.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

# What comes before the first block. DINOv2 calls register tokens so, DINOv3 storage tokens.
EMBEDDING = ("cls_token", "pos_embed", "mask_token", "register_tokens", "storage_tokens", "patch_embed")
_BLOCK = re.compile(r"blocks\.(?:\d+\.)?(\d+)\.")  # blocks.3. or, in chunks, blocks.<chunk>.3.


class Multipliers(NamedTuple):
    """Of one parameter. is_last_layer: its rate is the last layers' own, which is 0 while they are frozen."""

    lr: float
    weight_decay: float
    is_last_layer: bool


def layer_of(name: str, depth: int) -> int:
    """0 for the embedding, i + 1 for block i, depth + 1 for what follows the blocks."""
    if name.startswith(EMBEDDING):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else depth + 1


def backbone_multipliers(name: str, depth: int, lr_decay: float, patch_embed_lr: float = 1.0) -> Multipliers:
    """Of a backbone's parameter by its name in the state_dict. lr_decay: per layer. patch_embed_lr: on top of it."""
    lr = lr_decay ** (depth + 1 - layer_of(name, depth))
    return Multipliers(lr * patch_embed_lr if "patch_embed" in name else lr, _weight_decay(name), False)


def head_multipliers(name: str) -> Multipliers:
    """Of a head's parameter: the whole rate, whatever its depth."""
    return Multipliers(1.0, _weight_decay(name), "last_layer" in name)


def _weight_decay(name: str) -> float:
    """Biases, norms and LayerScale do not decay; tokens, positions and weight_g do."""
    return 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0


def get_params_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: parameters that decay, and those that do not (names ending in `.bias`, and vectors).

    Frozen parameters are left out. The second group carries weight_decay = 0.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (not_decayed if name.endswith(".bias") or param.ndim == 1 else decayed).append(param)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


class Group(NamedTuple):
    """Parameters that share what the schedules are multiplied with."""

    params: list[nn.Parameter]
    multipliers: Multipliers

    def columns(self, columns: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Learning rate and weight decay per iteration, from the run's."""
        rate = columns["last_layer_lr" if self.multipliers.is_last_layer else "lr"]
        return rate * self.multipliers.lr, columns["weight_decay"] * self.multipliers.weight_decay


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How gradients become an update where that is not as in DINO."""

    clips_modules: bool = False
    """Whether clip_grad holds for all gradients of the backbone together, and for those of each head, as in DINOv2."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    multipliers: Callable[[str], Multipliers] | None = None
    """Of a parameter, by its name in the student. None: DINO's, 1 and, for weight decay, 0 for biases and vectors."""

    def groups(self, student: nn.Module) -> list[Group]:
        """The parameters that are trained, in the order in which the optimizer keeps them."""
        if self.multipliers is None:
            return [
                Group(group["params"], Multipliers(1.0, group.get("weight_decay", 1.0), False))
                for group in get_params_groups(student)
            ]
        found: dict[Multipliers, list[nn.Parameter]] = {}
        for name, param in student.named_parameters():
            if param.requires_grad:
                found.setdefault(self.multipliers(name), []).append(param)
        return [Group(params, multipliers) for multipliers, params in found.items()]

    def columns(self, student: nn.Module, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """What each group reads of the schedules' row, by the names `_names` gives."""
        found: dict[str, NDArray[np.float64]] = {}
        for i, group in enumerate(self.groups(student)):
            found.update(zip(column_names(i), group.columns(columns)))
        return found


DINOS_TUNING = Tuning()


def frozen_columns(
    epochs: NDArray[np.int64], freeze_last_layer: int, freeze_backbone: int
) -> dict[str, NDArray[np.float64]]:
    """Per iteration, from the epoch of each, whether something is left out of the update; nothing where that is never.

    freeze_last_layer, freeze_backbone: epochs.
    """
    frozen = {"frozen": freeze_last_layer, "backbone_frozen": freeze_backbone}
    return {name: (epochs < n_epochs).astype(np.float64) for name, n_epochs in frozen.items() if n_epochs}


def dinov2_tuning(
    depth: int, lr_decay: float, patch_embed_lr: float, betas: tuple[float, float] = (0.9, 0.999)
) -> Tuning:
    """DINOv2's and DINOv3's, for a MaskedMultiCrop of `depth` blocks. Arguments are `backbone_multipliers`'."""

    def multipliers(name: str) -> Multipliers:
        module, _, rest = name.partition(".")
        is_head = module != "backbone"
        return head_multipliers(rest) if is_head else backbone_multipliers(rest, depth, lr_decay, patch_embed_lr)

    return Tuning(clips_modules=True, betas=betas, multipliers=multipliers)


def column_names(group: int) -> tuple[str, str]:
    return f"lr of group {group}", f"weight_decay of group {group}"
