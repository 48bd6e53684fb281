"""Masks beyond the golden ones (`test_v2_golden.py`): numbers of patches, and what a batch keeps."""

import random

import numpy as np
import pytest
import torch

from fastdino.data.masks import BlockMasks, mask_batch

SIDE = {"height": 14, "width": 14, "max_patches": 98}


def draws(seed: int) -> tuple[random.Random, np.random.RandomState]:
    return random.Random(seed), np.random.RandomState(seed)


@pytest.mark.parametrize("shift", [False, True])
def test_exact_masks_have_the_number_asked_for(shift):
    py, nprng = draws(0)
    generator = BlockMasks(**SIDE, circular_shift=shift)
    for count in (0, 1, 3, 50, 98, 196):
        assert generator.draw(count, py, nprng).sum() == count


def test_masks_that_are_not_exact_stop_short_and_draw_no_numpy_numbers():
    py, nprng = draws(0)
    before = nprng.get_state()[1].copy()
    counts = [BlockMasks(**SIDE, exact=False).draw(90, py, nprng).sum() for _ in range(50)]
    assert max(counts) <= 90
    assert min(counts) < 90
    assert np.array_equal(nprng.get_state()[1], before)


def test_a_batch_of_vit_l_has_one_size_in_every_step():
    """64 images of 14 x 14 patches: 3771 masked ones."""
    for seed in range(5):
        batch = mask_batch(BlockMasks(**SIDE), 128, 0.5, (0.1, 0.5), *draws(seed))
        assert len(batch.indices) == batch.upper_bound == 3771
        assert (batch.masks.sum(-1) > 0).sum() == 64
        assert torch.equal(batch.masks.flatten()[batch.indices], torch.ones(3771, dtype=torch.bool))
        assert batch.weights.sum().item() == pytest.approx(64, rel=1e-5)


def test_equal_seeds_give_equal_batches():
    one, two, other = (mask_batch(BlockMasks(**SIDE), 8, 0.5, (0.1, 0.5), *draws(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.masks, two.masks)
    assert not torch.equal(one.masks, other.masks)
