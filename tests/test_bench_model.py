"""The analytic model of the step agrees with counts made another way, and takes its ceilings from whoever asks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import model
from bench.baselines import _Network
from bench.model import ARCHITECTURES, Ceilings, Workload, parameters, parts, project, step_seconds, total
from fastdino import DINOHead, MultiCropWrapper, vit_small, vit_tiny


@pytest.mark.parametrize(("name", "gflops"), [("vit_small", 113.4), ("vit_base", 434.8), ("vit_large", 1526)])
def test_flops_per_image_are_the_published_counts(name, gflops):
    assert total(Workload(arch=name, batch=1)).flops / 1e9 == pytest.approx(gflops, rel=5e-3)


def test_flops_are_those_that_pytorch_counts():
    torch.manual_seed(0)
    backbone = vit_tiny()
    student = _Network(MultiCropWrapper(backbone, DINOHead(192, 512)), fused=True)  # all that the original computes
    crops = [torch.randn(1, 3, side, side) for side in (224, 224, 96, 96)]
    with FlopCounterMode(display=False) as counter:
        student(crops).sum().backward()
        with torch.no_grad():
            student(crops[:2])
    # PyTorch does not count attention on a CPU, and the crops get no gradient, which the patch embedding's count has.
    work = Workload(arch="vit_tiny", batch=1, n_local=2, out_dim=512)
    counted = total(work).flops - model.attention(work).flops
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("name", "build"), [("vit_tiny", vit_tiny), ("vit_small", vit_small)])
def test_parameters_are_those_of_the_networks(name, build):
    backbone, arch = build(), ARCHITECTURES[name]
    networks = (backbone, DINOHead(backbone.embed_dim, 512))
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    assert parameters(arch, out_dim=512) == sum(p.numel() for p in trained)


def test_bytes_of_loss_and_optimizer_are_those_of_the_kernels():
    work = Workload(arch="vit_small", batch=64)
    rows = 3 * 10 + 2 * 2 + 2  # of 65536 logits: the loss forward and backward, then the center
    assert model.loss(work).n_bytes == rows * 64 * 65536 * 2
    assert model.optimizer(work).n_bytes == 44 * parameters(ARCHITECTURES["vit_small"])


def test_each_part_waits_for_the_slowest_of_its_three_ceilings():
    cost = model.Cost(flops=2e12, n_bytes=3e9, launches=1000)
    assert Ceilings(matmul_tflops=1, copy_gbps=1000, launch_us=1).seconds(cost) == 2
    assert Ceilings(matmul_tflops=1000, copy_gbps=1, launch_us=1).seconds(cost) == 3
    assert Ceilings(matmul_tflops=1000, copy_gbps=1000, launch_us=5000).seconds(cost) == 5


def test_twice_the_ceilings_take_half_the_time_and_no_part_is_free():
    work = Workload(arch="vit_small", batch=64)
    once, twice = (Ceilings(matmul_tflops=100 * n, copy_gbps=1000 * n) for n in (1, 2))
    assert step_seconds(work, twice) == pytest.approx(step_seconds(work, once) / 2)
    assert all(once.seconds(cost) > 0 for cost in parts(work).values())


def test_one_gpu_reduces_nothing_and_many_move_the_gradients_twice():
    alone, many = (project(n, 0.1, 10**9, link_gbps=100) for n in (1, 10**6))
    assert (alone.allreduce_seconds, alone.efficiency_exposed) == (0, 1)
    assert many.allreduce_bytes == pytest.approx(8e9, rel=1e-5)
    assert many.allreduce_seconds == pytest.approx(0.08, rel=1e-5)
    assert many.efficiency_exposed == pytest.approx(0.1 / 0.18, rel=1e-4)
    assert many.efficiency_hidden == pytest.approx(0.1 / (0.1 + 0.08 - 2 / 3 * 0.1), rel=1e-4)
