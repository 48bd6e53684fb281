"""The trials' scripts in their quick form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trials.mounts import why_not

TESTS = Path(__file__).parents[1]


SCRIPTS = "kills poison signals disks power pairs checkpoints contents shards parquets images weights"


@pytest.mark.parametrize("script", SCRIPTS.split())
def test_nothing_is_lost(script: str) -> None:
    """In a process of its own, which forks its runs and waits for them and for disks: some 5 to 40 seconds each."""
    if script in ("disks", "power") and (reason := why_not()):
        pytest.skip(f"file systems cannot be mounted: {reason}")
    command = [sys.executable, "-m", f"trials.{script}", "--quick"]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        command, cwd=TESTS, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
