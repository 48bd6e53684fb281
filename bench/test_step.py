"""The step beside the baselines, with more images and crops, part by part, and its most expensive kernels.

Every provider's first loss is compared with the plain one's before it is timed. `ours` comes in the modes of
`fastdino.train.step`; `plain` and `careful` are `bench.baselines`; the rest is whoever is installed.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import model, peers
from bench.baselines import CarefulStep, PlainStep
from bench.measure import DEVICE, ON_GPU, QUICK, Timing, require
from bench.records import Record
from fastdino import DINOHead, DINOLoss, MultiCropWrapper
from fastdino.model import attention
from fastdino.model.archs import ARCHITECTURES as NETWORKS
from fastdino.model.attention_choice import choose
from fastdino.train.config import TrainConfig
from fastdino.train.schedules import Schedules
from fastdino.train.step import TrainStep
from fastdino_kernels import ClipAdamWEMA, center_update_, dino_loss

NITER_PER_EP = 1000  # more than are ever run here, so that the schedules do not end
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
    def work(self) -> model.Workload:
        return model.Workload(
            arch=self.arch,
            batch=self.batch,
            n_local=self.n_local,
            out_dim=self.out_dim,
            itemsize=2 if self.dtype == "bf16" else 4,
        )

    @property
    def facts(self) -> Record:
        """What a record says of its case, for the pictures."""
        return self._asdict() | {"flops_per_image": model.total(self.work).flops / self.batch}


OURS = ("ours graph", "ours compiled", "ours eager")  # most wanted first: a host may end the run
EVERYONE = (OURS[0], "plain", *OURS[1:], "careful", "careful compiled", "original", "timm")
if ON_GPU:
    MAIN = Case("vit_small", 8, 64, 65536, "bf16")
    FEW = ("plain", "ours graph")
    WIDER = [MAIN._replace(batch=128), MAIN._replace(batch=256)]
    WIDER += [Case("vit_base", 8, batch, 65536, "bf16") for batch in (64, 128, 256)]
    WIDER += [MAIN._replace(n_local=n) for n in (0, 4)]
elif QUICK:
    MAIN = Case("vit_tiny", 2, 2, 4096, "fp32")
    FEW = ("plain", "ours eager")
    WIDER = [MAIN._replace(batch=1), MAIN._replace(batch=4), MAIN._replace(n_local=0), MAIN._replace(n_local=8)]
else:
    MAIN = Case("vit_tiny", 8, 4, 65536, "fp32")
    FEW = ("plain", "careful", "ours eager")
    WIDER = [MAIN._replace(dtype="bf16"), *(MAIN._replace(batch=n) for n in (1, 2, 8))]
    WIDER += [MAIN._replace(n_local=n) for n in (0, 4)]

CASES = [(provider, MAIN) for provider in EVERYONE] + [(provider, case) for case in WIDER for provider in FEW]
REPEATS = (20 if ON_GPU else 5) if not QUICK else 3
HALF = {"bf16": torch.bfloat16, "fp32": None}


def free() -> None:
    """Give back what earlier tests took: memory, and compiled code, of which torch.compile keeps only so much."""
    gc.collect()
    if ON_GPU:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def crops_of(case: Case) -> list[Tensor]:
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
        "niter_per_ep": NITER_PER_EP,
        "clip_grad": 3.0,
        "freeze_last_layer": 0,
        "amp_dtype": HALF[case.dtype],
    }


Step = Callable[[list[Tensor], int], Tensor]  # (crops, iteration) -> loss


@contextmanager
def made(provider: str, case: Case) -> Iterator[Step]:
    """A provider's step, alone in the device's memory. Skips the test where it cannot be."""
    free()
    if "compiled" in provider and QUICK and not ON_GPU:
        pytest.skip("Inductor compiles for minutes on a CPU: left out of --quick")
    if provider == "ours graph" and not ON_GPU:
        pytest.skip("a CUDA graph needs a CUDA device")
    if provider.startswith("ours"):
        mode = provider.split()[1]
        step = TrainStep(optimizer="adamw", mode=mode, **pieces(case))

        def ours(crops: list[Tensor], iteration: int) -> Tensor:
            loss = step(crops, iteration).loss
            assert step.mode == mode, f"{mode} fell back to {step.mode}: not timed"
            return loss

        try:
            yield ours
        finally:
            step.close()
        return
    kinds: dict[str, Any] = {"plain": PlainStep, "original": peers.OriginalStep, "timm": peers.TimmStep}
    options = {} if provider in kinds else {"compiled": provider.endswith("compiled")}
    try:
        other = kinds.get(provider, CarefulStep)(**options, **pieces(case))
    except peers.Absent as reason:
        pytest.skip(str(reason))
    yield other


@pytest.fixture(scope="module")
def step(provider: str, case: Case) -> Iterator[Step]:
    """One for all tests of a case, which pytest runs after each other: what it compiled, a profile finds."""
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


def kept_for_backward_gib(run: Callable[[], object]) -> float:
    """What autograd keeps between forward and backward, the weights among it included."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # held, so that no two have one address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / 2**30


