"""What a host lacks is said by name before anything is measured; what it can do without stops nothing."""

import pytest

from bench import preflight


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setenv("BENCH_QUICK", "0")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in preflight.compiler()


def test_a_missing_python_h_is_named(monkeypatch, tmp_path):
    if reason := preflight.compiler():
        pytest.skip(reason)
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in preflight.compiler()


def test_a_module_that_is_needed_stops_and_one_that_is_not_is_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(preflight, "OPTIONAL", {"no_such_module": "nothing of it"})
    assert preflight.main(str(tmp_path), quick=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "without no_such_module: nothing of it"
    assert lines[-1].startswith("device ")  # what gpu.sh knows a host by
    monkeypatch.setattr(preflight, "NEEDED", ("no_such_module",))
    assert preflight.main(str(tmp_path), quick=True) == 2
    assert "MISSING no_such_module" in capsys.readouterr().out


def test_a_full_disk_and_no_gpu_are_named_together(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(preflight, "FREE_GB", 10**9)
    monkeypatch.setattr(preflight, "gpu", lambda: "no CUDA device")
    assert preflight.main(str(tmp_path), quick=False) == 2
    assert capsys.readouterr().out.count("MISSING") == 2
