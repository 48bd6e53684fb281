"""Images, crops and the tables made of them, and what Pillow makes of them: shared by the tests of the augmentation."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdino_kernels.augment import CropTable, PackedImages

spec = importlib.util.spec_from_file_location(
    "pillow_replica", Path(__file__).parents[1] / "data" / "pillow_replica.py"
)
replica = importlib.util.module_from_spec(spec)
spec.loader.exec_module(replica)

STEPS = ("brightness", "contrast", "saturation", "hue")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Image = NDArray[np.uint8]


def crop(image: int, box: tuple[int, int, int, int], **alterations: Any) -> dict[str, Any]:
    """A crop as the replica takes it, its size aside; image: which one."""
    plain = {"flip": False, "jitter": [], "gray": False, "blur": 0.0, "solarize": False}
    # Tables hold fp32: Pillow is given the same numbers.
    crop = {"image": image, "box": box, **plain, **alterations}
    crop["jitter"] = [(name, f if name == "hue" else float(np.float32(f))) for name, f in crop["jitter"]]
    crop["blur"] = float(np.float32(crop["blur"]))
    return crop


def random_crop(rng: np.random.Generator, images: list[Image], image: int) -> dict[str, Any]:
    """Every alteration about half of the time; no box so tall that Pillow sums its rows first."""
    height, width, _ = images[image].shape
    w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
    h = min(h, 100 * w)
    factors = {name: rng.uniform(0.6, 1.4) for name in STEPS[:3]} | {"hue": rng.uniform(-0.1, 0.1)}
    flip, jitter, gray, blur, solarize = rng.random(5) < (0.5, 0.8, 0.2, 0.5, 0.3)
    return crop(
        image,
        (int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h),
        flip=bool(flip),
        jitter=[(name, factors[name]) for name in rng.permutation(STEPS)] if jitter else [],
        gray=bool(gray),
        blur=rng.uniform(0.1, 2.0) if blur else 0.0,
        solarize=bool(solarize),
    )


def packed(images: list[Image], device: torch.device, gap: int = 5) -> PackedImages:
    """Images in one buffer, at odd offsets; rows of every second one are padded by `gap` bytes."""
    chunks, rows, at = [], [], 0
    for i, image in enumerate(images):
        height, width, _ = image.shape
        stride = width * 3 + (gap if i % 2 else 0)
        buffer = np.full((height, stride), 99, np.uint8)
        buffer[:, : width * 3] = image.reshape(height, -1)
        chunks += [np.full(gap, 77, np.uint8), buffer.reshape(-1)]
        rows.append((at + gap, width, height, stride))
        at += gap + buffer.size
    offset, width, height, stride = (torch.tensor(column, device=device) for column in zip(*rows))
    pixels = torch.from_numpy(np.concatenate(chunks)).to(device)
    return PackedImages(pixels, offset.long(), width.int(), height.int(), stride.int())


def table(crops: list[dict[str, Any]], device: torch.device) -> CropTable:
    def column(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    jitter = [dict(c["jitter"]) for c in crops]
    orders = [[STEPS.index(name) for name, _ in c["jitter"]] for c in crops]
    return CropTable(
        image=column([c["image"] for c in crops], torch.int32),
        box=column([c["box"] for c in crops], torch.int32).view(-1, 4),
        flip=column([c["flip"] for c in crops], torch.bool),
        order=column([o + [-1] * (4 - len(o)) for o in orders], torch.int8).view(-1, 4),
        factor=column([[j.get(name, 1.0) for name in STEPS[:3]] for j in jitter], torch.float32).view(-1, 3),
        hue=column([int(j.get("hue", 0.0) * 255) % 256 for j in jitter], torch.int32),
        gray=column([c["gray"] for c in crops], torch.bool),
        blur=column([c["blur"] for c in crops], torch.float32),
        solarize=column([c["solarize"] for c in crops], torch.bool),
    )


def by_replica(images: list[Image], crops: list[dict[str, Any]], size: int) -> Tensor:
    """Levels (n, 3, S, S), from the integer specification."""
    levels = [replica.augment(images[c["image"]], {**c, "size": size}) for c in crops]
    return torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2)


def by_pillow(images: list[Image], crops: list[dict[str, Any]], size: int) -> Tensor:
    """Levels (n, 3, S, S), from the installed Pillow."""
    levels = [replica.pillow_augment(images[c["image"]], {**c, "size": size}) for c in crops]
    return torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2)


def levels_of(out: Tensor) -> Tensor:
    """The 8-bit levels that fp32 crops were made of; whole numbers, or they would not be found again."""
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
    exact = (out.cpu().double() * std + mean) * 255
    assert (exact - exact.round()).abs().max() < 1e-4
    return exact.round().long()
