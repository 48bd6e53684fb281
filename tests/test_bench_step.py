"""The benchmark's steps: closed, and out of memory when their case is over."""

import gc
import weakref

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks run under pytest-benchmark: the extra `bench`")

from bench import test_step as bench_step


@pytest.mark.parametrize("provider", ["ours eager", "plain"])
def test_a_step_is_closed_and_gone_when_its_case_is_over(provider, monkeypatch):
    steps, closed = [], []
    for kind in (bench_step.TrainStep, bench_step.PlainStep):
        init = kind.__init__
        monkeypatch.setattr(
            kind, "__init__", lambda self, init=init, **kw: (steps.append(weakref.ref(self)), init(self, **kw))[1]
        )
    monkeypatch.setattr(bench_step.TrainStep, "close", lambda self: closed.append(True))
    small = bench_step.NETWORKS["vit_tiny"]
    monkeypatch.setitem(bench_step.NETWORKS, "vit_tiny", lambda: small(depth=1))
    case = bench_step.Case("vit_tiny", 0, 1, 64, "fp32")
    with bench_step.made(provider, case) as step:
        step(bench_step.crops_of(case), 0)
        assert not closed
    del step
    gc.collect()
    assert len(closed) == (provider == "ours eager")
    assert [ref() for ref in steps] == [None]
