"""Losses, center and MLP stay within their budgets where exp2, log2 and division are as wrong as a card's may be."""

from collections.abc import Iterator

import pytest
import torch
from budget import assert_error_at_most, assert_within_budget, loss_budgets
from card_math import card_math
from test_attention import check as check_attention
from test_attention import check_turned, packed, plain, plain_cls
from test_center import rows, updated
from test_dino_loss import STUDENT_TEMP, TEACHER_TEMP, check_against_fp64, logits
from test_mlp import check_against_fp64 as check_mlp
from test_mlp import inputs, upstream
from test_patch_loss import check_against_fp64 as check_patch_loss
from test_patch_loss import inputs as patch_inputs
from test_sinkhorn import logits as sinkhorn_logits
from test_sinkhorn import plain as plain_sinkhorn

from fastdino_kernels import (
    batch_center,
    cls_attention,
    dino_loss_with_stats,
    mlp,
    reference,
    short_attention,
    sinkhorn_center,
)
from fastdino_kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a card has arithmetic of its own")
fp32, bf16 = torch.float32, torch.bfloat16


@pytest.fixture(params=["hash", "plus", "minus"], autouse=True)
def _errors(request: pytest.FixtureRequest) -> Iterator[None]:
    with card_math(request.param):
        yield


def test_the_errors_are_made(device):
    """The loss is off in its last digits, and only there."""
    student, teacher, center = logits(10, 2, 3, 257, fp32, device)
    wrong = dino_loss_with_stats(student, teacher, center, STUDENT_TEMP, TEACHER_TEMP).per_image
    with card_math("none"):
        right = dino_loss_with_stats(student, teacher, center, STUDENT_TEMP, TEACHER_TEMP).per_image
    assert not torch.equal(wrong, right)
    torch.testing.assert_close(wrong, right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=["fp32", "bf16"])
def test_loss_and_gradient_match_fp64(dtype, device):
    check_against_fp64(*logits(10, 2, 3, 257, dtype, device))


def test_huge_logits_match_fp64(device):
    student, teacher, center = logits(4, 2, 2, 257, fp32, device)
    check_against_fp64(1e4 * student.clamp(-1, 1), 1e4 * teacher.clamp(-1, 1), center)


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=["fp32", "bf16"])
def test_patch_loss_and_its_gradient_match_fp64(dtype, device):
    check_patch_loss(*patch_inputs(5, 257, dtype, device))
    student, teacher, center, weights = patch_inputs(3, 300, fp32, device)
    huge = [(1e4 * x.clamp(-1, 1)).to(dtype) for x in (student, teacher)]
    check_patch_loss(*huge, center, weights)


def test_sinkhorn_center_matches_fp64(device):
    for scale in (1.0, 1e4):
        teacher = scale * sinkhorn_logits(40, 257, fp32, device)
        truth = sinkhorn_center(teacher.double(), TEACHER_TEMP)
        got = sinkhorn_center(teacher, TEACHER_TEMP)
        assert_within_budget("center", got, plain_sinkhorn(teacher), truth, fp32)


def test_one_prototype_costs_nothing(device):
    check_against_fp64(*logits(4, 5, 2, 1, fp32, device))


def test_statistics_match_fp64(device):
    inputs = logits(3, 3, 2, 300, fp32, device)
    stats = dino_loss_with_stats(*inputs, STUDENT_TEMP, TEACHER_TEMP)
    truth = reference.dino_loss_with_stats(*(x.double() for x in inputs), STUDENT_TEMP, TEACHER_TEMP)
    loss_budget, entropy_budget = loss_budgets(*inputs, STUDENT_TEMP, TEACHER_TEMP)
    assert_error_at_most("loss", stats.loss, truth[0], loss_budget)
    assert_error_at_most("teacher_entropy", stats.teacher_entropy, truth[1], entropy_budget)


def test_center_matches_fp64(device):
    teacher, center = rows(3, 7, 257, fp32, device)
    mean, true_mean = batch_center(teacher), reference.batch_center(teacher.double())
    plain_mean = reference.batch_center(teacher)
    assert_within_budget("batch_center", mean, plain_mean, true_mean, fp32)
    plain = updated(center, plain_mean, 0.9, op=reference.center_ema_)
    truth = updated(center.double(), true_mean, 0.9, op=reference.center_ema_)
    assert_within_budget("center_update_", updated(center, teacher, 0.9), plain, truth, fp32)


@pytest.mark.parametrize("dtype", [fp32, torch.float16], ids=["fp32", "fp16"])
def test_attention_and_its_gradients_match_fp64(dtype, device):
    groups = [(1, 197), (4, 37)]
    check_attention(short_attention, plain, reference.short_attention, (packed(groups, 3, dtype, device),), groups)
    check_turned(groups, dtype, device)
    kv = packed(groups, 2, dtype, device)
    check_attention(cls_attention, plain_cls, reference.cls_attention, (kv[:5, 0] / 2, kv), groups)


@pytest.mark.parametrize("dtype", [torch.float16, bf16], ids=["fp16", "bf16"])
def test_mlp_and_its_gradients_match_fp64(dtype, device):
    tensors = inputs(37, 33, 129, dtype, device)
    check_mlp(mlp, reference.mlp, tensors, upstream(tensors, 33))
