"""The step beside the two baselines: images per second. Every provider's first loss is compared before it is timed."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.baselines import CarefulStep, PlainStep
from bench.measure import DEVICE, ON_GPU, measure
from bench.model import ARCHITECTURES, step_flops_per_image
from fastdino import DINOHead, DINOLoss, MultiCropWrapper, get_params_groups
from fastdino.model.vit import ARCHITECTURES as NETWORKS
from fastdino.train.config import TrainConfig
from fastdino.train.optim import OPTIMIZERS
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep

PROVIDERS = ("ours", "plain", "careful")
NITER_PER_EP = 1000  # more than are ever run here, so that the schedules do not end


def cases(quick: bool) -> list[tuple[str, int, int, int]]:
    """(architecture, batch, local crops, prototypes)."""
    if ON_GPU:
        return [(arch, batch, 8, 65536) for arch in ("vit_small", "vit_base") for batch in (64, 128, 256)]
    return [("vit_tiny", 2 if quick else 4, 2 if quick else 8, 1024 if quick else 65536)]


def label(provider: str, arch: str, batch: int, n_local: int) -> str:
    """A record's name."""
    return f"step-{provider}-{arch}-2+{n_local}-B{batch}"


def _provider(name: str, arch: str, n_local: int, out_dim: int, batch: int) -> Callable[..., Any]:
    torch.manual_seed(0)
    backbone = NETWORKS[arch]()
    student = MultiCropWrapper(backbone, DINOHead(backbone.embed_dim, out_dim)).to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)
    config = TrainConfig(
        arch=arch, out_dim=out_dim, local_crops_number=n_local, batch_size_per_gpu=batch, epochs=2, warmup_epochs=0
    )
    common: dict[str, Any] = {
        "loss": DINOLoss(out_dim, 2 + n_local, 0.04, 0.04, 0, 2).to(DEVICE),
        "schedules": Schedules.of(config, NITER_PER_EP, world_size=1),
        "niter_per_ep": NITER_PER_EP,
        "clip_grad": 3.0,
        "freeze_last_layer": 0,
        "amp_dtype": torch.bfloat16 if ON_GPU else None,
    }
    if name == "ours":
        optimizer = OPTIMIZERS["adamw"](get_params_groups(student))
        return TrainStep(student=student, teacher=teacher, optimizer=optimizer, **common)
    return {"plain": PlainStep, "careful": CarefulStep}[name](student=student, teacher=teacher, **common)


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """One record per provider and case. Raises AssertionError where a first loss differs: it is not timed."""
    for arch, batch, n_local, out_dim in cases(quick):
        generator = torch.Generator().manual_seed(1)
        sides = [224] * 2 + [96] * n_local
        crops = [torch.randn(batch, 3, side, side, generator=generator).to(DEVICE) for side in sides]
        expected = None
        for name in PROVIDERS:
            step = _provider(name, arch, n_local, out_dim, batch)
            first = step(crops, 0)
            loss = float(first.loss if name == "ours" else first)
            expected = loss if expected is None else expected
            assert abs(loss - expected) <= (1e-2 if ON_GPU else 1e-4) * abs(expected), f"{name}: {loss}, not {expected}"
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            timing = measure(partial(step, crops, 1), repeats=3 if quick else 20, warmup=1)
            images_per_s = 1e3 * batch / timing.median_ms
            flops = sum(step_flops_per_image(ARCHITECTURES[arch], n_local, out_dim).values())
            yield {
                "name": label(name, arch, batch, n_local),
                **vars(timing),
                "images_per_s": images_per_s,
                "tflops": images_per_s * flops / 1e12,
                **({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if ON_GPU else {}),
            }
            del step
