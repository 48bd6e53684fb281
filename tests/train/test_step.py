"""The step: nothing waits for the device, nothing is compiled twice, and what cannot be done says why."""

import copy
import sys

import numpy as np
import pytest
import torch
from fake_device import no_host_sync
from torch import nn
from torch._inductor import list_mode_options
from train_steps import NITER, CountOps, make_crops, make_networks, make_step

from fastdino import DINOHead, MultiCropWrapper, VisionTransformer
from fastdino.model import attention
from fastdino.train.modes import MODES
from fastdino.train.precision import low_precision_twin
from fastdino.train.schedules import ScheduleTable
from fastdino_kernels.fusion import JoinResiduals

OPTIONS = [{}, {"amp_dtype": torch.bfloat16}, {"accumulate": 2}, {"checkpointing": True, "drop_path_rate": 0.3}]
OPTIONS += [{"drop_path_rate": 0.3, "drop_path_mode": "batch"}, {"freeze_backbone": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=["fp32", "bf16", "parts", "checkpointing", "subsets", "frozen"])
def test_no_iteration_waits_for_the_device(options, capsys, monkeypatch):
    """While the freeze is lifted and every schedule moves."""
    networks = make_networks(**options), make_networks().requires_grad_(False)
    # The table of schedules comes from the host, once; here it has no values to bring.
    empty = staticmethod(lambda values, device, dtype: torch.zeros(values.shape, device=device, dtype=dtype))
    monkeypatch.setattr(ScheduleTable, "_on_device", empty)
    with no_host_sync() as device:
        step = make_step(device, networks, **options)
        counts = []
        for i in range(1, NITER + 2):
            with CountOps() as ops:
                metrics = step(make_crops(device=device), i)
            counts.append(ops.n)
    assert metrics.loss.device.type == device.type
    assert len(set(counts[2:])) == 1  # the same launches whatever the schedules say
    with capsys.disabled():
        print(f"\n[{counts[-1]} operations an iteration, none waits]", end=" ")


def test_compiled_is_one_graph_for_all_iterations(monkeypatch, capsys):
    """fullgraph refuses graph breaks; the backend counts what it is given to compile."""
    graphs = []

    def counting(graph, inputs, options):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counting, **options))
    torch._dynamo.reset()
    step = make_step(mode="compiled", say=pytest.fail)
    plain = make_step()
    for i in range(10):
        ours, expected = step(make_crops(i), i), plain(make_crops(i), i)
        assert torch.allclose(ours.loss, expected.loss, rtol=1e-5)
    assert len(graphs) == 1, graphs
    with capsys.disabled():
        print(f"\n[one graph of {graphs[0]} nodes, traced once in ten iterations]", end=" ")


