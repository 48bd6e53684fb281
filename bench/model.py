"""What a step must cost: FLOPs, bytes and launches per part, counted from shapes, and the least time they take.

A part takes as long as the slowest of three: its FLOPs at the matmul ceiling, its bytes at the copy ceiling, its
launches at what one costs the host (nothing, where a graph replays them). Ceilings are handed in; none is known here.
Counted is what the original computes, also where somebody finds that it is not needed: the patches' share of the last
block after its attention, a 16th of a 12-block backbone, which `fastdino.model` leaves out.
Axes: B images, N tokens (1 + patches) of a crop, D channels, K prototypes, V views. A FLOP is one multiplication or one
addition. A student's crop counts three forwards (forward, gradients by input and by weight), a teacher's one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdino.model.archs import ARCHITECTURES, Arch

HIDDEN_DIM, BOTTLENECK_DIM = 2048, 256  # of DINO's head


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step. sides in pixels; itemsize: bytes of a number in activations and weights, 2 for bf16."""

    arch: str
    batch: int
    n_local: int = 8
    out_dim: int = 65536
    itemsize: int = 2
    patch_size: int = 16
    global_side: int = 224
    local_side: int = 96

    @property
    def shape(self) -> Arch:
        return ARCHITECTURES[self.arch]

    def tokens(self, side: int) -> int:
        """N of a crop."""
        return (side // self.patch_size) ** 2 + 1

    @property
    def passes(self) -> tuple[tuple[int, int, int], ...]:
        """(crops, N, forwards that a crop counts for): globals and locals of the student, globals of the teacher."""
        large, small = self.tokens(self.global_side), self.tokens(self.local_side)
        return (2 * self.batch, large, 3), (self.n_local * self.batch, small, 3), (2 * self.batch, large, 1)


@dataclass(frozen=True)
class Cost:
    """What a part does, at the least."""

    flops: float
    n_bytes: float
    launches: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.n_bytes + other.n_bytes, self.launches + other.launches)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device reaches: as measured there, or as assumed by whoever asks."""

    copy_gbps: float
    matmul_tflops: float
    launch_us: float = 0.0

    @classmethod
    def of(cls, record: Mapping[str, Any], dtype: str, launches: bool) -> "Ceilings":
        """As a record carries them. launches: whether the host pays for each."""
        launch_us = record["launch_us"] if launches else 0.0
        return cls(copy_gbps=record["copy_gbps"], matmul_tflops=record[f"matmul_{dtype}_tflops"], launch_us=launch_us)

    def seconds(self, cost: Cost) -> float:
        """The least time that a part takes."""
        return max(
            cost.flops / (self.matmul_tflops * 1e12),
            cost.n_bytes / (self.copy_gbps * 1e9),
            cost.launches * self.launch_us / 1e6,
        )


def parameters(arch: Arch, out_dim: int = 65536, patch_size: int = 16, side: int = 224) -> int:
    """Parameters of backbone and head that get a gradient (the prototypes' lengths do not)."""
    block = 12 * arch.width**2 + 13 * arch.width  # qkv, proj, MLP; biases 9 D, norms 4 D
    tokens = (side // patch_size) ** 2 + 2  # position embedding of patches and CLS, and the CLS token
    backbone = arch.depth * block + tokens * arch.width + (3 * patch_size**2 + 1) * arch.width + 2 * arch.width
    return backbone + _head_mlp(arch) + HIDDEN_DIM * 2 + BOTTLENECK_DIM + BOTTLENECK_DIM * out_dim


def _head_mlp(arch: Arch) -> int:
    return arch.width * HIDDEN_DIM + HIDDEN_DIM**2 + HIDDEN_DIM * BOTTLENECK_DIM


def linears(work: Workload) -> Cost:
    """Patch embedding, qkv, proj and the MLP of every block."""
    arch = work.shape
    patch = 3 * work.patch_size**2
    flops = words = 0
    for n_crops, n, count in work.passes:
        per_crop = arch.depth * 24 * n * arch.width**2 + 2 * (n - 1) * patch * arch.width  # qkv 6, proj 2, MLP 16
        flops += count * n_crops * per_crop
        words += count * (n_crops * n * arch.depth * 16 * arch.width + arch.depth * 12 * arch.width**2)
    return Cost(flops, words * work.itemsize, arch.depth * (2 * 4 + 4 * 3))


def pointwise(work: Workload) -> Cost:
    """Norms, GELU and residual sums, one op after another (a compiler fuses some): no FLOPs worth counting."""
    arch = work.shape
    words = 0
    for n_crops, n, count in work.passes:
        # Forward: two norms 4, GELU 8, two sums 6 D. Backward: 6, 12, 6.
        words += n_crops * n * arch.depth * arch.width * (42 if count == 3 else 18)
    return Cost(0, words * work.itemsize, arch.depth * (2 * 5 + 7))


def attention(work: Workload) -> Cost:
    """q k^T, softmax, times v, never written down: reads q, k, v, writes out; backward twice that."""
    arch = work.shape
    flops = sum(count * n_crops * arch.depth * 4 * n**2 * arch.width for n_crops, n, count in work.passes)
    words = sum(count * n_crops * n * arch.depth * 4 * arch.width for n_crops, n, count in work.passes)
    return Cost(flops, words * work.itemsize, arch.depth * (2 + 3))


def head(work: Workload) -> Cost:
    """Three linears, and the prototypes, whose logits are most of the bytes."""
    weights = _head_mlp(work.shape) + BOTTLENECK_DIM * work.out_dim
    rows = 3 * (2 + work.n_local) * work.batch + 2 * work.batch
    words = rows * (work.out_dim + 2 * HIDDEN_DIM) + 4 * weights
    return Cost(2 * rows * weights, words * work.itemsize, 2 * 8 + 20)


def loss(work: Workload) -> Cost:
    """Logits read forward and backward, gradients written; the teacher's once more for the center."""
    views = 2 + work.n_local
    return Cost(0, (3 * views + 2 * 2 + 2) * work.batch * work.out_dim * work.itemsize, 4)


def optimizer(work: Workload) -> Cost:
    """Clip, AdamW and EMA in two passes: gradients once for their norms (4 bytes), then gradient, weight, two moments
    and teacher (20), all but the gradient written (16), and two copies where it is bf16 that computes (4).
    """
    return Cost(0, (44 if work.itemsize == 2 else 40) * parameters(work.shape, work.out_dim), 2)


PARTS = {f.__name__: f for f in (linears, pointwise, attention, head, loss, optimizer)}


def parts(work: Workload) -> dict[str, Cost]:
    """Every part of a step."""
    return {name: count(work) for name, count in PARTS.items()}


def total(work: Workload) -> Cost:
    """The whole step."""
    return sum(parts(work).values(), Cost(0, 0, 0))


def step_seconds(work: Workload, ceilings: Ceilings) -> float:
    """The least time of a step: part after part."""
    return sum(ceilings.seconds(cost) for cost in parts(work).values())


@dataclass(frozen=True)
class Projection:
    """PROJECTED, never measured.

    efficiency: of n GPUs against one, if the all-reduce comes after backward (exposed) or beside it (hidden).
    """

    n_gpus: int
    step_seconds: float
    allreduce_bytes: float
    allreduce_seconds: float
    efficiency_exposed: float
    efficiency_hidden: float


def project(
    n_gpus: int, seconds: float, n_parameters: int, link_gbps: float, bytes_per_gradient: int = 4
) -> Projection:
    """A PROJECTION of one GPU's step to n of them, each with the same batch.

    seconds: of one step on one GPU, measured or modelled. link_gbps: GB/s that each GPU sends, assumed by the caller.
    bytes_per_gradient: 2 where bf16 computes. A ring moves 2 (n - 1) / n of the gradients through each link; two thirds
    of a step are backward, and can hide it.
    """
    n_bytes = 2 * (n_gpus - 1) / n_gpus * n_parameters * bytes_per_gradient
    reduce_seconds = n_bytes / (link_gbps * 1e9)
    uncovered = max(0.0, reduce_seconds - 2 / 3 * seconds)
    return Projection(
        n_gpus, seconds, n_bytes, reduce_seconds, seconds / (seconds + reduce_seconds), seconds / (seconds + uncovered)
    )
