"""The FLOPs of a step are the published counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines import plain_logits, step_flops
from fastdino import DINOHead, MultiCropWrapper, vit_tiny


@pytest.mark.parametrize(("name", "gflops"), [("vit_small", 113.4), ("vit_base", 434.8), ("vit_large", 1526)])
def test_flops_per_image_are_the_published_counts(name, gflops):
    assert step_flops(name, batch=1) / 1e9 == pytest.approx(gflops, rel=5e-3)


def test_flops_of_a_step_are_those_of_its_passes():
    """A backward pass is twice a forward pass, but for the crops, which get no gradient."""
    torch.manual_seed(0)
    student = MultiCropWrapper(vit_tiny(), DINOHead(192, 512))
    crops = [torch.randn(1, 3, side, side) for side in (224, 224, 96, 96)]
    with FlopCounterMode(display=False) as counter:
        plain_logits(student, crops, fused=False).sum().backward()
        with torch.no_grad():
            plain_logits(student, crops[:2], fused=False)
    assert step_flops("vit_tiny", batch=1, n_local=2, out_dim=512) == pytest.approx(counter.get_total_flops(), rel=0.01)
