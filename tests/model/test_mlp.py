"""Which MLP runs, and that what stands in for the layers gives their numbers."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdino import MultiCropWrapper, VisionTransformer
from fastdino.model import mlp, timing
from fastdino.model.mlp import Mlp, choose, choose_for, use_mlp
from fastdino.model.timing import Choice

KERNELS = import_module("fastdino_kernels.mlp")  # by name: in the package, `mlp` is the function
fp32, bf16 = torch.float32, torch.bfloat16


@pytest.fixture
def layers(monkeypatch, ops):
    """An MLP, with the kernels taking fp32, which shows more digits."""
    monkeypatch.setattr(KERNELS, "KERNEL_DTYPES", {fp32})
    monkeypatch.setattr(mlp._Current, "way", "library")
    torch.manual_seed(0)
    return Mlp(16, 64)


def run(layers, x):
    x = x.clone().requires_grad_()
    y = layers(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layers.parameters()])]


def test_ours_gives_the_layers_numbers(layers):
    x = torch.randn(3, 5, 16)
    expected = run(layers, x)
    use_mlp("ours")
    for ours, library in zip(run(layers, x), expected, strict=True):
        torch.testing.assert_close(ours, library, rtol=1e-5, atol=2e-6)


def test_layers_that_are_watched_or_replaced_are_called(layers, ops):
    use_mlp("ours")
    if ops == "plain":
        pytest.skip("nothing stands in for the layers there")
    x, seen = torch.randn(2, 16), []
    layers(x)
    handle = layers.act.register_forward_hook(lambda *_: seen.append(1))
    layers(x)
    assert seen == [1]
    handle.remove()
    layers.fc1 = nn.Sequential(layers.fc1)
    layers.fc1.register_forward_hook(lambda *_: seen.append(2))
    layers(x)
    assert seen == [1, 2]


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="mlp: expected one of ours, library, got 'fast'"):
        use_mlp("fast")
    with pytest.raises(ValueError, match="mlp: expected auto, ours, library, got 'fast'"):
        choose(Mlp(16, 64), [4, 2], fp32, "fast", compiled=False)


def test_what_is_asked_for_is_not_timed():
    assert choose(Mlp(16, 64), [4, 2], bf16, "ours", compiled=False) == Choice("ours", "ours, as asked")
    assert choose(Mlp(16, 64), [4, 2], bf16, "auto", compiled=False) == Choice("library", "library")


ON_GPU = SimpleNamespace(fc1=SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda"))))


def test_auto_times_both_and_takes_the_faster(monkeypatch):
    """Each for the step's tokens, in its dtype, compiled as it is."""
    works = []

    def work(way, layers, *given):
        works.append((way, *given))
        return {"ours": 0.5, "library": 0.75}[way]

    monkeypatch.setattr(mlp, "_work", work)
    monkeypatch.setattr(timing, "time_ms", float)
    assert choose(ON_GPU, [40, 20], bf16, "auto", compiled=True) == Choice("ours", "ours 0.50 ms, library 0.75 ms")
    assert works == [("ours", [40, 20], bf16, True), ("library", [40, 20], bf16, True)]
    assert choose(ON_GPU, [40, 20], fp32, "auto", compiled=True) == Choice("library", "library")


def test_what_raises_is_said_and_left_out(monkeypatch):
    def work(way, *_):
        if way == "ours":
            raise RuntimeError("out of shared memory")
        return 1.0

    monkeypatch.setattr(mlp, "_work", work)
    monkeypatch.setattr(timing, "time_ms", float)
    choice = choose(ON_GPU, [4, 2], bf16, "auto", compiled=False)
    assert choice.way == "library"
    assert choice.reason == "library 1.00 ms; ours does not run here: RuntimeError: out of shared memory"


def test_the_work_is_both_ways_and_leaves_no_trace():
    layers, state = Mlp(16, 64), torch.get_rng_state()
    for compiled in (False, True):
        mlp._work("library", layers, [6, 3], fp32, compiled)()
    assert all(p.grad is None for p in layers.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_student_is_asked_for_its_tokens(monkeypatch):
    monkeypatch.setattr(mlp._Current, "way", "library")
    asked = []
    monkeypatch.setattr(mlp, "choose", lambda layers, n_tokens, *_: asked.append(n_tokens) or Choice("ours", "ours"))
    vit = VisionTransformer([16], 8, embed_dim=16, depth=1, num_heads=1)
    crops = [torch.zeros(3, 3, side, side) for side in (16, 16, 8)]
    assert choose_for(MultiCropWrapper(vit, nn.Identity()), crops, 2, bf16, "auto", False) == Choice("ours", "ours")
    assert asked == [[3 * (5 + 5 + 2), 3 * (5 + 5)]]
    assert mlp._Current.way == "ours"
    assert choose_for(MultiCropWrapper(vit, nn.Identity(), packed=False), crops, 2, bf16, "auto", False) is None
