"""What the schedules are multiplied with for each parameter, in DINOv2 (arXiv:2304.07193) and DINOv3.

Layer-wise decay of the learning rate as in BEiT (arXiv:2106.08254): the deeper, the faster.
"""

import re
from typing import NamedTuple

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