def over(cases: list[tuple[str, Case]]) -> pytest.MarkDecorator:
    params = [pytest.param(provider, case, id=f"{provider}-{case}") for provider, case in cases]
    return pytest.mark.parametrize(("provider", "case"), params, scope="module")


@over(CASES)
def test_step(provider: str, case: Case, step: Step, timed: Any) -> None:
    crops, facts = crops_of(case), case.facts
    losses: list[float] = []
    if ON_GPU or "compiled" in provider:
        losses.append(float(step(crops, 0)))
    else:
        kept = kept_for_backward_gib(lambda: losses.append(float(step(crops, 0))))
        facts["activations_gib"] = kept
    # fp32: what two correct implementations may differ by in a step (the golden tests' bound). bf16: a quarter of its
    # rounding. timm interpolates the position embedding in another way, and starts at another loss.
    budget = {"fp32": 1e-5, "bf16": 2e-3}[case.dtype] if provider != "timm" else 1e-2
    expected = expected_loss(case)
    require(abs(losses[0] - expected) <= budget * expected, f"loss {losses[0]}, expected {expected}")
    done = iter(range(1, NITER_PER_EP))
    timed(
        lambda: step(crops, next(done)),
        n_flops=model.total(case.work).flops,
        dtype=case.dtype,
        n_images=case.batch,
        repeats=REPEATS,
        warmup=5 if ON_GPU else 1,
        extra=lambda _: facts,
    )