@pytest.mark.parametrize(("effort", "mode"), [("default", None), ("max", "max-autotune-no-cudagraphs")])
def test_the_compiler_is_told_how_hard_to_try(monkeypatch, effort, mode):
    """By a name that this PyTorch knows, and without graphs of its own, which would be inside of ours."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: seen.append(how["options"]) or f)
    make_step(mode="compiled", effort=effort)
    (options,) = seen
    assert isinstance(options.pop("post_grad_custom_pre_pass"), JoinResiduals)
    assert options == list_mode_options().get(mode, {})
    assert not options.get("triton.cudagraphs")
    assert mode is None or options["max_autotune"]


def test_a_pytorch_that_has_moved_what_our_pass_builds_on_compiles_without_it(monkeypatch):
    seen, said = [], []
    monkeypatch.setattr(torch, "compile", lambda f, **how: seen.append(how["options"]) or f)
    monkeypatch.setitem(sys.modules, "fastdino_kernels.fusion", None)
    make_step(mode="compiled", say=said.append)
    assert seen == [{}]
    assert any("compiled without JoinResiduals" in line for line in said)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"accumulate": 4}, {"checkpointing": True}], ids=str)
def test_less_memory_is_the_same_step(options):
    ours, plain = make_step(**options), make_step()
    for i in range(6):
        a, b = ours(make_crops(i), i), plain(make_crops(i), i)
    assert torch.allclose(a.loss, b.loss, rtol=1e-5)
    assert torch.allclose(ours.loss.center, plain.loss.center, atol=1e-6)
    for (name, x), y in zip(ours.student.named_parameters(), plain.student.parameters()):
        if not name.endswith("qkv.bias"):
            assert torch.allclose(x, y, atol=2e-5), name


def test_bf16_runs_on_copies_that_follow_the_masters():
    step = make_step(amp_dtype=torch.bfloat16)
    reference = make_step()
    for i in range(6):
        low, full = step(make_crops(i), i), reference(make_crops(i), i)
    assert torch.allclose(low.loss, full.loss, rtol=2e-2)
    for master, copy_ in step.run.copies:
        assert copy_.dtype == torch.bfloat16
        assert torch.equal(copy_, master.to(torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in step.student.parameters())


def test_bf16_parts_are_added_up_in_fp32():
    step = make_step(amp_dtype=torch.bfloat16, accumulate=2)
    step(make_crops(), 0)
    assert all(p.grad.dtype == torch.float32 for p in step.student.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in step.student.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "float32"), ({"amp_dtype": torch.bfloat16}, "bfloat16"), ({"optimizer": "sgd"}, "float32")]
    + [({"optimizer": name, "amp_dtype": torch.bfloat16}, "float32") for name in ("sgd", "lars")],
    ids=str,
)
def test_crops_in_the_steps_dtype_are_those_that_it_would_cast(options, expected):
    """So that whoever makes them can write them so. Autocast decides per operator, and is given full precision."""
    step, other = make_step(**options), make_step(**options)
    assert str(step.run.crop_dtype) == f"torch.{expected}"
    for i in range(3):
        cast = [crop.to(step.run.crop_dtype) for crop in make_crops(i)]
        assert torch.equal(step(cast, i).loss, other(make_crops(i), i).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_number_of_a_row_has_16_bytes_of_its_own(dtype):
    """At another address a compiler would take it for unaligned, and with it all that an operator makes of it."""
    table = ScheduleTable({name: np.arange(3.0) for name in "abcde"}, torch.device("cpu"), dtype)
    table.advance()
    table.advance()
    for number in table.row.values():
        assert number == 1
        assert number.storage_offset() * number.itemsize % 16 == 0


def test_a_twin_shares_batchnorm_and_buffers():
    net = MultiCropWrapper(nn.Flatten(), DINOHead(12, 5, use_bn=True, hidden_dim=8, bottleneck_dim=4))
    twin, pairs = low_precision_twin(net, torch.bfloat16)
    assert twin.head.mlp[1].weight is net.head.mlp[1].weight
    assert twin.head.mlp[1].running_mean is net.head.mlp[1].running_mean
    assert len(pairs) == sum(1 for _ in net.parameters()) - 4
    assert all(low.requires_grad == p.requires_grad for p, low in pairs)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_autocast_is_near_full_precision(optimizer):
    """What is computed again in the backward pass is computed in the precision of the forward pass."""
    low, full = make_step(optimizer=optimizer, amp_dtype=torch.bfloat16), make_step(optimizer=optimizer)
    for i in range(6):
        a, b = low(make_crops(i), i), full(make_crops(i), i)
    assert 0 < abs(a.loss - b.loss) < 1e-2 * b.loss
    assert all(p.grad.dtype == torch.float32 for p in low.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimizers_take_the_same_step(optimizer):
    step = make_step(optimizer=optimizer)
    before = copy.deepcopy(step.student.state_dict())
    for i in range(6):
        step(make_crops(i), i)
    moved = [name for name, x in step.student.state_dict().items() if not torch.equal(x, before[name])]
    assert any("last_layer.weight_v" in name for name in moved)


def test_what_cannot_compile_falls_back_once_and_says_why(monkeypatch):
    def broken(function, **options):
        def run(*args):
            raise RuntimeError("no compiler here\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    said = []
    step, plain = make_step(mode="compiled", say=said.append), make_step()
    for i in range(3):
        assert torch.equal(step(make_crops(i), i).loss, plain(make_crops(i), i).loss)
    assert said == ["step: compiled failed (RuntimeError: no compiler here and a long story); using eager"]
    assert step.mode == "eager"


def test_a_graph_on_a_cpu_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    assert make_step(mode="graph", say=said.append).mode == "compiled"
    assert said == ["step: a graph needs a CUDA device; using compiled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode: expected one of eager, compiled, graph, got 'fast'"),
        ({"effort": "most"}, "compile: expected one of default, max, got 'most'"),
        ({"accumulate": 0}, "accumulate: expected 1 or more, got 0"),
        ({"attention_backend": "flash"}, "attention: expected auto, ours, xformers, varlen, sdpa, got 'flash'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_step(**options)(make_crops(), 0)


def test_parts_must_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate: expected a divisor of the batch of 4, got 3"):
        make_step(accumulate=3)(make_crops(), 0)


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_a_backend_that_cannot_run_says_what_is_missing(name):
    with pytest.raises(ValueError, match=f"attention: {name} has kernels for CUDA only, and the model is on cpu"):
        make_step(attention_backend=name)(make_crops(), 0)


def test_drop_path_keeps_the_mean_in_both_modes():
    """A dropped image keeps its tokens; the others are scaled so that the expectation stays."""
    torch.manual_seed(0)
    for mode in ("sample", "batch"):
        net = VisionTransformer([16], 8, embed_dim=8, depth=1, num_heads=2).double()
        block = net.blocks[0]
        block.drop_path = 0.25
        nn.init.zeros_(block.mlp.fc2.weight)  # the second branch adds nothing: one branch is looked at
        nn.init.zeros_(block.mlp.fc2.bias)
        packing = attention.Packing(((8, 5), (4, 2)))
        x = torch.randn(48, 8, dtype=torch.float64)
        full = block.eval()(x, packing=packing, paths=block.paths(x, packing, mode)) - x
        block.train()
        total, dropped = torch.zeros_like(full), 0
        for _ in range(600):
            change = block(x, packing=packing, paths=block.paths(x, packing, mode)) - x
            images = torch.cat([part.flatten(1).abs().amax(1) for part in packing.split(change)])
            dropped += int((images == 0).sum())
            kept = change.abs().amax(1) > 0
            assert torch.allclose(change[kept], full[kept] / 0.75, rtol=1e-9)
            total += change
        assert abs(dropped / (600 * 12) - 0.25) < (1e-9 if mode == "batch" else 0.02)
        assert (total / 600 - full).abs().max() < 0.15 * full.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["whole", "parts"])
def test_graph_equals_eager_over_twenty_steps(options):
    """Changing schedules, the freeze boundary (iteration 4) and a resume in the middle of them."""
    torch.backends.cuda.matmul.allow_tf32 = False
    options = {**options, "attention_backend": "sdpa"}  # one for the process: the second step would change the first's
    graph, eager = make_step("cuda", mode="graph", say=pytest.fail, **options), make_step("cuda", **options)
    for part in ("student", "teacher"):
        getattr(eager, part).load_state_dict(getattr(graph, part).state_dict())
    n = NITER * 4
    for i in [*range(n), *range(4)]:
        crops = [x.cuda() for x in make_crops(i)]
        a, b = graph(crops, i), eager(crops, i)
        assert torch.allclose(a.loss, b.loss, rtol=1e-5)
    assert graph.mode == MODES[2]
    for (name, x), y in zip(graph.student.named_parameters(), eager.student.parameters()):
        if not name.endswith("qkv.bias"):
            assert torch.allclose(x, y, atol=1e-5), name
    with pytest.raises(ValueError, match="expected the captured shapes"):
        graph([x[:2] for x in crops], 4)
