"""What is exported, and what a format is.

Axes: B images of 3 channels, D features.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from fastdino.data.views import View
from fastdino.model import VisionTransformer
from fastdino.model.archs import ARCHITECTURES
from fastdino.model.inferred import name_of
from fastdino_kernels.augment import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = list(IMAGENET_MEAN), list(IMAGENET_STD)


@dataclass(frozen=True)
class Model:
    """What is exported.

    backbone: frozen, in eval mode, on the CPU; its positions are laid out for view.size. fixed: a graph takes images of
    that size alone.
    """

    backbone: VisionTransformer
    view: View
    fixed: bool

    @property
    def patch_size(self) -> int:
        """In pixels."""
        return self.backbone.patch_embed.patch_size

    @property
    def shape(self) -> dict[str, int]:
        """Of the network, under the names that VisionTransformer and timm have for it."""
        backbone = self.backbone
        return {
            "embed_dim": backbone.embed_dim,
            "depth": len(backbone.blocks),
            "num_heads": backbone.num_heads,
            "patch_size": self.patch_size,
            "img_size": self.view.size,
        }

    @property
    def arch(self) -> str | None:
        """Its name in the table of architectures, whatever the patch; None where it has none."""
        if not self.backbone.is_dinos:
            return name_of(self.backbone.state_dict())
        shape = tuple(self.shape.values())[:3]
        return next((name for name, a in ARCHITECTURES.items() if (a.width, a.depth, a.heads) == shape), None)

    @property
    def facts(self) -> dict[str, str]:
        """What the weights do not tell, for a file's metadata: text alone, as safetensors has it."""
        facts = {"arch": self.arch or "", **self.shape, "resize": self.view.resize, "mean": MEAN, "std": STD}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


@dataclass(frozen=True)
class Loaded:
    """A written file in the hands of its library.

    features: normalised images (B, 3, H, W) -> (B, D). view: the library's own preprocessing, of an image to
    (3, size, size), where the file has one.
    """

    features: Callable[[Tensor], Tensor]
    view: Callable[[Image.Image], Tensor] | None = None


@dataclass(frozen=True)
class Format:
    """One way to write a backbone.

    what: a phrase for the help. suffixes: of the file; none for a folder. needs: packages, by the names they are
    imported under and installed by. write: to a path that does not exist. load: by the library, from that path.
    use: lines of Python that do so, given the path. own_positions: the library interpolates positions its own way.
    takes_newer: backbones of DINOv2 and DINOv3, too. is_graph: of those it takes images of one size alone.
    """

    what: str
    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[Model, Path], None]
    load: Callable[[Model, Path], Loaded]
    use: Callable[[Model, Path], list[str]]
    own_positions: bool = False
    takes_newer: bool = True
    is_graph: bool = False
