"""Public weights under the names of their hubs: fetched into torch.hub's folder, and only where somebody asks."""

import difflib
import warnings
from pathlib import Path

import torch
from torch import nn

from fastdino.errors import UserError, reason
from fastdino.model.archs import CONVNEXTS, PUBLISHED, check_arch, timm_backbone

_AUTHORS = "https://dl.fbaipublicfiles.com"
_DINO = {"vits16": "deitsmall16", "vits8": "deitsmall8", "vitb16": "vitbase16", "vitb8": "vitbase8"}
URLS = {
    **{f"dino_{name}": f"{_AUTHORS}/dino/dino_{of}_pretrain/dino_{of}_pretrain.pth" for name, of in _DINO.items()},
    **{
        name: f"{_AUTHORS}/dinov2/{name.removesuffix('_reg')}/{name.replace('_reg', '_reg4')}_pretrain.pth"
        for name in PUBLISHED
        if name.startswith("dinov2")
    },
}
# Given out under addresses of one's own, to those who accept its licence.
ON_REQUEST = [name for name in PUBLISHED if name.startswith("dinov3")]


def public_file(name: str) -> Path:
    """The file of a name of URLS or ON_REQUEST, fetched where it is not there. Raises UserError where it cannot be."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if name in ON_REQUEST:
        stem, _, data = name.partition("_sat")
        pattern = f"{stem}_pretrain_{'sat' + data if data else 'lvd'}*.pth"
        if found := sorted(folder.glob(pattern)):
            return found[-1]
        raise UserError(
            f"--init: {name} is given out on request alone (github.com/facebookresearch/dinov3): give its file, or put "
            f"it as {pattern} into {folder}"
        )
    if name in CONVNEXTS:
        raise UserError(f"--init: {name} is a ConvNeXt: those of DINOv3 give features here, and cannot be trained")
    if name not in URLS:
        close = difflib.get_close_matches(name, [*URLS, *ON_REQUEST], 1)
        others = f"did you mean {close[0]}?" if close else f"there are {', '.join([*URLS, *ON_REQUEST])}"
        raise UserError(f"--init: no file, and no public weights, of the name {name!r}; {others}")
    path = folder / URLS[name].rpartition("/")[2]
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URLS[name], str(path), progress=False)
        except OSError as error:
            raise UserError(
                f"--init: {name} cannot be fetched from {URLS[name]}: {reason(error)}; --init FILE needs no network"
            ) from error
    return path


def timm_pretrained(name: str) -> nn.Module:
    """timm's network `timm:NAME` with its weights. Raises UserError where there are none, or they cannot be fetched."""
    try:
        check_arch(name)
    except ValueError as error:
        raise UserError(f"--init: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm_backbone(name, 0.0, pretrained=True)
    except Exception as error:  # of timm, of the hub's client, or of what that is built on
        raise UserError(
            f"--init: {name} cannot be fetched: {reason(error)}; --init FILE --arch {name} needs no network"
        ) from error


def is_name(init: str) -> bool:
    """Whether `--init` says a name, and not where a file is."""
    return not Path(init).exists() and Path(init).name == init and not Path(init).suffix
