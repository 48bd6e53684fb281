"""Which attention runs, why, and that a compiled step stays compiled whatever else attends."""

import ctypes
import sys
import types
from contextlib import contextmanager

import pytest
import torch

from fastdino import VisionTransformer, capture
from fastdino.model import attention, attention_choice, timing
from fastdino.model.attention import BACKENDS, Backend, Packing
from fastdino.model.attention_choice import choose
from fastdino.model.constant import constant
from fastdino.model.timing import Choice

STUDENT, TEACHER = Packing(((4, 17), (6, 5))), Packing(((4, 17),))


class Layout:
    """What the stub has to know of a packing: in a trace a tensor, as xformers' mask and varlen's boundaries are."""

    def __init__(self, lengths, device):
        self.lengths = torch.tensor(lengths, device=device)


def layout(lengths, device):
    return Layout(lengths, device)


def stub(qkv, scale, packing):
    images = attention._layout(layout, packing.groups, qkv.device)
    parts = attention.sdpa(qkv, scale, packing)
    return [torch.cat(parts) * (images.lengths.sum() / len(qkv))]  # a factor of 1


@pytest.fixture
def use_stub(monkeypatch):
    monkeypatch.setitem(BACKENDS, "stub", Backend("stub", stub, on_cuda_only=False, dtypes=None, compiled_dtypes=None))
    monkeypatch.setattr(attention._Current, "backend", BACKENDS["stub"])
    attention._LAYOUTS.clear()
    torch._dynamo.reset()


@pytest.fixture
def fresh():
    choose.cache_clear()
    yield
    choose.cache_clear()


