"""JoinResiduals: what is found around norms and attention, and that the gradients stay the eager ones.

Most tests run what the pass leaves behind operation by operation, on Inductor's decompositions, for Inductor's own code
takes a minute to compile on a CPU.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from fastdino.model.attention import use_backend
from fastdino.model.drop_path import Rows
from fastdino.model.mlp import use_mlp
from fastdino.model.vit import VisionTransformer
from fastdino_kernels import layer_norm
from fastdino_kernels.fusion import JoinResiduals
from fastdino_kernels.launch import INTERPRETED
from fastdino_kernels.rows import spread_rows, take_rows

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs the kernels")
DEPTH = 2
# On a device attention's kernels take half precision alone.
DTYPE = torch.float32 if INTERPRETED else torch.float16
RTOL, ATOL = (1e-4, 1e-5) if INTERPRETED else (2e-2, 1e-2)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    """All of them, in fp32 where they are interpreted."""
    room = import_module("fastdino_kernels.mlp")
    torch._dynamo.reset()
    use_backend("ours")
    use_mlp("ours")
    with mock.patch.object(room, "KERNEL_DTYPES", room.KERNEL_DTYPES | {torch.float32}):
        yield
    use_backend("sdpa")
    use_mlp("library")


def uncompiled(joins: JoinResiduals) -> Any:
    """A backend that runs a graph as the pass leaves it."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        joins(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return graph.forward

    return aot_autograd(
        fw_compiler=compiler,
        decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition,
    )


def model(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    network = VisionTransformer(
        img_size=[32], patch_size=8, embed_dim=32, depth=DEPTH, num_heads=2, qkv_bias=True, **options
    )
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network.to(DTYPE)


def check_gradients(
    network: VisionTransformer, compiled: Callable[..., Tensor], rtol: float = RTOL, atol: float = ATOL
) -> None:
    """compiled: the network, two resolutions in one pass. atol: of the greatest number of a gradient."""
    draw = torch.Generator().manual_seed(1)
    crops = [torch.randn(n, 3, side, side, generator=draw) for n, side in ((2, 32), (4, 16))]
    crops = [crop.to(network.cls_token) for crop in crops]
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(3)  # of drop-path
        y = function(crops)
        return torch.autograd.grad(
            (y * torch.arange(y.numel(), device=y.device).view(y.shape).sin()).sum(), trained.values()
        )

    for name, ours, eager in zip(trained, gradients(compiled), gradients(network)):
        torch.testing.assert_close(ours, eager, rtol=rtol, atol=atol * eager.abs().max().item(), msg=name)


def joined(network: VisionTransformer, **tolerance: float) -> dict[str, int]:
    """What was found, after the gradients were compared."""
    torch._dynamo.reset()
    joins = JoinResiduals()
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=uncompiled(joins))
    check_gradients(network, compiled, **tolerance)
    return vars(joins)


# Two norms a block join the stream; the last one of all has none to join. Bias sums: of each block's projection and
# MLP, and of qkv, where the last block has keys and values alone.
FOUND = {"n_streams": 2 * DEPTH, "n_scales": 0, "n_sums": 3 * DEPTH}


def test_streams_and_sums_are_found(device):
    assert joined(model().to(device)) == FOUND


def test_drop_path_is_found(device):
    """Its probability grows from 0 in the first block, so that one has no scale."""
    assert joined(model(drop_path_rate=0.5).to(device)) == FOUND | {"n_scales": 2 * (DEPTH - 1)}


def test_sums_are_found_where_queries_and_keys_turn(device):
    """But in the last block, whose keys are turned before."""
    assert joined(model(rope={"base": 100.0}).to(device)) == FOUND | {"n_sums": 3 * DEPTH - 1}


def test_layerscale_is_found(device):
    """A scale of each branch, and a sum for each of its gammas."""
    expected = FOUND | {"n_scales": 2 * DEPTH, "n_sums": 5 * DEPTH}
    assert joined(model(init_values=0.1).to(device)) == expected
    assert joined(model(init_values=0.1, drop_path_rate=0.5).to(device)) == expected


