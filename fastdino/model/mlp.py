"""The MLP of a block, by kernels of our own or by the library's, and which of the two is faster here.

Axes: M tokens of all images, D channels.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.model.attention import HALF
from fastdino.model.multicrop import MultiCrop
from fastdino.model.recompute import recomputed
from fastdino.model.timing import Choice, agreed, outcome, said
from fastdino_kernels import mlp, reference
from fastdino_kernels.mlp import takes_kernels

# x, weight and bias of both linear maps -> y. ours: GELU inside of the products, its output not kept.
WAYS: dict[str, Callable[..., Tensor]] = {"ours": mlp, "library": reference.mlp}


class _Current:
    """The way of all models in this process, for what it takes."""

    way = "library"


def use_mlp(name: str) -> None:
    """Set the way of all models in this process: a name of WAYS. Raises ValueError for another."""
    if name not in WAYS:
        raise ValueError(f"mlp: expected one of {', '.join(WAYS)}, got {name!r}")
    _Current.way = name


class GELU(nn.GELU):
    """PyTorch's (exact), whose output is computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return recomputed(F.gelu, x)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Weight and bias of both linear maps, as `fastdino_kernels.mlp` takes them."""
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def _is_ours(self, x: Tensor) -> bool:
        """Whether our kernels may stand in for the layers: they take x, and nobody changed a layer or watches one."""
        if _Current.way != "ours" or not takes_kernels(x):
            return False
        layers = self.fc1, self.act, self.fc2
        kinds = [type(layer) for layer in layers]
        untouched = kinds == [nn.Linear, GELU, nn.Linear] and self.fc1.bias is not None
        if not untouched or torch.compiler.is_compiling():
            return untouched
        return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return mlp(x, *self.weights) if self._is_ours(x) else self.fc2(self.act(self.fc1(x)))


def _gated(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def _two_thirds(hidden_dim: int, align: int) -> int:
    """Of a GELU MLP's width: as many weights in three matrices as that one has in two; up to a multiple of align."""
    return -(int(hidden_dim * 2 / 3) // -align) * align


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x) (arXiv:2002.05202), under the names of DINOv3. hidden_dim: of a GELU MLP as large."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True, align: int = 8) -> None:
        super().__init__()
        width = _two_thirds(hidden_dim, align)
        self.w1 = nn.Linear(dim, width, bias=bias)
        self.w2 = nn.Linear(dim, width, bias=bias)
        self.w3 = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w3(recomputed(_gated, self.w1(x), self.w2(x)))


class JoinedSwiGLU(nn.Module):
    """`SwiGLU` whose first two matrices are one, `w12`, the gate's half first, under the names of DINOv2."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        width = _two_thirds(hidden_dim, 8)
        self.w12 = nn.Linear(dim, 2 * width, bias=bias)
        self.w3 = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w3(recomputed(_gated, *self.w12(x).chunk(2, dim=-1)))


# What a block computes of each token: of width, hidden width (of a GELU MLP) and whether there are biases. The names
# are those of DINOv3's configurations, and DINOv2's for its own form.
FEED_FORWARDS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "mlp": Mlp,
    "swiglufused": JoinedSwiGLU,
    "swiglu": SwiGLU,
    "swiglu32": partial(SwiGLU, align=32),
    "swiglu64": partial(SwiGLU, align=64),
    "swiglu128": partial(SwiGLU, align=128),
}


def feed_forward(name: str, dim: int, hidden_dim: int, bias: bool) -> nn.Module:
    """One of FEED_FORWARDS. Raises ValueError for another name."""
    if name not in FEED_FORWARDS:
        raise ValueError(f"ffn: expected one of {', '.join(FEED_FORWARDS)}, got {name!r}")
    return FEED_FORWARDS[name](dim, hidden_dim, bias)


def _work(way: str, layers: Mlp, n_tokens: Sequence[int], dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """What a step asks of one MLP: the student's tokens both ways, the teacher's forward. It draws nothing."""
    run = torch.compile(WAYS[way], fullgraph=True, dynamic=False) if compiled else WAYS[way]
    weights = [x.detach().to(dtype).requires_grad_() for x in layers.weights]
    student, teacher = (weights[0].new_zeros(n, weights[0].shape[1]).requires_grad_() for n in n_tokens)
    upstream = torch.zeros_like(student)

    def work() -> None:
        with torch.no_grad():
            run(teacher, *weights)
        torch.autograd.grad(run(student, *weights), [student, *weights], upstream)

    return work


def choose(layers: Mlp, n_tokens: Sequence[int], dtype: torch.dtype, asked: str, compiled: bool) -> Choice:
    """The way asked for, or under `auto` the faster one for so many tokens, (student's, teacher's), timed on a GPU.

    A collective, where there are several processes: the choice is the same on all. Raises ValueError for another name.
    """
    if asked not in ("auto", *WAYS):
        raise ValueError(f"mlp: expected auto, {', '.join(WAYS)}, got {asked!r}")
    if asked != "auto":
        return Choice(asked, f"{asked}, as asked")
    device = layers.fc1.weight.device
    if device.type != "cuda" or dtype not in HALF:
        return Choice("library", "library")

    works = {way: partial(_work, way, layers, n_tokens, dtype, compiled) for way in WAYS}
    outcomes = agreed({way: outcome(way, work) for way, work in works.items()})
    if all(isinstance(result, str) for result in outcomes.values()):  # the step itself will say what is wrong
        return Choice("library", "library")
    return said(outcomes)


def choose_for(
    student: MultiCrop,
    crops: Sequence[Tensor],
    n_teacher_views: int,
    dtype: torch.dtype,
    asked: str,
    compiled: bool,
) -> Choice | None:
    """`choose` for what a student does with such crops, and its teacher with the first of them; for all models from
    here on. None where the backbone has MLPs of its own.
    Raises ValueError where `ours` is asked for a backbone with SwiGLU, which has no kernels of ours.
    """
    if asked == "ours" and any(isinstance(module, (SwiGLU, JoinedSwiGLU)) for module in student.modules()):
        raise ValueError("mlp: expected auto or library, for the backbone has SwiGLU, got 'ours'")
    packings = [student.packing(crops[:n], len(crops[0])) for n in (len(crops), n_teacher_views)]
    layers = next((module for module in student.modules() if isinstance(module, Mlp)), None)
    if layers is None or None in packings:
        return None
    choice = choose(layers, [sum(x.sizes) for x in packings if x], dtype, asked, compiled)
    use_mlp(choice.way)
    return choice
