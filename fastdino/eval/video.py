"""Video object segmentation by label propagation: DINO (arXiv:2104.14294), section 4.2; arXiv:2006.14613.

Each patch of a frame takes the labels of the patches most like it, in the first frame and in those just before it, and
near the same place. Nothing is trained.

Axes: S source frames, R rows and W columns of patches, D features, C labels (the background first).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastdino.data.decode import BadImage, open_image
from fastdino.data.sources import ImageSource
from fastdino.errors import UserError
from fastdino.eval.features import backbone_features, image_batches

STD = (0.228, 0.224, 0.225)  # the original's here, where ImageNet's begins with 0.229
MULTIPLE = 64  # the long side is cut down to a multiple of so many pixels
TEMPERATURE = 0.1
TILE = 16  # rows and columns of patches that are compared at once: bounds memory
VOID = 255
BOUNDARY = 0.008  # of the diagonal: how far a contour may be off, DAVIS (Perazzi et al., CVPR 2016), section 5

Mask = NDArray[np.uint8]  # (H, W), an object's number at each pixel, 0 for the background


@dataclass(frozen=True)
class Propagation:
    """Where labels come from, and how frames are shown.

    side: pixels of a frame's short side. n_last_frames: frames just before, besides the first. neighbourhood: rows and
    columns that a patch looks away from its place, 0 for everywhere. topk: patches whose labels are taken.
    """

    side: int = 480
    n_last_frames: int = 7
    neighbourhood: int = 12
    topk: int = 5


@dataclass(frozen=True)
class Frame:
    """Shows a frame of a film: short side to `side` pixels, the long side to a multiple of 64.

    shape: (H, W) that frames have before.
    """

    side: int
    shape: tuple[int, int]

    @property
    def shown(self) -> tuple[int, int]:
        """(H, W) that the backbone sees. Of square frames the original turns the mask, but not the frame, upright."""
        height, width = self.shape
        if height > width:
            return int(self.side * height / width // MULTIPLE * MULTIPLE), self.side
        return self.side, int(self.side * width / height // MULTIPLE * MULTIPLE)

    def __call__(self, pixels: NDArray[np.uint8], index: int = 0) -> NDArray[np.uint8]:
        """(h, w, 3) -> (H, W, 3). Raises BadImage for a frame of another shape."""
        height, width, _ = pixels.shape
        if (height, width) != self.shape:
            raise BadImage(f"has {width} x {height} pixels, the first {self.shape[1]} x {self.shape[0]}")
        return np.asarray(cv2.resize(pixels, self.shown[::-1]))


def propagate(target: Tensor, sources: Tensor, labels: Tensor, neighbourhood: int, topk: int) -> Tensor:
    """Labels (R, W, C) for the patches of a frame, whose features are target, (R, W, D).

    sources: (S, R, W, D), labels: (S, R, W, C). Features have unit length. Of each patch's neighbours in all sources
    the topk most similar vote with weight exp(cosine / 0.1), and whatever is as similar as the last of them.
    """
    rows, columns = target.shape[:2]
    found = labels.new_empty(rows, columns, labels.shape[-1])
    reach = neighbourhood or max(rows, columns)
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            here = slice(top, top + TILE), slice(left, left + TILE)
            near = slice(max(0, top - reach), top + TILE + reach), slice(max(0, left - reach), left + TILE + reach)
            tile = target[here]
            voters, votes = (x[(slice(None), *near)].flatten(0, 2) for x in (sources, labels))
            logits = tile.flatten(0, 1) @ voters.T / TEMPERATURE
            is_far = ~_within_reach(here, near, (rows, columns), reach, target.device)
            logits.unflatten(1, (len(sources), -1)).masked_fill_(is_far[:, None], -torch.inf)
            least = logits.topk(min(topk, logits.shape[1]), dim=1).values[:, -1:]
            patch, voter = (logits >= least).nonzero(as_tuple=True)
            weight = logits[patch, voter].exp()[:, None]
            total = weight.new_zeros(len(logits), 1).index_add_(0, patch, weight)
            mixed = votes.new_zeros(len(logits), votes.shape[1]).index_add_(0, patch, weight * votes[voter])
            found[here] = (mixed / total).view(*tile.shape[:2], -1)
    return found


def _within_reach(
    here: tuple[slice, slice], near: tuple[slice, slice], shape: tuple[int, int], reach: int, device: torch.device
) -> Tensor:
    """Whether a source patch is a target patch's neighbour: (targets, sources of one frame)."""
    axes = []
    for target, source, size in zip(here, near, shape):
        of_target, of_source = (torch.arange(*part.indices(size), device=device) for part in (target, source))
        axes.append((of_target[:, None] - of_source).abs() <= reach)
    by_row, by_column = axes
    return (by_row[:, None, :, None] & by_column[None, :, None, :]).flatten(2).flatten(0, 1)


