"""dino_loss on shapes, dtypes, strides and temperatures that nobody chose, against fp64."""

from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from budget import assert_error_at_most, assert_within_budget, loss_budgets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdino_kernels import batch_center, dino_loss_with_stats, reference
from fastdino_kernels.launch import LAUNCH

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Chunks of 16 times the columns: the interpreter's time is that of its operations, whatever their size.
WIDE_CHUNKS = {"dino_loss_fwd": replace(LAUNCH["dino_loss_fwd"], num_warps=16)}


class Problem(NamedTuple):
    """What hypothesis draws, and prints where a test fails."""

    n_student: int
    n_teacher: int
    n_images: int
    n_prototypes: int
    dtypes: tuple[torch.dtype, torch.dtype]
    spread: float
    axes_in_memory: tuple[int, ...]
    gap: int  # words between the rows
    temps: tuple[float, float]
    seed: int

    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """student (V, B, K), teacher (T, B, K) and center (K,)."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(n_views: int, dtype: torch.dtype) -> Tensor:
            shape = [(n_views, self.n_images, self.n_prototypes)[axis] for axis in self.axes_in_memory]
            dense = self.spread * torch.randn(*shape[:2], shape[2] + self.gap, generator=generator)
            strided = dense.to(DEVICE, dtype)[..., : shape[2]]
            return strided.permute([self.axes_in_memory.index(axis) for axis in range(3)])

        center = self.spread * torch.randn(self.n_prototypes, generator=generator).to(DEVICE)
        return draw(self.n_student, self.dtypes[0]), draw(self.n_teacher, self.dtypes[1]), center


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
problems = st.builds(
    Problem,
    n_student=st.sampled_from([*range(2, 13), 24]),
    n_teacher=st.integers(1, 5),
    n_images=st.integers(1, 2),
    n_prototypes=st.integers(1, 40) | st.integers(200, 2500),
    dtypes=st.tuples(dtypes, dtypes),
    spread=st.sampled_from([0.01, 1.0, 100.0]),
    axes_in_memory=st.permutations([0, 1, 2]).map(tuple),
    gap=st.integers(0, 3),
    temps=st.tuples(st.floats(0.05, 1.0), st.floats(0.02, 1.0)),
    seed=st.integers(0, 2**31),
)


@mock.patch.dict(LAUNCH, WIDE_CHUNKS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(problems)
def test_any_problem_matches_fp64(problem):
    (student, teacher, center), temps = problem.logits(), problem.temps
    exact = student.double(), teacher.double(), center.double()
    results = {}
    for name, function, inputs in (
        ("ours", dino_loss_with_stats, (student, teacher, center)),
        ("plain", reference.dino_loss_with_stats, (student, teacher, center)),
        ("truth", reference.dino_loss_with_stats, exact),
    ):
        leaf = inputs[0].detach().requires_grad_()
        out = function(leaf, *inputs[1:], *temps)
        out[0].backward()
        results[name] = leaf.grad, out
    grad, stats = results["ours"]
    true_grad, (true_loss, true_entropy, true_per_image) = results["truth"]
    assert_within_budget("gradient", grad, results["plain"][0], true_grad, student.dtype)

    loss_budget, entropy_budget = loss_budgets(student, teacher, center, *temps)
    assert_error_at_most("loss", stats.loss.detach(), true_loss.detach(), loss_budget)
    assert_error_at_most("per_image", stats.per_image, true_per_image, loss_budget)
    assert_error_at_most("teacher_entropy", stats.teacher_entropy, true_entropy, entropy_budget)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems)
def test_any_batch_center_matches_fp64(problem):
    teacher = problem.logits()[1]
    plain, truth = reference.batch_center(teacher), reference.batch_center(teacher.double())
    assert_within_budget("batch_center", batch_center(teacher), plain, truth, torch.float32)
