"""Two processes agree: on skipping a step, on a mode, on an end. One start of two processes for all of them."""

import json
import os
from pathlib import Path

import pytest
import torch
from two_processes import masked


@pytest.fixture(scope="module")
def seen(forks, tmp_path_factory):
    """What both processes saw, by rank: [{scenario: result}] * 2."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    store = f"file://{tmp_path_factory.mktemp('two_processes')}/store"
    both = forks.run_ranks(2, here / "two_processes.py", store, env=os.environ | {"PYTHONPATH": path})
    assert [done.returncode for done in both] == [0, 0], "".join(done.stderr for done in both)
    return [json.loads(done.stdout) for done in both]


def test_an_infinity_on_one_makes_both_skip(seen):
    expected = {"skipped": True, "halved": True, "moved": True, "equal": True, "finite": True}
    assert [result["fp16_with_an_infinity_on_one"] for result in seen] == [expected] * 2


@pytest.mark.parametrize("centering", ["sinkhorn", "center"])
def test_two_processes_learn_from_masks_as_one(seen, centering):
    """Sinkhorn and both centers are of the batch as a whole."""
    name = {"sinkhorn": "sinkhorn_over_both", "center": "centers_over_both"}[centering]
    expected = torch.tensor(masked(centering), dtype=torch.float64)
    for result in seen:
        found = torch.tensor(result[name], dtype=torch.float64)
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)


def test_a_mode_that_fails_on_one_is_left_by_both(seen):
    line = "step: compiled failed (RuntimeError: no compiler here, on process 1); using eager"
    expected = {"mode": "eager", "said": [line], "equal": True}
    assert [result["compiler_missing_on_one"] for result in seen] == [expected] * 2


def test_memory_that_ends_on_one_ends_both(seen):
    zero, one = (result["memory_short_on_one"]["error"] for result in seen)
    assert zero == "TrainingError: compiled failed: OutOfMemoryError: CUDA out of memory, on process 1"
    assert one == "OutOfMemoryError: CUDA out of memory."


def test_buckets_are_reduced_while_the_backward_pass_goes_on(seen):
    for result in seen:
        found = result["reductions_during_backward"]
        assert found["all"] > 5
        assert found["before the last gradient"] > found["all"] / 2
        assert found["equal"]
        assert found["aligned"]


def test_the_others_wait_for_a_long_evaluation(seen):
    assert [result["a_long_evaluation"] for result in seen] == [{"waited": True}] * 2
