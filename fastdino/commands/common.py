"""What commands share: which backbone, how it sees images, which images, and how a result is told."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastdino.data.channels import RGB, ImageFormat, converted, open_images
from fastdino.data.sources import ImageSource
from fastdino.data.views import View
from fastdino.errors import UserError
from fastdino.eval.linear import Input, hold_out
from fastdino.files import append
from fastdino.model import VisionTransformer
from fastdino.model.archs import ARCHITECTURES, PUBLISHED

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HELD_OUT = "train/ and val/ with class folders; or class folders alone"


@dataclass(frozen=True)
class Opened:
    """A backbone on its device, and the view its images are shown in."""

    backbone: Any  # nn.Module with what a VisionTransformer has
    view: View
    checkpoint: Mapping[str, Any]

    @property
    def image_format(self) -> ImageFormat:
        """How it has to see images."""
        return ImageFormat.of(self.backbone, self.checkpoint.get("args"))


def add_weights_flags(parser: argparse.ArgumentParser, unless: str = "") -> None:
    """Which backbone, and where it runs. unless: a flag that takes its place."""
    group = add_file_flags(parser, unless)
    group.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N [auto]")
    group.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the backbone [fp32]")
    # Of the original's command lines.
    group.add_argument("--arch", metavar="NAME", help="not needed: the weights tell, and have to agree")
    group.add_argument("--patch_size", type=int, metavar="N", help="not needed either")
    add_ignored_flags(parser, "--dist_url", "--local_rank")


def add_file_flags(parser: argparse.ArgumentParser, unless: str = "") -> argparse._ArgumentGroup:
    """Which backbone; the group, for what else is about it."""
    group = parser.add_argument_group("Weights")
    group.add_argument(
        "--pretrained_weights", required=not unless, metavar="FILE", help="checkpoint, or backbone weights"
    )
    group.add_argument("--checkpoint_key", default="teacher", metavar="NAME", help="teacher or student [teacher]")
    group.add_argument("--num_heads", type=int, metavar="N", help="only for widths that no architecture here has")
    return group


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """How images are shown, and loaded."""
    group = parser.add_argument_group("Images")
    group.add_argument("--size", type=int, metavar="N", help="side of the center crop [as trained]")
    group.add_argument("--resize", type=int, metavar="N", help="short side before it [as trained, else 8/7 of --size]")
    add_loading_flags(group, batch_size=128)


def add_loading_flags(group: Any, batch_size: int) -> None:
    """How images are loaded. group: of flags, or the parser."""
    group.add_argument(
        "--batch_size_per_gpu", type=int, default=batch_size, metavar="N", help=f"images at once [{batch_size}]"
    )
    group.add_argument("--num_workers", type=int, default=10, metavar="N", help="threads, at most one per core [10]")


def add_ignored_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Flags of the original's command lines that have nothing to say here."""
    for name in names:
        parser.add_argument(name, help=argparse.SUPPRESS)


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """Where the numbers go besides the terminal."""
    parser.add_argument("--json", metavar="FILE", help="add the result to this file, too: a JSON object, a line each")


def open_backbone(
    args: argparse.Namespace, of_any_kind: bool = False, together: bool = False, any_channels: bool = False
) -> Opened:
    """The backbone that the flags ask for, frozen, and the view. Raises UserError where they do not fit together.

    of_any_kind: a network of timm's will do, too. together: several processes share the work; else they are refused.
    any_channels: images may have other than 3; else such a backbone is refused.
    """
    from fastdino.train.checkpoint import any_backbone_of, backbone_of, eval_size, load_checkpoint
    from fastdino.train.distributed import launched, start

    check_positive(args, "batch_size_per_gpu")
    if not together and (n_processes := launched().world_size) > 1:
        raise UserError(f"one process does this, and {n_processes} were launched; several share `fastdino features`")
    if args.pretrained_weights is None:
        raise UserError("--pretrained_weights: a checkpoint is needed")
    checkpoint = load_checkpoint(args.pretrained_weights)
    opened = any_backbone_of if of_any_kind else backbone_of
    backbone: Any = opened(checkpoint, args.pretrained_weights, args.checkpoint_key, args.num_heads)
    n_channels = ImageFormat.of(backbone).channels
    if n_channels != 3 and not any_channels:
        raise UserError(
            f"{args.pretrained_weights} takes images of {n_channels} channels; fastdino {args.command} those of 3 alone"
        )
    device = start(args.device, "env://").device
    if not isinstance(backbone, VisionTransformer):
        size: Any = getattr(args, "size", None) or getattr(checkpoint.get("args"), "global_crops_size", 224)
        resize = getattr(args, "resize", None) or eval_size(checkpoint, size)
        return Opened(backbone.to(device, DTYPES[args.dtype]), View(resize, size), checkpoint)
    patch_size = backbone.patch_embed.patch_size
    if args.patch_size not in (None, patch_size):
        raise UserError(f"--patch_size: {args.pretrained_weights} has {patch_size}, got {args.patch_size}")
    arch = {**ARCHITECTURES, **PUBLISHED}.get(args.arch or "")
    if arch and arch.width != backbone.embed_dim:
        raise UserError(f"--arch: {args.pretrained_weights} is {backbone.embed_dim} wide, {args.arch} {arch.width}")
    size = getattr(args, "size", None) or backbone.patch_embed.img_size
    resize = getattr(args, "resize", None) or eval_size(checkpoint, size)
    if not patch_size <= size <= resize:
        raise UserError(
            f"--size: expected at least the patch size {patch_size} and at most --resize, got {size} and {resize}"
        )
    return Opened(backbone.to(device, DTYPES[args.dtype]), View(resize, size), checkpoint)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError, naming the flag, where one of them is given and is not above 0."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise UserError(f"--{name}: expected a value above 0, got {value}")