def workload(student=STUDENT, teacher=TEACHER, compiled=False, turned=False):
    return attention_choice._Workload(student, teacher, 2, 16, torch.float32, compiled, turned, device="cpu")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_a_step_is_traced_once_whatever_else_attends(use_stub, mode, checkpointing):
    """Drop-path by batch draws packings in the trace; k-NN attends over another one between two steps."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    vit = VisionTransformer(
        [16], 8, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.4, drop_path_mode=mode,
        checkpointing=checkpointing,
    )  # fmt: skip
    images = [torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 8)]
    step = torch.compile(lambda crops: vit(crops).square().sum(), fullgraph=True, dynamic=False, backend=counting)
    for i in range(3):
        vit.zero_grad()
        step(images).backward()
        assert all(p.grad is not None for p in vit.blocks[0].parameters())
        n_layouts = len(attention._LAYOUTS)
        with torch.inference_mode():
            vit.eval()([torch.randn(20 + i, 3, 16, 16)])
        vit.train()
        assert len(attention._LAYOUTS) == n_layouts + 1
    assert len(graphs) == 1
    assert n_layouts == (4 if mode == "batch" else 3)  # of the step, of its subsets, and of two evaluations


def test_a_layout_made_without_gradients_serves_a_backward_pass(use_stub):
    qkv = torch.randn(98, 3, 2, 8, requires_grad=True)
    with torch.inference_mode():
        attention.attention(qkv, 0.5, STUDENT)
    attention.attention(qkv, 0.5, STUDENT).sum().backward()
    assert len(attention._LAYOUTS) == 1


def test_what_a_backend_has_no_kernel_for_goes_to_sdpa(monkeypatch):
    seen = []

    def half_only(qkv, scale, packing):
        seen.append(qkv.dtype)
        return attention.sdpa(qkv, scale, packing)

    backend = Backend("half", half_only, on_cuda_only=False)
    monkeypatch.setattr(attention._Current, "backend", backend)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        qkv = torch.randn(98, 3, 2, 8, dtype=dtype)
        joined = torch.cat(attention.sdpa(qkv, 0.5, STUDENT)).flatten(1)
        assert torch.equal(attention.attention(qkv, 0.5, STUDENT), joined)
    assert seen == [torch.bfloat16]


def test_a_constant_is_marked_as_pytorch_marks_it():
    ours, theirs = constant(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert ours.__dict__ == theirs.__dict__ != {}


def outcomes(monkeypatch, **of_backend):
    """Backends of these times in ms; an exception is what is raised where the time would be taken."""

    def time_ms(work):
        if isinstance(work, Exception):
            raise work
        return work

    monkeypatch.setattr(
        attention_choice, "why_not", lambda name, *_: of_backend[name] if type(of_backend[name]) is str else None
    )
    monkeypatch.setattr(attention_choice._Workload, "of", lambda self, backend: of_backend[backend.name])
    monkeypatch.setattr(timing, "time_ms", time_ms)
    monkeypatch.setattr(attention_choice, "_kernels_of_sdpa", lambda work: "flash")


def test_auto_takes_the_fastest_and_says_what_it_measured(monkeypatch, fresh):
    outcomes(monkeypatch, ours=1.9, xformers="xformers is not installed", varlen=1.2, sdpa=1.5)
    choice = choose(STUDENT, 6, 64, "cuda", torch.bfloat16)
    assert choice.way == "varlen"
    assert str(choice) == "varlen 1.20 ms, sdpa (flash) 1.50 ms, ours 1.90 ms; xformers is not installed"


def test_auto_leaves_out_what_raises_and_says_why(monkeypatch, fresh):
    try:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
    except RuntimeError as error:
        spoilt = error
    xformers = NotImplementedError("No operator found:\n  a, b\n  a needs 8")
    outcomes(monkeypatch, ours=3.0, xformers=xformers, varlen=spoilt, sdpa=2.0)
    choice = choose(STUDENT, 6, 64, "cuda", torch.bfloat16)
    assert choice.way == "sdpa"
    assert choice.reason.split("; ") == [
        "sdpa (flash) 2.00 ms, ours 3.00 ms",
        "xformers does not run here: NotImplementedError: No operator found: a needs 8",
        "varlen does not run here: RuntimeError: operation failed due to a previous error during capture, after "
        "RuntimeError: operation not permitted when stream is capturing",
    ]


def test_nothing_that_runs_is_an_error_with_all_reasons(monkeypatch, fresh):
    reasons = {"ours": "no Triton", "xformers": "xformers is not installed"}
    outcomes(monkeypatch, **reasons, varlen=ValueError(), sdpa=RuntimeError("no memory"))
    with pytest.raises(
        RuntimeError, match=r"not installed; varlen does not run here: ValueError; sdpa .*: RuntimeError: no memory"
    ):
        choose(STUDENT, 6, 64, "cuda", torch.bfloat16)


def test_crops_that_ours_does_not_take_go_to_another_and_it_is_said(monkeypatch, fresh):
    """Images of more than 256 tokens, heads of 24 channels."""
    long = Packing(((2, 257), (4, 37)))
    outcomes(monkeypatch, ours=0.1, xformers=2.0, varlen=3.0, sdpa=4.0)
    choice = choose(long, 6, 64, "cuda", torch.bfloat16)
    assert choice.way == "xformers"
    words = "ours does not take these crops: expected images of at most 256 tokens, got 257"
    assert choice.reason.endswith(f"; {words}")
    expected = "sdpa, because ours does not take these crops: expected a head of 16, 32, 64 channels, got 24"
    assert choose(STUDENT, 2, 24, "cpu", torch.float32, "ours") == Choice("sdpa", expected)
    monkeypatch.setattr(attention._Current, "backend", BACKENDS["ours"])
    qkv = torch.randn(98, 3, 2, 24)
    joined = torch.cat(attention.sdpa(qkv, 0.5, STUDENT)).flatten(1)
    assert torch.equal(attention.attention(qkv, 0.5, STUDENT), joined)


def test_what_is_asked_for_is_not_timed(fresh):
    assert choose(STUDENT, 2, 16, "cpu", torch.float32, "sdpa") == Choice("sdpa", "sdpa, as asked")
    assert choose(STUDENT, 2, 16, "cpu", torch.float32) == Choice("sdpa", "sdpa")


def test_xformers_in_fp32_is_refused_where_a_step_is_compiled():
    message = "attention: xformers cannot be compiled in float32, only run eagerly"
    with pytest.raises(ValueError, match=message):
        attention_choice.check("xformers", "cuda", torch.float32, compiled=True)
    with pytest.raises(ValueError, match="varlen has no kernel for float32"):
        attention_choice.check("varlen", "cuda", torch.float32)
    assert BACKENDS["xformers"].takes("cuda", torch.float32, compiled=False)


@pytest.mark.parametrize(
    ("installed", "has_runtime", "loads", "reason"),
    [
        (False, True, True, "xformers is not installed"),
        (True, False, False, "pip install nvidia-cuda-runtime-cu12"),
        (True, True, False, "python -m xformers.info"),
        (True, True, True, None),
        (True, False, True, None),  # built for another CUDA
    ],
)
def test_what_xformers_lacks(monkeypatch, installed, has_runtime, loads, reason):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(attention, "_load_cuda12_runtime", lambda: has_runtime)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(_has_cpp_library=loads))
    lacks = attention._xformers_lacks()
    assert lacks is None if reason is None else reason in lacks


@pytest.mark.parametrize("found", ["wheel", "system", None])
def test_the_cuda_12_runtime_is_looked_for_in_its_wheel_and_in_the_system(monkeypatch, tmp_path, found):
    library = tmp_path / "cuda_runtime" / "lib" / "libcudart.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    asked = []

    def load(name, mode):
        asked.append(name)
        if name != {"wheel": str(library), "system": "libcudart.so.12"}.get(found):
            raise OSError(name)

    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert attention._load_cuda12_runtime() == (found is not None)
    assert asked == [str(library), "libcudart.so.12"][: 1 if found == "wheel" else 2]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "traced"])
def test_what_is_timed_is_what_the_model_does(compiled):
    """One (M, 3, H, D) that keeps the gradient; the student's tokens both ways, the teacher's forward."""
    calls, gradients = [], []

    def spy(qkv, scale, packing):
        if not torch.compiler.is_compiling():
            calls.append((qkv.is_contiguous(), torch.is_grad_enabled(), scale, packing))
        return attention.sdpa(qkv, scale, packing)

    torch._dynamo.reset()
    work = workload(compiled=compiled).of(Backend("spy", spy))
    calls.clear()
    grad = torch.autograd.grad

    def autograd_grad(*arguments):
        gradients.extend(grad(*arguments))
        return gradients

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", autograd_grad)
        work()
    assert [g.shape for g in gradients] == [(98, 3, 2, 16)]
    if not compiled:
        assert calls == [(True, False, 0.25, TEACHER), (True, True, 0.25, STUDENT)]


def test_turning_is_timed_inside_of_a_backend_and_before_others():
    """The same results; what a backend is given differs."""
    given = []

    def spy(qkv, scale, packing, rotation=None):
        given.append((qkv, None if rotation is None else len(rotation.sin)))
        return attention.sdpa(attention.turned(qkv, rotation, packing), scale, packing)

    for turns in (True, False):
        workload(turned=True).of(Backend("spy", spy, turns=turns))()
    before, inside = given[3:], given[:3]  # to see its shape, the teacher's, the student's
    assert [n for _, n in inside] == [22, 17, 22]  # places: 17 tokens of a global crop, 5 of a local one
    assert [n for _, n in before] == [None] * 3
    for (qkv, _), (turned, _), packing in zip(inside, before, (STUDENT, TEACHER, STUDENT)):
        assert torch.equal(attention.turned(qkv, workload(turned=True).rotation(packing), packing), turned)
        assert not torch.equal(qkv, turned)


def test_tracing_finds_what_a_compiled_step_would_trip_over():
    def breaks(qkv, scale, packing):
        torch._dynamo.graph_break()
        return attention.sdpa(qkv, scale, packing)

    backend = Backend("breaks", breaks)
    workload().of(backend)()
    with pytest.raises(Exception, match="graph_break"):
        workload(compiled=True).of(backend)()


def test_many_shapes_can_be_traced():
    for n in range(2, 11):  # Dynamo's own limit is 8
        workload(Packing(((n, 5),)), compiled=True).of(BACKENDS["sdpa"])()


def test_timing_leaves_the_runs_random_numbers_alone():
    """A resumed run draws what it would have drawn, though it times again."""
    state = torch.get_rng_state()
    workload().of(BACKENDS["sdpa"])()
    assert torch.equal(torch.get_rng_state(), state)


def test_sdpa_says_its_kernels():
    assert attention_choice._kernels_of_sdpa(workload()) == "flash"


class FakeCuda:
    """Streams, events and graphs that are written down."""

    def __init__(self, monkeypatch, milliseconds=(), fails=()):
        self.current, self.log, self.milliseconds, self.fails = "main", [], list(milliseconds), fails
        make_stream = lambda: types.SimpleNamespace(wait_stream=lambda other: None)  # noqa: E731
        self.main, self.side = make_stream(), make_stream()
        self.current = self.main
        for name, value in {
            "current_stream": lambda device=None: self.current,
            "Stream": lambda: self.side,
            "stream": self.stream,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "CUDAGraph": lambda: types.SimpleNamespace(
                replay=lambda: self.log.append("replay"), reset=lambda: self.log.append("reset")
            ),
            "graph_pool_handle": lambda: (0, 1),
            "current_device": lambda: 0,
            "graph": self.graph,
            "Event": lambda enable_timing: types.SimpleNamespace(
                record=lambda: self.log.append("record"),
                synchronize=lambda: None,
                elapsed_time=lambda end: self.milliseconds.pop(0),
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        """As PyTorch's: where the capture's end raises, the capture's stream stays the current one."""
        assert capture_error_mode == "thread_local"
        self.current = stream
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError(self.fails)
        self.current = self.main