def segment(
    backbone: nn.Module,
    frames: ImageSource,
    mask: Mask,
    how: Propagation = Propagation(),
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    bad: dict[int, str] | None = None,
) -> Iterator[tuple[int, Mask]]:
    """(index, mask) for each frame of a film after the first, of which the mask is given.

    mask: (H, W), as large as the frames. batch_size: frames that the backbone sees at once. bad: takes index and reason
    of each frame that cannot be read, or has another size; there is no mask of it. Raises UserError where the first
    frame cannot be read, has not the size of the mask, or holds no patch.
    """
    try:
        first = open_image(frames[0])
    except (BadImage, OSError) as error:
        raise UserError(f"the first frame cannot be read: {frames.name(0)}: {error}") from error
    if (first.height, first.width) != mask.shape:
        raise UserError(
            f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels, "
            f"the first frame, {frames.name(0)}, {first.width} x {first.height}"
        )
    embed: Any = backbone.patch_embed
    show = Frame(how.side, mask.shape)
    if min(show.shown) < embed.patch_size:
        raise UserError(f"frames are shown as {show.shown[1]} x {show.shown[0]} pixels, which hold no patch")
    bad = {} if bad is None else bad
    numbers, labels = first_labels(mask, *embed.grid(*show.shown))
    batches = image_batches(
        backbone,
        frames,
        np.arange(len(frames)),
        show,
        batch_size=batch_size,
        num_workers=num_workers,
        bad=bad.__setitem__,
        std=STD,
    )

    def masks() -> Iterator[tuple[int, Mask]]:
        past: _Past | None = None
        for batch, images in batches:
            if 0 in bad:
                break
            patches = backbone_features(backbone, images, tokens=("patch",))["patch"]
            for index, frame in zip(batch, F.normalize(patches, dim=-1)):
                if past is None:
                    past = _Past(frame, labels.to(frame.device), how.n_last_frames)
                    continue
                found = propagate(frame, *past.frames(), how.neighbourhood, how.topk)
                past.add(frame, found)
                yield int(index), numbers[_upsampled(found, mask.shape, embed.patch_size)]
        if 0 in bad:
            raise UserError(f"the first frame cannot be read: {bad[0]}")

    return masks()


def first_labels(mask: Mask, rows: int, columns: int) -> tuple[Mask, Tensor]:
    """(object numbers (C,), 0 first; labels (R, W, C) of the patches, 1 where a patch shows the object)."""
    small = np.asarray(Image.fromarray(mask).resize((columns, rows), Image.Resampling.NEAREST))
    numbers = np.union1d([0], small).astype(np.uint8)
    return numbers, torch.from_numpy(small[..., None] == numbers).float()


def too_small(backbone: nn.Module, mask: Mask, side: int) -> list[int]:
    """Numbers of the objects that no patch of the first frame shows."""
    embed: Any = backbone.patch_embed
    seen, _ = first_labels(mask, *embed.grid(*Frame(side, mask.shape).shown))
    return sorted(set(map(int, np.unique(mask))) - set(map(int, seen)))


class _Past:
    """The first frame, and the last n: features (S, R, W, D) and labels (S, R, W, C), in memory that is used again."""

    def __init__(self, features: Tensor, labels: Tensor, n_last: int) -> None:
        self.features, self.labels = (x.new_empty(1 + n_last, *x.shape) for x in (features, labels))
        self.features[0], self.labels[0] = features, labels
        self.n_added, self.n_last = 0, n_last

    def add(self, features: Tensor, labels: Tensor) -> None:
        """One more, in the place of the oldest."""
        if self.n_last:
            place = 1 + self.n_added % self.n_last
            self.features[place], self.labels[place] = features, labels
            self.n_added += 1

    def frames(self) -> tuple[Tensor, Tensor]:
        """Those that are there, in no order."""
        n = 1 + min(self.n_added, self.n_last)
        return self.features[:n], self.labels[:n]


def _upsampled(labels: Tensor, shape: tuple[int, int], patch_size: int) -> Mask:
    """(R, W, C) -> the most likely label of each pixel, by index; each label's likelihoods are stretched to [0, 1]."""
    likely = F.interpolate(
        labels.permute(2, 0, 1)[None], scale_factor=patch_size, mode="bilinear", align_corners=False
    )[0].flatten(1)
    low, high = likely.aminmax(dim=1, keepdim=True)
    span = high - low
    stretched = torch.where(span > 0, (likely - low) / span, likely)
    # argmax(0) takes ten times as long: 40 ms where this takes 4, of 3 labels (one core, PyTorch 2.13, 2026-11-28)
    seen = stretched.max(0).indices.view(labels.shape[0] * patch_size, -1).byte().cpu().numpy()
    return np.asarray(Image.fromarray(seen).resize(shape[::-1], Image.Resampling.NEAREST))


def objects_of(mask: Mask) -> list[int]:
    """The objects' numbers. 255 is DAVIS' mark for what belongs to nothing, unless it is the only number."""
    numbers = [int(number) for number in np.unique(mask) if number]
    return [number for number in numbers if number != VOID] or numbers


def region_similarity(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """J, in [0, 1]: intersection over union of two masks (H, W); 1 where both are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 1.0


def contour_accuracy(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """F, in [0, 1]: harmonic mean of the shares of each contour that lie near the other one.

    Near: within 0.8% of the diagonal, rounded up to whole pixels. 1 where neither mask has a contour, 0 where one has.
    """
    radius = math.ceil(BOUNDARY * math.hypot(*found.shape))
    offsets = np.arange(-radius, radius + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.uint8)
    lines = [_contour(mask) for mask in (found, truth)]
    if not all(line.any() for line in lines):
        return float(not any(line.any() for line in lines))
    wide = [cv2.dilate(line.astype(np.uint8), disk).astype(bool) for line in lines]
    precision, recall = (
        np.count_nonzero(line & other) / np.count_nonzero(line) for line, other in zip(lines, reversed(wide))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _contour(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a pixel differs from the one to the right, below, or both; beyond the border all repeats."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def frame_scores(found: Mask, truth: Mask, objects: Sequence[int]) -> list[tuple[float, float]]:
    """(J, F) of each object in one frame. Pixels that the truth marks as void count for neither."""
    counts = truth != VOID if VOID not in objects else np.ones(truth.shape, bool)
    scores = []
    for number in objects:
        pair = (found == number) & counts, (truth == number) & counts
        scores.append((region_similarity(*pair), contour_accuracy(*pair)))
    return scores
