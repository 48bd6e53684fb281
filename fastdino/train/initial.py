"""`--init`: a backbone's weights to start from, of a file, a public name or timm, and the network they belong to.

The architecture is that of the weights. A run that goes on takes it from its own checkpoint: the file may be gone.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdino.errors import UserError
from fastdino.model import VisionTransformer
from fastdino.model.archs import ARCHITECTURES, PUBLISHED, TIMM, timm_backbone
from fastdino.model.inferred import name_of, nearest, without_chunks
from fastdino.train import distributed
from fastdino.train.checkpoint import backbone_state, load_checkpoint, vit_arguments
from fastdino.train.config import TrainConfig
from fastdino.train.contents import first_difference
from fastdino.train.folder import RunFolder
from fastdino.train.public import is_name, public_file, timm_pretrained
from fastdino.train.recipes import OF_THE_WEIGHTS, from_weights

CLASSIFIER = re.compile(r"(head|fc|head\.fc|classifier)\.(weight|bias)")  # as timm's files have them


@dataclass(frozen=True)
class Initial:
    """Weights, and what makes their network: arch, patch_size: the run's flags; make: drop_path_rate -> the network."""

    arch: str
    patch_size: int
    state: Mapping[str, Tensor]
    make: Callable[[float], nn.Module]

    def backbone(self, drop_path_rate: float) -> nn.Module:
        """A network of its own, with the weights."""
        network = self.make(drop_path_rate)
        network.load_state_dict(self.state)
        return network

    def describe(self, config: TrainConfig) -> list[str]:
        """Where a run begins, and which of its flags are others than from scratch."""
        flags = [
            f"--{name} {getattr(config, name):g}" for name in from_weights({}) if name not in ("arch", "patch_size")
        ]
        return [f"{config.init}; heads are fresh{self._positions(config)}", f"as from weights: {' '.join(flags)}"]

    def _positions(self, config: TrainConfig) -> str:
        """Where crops have other grids than the table of positions: that it is interpolated."""
        if self.arch.startswith(TIMM) or "pos_embed" not in self.state:
            return ""
        side = _side(self.state)
        crops = [config.global_crops_size] + [config.local_crops_size] * bool(config.local_crops_number)
        grids = dict.fromkeys(size // self.patch_size for size in crops)
        others = [f"{n} x {n}" for n in grids if n != side]
        return f"; positions of {side} x {side} patches, interpolated to {' and '.join(others)}" if others else ""


def _side(state: Mapping[str, Tensor]) -> int:
    """Of the grid of positions, in patches."""
    return math.isqrt(state["pos_embed"].shape[1] - 1)


def start_from(config: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, Initial | None]:
    """(the run with the architecture of its `init`, the weights); without it, the run as it is, and None.

    Raises UserError where there are no weights, they are of another architecture than the flags, or cannot be trained.
    """
    if config.init is None:
        return config, None
    initial = _weights(config, folder)
    return replace(config, arch=initial.arch, patch_size=initial.patch_size), initial


def _weights(config: TrainConfig, folder: RunFolder) -> Initial:
    if not (config.resume and os.path.lexists(folder.checkpoint)):
        return _initial(config)
    try:
        return _own(config, folder.checkpoint.parent if config.fsdp else folder.checkpoint)
    except UserError as damaged:
        try:
            return _initial(config)  # `resume` says what is wrong with the checkpoint, and what can be used instead
        except UserError:
            raise UserError(f"cannot resume: {damaged}. --resume false starts anew") from damaged


def _initial(config: TrainConfig) -> Initial:
    """What `init` says."""
    init = str(config.init)
    if init.startswith(TIMM):
        if config.arch not in (init, OF_THE_WEIGHTS):
            raise UserError(f"--init: {init} is not of --arch {config.arch}")
        return _of_timm(config, timm_pretrained(init).state_dict(), init, init)
    path: str | Path = init
    if is_name(init):
        distributed.main_first(partial(public_file, init))
        path = public_file(init)
    try:
        return _of_checkpoint(config, load_checkpoint(path), path)
    except UserError as error:
        raise UserError(f"--init: {error}") from error


def _own(config: TrainConfig, path: Path) -> Initial:
    """The run's own checkpoint; whether the flags are still those of it, `resume` asks."""
    found = _of_checkpoint(replace(config, arch=OF_THE_WEIGHTS, patch_size=0), load_checkpoint(path), path)
    arch = found.arch if config.arch == OF_THE_WEIGHTS else config.arch
    return replace(found, arch=arch, patch_size=config.patch_size or found.patch_size)


def _of_checkpoint(config: TrainConfig, checkpoint: Mapping[str, Any], path: str | Path) -> Initial:
    """The teacher's backbone of a file, or the weights that are all of it."""
    state, args = backbone_state(checkpoint, path, "teacher"), checkpoint.get("args")
    names = (config.arch, getattr(args, "arch", None))
    if name := next((name for name in names if isinstance(name, str) and name.startswith(TIMM)), None):
        return _of_timm(config, state, name, path)
    if "downsample_layers.0.0.weight" in state:
        raise UserError(f"{path} is a ConvNeXt: those of DINOv3 give features here, and cannot be trained")
    state = {k: v for k, v in without_chunks(state).items() if not CLASSIFIER.fullmatch(k)}
    try:
        arguments = vit_arguments(state, args, path, "teacher")
    except UserError as error:
        near = nearest(state)
        raise UserError(f"{error}; the nearest architecture is {near}" if near else str(error)) from error
    patch_size: int = arguments["patch_size"]
    name = name_of(state) or OF_THE_WEIGHTS
    _check_flags(config, state, arguments, path)
    if config.recipe != "dino":
        if not arguments["mask_token"]:  # it starts at 0, also in DINOv2 and DINOv3
            arguments["mask_token"], state["mask_token"] = True, torch.zeros(1, arguments["embed_dim"])
        if "rope" in arguments and name in PUBLISHED:
            arguments["rope"] = PUBLISHED[name].options["rope"]  # with its draws in training, which no file tells
    training: dict[str, Any] = {"drop_path_mode": config.drop_path_mode, "checkpointing": config.checkpointing}
    return Initial(
        name if config.arch == OF_THE_WEIGHTS else config.arch,
        patch_size,
        state,
        lambda drop_path_rate: VisionTransformer(**arguments, **training, drop_path_rate=drop_path_rate),
    )


def _check_flags(
    config: TrainConfig, state: Mapping[str, Tensor], arguments: Mapping[str, Any], path: str | Path
) -> None:
    """Raise UserError, naming the first key that differs, where weights are not of --arch and --patch_size.

    Positions may be of any grid: they are interpolated.
    """
    patch_size = config.patch_size or arguments["patch_size"]
    side = _side(state) if "pos_embed" in state else 1
    known = {**ARCHITECTURES, **PUBLISHED}.get(config.arch, partial(VisionTransformer, **arguments))
    with torch.device("meta"):
        expected = known(patch_size=patch_size, img_size=[patch_size * side], in_chans=config.channels).state_dict()
    if difference := first_difference(expected, state):
        arch = "" if config.arch == OF_THE_WEIGHTS else f"--arch {config.arch} "
        said = f"{path} is not of {arch}--patch_size {patch_size}: {difference}"
        raise UserError(f"{said}; the nearest architecture is {nearest(state)}")


def _of_timm(config: TrainConfig, state: Mapping[str, Tensor], name: str, path: str | Path) -> Initial:
    """Weights of timm's network `timm:NAME`. Raises UserError where they do not fit it."""
    if config.arch not in (name, OF_THE_WEIGHTS):
        raise UserError(f"{path} is of {name}, not of --arch {config.arch}")
    build = partial(timm_backbone, name, channels=config.channels)
    expected = build(0.0).state_dict()
    state = {k: v for k, v in state.items() if k in expected or not CLASSIFIER.fullmatch(k)}
    if difference := first_difference(expected, state):
        raise UserError(f"{path} does not fit {name} of this timm: {difference}")
    return Initial(name, config.patch_size or TrainConfig.patch_size, state, build)
