"""The recipes of DINOv2 and DINOv3 in numbers of the originals: what `check_v2.py` says of `adapter_v2.py`.

All of it: python tests/check_v2.py tests/golden/v2 tests/adapter_v2.py -v
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LOSSES = ("sinkhorn", "center_cls", "center_patch", "dino_loss", "dino_loss_diag", "ibot_loss", "gram")
KOLEO = ("koleo0", "koleo1", "koleo2", "koleo_duplicates", "koleo_top3")
MASKS = ("mask_v2", "mask_v3", "mask_batch_v2", "mask_batch_v3")
RUN = ("schedules_v2", "schedules_v3", "schedules_v3_curve", "param_groups")
CHECKS = [*(f"{name}.{dtype}" for name in (*LOSSES, *KOLEO) for dtype in ("fp64", "fp32")), *MASKS, *RUN]


@pytest.fixture(scope="module")
def held() -> dict[str, bool]:
    """What each check came to, by its name."""
    command = [sys.executable, HERE / "check_v2.py", HERE / "golden" / "v2", HERE / "adapter_v2.py", "-v"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    report = subprocess.run(command, env=env, capture_output=True, text=True).stdout
    lines = re.findall(r"^(\S+) +\S+ \(bar .*?\)(.*)$", report, re.M)
    return {name: "FALLS SHORT" not in rest for name, rest in lines}


@pytest.mark.parametrize("name", CHECKS)
def test_check_holds(name: str, held: dict[str, bool]) -> None:
    assert held[name]