def test_drop_path_by_batch_is_found(device):
    """Rows of the stream; in the last block its MLP's are CLS tokens of a few images."""
    options = {"drop_path_mode": "batch", "drop_path_rate": 0.5}
    assert joined(model(**options).to(device)) == FOUND | {"n_scales": 2 * (DEPTH - 1)}
    uniform = model(init_values=0.1, drop_path_uniform=True, checkpointing=True, **options)
    assert joined(uniform.to(device)) == FOUND | {"n_scales": 2 * DEPTH, "n_sums": 5 * DEPTH}


def test_a_stream_in_fp32_is_found_around_branches_in_half(device):
    """But for the last norm, which is in fp32 with it, and PyTorch's: what it gives the last branch is not found."""
    use_backend("sdpa")
    use_mlp("library")
    network = model(init_values=0.1, fp32_residual=True).to(device, torch.float16)
    found = joined(network, rtol=0.05, atol=0.01)
    assert found == {"n_streams": 2 * DEPTH, "n_scales": 2 * DEPTH - 1, "n_sums": 2 * (2 * DEPTH - 1)}


def test_frozen_norms_and_biases_ask_for_no_sum(device):
    network = model().to(device)
    for name, p in network.named_parameters():
        p.requires_grad_("norm" not in name and "bias" not in name)
    assert joined(network)["n_sums"] == 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"mask_k_bias": True, "rope": {"dtype": torch.float32}, "registers": 2}, id="dinov3"),
        pytest.param({"checkpointing": True}, id="checkpointing"),
    ],
)
def test_what_is_not_found_stays_right(options, device):
    joined(model(**options).to(device))


def check_inductor(device: torch.device, mode: str = "sample") -> None:
    network, joins = model(drop_path_rate=0.5, drop_path_mode=mode).to(device), JoinResiduals()
    options = {"post_grad_custom_pre_pass": joins, "fallback_random": True}
    with torch._inductor.config.patch(fx_graph_cache=False):  # which would not ask the pass again
        check_gradients(network, torch.compile(network, fullgraph=True, dynamic=False, options=options))
    assert vars(joins) == FOUND | {"n_scales": 2 * (DEPTH - 1)}


def test_inductor_takes_what_is_left(device):
    """30 s: it is the one test that compiles."""
    check_inductor(device)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_inductor_takes_what_is_left_on_a_device(mode, device):
    check_inductor(device, mode)


def test_rows_that_join_nothing_are_taken_apart(device):
    """Between a take and a spread that no norm follows: the operations that they stand for, and their gradients."""
    rows = Rows.among(8, torch.tensor([6, 1, 3], device=device))
    x = torch.randn(8, 16, device=device, requires_grad=True)
    seen = []

    def loss(x: Tensor) -> Tensor:
        y = x + spread_rows(take_rows(x, *rows).sin(), *rows)
        return (y**2 * torch.arange(16, device=device)).sum()

    class Look(JoinResiduals):
        def __call__(self, graph: torch.fx.Graph) -> None:
            n_ops = sum("rows" in str(node.target) for node in graph.nodes)
            super().__call__(graph)
            seen.append((n_ops, sum("rows" in str(node.target) for node in graph.nodes)))

    [ours] = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=uncompiled(Look()))(x), x)
    assert seen == [(0, 0), (2, 0)]
    y = x.index_add(0, rows.rows, x[rows.rows].sin())
    [expected] = torch.autograd.grad((y**2 * torch.arange(16, device=device)).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_sum_that_the_graph_goes_on_with_is_not_put_off(device):
    """A norm's weight that is computed has a gradient that is computed with."""
    x = torch.randn(8, 16, device=device, requires_grad=True)
    w = torch.randn(16, device=device, requires_grad=True)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        first = layer_norm(x, w.sin(), w)
        return (layer_norm(first + x, w.cos(), w * 2) ** 2 * torch.arange(16, device=device)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=uncompiled(JoinResiduals()))
    ours = torch.autograd.grad(compiled(x, w), (x, w))
    for grad, eager in zip(ours, torch.autograd.grad(loss(x, w), (x, w))):
        torch.testing.assert_close(grad, eager, rtol=1e-4, atol=1e-4)
