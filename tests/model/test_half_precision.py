"""In bf16 the prototypes and attention are as near to fp64 as plain PyTorch in bf16 is."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from torch import nn

from fastdino.model.attention import Packing, sdpa
from fastdino.model.head import WeightNormLinear

bf16 = torch.bfloat16


def plain_prototypes(x, g, v):
    return F.linear(x, (g * (v / v.float().norm(dim=1, keepdim=True))).to(x.dtype))


def outputs(function, dtype, inputs, upstream):
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, upstream.to(dtype))


@pytest.mark.parametrize("autocast", [False, True], ids=["copies", "autocast"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_prototypes_in_bf16(compiled, autocast):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = F.normalize(torch.randn(12, 64), dim=-1).to(bf16)
    g, v = (1 + torch.rand(300, 1)).to(bf16), nn.init.kaiming_uniform_(torch.empty(300, 64)).to(bf16)
    layer = WeightNormLinear(64, 300)

    def ours(x, g, v):
        with torch.autocast("cpu", bf16, enabled=autocast):
            return torch.func.functional_call(layer, {"weight_g": g, "weight_v": v}, x)

    if compiled:
        ours = torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")
    upstream = torch.randn(12, 300).to(bf16)
    truth = outputs(
        lambda x, g, v: F.linear(x, g * v / v.norm(dim=1, keepdim=True)), torch.float64, (x, g, v), upstream
    )
    plain = outputs(plain_prototypes, bf16, (x, g, v), upstream)
    got = outputs(ours, torch.float32 if autocast else bf16, (x, g, v), upstream)
    for name, a, p, t in zip(("logits", "d x", "d g", "d v"), got, plain, truth, strict=True):
        assert_within_budget(name, a, p, t, bf16)


def test_attention_in_bf16():
    torch.manual_seed(0)
    packing = Packing(((3, 17), (4, 5)))
    qkv = [torch.randn(71, 2, 16).to(bf16) for _ in range(3)]
    upstream = torch.randn(71, 2, 16).to(bf16)

    def plain(q, k, v):
        parts = [[x.transpose(1, 2) for x in group] for group in zip(*(packing.split(x) for x in (q, k, v)))]
        outs = [F.scaled_dot_product_attention(*part, scale=0.25).transpose(1, 2).flatten(0, 1) for part in parts]
        return torch.cat(outs)

    truth = outputs(plain, torch.float64, qkv, upstream)
    same_dtype = outputs(plain, bf16, qkv, upstream)
    got = outputs(lambda *qkv: torch.cat(sdpa(torch.stack(qkv, 1), 0.25, packing)), bf16, qkv, upstream)
    for name, a, p, t in zip(("out", "d q", "d k", "d v"), got, same_dtype, truth, strict=True):
        assert_within_budget(name, a, p, t, bf16)
