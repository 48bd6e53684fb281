"""Features from images, in Python: `features` and `eval_transform`; and to a file, however many there are."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastdino.data.augment import center_view, normalize
from fastdino.data.channels import ImageFormat, as_wanted, channels_of, open_images
from fastdino.data.loader import useful_workers
from fastdino.data.sequences import dataset_source
from fastdino.data.sources import ImageSource
from fastdino.data.views import View
from fastdino.errors import UserError, some_of
from fastdino.eval import feature_files
from fastdino.eval.features import BATCH, backbone_features, checksum, evaluating, fingerprint, stream
from fastdino.model import VisionTransformer
from fastdino.train import distributed
from fastdino.train.checkpoint import any_backbone_of, eval_size, load_checkpoint

Progress = Callable[[int, int, float], object]  # (images done, of how many, images a second)


@dataclass(frozen=True)
class Features:
    """Features of M images, those that were asked for: (M, L * D), of patch (M, rows, columns, L * D), fp32.

    names: of the images. labels: (M,) class numbers into `classes`, or None. bad: a line for each image that could not
    be read, and is not among them.
    """

    names: list[str]
    labels: NDArray[np.int64] | None
    classes: Sequence[str]
    bad: list[str]
    cls: NDArray[np.float32] | None = None
    avg: NDArray[np.float32] | None = None
    patch: NDArray[np.float32] | None = None


class EvalTransform:
    """PIL image -> (C, size, size) fp32, as in evaluations: bicubic resize, center crop, ImageNet's normalisation.

    channels: C, of a backbone that takes other than 3; images are then arrays (H, W, C), or PIL's of as many bands.
    exif_turn: turn them as EXIF says, as `--exif_turn` of the run did.
    """

    def __init__(
        self,
        size: int = 224,
        resize: int | None = None,
        channels: int = 3,
        value_range: Sequence[float] = (),
        exif_turn: bool = False,
    ) -> None:
        self.view = View(resize or round(size * 8 / 7), size)
        self.wanted = ImageFormat(channels, tuple(value_range), exif_turn)

    def __call__(self, image: Image.Image | NDArray[Any]) -> Tensor:
        """The view of an image of any size and mode. Raises ValueError where it cannot have so many channels."""
        if isinstance(image, Image.Image) and not self.wanted.converts:
            image = image.convert("RGB")
        pixels = center_view(as_wanted(image, self.wanted), self.view.resize, self.view.size)
        return normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1))

    def __repr__(self) -> str:
        more = f", channels={self.wanted.channels}" if self.wanted.channels != 3 else ""
        more += f", value_range={self.wanted.value_range}" if self.wanted.value_range else ""
        more += ", exif_turn=True" if self.wanted.exif_turn else ""
        return f"EvalTransform(size={self.view.size}, resize={self.view.resize}{more})"


def eval_transform(weights: str | Path) -> EvalTransform:
    """The transform that fits a checkpoint: the size that it was trained for. Raises UserError as `load_backbone`."""
    _, view, wanted = _opened(weights)
    return EvalTransform(view.size, view.resize, wanted.channels, wanted.value_range, wanted.exif_turn)


def _opened(
    weights: str | Path | nn.Module, size: int | None = None, resize: int | None = None
) -> tuple[Any, View, ImageFormat]:
    """(backbone, view, how images are read) of a checkpoint's teacher, or of a module."""
    checkpoint: Mapping[str, Any] = {}
    backbone: Any = weights
    if not isinstance(weights, nn.Module):
        checkpoint = load_checkpoint(weights)
        backbone = any_backbone_of(checkpoint, weights, "teacher")
    if size is None and isinstance(backbone, VisionTransformer):
        size = backbone.patch_embed.img_size
    side = size or int(getattr(checkpoint.get("args"), "global_crops_size", 224))
    wanted = ImageFormat.of(backbone, checkpoint.get("args"))
    return backbone, View(resize or eval_size(checkpoint, side), side), wanted


