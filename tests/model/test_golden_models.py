"""The networks give the original's numbers, under the original's names."""

import copy
import gc
import json
from contextlib import nullcontext

import pytest
import torch
from kept import Storages

from fastdino import DINOHead, MultiCropWrapper, VisionTransformer, get_params_groups
from fastdino.model import ARCHITECTURES, recompute
from fastdino.model import vit as vit_module
from fastdino.model.attention import Packing
from fastdino.model.block import Block
from fastdino.model.drop_path import Path, Rows, draw, draw_orders

BUDGET = {"fp64": 1e-10, "fp32": 1e-5}


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_vit_matches_the_original(golden, rel, precision):
    data = golden(f"vit_{precision}")
    vit = VisionTransformer(**data["kw"]).to(data["x0"].dtype).eval()
    vit.load_state_dict(data.state("state"))
    sizes = [i for i in range(9) if f"x{i}" in data]
    assert len(sizes) >= 2
    for i in sizes:
        x = data[f"x{i}"]
        layers = vit.get_intermediate_layers(x, 2)
        assert rel(vit(x), data[f"cls{i}"]) < BUDGET[precision]
        assert rel(vit.get_last_selfattention(x), data[f"attn{i}"]) < BUDGET[precision]
        assert len(layers) == 2
        for j, layer in enumerate(layers):
            assert rel(layer, data[f"inter{i}_{j}"]) < BUDGET[precision]