def test_time_is_the_median_over_replays_of_a_graph(monkeypatch):
    cuda = FakeCuda(monkeypatch, milliseconds=[900, 10, 50, 20, 30, 40])  # the first one warms up
    ran_on = []
    assert timing.time_ms(lambda: ran_on.append(cuda.current)) == 30 / timing.REPLAYS
    assert ran_on == [cuda.side] * (timing.WARM_UP + 1)
    assert cuda.log == ["record", *["replay"] * timing.REPLAYS, "record"] * 6


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    cuda = FakeCuda(monkeypatch, fails="capture is over")
    monkeypatch.setattr(capture, "_leaves_capture", lambda device, pool: True)
    with pytest.raises(RuntimeError, match="capture is over"):
        timing.time_ms(lambda: None)
    assert cuda.current is cuda.main
    assert cuda.log == ["reset"]


def test_a_capture_that_pytorch_cannot_leave_ends_the_choice(monkeypatch, fresh):
    """Another backend must not be taken instead: the allocator would never reuse memory again."""
    FakeCuda(monkeypatch, fails="capture is over")
    monkeypatch.setattr(capture, "_leaves_capture", lambda device, pool: False)
    monkeypatch.setattr(attention_choice, "why_not", lambda *_: None)
    monkeypatch.setattr(attention_choice._Workload, "of", lambda self, backend: lambda: None)
    with pytest.raises(capture.StuckCapture, match=r"capture is over; PyTorch .* cannot go on after a capture"):
        choose(STUDENT, 6, 64, "cuda", torch.bfloat16)


