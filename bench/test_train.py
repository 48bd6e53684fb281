"""Equal quality: the digits, learned by our step and by the plain one, from the same weights, crops and schedules.

Both train in turns on the batches of one loader, so a seed's curves differ by rounding alone, and what else the machine
does meets both alike. `fastdino.train.config.DIGITS` is the recipe; EPOCHS of it, with schedules of that length.
"""

import time
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch

from bench.baselines import PlainStep
from bench.measure import DEVICE, QUICK, require
from fastdino.data.digits import load_digits
from fastdino.data.loader import CropLoader, EpochSampler
from fastdino.eval.knn import extract_features, knn_accuracy
from fastdino.objectives import DINOLoss
from fastdino.train.build import build_networks
from fastdino.train.config import TrainConfig
from fastdino.train.recipes import DIGITS
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep

SEEDS = (0,) if QUICK else (0, 1, 2)
EPOCHS = min(DIGITS["epochs"], 24)
KNN_BOUND = 0.02
MAX_STEPS = 22 if QUICK else None


class Run(NamedTuple):
    """losses: of each step, nats. step_ms: of each step. knn_before, knn: accuracy on the held-out digits."""

    losses: list[float]
    step_ms: list[float]
    knn_before: float
    knn: float


@cache
def both(seed: int) -> dict[str, Run]:
    """Our run and the plain one of a seed."""
    config = TrainConfig.from_flags({"epochs": EPOCHS, "seed": seed})
    source, held_out = load_digits()
    sampler = EpochSampler(len(source), config.batch_size_per_gpu, seed)
    n_steps = min(EPOCHS * len(sampler), MAX_STEPS or 10**9)

    def knn(network: Any) -> float:
        resize, size = config.eval_size
        bank, queries = (extract_features(network.backbone, x, resize=resize, size=size) for x in (source, held_out))
        return knn_accuracy(bank, queries, config.knn_k)

    steps, teachers = {}, {}
    for provider, kind in (("ours", TrainStep), ("plain", PlainStep)):
        student, teacher = (network.to(DEVICE) for network in build_networks(config))
        temps = config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
        options: dict[str, Any] = {"optimizer": "adamw"} if kind is TrainStep else {}
        steps[provider] = kind(
            student=student,
            teacher=teacher,
            loss=DINOLoss(config.out_dim, config.ncrops, *temps, EPOCHS).to(DEVICE),
            schedules=Schedules.of(config, len(sampler), world_size=1),
            niter_per_ep=len(sampler),
            clip_grad=config.clip_grad,
            freeze_last_layer=config.freeze_last_layer,
            **options,
        )
        teachers[provider] = teacher
    before = {provider: knn(teacher) for provider, teacher in teachers.items()}
    losses: dict[str, list[float]] = {provider: [] for provider in steps}
    step_ms: dict[str, list[float]] = {provider: [] for provider in steps}
    loader = CropLoader(source, config.recipe(), sampler, num_workers=config.num_workers, device=DEVICE)
    done = 0
    for epoch in range(-(-n_steps // len(sampler))):
        sampler.seek(epoch)
        for batch in loader:
            if done == n_steps:
                break
            crops = batch.crops(DEVICE)
            for provider in sorted(steps, reverse=done % 2 == 1):
                torch.manual_seed(done)  # drop-path
                started = time.perf_counter()
                result = steps[provider](crops, done)
                losses[provider].append(float(result if isinstance(result, torch.Tensor) else result.loss))
                step_ms[provider].append(1e3 * (time.perf_counter() - started))
            done += 1
    loader.close()
    return {
        provider: Run(losses[provider], step_ms[provider], before[provider], knn(teacher))
        for provider, teacher in teachers.items()
    }


@pytest.mark.parametrize("seed", SEEDS, ids=lambda n: f"seed {n}")
@pytest.mark.parametrize("provider", ["ours", "plain"])
def test_digits(provider: str, seed: int, timed: Any) -> None:
    run, other = both(seed)[provider], both(seed)["plain"]
    # Both start from the same weights and crops: before rounding has grown, the losses are the same.
    first = max(abs(a - b) / b for a, b in zip(run.losses[:3], other.losses[:3]))
    require(first < 1e-3, f"the first losses are {first:.1e} apart")
    facts = {
        "losses": [round(loss, 5) for loss in run.losses],
        "knn_before": run.knn_before,
        "knn": run.knn,
        "seconds": sum(run.step_ms) / 1e3,
        "seed": seed,
    }
    n_images = DIGITS["batch_size_per_gpu"]
    timed(lambda: None, times=run.step_ms[1:], n_images=n_images, extra=lambda _: facts)


@pytest.mark.parametrize("provider", ["both"])
def test_agreement(provider: str, timed: Any) -> None:
    """Over the seeds: k-NN the same within KNN_BOUND, and curves nearer to each other than those of two seeds are."""
    runs = [both(seed) for seed in SEEDS]
    knn = {who: sum(run[who].knn for run in runs) / len(runs) for who in ("ours", "plain")}
    assert abs(knn["ours"] - knn["plain"]) <= KNN_BOUND, f"k-NN {knn['ours']:.4f} ours, {knn['plain']:.4f} plain"
    apart = max(_apart(run["ours"].losses, run["plain"].losses) for run in runs)
    facts: dict[str, float] = {"n_seeds": len(runs), "n_steps": len(runs[0]["ours"].losses)}
    facts |= {"knn_ours": knn["ours"], "knn_plain": knn["plain"], "curves_apart": apart}
    if len(runs) > 1:
        facts["seeds_apart"] = min(_apart(a["plain"].losses, b["plain"].losses) for a, b in combinations(runs, 2))
        assert apart <= facts["seeds_apart"], f"curves {apart:.4f} apart, seeds {facts['seeds_apart']:.4f}"
    timed(
        lambda: None, times=[sum(sum(run.step_ms) for run in both_.values()) for both_ in runs], extra=lambda _: facts
    )


def _apart(a: list[float], b: list[float]) -> float:
    """Mean distance of two curves, nats."""
    return sum(abs(x - y) for x, y in zip(a, b)) / len(a)
