"""What happens where a mode fails, on a CUDA device that is played: nothing here needs one."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn
from train_steps import make_crops, make_step

from fastdino import capture
from fastdino.errors import TrainingError, reason
from fastdino.train import memory, modes

CAPTURE_INVALID = "CUDA error: operation failed due to a previous error during capture\nSearch for `cudaErrorStream"
NOT_ALLOWED = "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be asynchronous"


class FakeStream:
    def __init__(self, name="side"):
        self.name = name

    def wait_stream(self, other):
        pass


class FakeCuda:
    """Streams, memory and graphs as PyTorch's CUDA allocator and its captures treat them.

    fails: what a capture ends with: None; "body", an error inside of it that the capture survives; "end", one after
    which CUDA refuses to end it, too. cause: that error's message. leaks: the allocator then stays in the capture, as
    in PyTorch 2.11. repairable: whether what PyTorch forgets can be done by hand.
    """

    def __init__(self, fails=None, cause=NOT_ALLOWED, leaks=False, repairable=True):
        self.fails, self.cause, self.leaks, self.repairable = fails, cause, leaks, repairable
        self.default = self.current = FakeStream("default")
        self.reserved, self.stuck = 0, False
        self.replays = 0

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream
        if self.fails:
            try:
                raise torch.AcceleratorError(self.cause)
            except RuntimeError as error:
                if self.fails == "end":
                    self.stuck = self.leaks
                    raise torch.AcceleratorError(CAPTURE_INVALID) from error
                self.current = before
                raise
        yield
        self.current = before

    def end_allocate(self, device, pool):
        if not self.repairable:
            raise RuntimeError("not currently recording")
        self.stuck = False

    def empty_cache(self):
        if not self.stuck:
            self.reserved = 0

    def empty(self, real_empty, *size, **options):
        """Memory of the device is taken by nobody but the probe."""
        if size == (capture.PROBE_BYTES,):
            self.reserved += capture.PROBE_BYTES
        return real_empty(*size, **options)

    def set_stream(self, stream):
        self.current = stream


@pytest.fixture
def play(monkeypatch):
    """play(fails=..., ...) makes `modes` believe in a CUDA device; what it did is read from what is returned."""

    def play_(**kind):
        fake = FakeCuda(**kind)
        graph = mock.Mock()
        graph.return_value.replay.side_effect = lambda: setattr(fake, "replays", fake.replays + 1)
        for name, value in {
            "Stream": lambda device: FakeStream(),
            "current_stream": lambda device=None: fake.current,
            "stream": fake.stream,
            "set_stream": fake.set_stream,
            "graph": fake.graph,
            "CUDAGraph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "empty_cache": fake.empty_cache,
            "memory_reserved": lambda device: fake.reserved,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", partial(fake.empty, torch.empty))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)
        monkeypatch.setattr(modes, "why_no_graph", lambda *_: None)
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        return fake

    return play_


@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("fails", ["body", "end"])
def test_a_failed_capture_gives_back_the_stream_and_the_memory_and_goes_on(play, fails, leaks):
    fake, said = play(fails=fails, leaks=leaks), []
    step, plain = make_step(mode="graph", say=said.append), make_step()
    for i in range(6):
        assert torch.equal(step(make_crops(i), i).loss, plain(make_crops(i), i).loss)
        assert fake.current is fake.default
    assert step.mode == "compiled"
    assert not fake.stuck
    assert fake.replays == 0
    (line,) = said
    assert "graph failed" in line
    assert "operation not permitted when stream is capturing" in line
    assert line.endswith("using compiled")


def test_where_the_allocator_stays_in_the_capture_the_run_ends_with_cause_and_cure(play):
    play(fails="end", leaks=True, repairable=False)
    step = make_step(mode="graph", say=pytest.fail)
    for i in range(modes.WARM_UP):
        step(make_crops(i), i)
    with pytest.raises(TrainingError, match=r"not permitted when stream is capturing.*Try --step compiled"):
        step(make_crops(3), 3)


def test_what_cannot_compile_does_not_compile_twice_on_its_way_down_from_a_graph(play, monkeypatch):
    play()
    compiled, said = [], []

    def broken(function, **options):
        def run(*args):
            compiled.append(1)
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    step, plain = make_step(mode="graph", say=said.append), make_step()
    for i in range(5):
        assert torch.equal(step(make_crops(i), i).loss, plain(make_crops(i), i).loss)
    assert said == ["step: compiled failed (RuntimeError: no compiler here); using eager"]
    assert len(compiled) == 1


def test_memory_that_ends_in_a_capture_ends_the_run(play):
    """What comes out of a capture is the capture's own error; what it came from says that memory ran out."""
    play(fails="end", cause="CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")
    step = make_step(mode="graph", say=pytest.fail)
    for i in range(modes.WARM_UP):
        step(make_crops(i), i)
    with pytest.raises(torch.AcceleratorError, match="previous error during capture") as raised:
        step(make_crops(3), 3)
    assert memory.shortage(raised.value) == "CUDA error: out of memory"


def test_other_shapes_than_the_captured_ones_are_refused(play):
    play()
    step = make_step(mode="graph")
    step(make_crops(0), 0)
    with pytest.raises(ValueError, match="expected the captured shapes"):
        step([x[:2] for x in make_crops(1)], 1)


class NormOfSeveralProcesses(nn.SyncBatchNorm):
    """On a CPU, where PyTorch has none: plain BatchNorm, in a way that no tracer can follow."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def test_batchnorm_over_processes_is_left_out_of_the_compiled_graph():
    def with_norms(**options):
        step = make_step(use_bn=True, say=pytest.fail, **options)
        for network in step.run.both:
            for m in network.modules():
                if isinstance(m, nn.BatchNorm1d):
                    m.__class__ = NormOfSeveralProcesses
        return step

    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        torch._dynamo.reset()
        ours, plain = with_norms(), with_norms()
        ours._modes._use("compiled")
        for i in range(3):
            assert torch.allclose(ours(make_crops(i), i).loss, plain(make_crops(i), i).loss, rtol=1e-5)
    assert ours.mode == "compiled"


def error_with(message, *earlier):
    """An exception that came up while others were handled."""
    error = RuntimeError(message)
    if earlier:
        error.__context__ = error_with(*earlier)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("short"), "ValueError: short"),
        (ValueError(), "ValueError"),
        (
            error_with("backend='inductor' raised:\nInvalidCxxCompiler: No C++ compiler\n\nSet TORCHDYNAMO_VERBOSE"),
            "RuntimeError: backend='inductor' raised: InvalidCxxCompiler: No C++ compiler",
        ),
        (
            error_with(CAPTURE_INVALID, NOT_ALLOWED),
            "RuntimeError: CUDA error: operation failed due to a previous error during capture, after RuntimeError: "
            "CUDA error: operation not permitted when stream is capturing",
        ),
        (error_with("outer: the inner", "the inner"), "RuntimeError: outer: the inner"),
        (error_with("Unsupported\n  Hint: try\n\nfrom user code:\n  x.item()"), "RuntimeError: Unsupported"),
    ],
    ids=range(6),
)
def test_a_reason_is_one_line_that_says_what_happened(error, expected):
    assert reason(error) == expected


def test_the_reason_of_a_compiler_that_is_missing_names_it():
    """The real exception of Inductor, as it comes out of torch.compile."""
    from torch._inductor import config

    torch._dynamo.reset()
    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(Exception, match="no-such-compiler") as raised:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(31))
    assert "no-such-compiler" in reason(raised.value)
    assert "TORCHDYNAMO_VERBOSE" not in reason(raised.value)