TWO_RANKS = """
import os, sys, torch, torch.distributed as dist
from fastdino.model import attention_choice, timing
from fastdino.model.attention import Packing

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=2)
times = {"ours": [9.0, 9.0], "xformers": [0.5, "no kernel"], "varlen": [1.0, 3.0], "sdpa": [2.0, 1.5]}
attention_choice.why_not = lambda name, *_: times[name][rank] if isinstance(times[name][rank], str) else None
attention_choice._Workload.of = lambda self, backend: times[backend.name][rank]
timing.time_ms = float
attention_choice._kernels_of_sdpa = lambda work: "flash"
print(attention_choice.choose(Packing(((2, 3),)), 1, 16, "cuda", torch.bfloat16))
try:
    attention_choice.check("xformers", "cuda", torch.bfloat16)
except ValueError as error:
    print(error)
attention_choice.check("varlen", "cuda", torch.bfloat16)
dist.destroy_process_group()
"""


def test_ranks_whose_times_disagree_choose_the_same(forks, tmp_path):
    """The slowest rank counts; a backend that one rank cannot run is out on both, which say which rank it is."""
    ranks = forks.run_ranks(2, "-c", TWO_RANKS, f"file://{tmp_path}/store")
    assert [done.returncode for done in ranks] == [0, 0], "".join(done.stderr for done in ranks)
    said = [done.stdout.splitlines() for done in ranks]
    assert said[0] == said[1]
    assert said[0] == [
        "sdpa (flash) 2.00 ms, varlen 3.00 ms, ours 9.00 ms; no kernel (rank 1)",
        "attention: no kernel (rank 1)",
    ]
