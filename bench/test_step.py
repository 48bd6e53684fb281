"""The step beside the baselines, with more images and crops, and its most expensive kernels.

Every provider's first loss is compared with the plain one's before it is timed. `ours` comes in the modes of
`fastdino.train.step`; `plain` and `fused` are `bench.baselines`.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.baselines import CarefulStep, PlainStep, step_flops
from bench.measure import DEVICE, ON_GPU, QUICK, require
from bench.records import Record
from fastdino import DINOHead, DINOLoss, MultiCropWrapper
from fastdino.model.archs import ARCHITECTURES as NETWORKS
from fastdino.train.build import build_step
from fastdino.train.config import TrainConfig
from fastdino.train.distributed import start
from fastdino.train.learning import build_masks
from fastdino.train.networks import build_networks
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep

NITER_PER_EP = 1000
CHUNK = 16  # images that the expected loss is computed of at once


class Case(NamedTuple):
    """Two globals of 224 pixels and n_local crops of 96."""

    arch: str
    n_local: int
    batch: int
    out_dim: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.arch} 2+{self.n_local} B{self.batch} {self.dtype}"

    @property
    def n_flops(self) -> int:
        return step_flops(self.arch, self.batch, self.n_local, self.out_dim)


# Most wanted first: a host may end the run.
EVERYONE = ("ours graph", "plain", "ours compiled", "ours eager", "fused", "fused compiled")
if ON_GPU:
    MAIN = Case("vit_small", 8, 64, 65536, "bf16")
    WIDER = [Case(arch, 8, n, 65536, "bf16") for arch in ("vit_small", "vit_base") for n in (64, 128, 256)][1:]
    WIDER += [MAIN._replace(n_local=n) for n in (0, 4)]
    TUNED = [("ours tuned", MAIN)]  # --compile max: minutes before the first iteration
else:
    MAIN, WIDER, TUNED = Case("vit_tiny", 8, 4, 65536, "fp32"), [], []

CASES = [(who, MAIN) for who in EVERYONE] + [(who, case) for case in WIDER for who in ("plain", "ours graph")] + TUNED
BUDGET_MS = 4000 if not QUICK else 1000
HALF = {"bf16": torch.bfloat16, "fp32": None}


def crops_of(case: Case) -> list[Tensor]:
    """fp32 for every provider, as the original's loader makes them. Ours makes them in the step's dtype on a GPU, so
    that here `ours` casts, 0.2 GB at B 64, what it would only copy, 0.13 GB.
    """
    generator = torch.Generator().manual_seed(1)
    sides = [224] * 2 + [96] * case.n_local
    return [torch.randn(case.batch, 3, side, side, generator=generator).to(DEVICE) for side in sides]


def pieces(case: Case) -> dict[str, Any]:
    """What every kind of step is made from, with the same weights each time."""
    torch.manual_seed(0)
    backbone = NETWORKS[case.arch]()
    student = MultiCropWrapper(backbone, DINOHead(backbone.embed_dim, case.out_dim)).to(DEVICE)
    config = TrainConfig(arch=case.arch, out_dim=case.out_dim, epochs=2, warmup_epochs=0, batch_size_per_gpu=case.batch)
    return {
        "student": student,
        "teacher": copy.deepcopy(student).requires_grad_(False),
        "loss": DINOLoss(case.out_dim, 2 + case.n_local, 0.04, 0.04, 0, 2).to(DEVICE),
        "schedules": Schedules.of(config, NITER_PER_EP, world_size=1),
        "amp_dtype": HALF[case.dtype],
    } | {"niter_per_ep": NITER_PER_EP, "clip_grad": 3.0, "freeze_last_layer": 0}


Step = Callable[[list[Tensor], int], Tensor]  # (crops, iteration) -> loss


@contextmanager
def made(provider: str, case: Case) -> Iterator[Step]:
    """A provider's step, alone in the device's memory. Skips the test where it cannot be."""
    gc.collect()  # what earlier tests took, and compiled code, of which torch.compile keeps only so much
    if ON_GPU:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    if "compiled" in provider and QUICK and not ON_GPU:
        pytest.skip("Inductor compiles for minutes on a CPU: left out of --quick")
    if provider == "ours graph" and not ON_GPU:
        pytest.skip("a CUDA graph needs a CUDA device")
    if provider == "plain":
        yield PlainStep(**pieces(case))
    elif provider.startswith("fused"):
        yield CarefulStep(compiled=provider.endswith("compiled"), **pieces(case))
    else:
        mode, effort = ("graph", "max") if provider == "ours tuned" else (provider.split()[1], "default")
        step = TrainStep(optimizer="adamw", mode=mode, effort=effort, **pieces(case))

        def ours(crops: list[Tensor], iteration: int) -> Tensor:
            loss = step(crops, iteration).loss
            assert step.mode == mode, f"{mode} fell back to {step.mode}: not timed"
            return loss

        try:
            yield ours
        finally:
            step.close()


@pytest.fixture(scope="module")
def step(provider: str, case: Case) -> Iterator[Step]:
    """One for all tests of a case: what it compiled, a profile finds."""
    with made(provider, case) as run:
        yield run


@cache
def expected_loss(case: Case) -> float:
    """The plain loss of the first batch in fp32; a few images at a time, as the mean over images may be taken."""
    plain = PlainStep(**(pieces(case) | {"amp_dtype": None}))
    with torch.no_grad():
        parts = zip(*(crop.split(CHUNK) for crop in crops_of(case)))
        sums = [float(plain.forward(part, 0)[0]) * len(part[0]) for part in parts]
    return sum(sums) / case.batch


def over(cases: list[tuple[str, Case]]) -> pytest.MarkDecorator:
    params = [pytest.param(provider, case, id=f"{provider}-{case}") for provider, case in cases]
    return pytest.mark.parametrize(("provider", "case"), params, scope="module")


@over(CASES)
def test_step(provider: str, case: Case, step: Step, timed: Any) -> None:
    crops, iteration = crops_of(case), cycle(range(NITER_PER_EP))
    loss, expected = float(step(crops, next(iteration))), expected_loss(case)
    budget = {"fp32": 1e-5, "bf16": 2e-3}[case.dtype]  # the golden tests' bound; a quarter of bf16's rounding
    require(abs(loss - expected) <= budget * expected, f"loss {loss}, expected {expected}")
    facts = case._asdict() | {"n_flops": case.n_flops, "n_images": case.batch}
    timed(lambda: step(crops, next(iteration)), budget_ms=BUDGET_MS, **facts)


def hottest(step: Callable[[], object], n_steps: int) -> Record:
    """The ten kernels (ops, on a CPU) that most time goes into, and of all the number and ms a step."""
    with torch.profiler.profile() as profiler:
        for _ in range(n_steps):
            step()
        if ON_GPU:
            torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if not ON_GPU or e.device_type == torch.autograd.DeviceType.CUDA]
    total = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    found = [(e.key[:120], getattr(e, total) / 1e3 / n_steps, e.count / n_steps) for e in events]
    _, ms, calls = zip(*found)
    ten = sorted(found, key=lambda row: row[1], reverse=True)[:10]
    return {"hottest": ten, "launches_per_step": sum(calls), "device_ms_per_step": sum(ms)}


@over([("ours graph" if ON_GPU else "ours eager", MAIN)])
def test_profile(provider: str, case: Case, step: Step, timed: Any) -> None:
    """Launches, idle share of the device, and where its time goes, over a few steps."""
    crops, iteration = crops_of(case), cycle(range(NITER_PER_EP))
    for _ in range(5 if ON_GPU else 1):
        step(crops, next(iteration))
    found = hottest(lambda: step(crops, next(iteration)), 20 if ON_GPU else 2)
    timed(lambda: step(crops, next(iteration)), n_images=case.batch, budget_ms=BUDGET_MS, **case._asdict(), **found)


@over([("ours dinov2", MAIN), ("ours dinov3", MAIN)])
def test_recipe(provider: str, case: Case, timed: Any) -> None:
    """A whole step of a newer recipe, with masks. tests/test_v2_golden.py holds its numbers to the originals'."""
    gc.collect()
    flags = {"recipe": provider.removeprefix("ours "), "arch": case.arch, "batch_size_per_gpu": case.batch}
    config = TrainConfig.from_flags(flags | {"device": str(DEVICE), "data_path": "photos/"})
    networks = build_networks(config)
    step, masks = build_step(config, start(str(DEVICE), "env://"), NITER_PER_EP, networks, print), build_masks(config)
    assert masks is not None
    views = [*crops_of(case), *(x.to(DEVICE) for x in masks.draw(case.batch, 0))]
    iteration = cycle(range(NITER_PER_EP))
    try:
        loss = float(step(views, next(iteration)).loss)
        require(0 < loss < 100, f"loss {loss}")
        timed(lambda: step(views, next(iteration)), budget_ms=BUDGET_MS, n_images=case.batch, **case._asdict())
    finally:
        step.close()