def open_labelled(data_path: str | None, wanted: ImageFormat = RGB) -> tuple[ImageSource, ImageSource | None]:
    """(images, held-out images or None): the digits, train/ and val/ below a folder, or class folders alone.

    Raises UserError where there are no labels, or the two halves do not have the same classes.
    """
    from fastdino.data.digits import load_digits

    if data_path is None:
        digits, others = load_digits()
        return converted(digits, wanted), converted(others, wanted)
    halves = [Path(data_path) / name for name in ("train", "val")]
    if not all(half.is_dir() for half in halves):
        return labelled(open_images(data_path, wanted)), None
    source, held_out = (labelled(open_images(half, wanted)) for half in halves)
    if list(source.classes) != list(held_out.classes):
        raise UserError(
            f"{data_path}: expected the same classes in train/ and val/, "
            f"got {some(source.classes)} and {some(held_out.classes)}"
        )
    return source, held_out


def labelled(source: ImageSource) -> ImageSource:
    """The source. Raises UserError where it has no labels."""
    if source.labels is None:
        raise UserError(f"labels are needed, from at least two class folders: {source.describe()}")
    return source


def original_numbers(classes: Sequence[str]) -> NDArray[np.int64]:
    """(classes,) the number of each class in the original's files: torchvision has 10 before 2."""
    return np.argsort(np.argsort(np.array(classes)))


@dataclass(frozen=True)
class Part:
    """Images of a labelled source: those at `indices`."""

    source: ImageSource
    indices: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) of all images of the source, as `original_numbers`."""
        assert self.source.labels is not None
        return original_numbers(self.source.classes)[self.source.labels]

    def describe(self) -> str:
        """One phrase for the log."""
        some_of_it = f"{len(self.indices):,} of " if len(self.indices) < len(self.source) else ""
        return some_of_it + self.source.describe()


def open_parts(data_path: str | None, wanted: ImageFormat, test_only: bool = False) -> tuple[Part, Part]:
    """(images to train on, held-out ones): as `open_labelled`, and from class folders alone as `hold_out`.

    test_only: val/ is enough, and stands for both. Raises UserError as they do.
    """
    if test_only and data_path and (val := Path(data_path) / "val").is_dir():
        tested = labelled(open_images(val, wanted))
        return (Part(tested, np.arange(len(tested))),) * 2
    source, held_out = open_labelled(data_path, wanted)
    if held_out is not None:
        return Part(source, np.arange(len(source))), Part(held_out, np.arange(len(held_out)))
    assert source.labels is not None
    kept, held = hold_out(source.labels)
    return Part(source, kept), Part(source, held)


def some(names: Any) -> str:
    """The first few of many names."""
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])]) or "none"


def asked_input(args: argparse.Namespace, backbone: nn.Module, n_layers: int) -> Input:
    """What a classifier sees, by --n_last_blocks and --avgpool_patchtokens. n_layers: where nobody says how many.

    Raises UserError where the backbone does not give it.
    """
    gives_tokens = isinstance(backbone, VisionTransformer)
    asked = Input(args.n_last_blocks or (n_layers if gives_tokens else 1), args.avgpool_patchtokens)
    if not gives_tokens and asked != Input(1, False):
        flag = "avgpool_patchtokens" if asked.avgpool else "n_last_blocks"
        raise UserError(f"--{flag}: {args.pretrained_weights} gives its output alone, leave it out")
    if isinstance(backbone, VisionTransformer) and asked.layers > len(backbone.blocks):
        raise UserError(
            f"--n_last_blocks: {args.pretrained_weights} has {len(backbone.blocks)} blocks, got {asked.layers}"
        )
    return asked


def loading(args: argparse.Namespace) -> dict[str, int]:
    """batch_size and num_workers for `eval.features.stream`."""
    from fastdino.data.loader import useful_workers
    from fastdino.train.distributed import local_world_size

    if args.num_workers < 0:
        raise UserError(f"--num_workers: expected 0 or more, got {args.num_workers}")
    workers = useful_workers(args.num_workers, local_world_size())
    return {"batch_size": args.batch_size_per_gpu, "num_workers": workers}


def tell(args: argparse.Namespace, numbers: Mapping[str, float], **context: Any) -> None:
    """The result as one JSON object: the last line printed, and a line of --json FILE."""
    entry = {"evaluation": args.command, "weights": args.pretrained_weights, **context, **numbers}
    line = json.dumps(entry)
    print(line)
    if args.json:
        try:
            append(Path(args.json), line + "\n")
        except OSError as error:
            raise UserError(f"--json: {args.json}: {error.strerror or error}") from error