def part_runs(case: Case) -> dict[str, Callable[[], object]]:
    """The parts of our eager step, each alone, on tensors of its own."""
    half = HALF[case.dtype] or torch.float32
    given = pieces(case)
    student, teacher = (given[name].to(half) for name in ("student", "teacher"))
    crops = [crop.to(half) for crop in crops_of(case)]
    runs = [torch.cat(crops[:2]), *([torch.cat(crops[2:])] if case.n_local else [])]
    backbone, head = student.backbone, student.head
    n_heads, dim = backbone.num_heads, backbone.embed_dim
    student_packing, teacher_packing = (student.packing(x, case.batch) for x in (crops, crops[:2]))
    backend, _ = choose(student_packing, n_heads, dim // n_heads, DEVICE.type, half, teacher=teacher_packing)
    attention.use_backend(backend)
    qkv = [torch.randn(sum(student_packing.sizes), n_heads, dim // n_heads, device=DEVICE, dtype=half) for _ in "qkv"]
    features = torch.randn(len(crops) * case.batch, dim, device=DEVICE, dtype=half)
    logits = torch.randn(len(crops), case.batch, case.out_dim, device=DEVICE, dtype=half)
    center, momentum = torch.zeros(case.out_dim, device=DEVICE), torch.tensor(0.9, device=DEVICE)
    masters = [p.detach().float().requires_grad_() for p in student.parameters()]
    for p in masters:
        p.grad = torch.randn_like(p)
    averages = [p.detach().clone() for p in masters]
    copies = [(p, p.detach().to(half)) for p in (*masters, *averages)] if case.dtype == "bf16" else []
    optimizer = ClipAdamWEMA(masters, lr=5e-4, clip_grad=3.0, teacher=zip(masters, averages), copies=copies)

    def both(network: torch.nn.Module, frozen: torch.nn.Module, x: Any, of_teacher: Any) -> None:
        network.zero_grad()
        with torch.no_grad():
            frozen(of_teacher)
        network(x).sum().backward()

    def attend() -> None:
        for x in qkv:
            x.grad = None
        op, scale = attention.BACKENDS[backend].run, (dim // n_heads) ** -0.5
        of_teacher = [x[: sum(teacher_packing.sizes)] for x in qkv]
        leaves = [x.requires_grad_() for x in qkv]
        for _ in backbone.blocks:
            with torch.no_grad():
                op(*of_teacher, scale, teacher_packing)
            torch.cat(op(*leaves, scale, student_packing)).sum().backward()

    def compare() -> None:
        logits.grad = None
        dino_loss(logits.requires_grad_(), logits[:2].detach(), center, 0.1, 0.04).backward()
        center_update_(center, logits[:2].detach(), momentum)

    return {
        "backbone": lambda: both(backbone, teacher.backbone, runs, runs[:1]),
        "attention": attend,
        "head": lambda: both(head, teacher.head, features.requires_grad_(), features[: 2 * case.batch].detach()),
        "loss": compare,
        "optimizer": optimizer.step,
    }


def cost_of(part: str, work: model.Workload) -> model.Cost:
    if part == "backbone":
        return model.linears(work) + model.pointwise(work) + model.attention(work)
    return model.PARTS[part](work)


@pytest.mark.parametrize("case", [MAIN], ids=str)
@pytest.mark.parametrize("provider", ["backbone", "attention", "head", "loss", "optimizer"])
def test_part(provider: str, case: Case, timed: Any) -> None:
    """`attention` lies within `backbone`. What the parts compute, the tests of the step check."""
    free()
    run, cost = part_runs(case)[provider], cost_of(provider, case.work)
    timed(
        run, n_bytes=cost.n_bytes, n_flops=cost.flops, dtype=case.dtype, n_images=case.batch, repeats=REPEATS,
        warmup=3 if ON_GPU else 1, extra=lambda _: case.facts,
    )  # fmt: skip


def hottest(step: Callable[[int], object], n_steps: int) -> Record:
    """The ten kernels (ops, on a CPU) that most time goes into, what is launched, and the busy share of the device."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ON_GPU else [])
    with profile(activities=activities) as profiler:
        for i in range(n_steps):
            step(i)
        if ON_GPU:
            torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if not ON_GPU or e.device_type == torch.autograd.DeviceType.CUDA]
    ms = {e.key: (e.self_device_time_total if ON_GPU else e.self_cpu_time_total) / 1e3 / n_steps for e in events}
    calls = {e.key: e.count / n_steps for e in events}
    ten = sorted(ms, key=ms.__getitem__, reverse=True)[:10]
    return {
        "hottest": [{"kernel": name[:120], "ms": ms[name], "calls": calls[name]} for name in ten],
        "launches_per_step": sum(calls.values()),
        "device_ms_per_step": sum(ms.values()),
    }


@over([("ours graph" if ON_GPU else "ours eager", MAIN)])
def test_profile(provider: str, case: Case, step: Step, timed: Any) -> None:
    """Launches, idle share of the device, and where its time goes, over 20 steps."""
    crops = crops_of(case)
    for i in range(5 if ON_GPU else 1):
        step(crops, i)
    found = hottest(lambda i: step(crops, 10 + i), 20 if ON_GPU else 2)

    def idle(timing: Timing) -> Record:
        share = {"idle_share": max(0.0, 1 - found["device_ms_per_step"] / timing.median_ms)} if ON_GPU else {}
        return case.facts | found | share

    done = iter(range(100, NITER_PER_EP))
    timed(lambda: step(crops, next(done)), n_images=case.batch, repeats=REPEATS, warmup=1, extra=idle)
