"""The trials' scripts in their quick form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "script", ["kills", "poison", "signals", "disks", "power", "pairs", "checkpoints", "contents", "shards", "images"]
)
def test_nothing_is_lost(script: str) -> None:
    """In a process of its own, which forks its runs: some 10 to 25 seconds each."""
    if script in ("disks", "power") and os.geteuid():
        pytest.skip("needs root, to mount file systems")
    command = [sys.executable, "-m", f"trials.{script}", "--quick"]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        command, cwd=TESTS, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
