"""A slowdown beyond the runs' own spread is found, one within it is not, and a cut-off run says what it lacks."""

import json
import subprocess
import sys

import pytest

from bench.compare import missing, read, slower


def record(median_ms, half_spread_ms=1.0, name="step", device="GPU"):
    spread = {"p20_ms": median_ms - half_spread_ms, "p80_ms": median_ms + half_spread_ms}
    return {"name": name, "device": device, "median_ms": median_ms, **spread}


@pytest.mark.parametrize(("after_ms", "found"), [(103.9, False), (104.1, True), (50.0, False)])
def test_only_what_exceeds_both_spreads_is_slower(after_ms, found):
    assert bool(slower([record(100.0)], [record(after_ms)])) is found


def test_other_devices_and_no_common_name_are_refused():
    with pytest.raises(ValueError, match="same device"):
        slower([record(100.0)], [record(100.0, device="other")])
    with pytest.raises(ValueError, match="in both"):
        slower([record(100.0)], [record(100.0, name="other")])


def test_a_killed_run_says_what_is_missing(tmp_path):
    lines = [json.dumps({"planned": ["a", "b"]}), json.dumps(record(1.0, name="a")), '{"name": "b", "med']
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    assert missing(read(tmp_path)) == ["b"]


@pytest.mark.parametrize(("after_ms", "code"), [(100.0, 0), (200.0, 1)])
def test_the_command_fails_where_something_got_slower(tmp_path, after_ms, code):
    for name, ms in (("a", 100.0), ("b", after_ms)):
        (tmp_path / name).write_text(json.dumps(record(ms)))
    command = [sys.executable, "-m", "bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert subprocess.run(command, capture_output=True).returncode == code
