"""Images that Python holds: a sequence of them, or a `torch.utils.data.Dataset`, as a source."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastdino.data.channels import RGB, ImageFormat, converted, orientation_of, turned, values_of
from fastdino.data.decode import BadImage, open_image
from fastdino.data.sources import ImageSource, kind, labels_of, read_file
from fastdino.errors import UserError, printable


class Indexed(Protocol):
    """A length, and items by index: a list, a map-style Dataset, a Hugging Face dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class SequenceSource:
    """PIL images, arrays (H, W) or (H, W, C), tensors (C, H, W) in uint8 or in [0, 1], encoded bytes, or paths.

    An item may be a tuple or a dict that has the image first or under `image`. labels: a class number for each, or
    None. wanted: what `channels.converted` will make of them. Items are read from several threads at once.
    Raises ValueError where there are no images, or not as many labels.
    """

    def __init__(
        self,
        images: Indexed,
        labels: Sequence[int] | None = None,
        what: str = "images in memory",
        wanted: ImageFormat = RGB,
    ) -> None:
        if not len(images):
            raise ValueError("images: expected at least one, got none")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"labels: expected {len(images)}, one for each image, got {len(labels)}")
        self.images, self.what, self.wanted = images, what, wanted
        self.classes: Sequence[str] = []
        self.labels: NDArray[np.int64] | None = None
        if labels is not None:
            self.classes, self.labels = labels_of([str(int(label)) for label in labels])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> bytes | NDArray[Any]:
        item = self.images[index]
        item = item["image"] if isinstance(item, dict) else item[0] if isinstance(item, (tuple, list)) else item
        if isinstance(item, bytes):
            return item
        if isinstance(item, (str, Path)):
            return read_file(item)
        if isinstance(item, torch.Tensor):
            item = item.permute(1, 2, 0) if item.ndim == 3 else item
            if item.is_floating_point() and not self.wanted.value_range:
                item = (item * 255).round().clamp(0, 255).byte()
            return np.asarray(item)
        pixels = values_of(item, self.wanted.channels) if isinstance(item, Image.Image) else np.asarray(item)
        if self.wanted.exif_turn:
            pixels = turned(pixels, orientation_of(item))
        is_gray = pixels.ndim == 2 and not self.wanted.converts
        return np.repeat(pixels[..., None], 3, -1) if is_gray else pixels

    def name(self, index: int) -> str:
        item = self.images[index] if isinstance(self.images, (list, tuple)) else None
        return printable(item) if isinstance(item, (str, Path)) else f"item {index} of {self.what}"

    def describe(self) -> str:
        return f"{len(self):,} {self.what}, {kind(self)}"


def dataset_source(dataset: Any, name: str, wanted: ImageFormat = RGB) -> ImageSource:
    """A dataset of one's own, or what a generator gives. Labels are its attribute `targets`, as in torchvision's.

    Raises UserError where it has no length and items, is empty, or does not begin with an image.
    """
    dataset = list(dataset) if isinstance(dataset, Iterator) else dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(f"{name}: expected a dataset with __len__ and __getitem__, got {type(dataset).__name__}")
    try:
        what = f"images of {type(dataset).__name__}"
        is_source = isinstance(dataset, SequenceSource)
        held = dataset if is_source else SequenceSource(dataset, getattr(dataset, "targets", None), what, wanted)
        source = converted(held, wanted)
        open_image(source[0], channels=wanted.channels)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except (BadImage, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: expected images (PIL, uint8 arrays (H, W, 3), tensors (3, H, W)), alone or first in a tuple; "
            f"item 0 is {type(dataset[0]).__name__}: {error}"
        ) from error
    return source