@pytest.mark.parametrize("name", ["head_fp64", "head_bn_fp64"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_head_matches_the_original(golden, rel, name, compiled):
    torch._dynamo.reset()
    data = golden(name)
    state = data.state("state")
    hidden_dim, bottleneck_dim = len(state["mlp.0.bias"]), state["last_layer.weight_v"].shape[1]
    head = DINOHead(48, 96, use_bn="bn" in name, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim).double()
    head.load_state_dict(state)
    assert [n for n, p in head.named_parameters() if not p.requires_grad] == data["frozen"]
    x = data["x"].requires_grad_()
    y = (torch.compile(head, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else head)(x)
    (y * torch.linspace(-1, 1, 96, dtype=torch.float64)).sum().backward()
    assert rel(y, data["y"]) < 1e-10
    assert rel(x.grad, data["dx"]) < 1e-10
    gradients = data.state("grad")
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert gradients.keys() == {n for n, p in head.named_parameters() if p.requires_grad}
    for n, p in head.named_parameters():
        if p.requires_grad:  # a bias in front of BatchNorm has a true gradient of zero, hence the absolute bound
            assert float((p.grad - gradients[n]).abs().max()) < 1e-10 * largest, n


@pytest.mark.parametrize(
    "name", ["vit_tiny_p16", "vit_tiny_p8", "vit_small_p16", "vit_small_p8", "vit_base_p16", "vit_base_p8"]
)
def test_names_shapes_and_groups_match_the_original(golden_folder, name):
    expected = json.loads((golden_folder / "architectures.json").read_text())[name]
    arch, patch_size = name.rsplit("_p", 1)
    out_dim = expected["state"]["head.last_layer.weight_v"][0]
    with torch.device("meta"):
        model = MultiCropWrapper(ARCHITECTURES[arch](int(patch_size)), DINOHead(expected["embed_dim"], out_dim))
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state == expected["state"]
    assert list(state) == list(expected["state"])
    assert sum(p.numel() for p in model.backbone.parameters()) == expected["n_params_backbone"]
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, not_decayed = ([names[id(p)] for p in group["params"]] for group in get_params_groups(model))
    assert decayed == expected["decayed"]
    assert not_decayed == expected["not_decayed"]


def test_free_prototype_lengths_decay():
    model = torch.nn.ModuleDict({"head": DINOHead(8, 12, norm_last_layer=False)})
    decayed, not_decayed = get_params_groups(model)
    assert any(p is model["head"].last_layer.weight_g for p in decayed["params"])
    assert not_decayed["weight_decay"] == 0


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("sides", [[32], [32, 16]], ids=["one resolution", "two"])
def test_the_last_block_does_for_cls_what_it_did_for_all(sides, mode):
    """And its gradients: those of tokens that nobody reads are zero."""
    torch.manual_seed(0)
    vit = VisionTransformer([32], 8, embed_dim=24, depth=2, num_heads=3, drop_path_rate=0.5, drop_path_mode=mode)
    vit = vit.double().train()
    images = [torch.randn(3, 3, side, side, dtype=torch.float64) for side in sides]
    last = vit.blocks[-1]

    def features_and_gradients():
        torch.manual_seed(1)  # drop-path
        features = vit(images)
        return features, *torch.autograd.grad(features.square().sum(), list(vit.parameters()))

    some = features_and_gradients()
    last.paths = lambda x, packing, mode, cls_only, orders: Block.paths(last, x, packing, mode, orders=orders)
    last.forward = lambda x, packing, paths, cls_only: packing.cls(Block.forward(last, x, packing=packing, paths=paths))
    for for_cls, for_all in zip(some, features_and_gradients(), strict=True):
        torch.testing.assert_close(for_cls, for_all, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(32, 32), (35, 37), (33, 47)], ids=str)
def test_sides_that_the_patch_does_not_divide_lose_the_rest_as_in_a_convolution(shape):
    torch.manual_seed(0)
    vit = VisionTransformer([32], 8, embed_dim=24, depth=1, num_heads=3).double()
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    convolved = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.patch_embed(x), convolved, rtol=1e-12, atol=1e-12)
    assert vit.packing([(2, *shape)]).groups == ((2, 1 + convolved.shape[1]),)
    whole = x[:, :, : shape[0] // 8 * 8, : shape[1] // 8 * 8]
    if shape[0] // 8 != shape[1] // 8:  # else the whole square has its positions as they are
        assert torch.equal(vit(x), vit(whole))


@pytest.mark.parametrize("shape", [(96, 96), (160, 224), (304, 256)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 2**-8)], ids=str
)
def test_a_compiler_resizes_positions_by_one_product(dtype, budget, shape):
    """With the interpolation's values and gradient, and the same bits each time, also under autocast."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    vit = VisionTransformer([224], 16, embed_dim=48, depth=1, num_heads=3).to(dtype)
    full = copy.deepcopy(vit).to(torch.promote_types(dtype, torch.float32))
    upstream, graphs = torch.randn_like(full.interpolate_pos_encoding(None, *shape)).to(dtype), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def values_and_gradient(function, vit, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            positions = function(None, *shape)
        return positions, *torch.autograd.grad(positions, vit.pos_embed, upstream.to(positions.dtype))

    compiled = torch.compile(vit.interpolate_pos_encoding, fullgraph=True, dynamic=False, backend=backend)
    expected = values_and_gradient(full.interpolate_pos_encoding, full)
    for autocast in (False, True):
        got, again = (values_and_gradient(compiled, vit, autocast) for _ in range(2))
        for x, y, truth in zip(got, again, expected, strict=True):
            assert x.dtype == dtype
            assert torch.equal(x, y)
            assert (x - truth).abs().max() < budget * truth.abs().max()
    names = {getattr(node.target, "__name__", str(node.target)) for graph in graphs for node in graph.graph.nodes}
    assert "matmul" in names
    assert "interpolate" not in names


def test_a_compiled_backbone_takes_images_of_several_sizes():
    """Several in one graph, and more than were there when it was first compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    vit = VisionTransformer([32], 8, embed_dim=24, depth=1, num_heads=3)
    compiled = torch.compile(vit, fullgraph=True, backend="eager")
    for side in (16, 24):
        images = [torch.randn(2, 3, *shape) for shape in ((side, side), (side, side + 8))]
        torch.testing.assert_close(compiled(images), vit(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", [{"qk_scale": 0.5}, {"drop_rate": 0.1}, {"attn_drop_rate": 0.1}], ids=str)
def test_what_the_original_takes_and_nobody_uses_is_refused_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        VisionTransformer([32], 8, embed_dim=24, depth=1, num_heads=3, **option)


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_drop_path_keeps_the_mean_of_each_resolution(mode):
    """Of 3 images one is left out, of 9 four: each group is scaled by its own share."""
    torch.manual_seed(0)
    block = Block(8, 2, drop_path=0.4).double()
    torch.nn.init.zeros_(block.mlp.fc2.weight)  # the second branch adds nothing: one branch is looked at
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    packing = Packing(((3, 5), (9, 2)))
    x = torch.randn(33, 8, dtype=torch.float64)
    full = block.eval()(x, packing=packing, paths=block.paths(x, packing, mode)) - x
    block.train()
    n = 400
    total = sum((block(x, packing=packing, paths=block.paths(x, packing, mode)) - x).detach() for _ in range(n))
    for mean, expected in zip(packing.split(total / n), packing.split(full.detach())):
        ratio = (mean * expected).sum() / expected.square().sum()
        assert float(ratio) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=["tokens", "images"])
def test_a_path_compiled_is_the_same_function(shape, monkeypatch):
    """Rows that a compiler gathers both ways, which it is spared the scatter for: their values and gradients."""
    torch.manual_seed(0)
    rows = Rows.among(7, torch.tensor([5, 0, 3]))
    assert rows.at.tolist() == [1, -1, -1, 2, -1, 0, -1]
    path = Path(None, rows, rows, torch.full((3, *[1] * len(shape)), 1.5, dtype=torch.float64))
    x = torch.randn(7, *shape, dtype=torch.float64, requires_grad=True)

    def branch(x):
        return path.add(x, path.take(x).square())

    eager = branch(x)
    of_x = torch.autograd.grad(eager.sin().sum(), x)[0]
    compiled = torch.compile(branch, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.sin().sum(), x)[0], of_x, rtol=1e-14, atol=1e-14)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.autograd.gradcheck(branch, x)


@pytest.mark.parametrize("n_kept", [1, 4])
def test_orders_are_drawn_for_all_branches_at_once_and_each_is_its_own(n_kept):
    torch.manual_seed(0)
    drawn = draw_orders(6, [5, 9], torch.device("cpu"))
    assert [[len(order.rows) for order in branch] for branch in drawn] == [[5, 9]] * 6
    assert len({tuple(branch[1].rows.tolist()) for branch in drawn}) == 6
    for branch in drawn:
        for images, at in branch:
            assert torch.equal(at[images], torch.arange(len(images)))
    packing = Packing(((5, 3), (9, 2)))
    path = draw("batch", 1 - n_kept / 5, packing, packing, torch.zeros(33, 4), drawn[0])
    assert path.packing.groups == ((n_kept, 3), (int(9 * n_kept / 5), 2))
    whole = Rows.among(33, path.taken.rows)
    assert torch.equal(path.taken.at, whole.at)
    assert torch.equal(path.added.at, whole.at)


def test_recomputing_changes_no_bit_and_leaves_nothing_behind(monkeypatch):
    """7 D fewer per token in a block: two norms, joined attention, four of GELU; in the last one a norm, CLS's six."""

    def gradients():
        torch.manual_seed(0)
        vit = VisionTransformer([32], 8, embed_dim=24, depth=3, num_heads=3)
        with Storages(vit) as storages:
            out = vit([torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)])
        kept = storages.alive_bytes
        out.square().sum().backward()
        return kept, [p.grad for p in vit.parameters()]

    less, recomputed = gradients()
    monkeypatch.setattr(vit_module, "keep_recipes", nullcontext)
    more, kept = gradients()
    n_tokens, n_images = 4 * 17 + 6 * 5, 10
    assert more - less == 4 * 24 * (2 * 7 * n_tokens + n_tokens + 6 * n_images)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, kept, strict=True))
    gc.collect()
    assert len(recompute._RECIPES) == 0


def test_a_compiler_sees_operators_alone_which_its_cache_can_hold():
    """An autograd.Function, or a change of autocast, would have every start of a run compile anew."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    vit = VisionTransformer([16], 8, embed_dim=16, depth=2, num_heads=2)
    network = MultiCropWrapper(vit, DINOHead(16, 32, hidden_dim=24, bottleneck_dim=8))
    crops = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]
    torch.compile(network, fullgraph=True, dynamic=False, backend=backend)(crops)
    (graph,) = graphs
    names = {getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes}
    assert "linear" in names
    assert not {name for name in names if "autograd" in name or "autocast" in name}
