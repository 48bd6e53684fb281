"""torch.hub's entry points, under the original's names: `torch.hub.load("OWNER/fastdino", "dino_vits16")`.

Its ResNet-50 and XCiTs are not here: their networks are torchvision's and their authors'.
"""

from typing import Any

import torch

from fastdino import VisionTransformer, vit_base, vit_small
from fastdino.train.public import URLS

dependencies = ["torch", "numpy", "PIL", "simplejpeg", "cv2"]


def _with_weights(model: VisionTransformer, pretrained: bool, name: str) -> VisionTransformer:
    if pretrained:
        url = URLS[name]
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as error:
            raise RuntimeError(
                f"pretrained: {url} cannot be read: {error}; pretrained=False needs no network"
            ) from error
        model.load_state_dict(state)
    return model


def dino_vits16(pretrained: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-S/16, trained with DINO on ImageNet. kwargs: of VisionTransformer."""
    return _with_weights(vit_small(16, **kwargs), pretrained, "dino_vits16")


def dino_vits8(pretrained: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-S/8, trained with DINO on ImageNet. kwargs: of VisionTransformer."""
    return _with_weights(vit_small(8, **kwargs), pretrained, "dino_vits8")


def dino_vitb16(pretrained: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-B/16, trained with DINO on ImageNet. kwargs: of VisionTransformer."""
    return _with_weights(vit_base(16, **kwargs), pretrained, "dino_vitb16")


def dino_vitb8(pretrained: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-B/8, trained with DINO on ImageNet. kwargs: of VisionTransformer."""
    return _with_weights(vit_base(8, **kwargs), pretrained, "dino_vitb8")
