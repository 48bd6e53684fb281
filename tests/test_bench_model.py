"""The analytic model of the step agrees with counts made another way."""

import pytest

from bench.model import ARCHITECTURES, parameters, projected_allreduce_seconds, step_flops_per_image, step_seconds
from fastdino import DINOHead, vit_small, vit_tiny


@pytest.mark.parametrize(("name", "gflops"), [("vit_small", 113.4), ("vit_base", 434.8), ("vit_large", 1526)])
def test_flops_per_image_are_the_published_counts(name, gflops):
    assert sum(step_flops_per_image(ARCHITECTURES[name]).values()) / 1e9 == pytest.approx(gflops, rel=5e-3)


@pytest.mark.parametrize(("name", "build"), [("vit_tiny", vit_tiny), ("vit_small", vit_small)])
def test_parameters_are_those_of_the_networks(name, build):
    backbone, arch = build(), ARCHITECTURES[name]
    networks = (backbone, DINOHead(backbone.embed_dim, 512))
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    assert parameters(arch, out_dim=512) == sum(p.numel() for p in trained)


def test_twice_the_ceilings_take_half_the_time():
    arch = ARCHITECTURES["vit_small"]
    assert step_seconds(arch, 64, 200, 2000) == pytest.approx(step_seconds(arch, 64, 100, 1000) / 2)


def test_one_gpu_reduces_nothing_and_many_move_the_gradients_twice():
    assert projected_allreduce_seconds(1, 10**9, 100) == 0
    assert projected_allreduce_seconds(10**6, 10**9, 100) == pytest.approx(2 * 4e9 / 1e11, rel=1e-5)
