"""KoLeo and Gram anchoring where their precision is at stake; their numbers are `test_v2_golden.py`'s."""

import pytest
import torch

from fastdino.objectives import gram, koleo


@pytest.mark.parametrize("n_images", [8, 64])
def test_koleo_holds_at_initialisation(n_images):
    """LayerScale of 1e-5: all features of the batch agree to 1e-5, where products of fp32 no longer tell them apart."""
    torch.manual_seed(0)
    x = (torch.randn(384) + 1e-5 * torch.randn(n_images, 384)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    loss, truth = koleo(x), koleo(exact)
    loss.backward(), truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=0)
    assert torch.cosine_similarity(x.grad.double().flatten(), exact.grad.flatten(), 0) > 0.999


def test_koleo_of_duplicates_is_finite():
    x = torch.ones(4, 8, requires_grad=True)
    loss = koleo(x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("function", [koleo, lambda x: gram(x[None], x[None].flip(-1))], ids=["koleo", "gram"])
def test_autocast_changes_nothing(function):
    torch.manual_seed(0)
    x = torch.randn(6, 16)
    expected = function(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(x), expected)
    assert function(x.bfloat16()).dtype == torch.float32


def test_gram_compares_similarities_alone():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(gram(3 * student, teacher), gram(student, teacher))
    assert gram(student, student) == 0
    assert gram(student, -student, apply_norm=False) == 0
    assert gram(student, teacher, remove_neg=True) < gram(student, teacher, remove_only_teacher_neg=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: koleo(x[:1]), r"B above topk=1, got \(1, 8\)"),
        (lambda x: koleo(x, 4), r"B above topk=4, got \(4, 8\)"),
        (lambda x: gram(x[None], x[None, :3]), r"like student \(1, 4, 8\), got \(1, 3, 8\)"),
        (lambda x: gram(x[None], x[None], remove_neg=True, remove_only_teacher_neg=True), "expected at most one"),
    ],
)
def test_bad_input_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 8))
