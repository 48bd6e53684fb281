"""The trials' scripts in their quick form."""

import os
from pathlib import Path

import pytest
from forks import Forks
from trials.mounts import why_not

TESTS = Path(__file__).parents[1]


SCRIPTS = "kills poison signals disks power pairs checkpoints contents shards parquets images weights"


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_nothing_is_lost(script: str, forks: Forks) -> None:
    """In a process of its own, which forks its runs and waits for them and for disks: some 5 to 40 seconds each."""
    if script in ("disks", "power") and (reason := why_not()):
        pytest.skip(f"file systems cannot be mounted: {reason}")
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ended = forks.run("-m", f"trials.{script}", "--quick", cwd=TESTS, env={**os.environ, "PYTHONPATH": paths})
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
