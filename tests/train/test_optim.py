"""Clipping, freezing, LARS and SGD against what they are defined to do."""

import pytest
import torch
from torch import nn

from fastdino import DINOHead, clip_gradients, get_params_groups
from fastdino.train.optim import LARS, OPTIMIZERS, cancel_last_layer_gradients, clip_modules


def model_with_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) * 10 ** (i - 2)
    return model


def test_each_tensor_is_clipped_by_its_own_norm():
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    norms = clip_gradients(model, 0.5)
    for p, grad, norm in zip(model.parameters(), before, norms, strict=True):
        assert torch.isclose(norm, grad.norm())
        coefficient = 0.5 / (grad.norm() + 1e-6)
        assert torch.allclose(p.grad, grad * coefficient if coefficient < 1 else grad, rtol=1e-14)
    assert any(norm > 0.5 for norm in norms)
    assert any(norm < 0.5 for norm in norms)


def test_parameters_without_gradient_are_left_out_of_clipping():
    model = model_with_gradients()
    model[0].weight.grad = None
    assert len(clip_gradients(model, 1.0)) == 5
    assert len(clip_gradients(nn.Linear(2, 2), 1.0)) == 0


def test_a_frozen_last_layer_neither_moves_nor_decays_nor_has_state():
    model = nn.ModuleDict({"head": DINOHead(6, 10, hidden_dim=8, bottleneck_dim=4)})
    optimizer = OPTIMIZERS["adamw"](get_params_groups(model))
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.5
    last = model["head"].last_layer.weight_v
    before = last.detach().clone()
    for _ in range(2):
        model["head"](torch.randn(5, 6)).square().sum().backward()
        cancel_last_layer_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(last, before)
    assert last not in optimizer.state
    model["head"](torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(last, before)
    assert float(optimizer.state[last]["step"]) == 1


def test_lars_follows_its_definition():
    model = model_with_gradients()
    optimizer = LARS(get_params_groups(model), lr=0.3, weight_decay=0.1)
    optimizer.param_groups[1]["weight_decay"] = 0.1  # vectors ignore it
    params = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in params]
    for _ in range(3):
        for i, p in enumerate(model.parameters()):
            update = p.grad
            if p.ndim > 1:
                update = update + 0.1 * params[i]
                update = update * (0.001 * params[i].norm() / update.norm())
            velocity[i] = 0.9 * velocity[i] + update
            params[i] = params[i] - 0.3 * velocity[i]
        optimizer.step()
    for p, expected in zip(model.parameters(), params, strict=True):
        assert torch.allclose(p, expected, rtol=1e-13)


def test_lars_moves_a_weight_of_zeros():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.1).step()
    assert torch.allclose(weight, torch.full((2, 2), -0.1))


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_other_optimizers_keep_a_velocity_across_checkpoints(name):
    runs = []
    for resume in (False, True):
        model = model_with_gradients()
        optimizer = OPTIMIZERS[name](get_params_groups(model))
        for i in range(4):
            if resume and i == 2:
                state = optimizer.state_dict()
                optimizer = OPTIMIZERS[name](get_params_groups(model))
                optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_modules_are_clipped_as_wholes(dtype):
    """As torch.nn.utils.clip_grad_norm_ over each; a module below the norm keeps its gradients to the bit."""
    torch.manual_seed(0)
    modules = [[torch.randn(5, 7, dtype=dtype), torch.randn(3, dtype=dtype)], [1e-3 * torch.randn(4, dtype=dtype)]]
    before = [[grad.double().clone() for grad in grads] for grads in modules]
    norms = clip_modules(modules, 0.5)
    for grads, were, norm in zip(modules, before, norms):
        expected = torch.stack([grad.norm() for grad in were]).norm()
        assert torch.allclose(norm.double(), expected, rtol=1e-6)
        factor = min(1.0, 0.5 / (float(expected) + 1e-6))
        for grad, was in zip(grads, were):
            assert torch.allclose(grad.double(), was * factor, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(modules[1][0].double(), before[1][0])
    assert torch.equal(clip_modules(modules, 0)[1], norms[1])
