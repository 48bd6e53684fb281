"""The step beside the two baselines: images per second, FLOP/s, memory.

Every provider's first loss is compared with the plain one's before anything is timed; then they take turns, a step
each, so that what else the machine does meets all of them alike.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import CarefulStep, PlainStep
from bench.measure import DEVICE, ON_GPU, time_once, timing_of
from bench.model import ARCHITECTURES, step_flops_per_image
from fastdino import DINOHead, DINOLoss, MultiCropWrapper
from fastdino.model.vit import ARCHITECTURES as NETWORKS
from fastdino.train.config import TrainConfig
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep

PROVIDERS = (
    ("plain", "plain bf16", "careful bf16", "careful compiled bf16", "eager bf16", "compiled bf16", "graph bf16")
    if ON_GPU
    else ("plain", "careful", "eager", "compiled", "plain bf16", "eager bf16", "compiled bf16")
)
NITER_PER_EP = 1000  # more than are ever run here, so that the schedules do not end


def cases(quick: bool) -> list[tuple[str, int, int, int]]:
    """(architecture, batch, local crops, prototypes)."""
    if ON_GPU:
        return [(arch, batch, 8, 65536) for arch in ("vit_small", "vit_base") for batch in (64, 128, 256)]
    return [("vit_tiny", 2 if quick else 4, 2 if quick else 8, 1024 if quick else 65536)]


def label(provider: str, arch: str, batch: int, n_local: int) -> str:
    """A record's name."""
    return f"step-{provider}-{arch}-2+{n_local}-B{batch}"


def _provider(name: str, arch: str, n_local: int, out_dim: int, batch: int) -> Callable[[list[Tensor], int], Any]:
    torch.manual_seed(0)
    backbone = NETWORKS[arch]()
    student = MultiCropWrapper(backbone, DINOHead(backbone.embed_dim, out_dim)).to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)
    config = TrainConfig(
        arch=arch, out_dim=out_dim, local_crops_number=n_local, batch_size_per_gpu=batch, epochs=2, warmup_epochs=0
    )
    common: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "loss": DINOLoss(out_dim, 2 + n_local, 0.04, 0.04, 0, 2).to(DEVICE),
        "schedules": Schedules.of(config, NITER_PER_EP, world_size=1),
        "niter_per_ep": NITER_PER_EP,
        "clip_grad": 3.0,
        "freeze_last_layer": 0,
        "amp_dtype": torch.bfloat16 if name.endswith("bf16") else None,
    }
    kind = name.removesuffix(" bf16")
    if kind == "plain":
        return PlainStep(**common)
    if kind.startswith("careful"):
        return CarefulStep(compiled=kind.endswith("compiled"), **common)
    step = TrainStep(optimizer="adamw", mode=kind, **common)

    def run(crops: list[Tensor], iteration: int) -> Tensor:
        loss = step(crops, iteration).loss
        assert step.mode == kind, f"{kind} fell back to {step.mode}: not timed"
        return loss

    return run


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """One record per provider and case; one that fails its check is named in a record without a time."""
    repeats = (20 if ON_GPU else 5) if not quick else 2
    for arch, batch, n_local, out_dim in cases(quick):
        generator = torch.Generator().manual_seed(1)
        sides = [224] * 2 + [96] * n_local
        crops = [torch.randn(batch, 3, side, side, generator=generator).to(DEVICE) for side in sides]
        steps: dict[str, Callable[[list[Tensor], int], Any]] = {}
        peaks: dict[str, float] = {}
        expected = 0.0
        for name in PROVIDERS:
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if ON_GPU else 0
            try:
                step = _provider(name, arch, n_local, out_dim, batch)
                loss = float(step(crops, 0))
                expected = expected or loss
                # fp32: what two correct implementations may differ by in a step (the golden tests' bound). bf16: two
                # roundings of the logits.
                budget = 2 * torch.finfo(torch.bfloat16).eps if name.endswith("bf16") else 1e-5
                assert abs(loss - expected) <= budget * abs(expected), f"loss {loss}, expected {expected}: not timed"
                for i in range(1, 6 if ON_GPU else 2):
                    step(crops, i)
                steps[name] = step
            except Exception as error:  # a provider that cannot run here is a result, too
                yield {"name": label(name, arch, batch, n_local), "failed": f"{type(error).__name__}: {error}"[:300]}
            if ON_GPU:
                peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**30
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(repeats):
            for name, step in steps.items():
                times[name].append(time_once(partial(step, crops, 10 + i)))
        flops = sum(step_flops_per_image(ARCHITECTURES[arch], n_local, out_dim).values())
        for name in steps:
            timing = timing_of(times[name])
            images_per_s = 1e3 * batch / timing.median_ms
            yield {
                "name": label(name, arch, batch, n_local),
                **vars(timing),
                "images_per_s": images_per_s,
                "times_plain": timing_of(times["plain"]).median_ms / timing.median_ms if "plain" in times else None,
                "tflops": images_per_s * flops / 1e12,
                **({"peak_gib": peaks[name]} if name in peaks else {}),
            }
