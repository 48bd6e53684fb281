"""Which patches of the global crops the student does not see: blocks, drawn as DINOv2 and DINOv3 draw them.

iBOT (arXiv:2111.07832), section 3.2, by the blocks of BEiT (arXiv:2106.08254), algorithm 1. DINOv2 (arXiv:2304.07193)
may stop short of the number asked for; DINOv3 (arXiv:2508.10104) adds single patches up to it, so that the number of
masked patches of a batch is the same in every step, and with it all shapes.

Axes: B images, so 2 * B global crops, of N = height * width patches; M masked patches of the batch.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockMasks:
    """Draws the mask of one crop."""

    height: int
    """Patches from top to bottom."""
    width: int
    max_patches: float
    """Of a block."""
    min_patches: int = 4
    """Of a block, unless fewer are still to be masked."""
    min_aspect: float = 0.3
    """Height over width of a block; at most its reciprocal."""
    exact: bool = True
    """Whether single patches are added up to the number asked for, as in DINOv3; DINOv2 stops short of it."""
    circular_shift: bool = False
    """Whether the mask is rotated by a random number of rows and columns."""

    def draw(self, count: int, py: random.Random, nprng: np.random.RandomState) -> NDArray[np.bool_]:
        """(height, width), True where a patch is masked: `count` of them, or at most as many where not exact."""
        mask = np.zeros((self.height, self.width), dtype=bool)
        done = 0
        while done < count:
            added = self._add_block(mask, min(count - done, self.max_patches), py)
            if not added:
                break
            done += added
        if self.exact:
            # Asked also where nothing is missing: the original's random numbers move on then, too.
            mask.flat[nprng.choice(np.flatnonzero(~mask), count - done, replace=False)] = True
        if self.circular_shift and count:
            mask = np.roll(mask, (py.randint(0, self.height - 1), py.randint(0, self.width - 1)), (0, 1))
        return mask

    def _add_block(self, mask: NDArray[np.bool_], room: float, py: random.Random) -> int:
        """Mask one more block, and say how many patches that were not; 0 where ten tries find none."""
        log_aspect = math.log(self.min_aspect)
        for _ in range(10):
            area = py.uniform(self.min_patches, room)
            aspect = math.exp(py.uniform(log_aspect, -log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top, left = py.randint(0, self.height - height), py.randint(0, self.width - width)
            block = mask[top : top + height, left : left + width]
            added = int(block.size - block.sum())
            if 0 < added <= room:
                block[:] = True
                return added
        return 0


@dataclass(frozen=True)
class MaskedBatch:
    """The masks of a batch, and its masked patches in the order of the crops."""

    masks: Tensor
    """(2 * B, N) bool."""
    indices: Tensor
    """(M,) int64: where masked patches are among the 2 * B * N of the batch."""
    weights: Tensor
    """(M,) fp32: 1 / masked patches of the crop."""
    upper_bound: int
    """The largest M that these settings can draw; with exact masks, always M."""


def mask_batch(
    generator: BlockMasks,
    n_crops: int,
    probability: float,
    ratio: tuple[float, float],
    py: random.Random,
    nprng: np.random.RandomState,
) -> MaskedBatch:
    """Masks of all global crops of a batch, both crops of an image independently.

    n_crops: 2 * B. probability: share of the crops that are masked, rounded down. ratio: smallest and largest share of
    masked patches; the masked crops divide that range evenly among them.
    """
    n_patches = generator.height * generator.width
    n_masked_crops = int(n_crops * probability)
    edges = torch.linspace(*ratio, n_masked_crops + 1).numpy()  # fp32, and so is what follows, as in the original
    size = np.float32(n_patches)
    most = [int(size * edge) for edge in edges[1:]]
    counts = [0] * n_crops
    masks = []
    for i in range(n_crops):
        if i < n_masked_crops and generator.exact:
            counts[i] = most[i]
        elif i < n_masked_crops:
            counts[i] = int(size * (edges[i] + (edges[i + 1] - edges[i]) * np.float32(py.random())))
        masks.append(generator.draw(counts[i], py, nprng))
    py.shuffle(masks)
    stacked = torch.from_numpy(np.stack(masks)).flatten(1)
    weights = (1 / stacked.sum(-1).clamp(min=1)).repeat_interleave(stacked.sum(-1))
    return MaskedBatch(stacked, stacked.flatten().nonzero().flatten(), weights, sum(most))


@dataclass(frozen=True)
class BatchMasks:
    """Draws the masks of every batch of a run.

    n_parts: that a batch is computed in (--accumulate), each with masks as of a batch of its own, and so with as many
    masked patches in every step.
    """

    generator: BlockMasks
    probability: float
    ratio: tuple[float, float]
    n_parts: int = 1

    def draw(self, n_images: int, *seed: int) -> list[Tensor]:
        """Masks of a batch, as a function of the numbers of `seed` alone.

        Returns the masks of the first global crops and of the second ones, (B, N) bool; indices, (parts, M) int64 of
        the masked patches among those of the part's global crops, crop-major; weights, (parts, M) fp32. Where not
        every batch has as many, M is the most, and what is missing is the last index again, with weight 0.
        """
        sequence = np.random.SeedSequence(seed)
        state = sequence.generate_state(2)
        py, nprng = random.Random(int(state[0])), np.random.RandomState(state[1])
        n_crops = 2 * n_images // self.n_parts
        parts = [
            mask_batch(self.generator, n_crops, self.probability, self.ratio, py, nprng) for _ in range(self.n_parts)
        ]
        views = [torch.cat(halves) for halves in zip(*(part.masks.chunk(2) for part in parts))]
        indices = torch.stack([_filled(part.indices, part.upper_bound) for part in parts])
        missing = [part.upper_bound - len(part.weights) for part in parts]
        weights = [torch.nn.functional.pad(part.weights, (0, n)) for part, n in zip(parts, missing)]
        return [*views, indices, torch.stack(weights)]


def _filled(indices: Tensor, length: int) -> Tensor:
    """Indices of so many patches, with the last of them again at the end; 0 where there is none."""
    last = indices[-1:] if len(indices) else indices.new_zeros(1)
    return torch.cat((indices, last.expand(length - len(indices))))
