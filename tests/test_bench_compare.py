"""A slowdown beyond the runs' own spread is found; noise, a slower machine and what is not ours are not."""

import json
import subprocess
import sys

import pytest

from bench.compare import compare
from bench.records import missing, read


def record(median_ms, half_spread=0.02, provider="ours", device="GPU"):
    spread = {"p20_ms": median_ms * (1 - half_spread), "p80_ms": median_ms * (1 + half_spread)}
    where = {"part": "ops", "group": "op", "provider": provider}
    return {"name": f"ops/op/{provider}", **where, "device": device, "median_ms": median_ms, **spread}


def run(ours_ms, others=1.0, **options):
    controls = [record(10.0 * others, provider=provider) for provider in ("plain", "compiled", "library")]
    return [record(ours_ms, **options), *controls]


@pytest.mark.parametrize(("after_ms", "found"), [(101.0, False), (105.0, True), (50.0, False)])
def test_only_what_exceeds_both_spreads_is_slower(after_ms, found):
    assert bool(compare(run(100.0), run(after_ms))[0]) is found


def test_a_wide_spread_hides_what_a_narrow_one_shows():
    assert compare(run(100.0), run(110.0))[0]
    assert not compare(run(100.0, half_spread=0.15), run(110.0, half_spread=0.15))[0]


def test_quiet_runs_may_differ_by_what_clocks_do():
    assert not compare(run(100.0, half_spread=0.0), run(102.0, half_spread=0.0))[0]


def test_a_slower_machine_is_no_slower_op_and_a_faster_one_hides_none():
    assert not compare(run(100.0), run(150.0, others=1.5))[0]
    assert compare(run(100.0), run(100.0, others=0.7))[0]


def test_what_is_not_ours_may_get_slower():
    before, after = run(100.0), run(100.0)
    after[1] = record(30.0, provider="plain")
    assert not compare(before, after)[0]


def elsewhere(records):
    return [r | {"group": "other", "name": f"ops/other/{r['provider']}"} for r in records]


def test_a_neighbour_while_one_group_was_measured_is_no_slower_op():
    quiet = elsewhere(run(50.0)[1:] + run(50.0)[1:])
    before = [record(100.0), record(100.0, provider="plain"), *quiet]
    after = [record(120.0), record(120.0, provider="plain"), *quiet]
    assert not compare(before, after)[0]
    after[1] = before[1]
    assert compare(before, after)[0]


def test_what_scatters_without_a_reason_sets_the_bound():
    noisy = [record(10.0 * x, provider=f"p{i}") for i, x in enumerate((0.8, 0.9, 1.0, 1.0, 1.1, 1.2))]
    calm = [record(10.0, provider=f"p{i}") for i in range(6)]
    assert not compare([record(100.0), *calm], [record(108.0), *noisy])[0]
    assert compare([record(100.0), *calm], [record(108.0), *calm])[0]


def test_a_check_that_fails_now_is_worse_than_slow():
    failed = {"name": "ops/op/ours", "provider": "ours", "failed": "error 1, allowed 0"}
    lines, _ = compare(run(100.0), [*run(100.0)[1:], failed])
    assert len(lines) == 1
    assert "no longer right" in lines[0]


def test_what_only_one_run_has_is_named():
    _, notes = compare([*run(100.0), record(1.0, provider="ours too")], [*run(100.0), record(1.0, provider="peer")])
    assert "only in the first: ops/op/ours too" in notes
    assert "only in the second: ops/op/peer" in notes


def test_a_record_of_another_device_is_left_out():
    lines, notes = compare(
        [*run(100.0), record(1.0, provider="ours too", device="other")], [*run(100.0), record(9.0, provider="ours too")]
    )
    assert not lines
    assert "on another device: ops/op/ours too" in notes


def test_other_devices_and_no_common_name_are_refused():
    with pytest.raises(ValueError, match="same device"):
        compare([record(100.0)], [record(100.0, device="other")])
    with pytest.raises(ValueError, match="in both"):
        compare([record(100.0)], [record(100.0, provider="other")])


def test_a_killed_run_says_what_is_missing(tmp_path):
    lines = [json.dumps({"planned": ["ops/op/ours", "ops/op/b"]}), json.dumps(record(1.0)), '{"name": "ops/op/b", "med']
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    assert missing(read(tmp_path)) == ["ops/op/b"]


@pytest.mark.parametrize(("after_ms", "code"), [(100.0, 0), (200.0, 1)])
def test_the_command_fails_where_something_got_slower(tmp_path, after_ms, code):
    for name, ms in (("a", 100.0), ("b", after_ms)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, run(ms))))
    command = [sys.executable, "-m", "bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert subprocess.run(command, capture_output=True).returncode == code