def features(
    images: Any,
    weights: str | Path | nn.Module,
    *,
    tokens: Sequence[str] = ("cls",),
    layers: int = 1,
    normalize: bool = False,
    size: int | None = None,
    resize: int | None = None,
    batch_size: int = BATCH,
    num_workers: int = 10,
    device: str = "auto",
) -> Features:
    """Features of images: `fastdino.features("photos/", "runs/photos/checkpoint.pth").cls`, in memory.

    images: a path (folder, tar or parquet files, a pattern), a sequence of PIL images, arrays, tensors or paths, or a
    dataset. weights: a checkpoint, whose teacher is taken, or a backbone. tokens: some of cls, avg (the patches' mean)
    and patch. layers: the last so many blocks, joined. normalize: to unit length, each image and kind.
    size, resize: pixels of the center crop, and of the short side before it; as trained. num_workers: threads.
    Raises UserError where images or weights cannot be had, ValueError for unknown tokens. For more images than fit into
    memory: `fastdino features`, which writes as it goes.
    """
    backbone, view, wanted = _opened(weights, size, resize)
    is_path = isinstance(images, (str, Path))
    source = open_images(images, wanted) if is_path else dataset_source(images, "images", wanted)
    if not isinstance(weights, nn.Module):
        backbone.to(distributed.start(device, "env://").device)
    bad: list[str] = []
    batches = stream(
        backbone,
        source,
        np.arange(len(source)),
        view,
        layers=layers,
        tokens=tokens,
        batch_size=batch_size,
        num_workers=useful_workers(num_workers, 1),
        bad=lambda _, line: bad.append(line),
    )
    found = [(index, _unit(values) if normalize else values) for index, values in batches]
    if not found:
        raise UserError(f"none of the images could be read: {source.describe()}: {some_of(bad)}")
    kept = np.concatenate([index for index, _ in found])
    labels = None if source.labels is None else source.labels[kept]
    joined = {name: torch.cat([values[name].cpu() for _, values in found]).numpy() for name in tokens}
    return Features([source.name(int(i)) for i in kept], labels, source.classes, bad, **joined)


def _unit(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: F.normalize(x, dim=-1) for name, x in values.items()}


def extract_to_file(
    output: Path,
    source: ImageSource,
    backbone: nn.Module,
    view: View,
    process: distributed.Process,
    progress: Progress,
    *,
    tokens: Sequence[str] = ("cls",),
    layers: int = 1,
    normalize: bool = False,
    batch_size: int = BATCH,
    num_workers: int = 0,
) -> tuple[int, list[str]]:
    """Write features of all images to a file, together with the other processes; (images written, bad lines).

    Memory does not grow with the number of images. A run that was ended goes on where it was, if weights, images and
    what is asked are the same. progress: is told now and then, on the main process. Raises UserError where the file
    exists, or nothing can be read; OSError where it cannot be written.
    """
    feature_files.check_output(output, tokens)
    if output.exists():
        raise UserError(f"--output: {output} exists; remove it, or give another name")
    with evaluating(backbone):
        parameter = next(backbone.parameters())
        example = torch.zeros(1, channels_of(source), view.size, view.size).to(parameter)
        shapes = {k: tuple(x.shape[1:]) for k, x in backbone_features(backbone, example, layers, tokens).items()}
    settings = {
        "images": [len(source), checksum(source.name(i).encode() for i in range(len(source)))],
        "weights": fingerprint(backbone),
        "view": [view.resize, view.size],
        "asked": [layers, list(tokens), normalize, str(parameter.dtype)],
    }
    rows = feature_files.Rows(output, len(source), settings)
    distributed.main_first(lambda: rows.prepare(shapes))
    mine = np.array_split(np.arange(len(source)), process.world_size)[process.rank]
    mine = mine[~rows.done()[mine]]
    bad: list[str] = []
    n_done, started = 0, time.perf_counter()
    batches = stream(
        backbone,
        source,
        mine,
        view,
        layers=layers,
        tokens=tokens,
        batch_size=batch_size,
        num_workers=num_workers,
        bad=lambda _, line: bad.append(line),
    )
    for index, values in batches:
        rows.write(index, _unit(values) if normalize else values)
        n_done += len(index)
        progress(n_done, len(mine), n_done / (time.perf_counter() - started))
    rows.sync(shapes)
    bad = [line for lines in distributed.gather(bad) for line in lines]

    def finish() -> None:
        table = feature_files.Table.of(rows, source, shapes)
        if not len(table.keep):
            rows.remove()
            raise UserError(f"none of the images could be read: {source.describe()}: {some_of(bad)}")
        feature_files.write(table, output)
        rows.remove()

    distributed.main_first(finish)
    return len(source) - len(bad), bad
