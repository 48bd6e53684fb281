"""Every example of kernels/README.md runs as it is printed, on its own, and does what its chapter says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdino_kernels import reference

README = Path(__file__).parents[2] / "kernels" / "README.md"
EXAMPLES = dict(re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", README.read_text(), flags=re.DOTALL))


def check_loss(scope: dict[str, Any]) -> None:
    leaf = scope["student"].detach().requires_grad_()
    expected = reference.dino_loss(leaf, scope["teacher"], scope["center"], 0.1, 0.04)
    expected.backward()
    torch.testing.assert_close(scope["loss"], expected)
    torch.testing.assert_close(scope["student"].grad, leaf.grad)
    torch.testing.assert_close(scope["owned"], leaf.grad)


def check_patch_loss(scope: dict[str, Any]) -> None:
    leaf = scope["student"].detach().requires_grad_()
    expected = reference.patch_loss(leaf, scope["teacher"], scope["center"], scope["weights"], 0.1, 0.07)
    expected.backward()
    torch.testing.assert_close(scope["loss"], expected)
    torch.testing.assert_close(scope["student"].grad, leaf.grad)
    torch.testing.assert_close(scope["owned"], leaf.grad)
    assert scope["weights"].sum() == 0.5  # half of the crops are masked
    factors = [scope[name].detach().requires_grad_() for name in ("x", "prototypes")]
    expected = reference.patch_loss(
        factors[0] @ factors[1].T, scope["teacher"], scope["center"], scope["weights"], 0.1, 0.07
    )
    expected.backward()
    torch.testing.assert_close(scope["of_product"], expected)
    torch.testing.assert_close([scope[name].grad for name in ("x", "prototypes")], [y.grad for y in factors])


def check_sinkhorn(scope: dict[str, Any]) -> None:
    """Rows sum to 1, and prototypes share the batch more evenly than without."""
    plain = (scope["teacher"] / 0.07).softmax(-1)
    torch.testing.assert_close(scope["targets"].sum(-1), torch.ones(2, 4))
    assert scope["targets"].mean((0, 1)).std() < plain.mean((0, 1)).std()
    assert scope["loss"].isfinite()


def check_center(scope: dict[str, Any]) -> None:
    """Zeros, moved twice by a tenth of the way."""
    torch.testing.assert_close(scope["center"], 0.19 * scope["teacher"].mean((0, 1)))


def check_teacher(scope: dict[str, Any]) -> None:
    """They start equal, and an average of equals is the same; the copies were empty."""
    for ours, student, copy in zip(scope["teacher"].parameters(), scope["student"].parameters(), scope["low"]):
        torch.testing.assert_close(ours, student)
        torch.testing.assert_close(copy, ours.detach().bfloat16())


def check_optimizer(scope: dict[str, Any]) -> None:
    """After three steps the teacher is behind the student, by most of what it moved; the bias has no gradient."""
    assert scope["loss"].isfinite()
    assert scope["teacher"].weight.isfinite().all()
    assert not torch.equal(scope["teacher"].weight, scope["student"].weight)


def check_crops(scope: dict[str, Any]) -> None:
    crops = scope["crops"]
    assert (crops.shape, crops.dtype) == ((2, 3, 32, 32), torch.bfloat16)
    assert crops.isfinite().all()
    assert crops.float().std() > 0.1


def check_attention(scope: dict[str, Any]) -> None:
    leaf, groups = scope["qkv"].detach().requires_grad_(), scope["groups"]
    expected = reference.short_attention(leaf, groups, 64**-0.5)
    expected.sum().backward()
    torch.testing.assert_close(scope["out"], expected)
    torch.testing.assert_close(scope["qkv"].grad, leaf.grad)
    torch.testing.assert_close(scope["cls"], expected[scope["firsts"]])


def check_mlp(scope: dict[str, Any]) -> None:
    leaf, fc1, fc2 = scope["tokens"].detach().requires_grad_(), scope["fc1"], scope["fc2"]
    hidden = torch.nn.functional.gelu(fc1(leaf))
    fc2(hidden).sum().backward()
    torch.testing.assert_close(scope["hidden"], hidden)
    torch.testing.assert_close(scope["y"], fc2(hidden))
    torch.testing.assert_close(scope["tokens"].grad, leaf.grad)


def check_layer_norm(scope: dict[str, Any]) -> None:
    leaf = scope["tokens"].detach().requires_grad_()
    expected = leaf + scope["fc"](scope["norm"](leaf))
    expected.sum().backward()
    torch.testing.assert_close(scope["y"], expected)
    torch.testing.assert_close(scope["tokens"].grad, leaf.grad, rtol=1e-4, atol=1e-5)


def check_loop(scope: dict[str, Any]) -> None:
    assert scope["loss"].isfinite()
    assert scope["center"].any()
    assert scope["momentum"] == 1.0
    for ours, student in zip(scope["teacher"].parameters(), scope["student"].parameters()):
        assert not torch.equal(ours, student)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "The loss": check_loss,
    "The loss of masked patches": check_patch_loss,
    "The center": check_center,
    "Sinkhorn's center": check_sinkhorn,
    "The teacher": check_teacher,
    "The optimizer": check_optimizer,
    "The crops": check_crops,
    "Attention": check_attention,
    "The MLP": check_mlp,
    "LayerNorm": check_layer_norm,
    "In a DINOv2-style loop": check_loop,
}


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title: str) -> None:
    scope: dict[str, Any] = {}
    exec(EXAMPLES[title], scope)
    CHECKS[title](scope)


def test_every_chapter_with_code_is_found() -> None:
    assert list(EXAMPLES) == list(CHECKS)
    assert len(CHECKS) == README.read_text().count("```python")
