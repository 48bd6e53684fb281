"""The recipes of DINOv2 and DINOv3 in numbers of the originals: what `check_v2.py` says of `adapter_v2.py`.

All of it: python tests/check_v2.py tests/golden/v2 tests/adapter_v2.py -v
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdino.model.archs import CONVNEXTS, PUBLISHED

HERE = Path(__file__).parent
LOSSES = ("sinkhorn", "center_cls", "center_patch", "dino_loss", "dino_loss_diag", "ibot_loss", "gram")
KOLEO = ("koleo0", "koleo1", "koleo2", "koleo_duplicates", "koleo_top3")
MASKS = ("mask_v2", "mask_v3", "mask_batch_v2", "mask_batch_v3")
RUN = ("schedules_v2", "schedules_v3", "schedules_v3_curve", "param_groups")
BLOCKS = [
    *(f"v2_{name}" for name in ("plain", "ls", "swiglu", "nobias", "drop", "drop_nols")),
    *(f"v3_{name}" for name in ("rope", "kbias", "swiglu", "swiglu64", "rms", "drop")),
]
BACKBONES = ("v2_mlp", "v2_reg", "v3_mlp", "v3_untied", "v3_rescale")
POSITIONS = ("0.1", "0.0.antialias", "0.0", "0.1.antialias")
TEACHERS = ("v2", "v2_chunked", "v3")
MODELS = [
    *(f"head_v{version}.{dtype}" for version in (2, 3) for dtype in ("fp64", "fp32")),
    *(f"block_{name}.{dtype}" for name in BLOCKS for dtype in ("fp64", "fp32")),
    *(f"backbone_{name}.{dtype}" for name in BACKBONES for dtype in ("fp64", "fp32")),
    *(f"pos_embed.offset{name}" for name in POSITIONS),
    *(f"rope.{dtype}" for dtype in ("fp64", "fp32", "bf16")),
    *(f"names_{name}" for name in (*PUBLISHED, *CONVNEXTS)),
    *(f"teacher_checkpoint_{name}" for name in TEACHERS),
]
NETWORKS = ("loss", "grad_norm", "student", "teacher")
TRAIN = [
    *(
        f"train_{run}.{part}.{dtype}"
        for run in ("v2_sinkhorn", "v3_gram")
        for part in NETWORKS
        for dtype in ("fp64", "fp32")
    ),
    *(f"train_v3_gram.gram_teacher.{dtype}" for dtype in ("fp64", "fp32")),
    *(f"train_v2_center.{part}.fp64" for part in (*NETWORKS, "center")),
    *(f"train_{run}.grad0.fp64" for run in ("v2_center", "v2_sinkhorn", "v3_gram")),
]
CHECKS = [*(f"{name}.{dtype}" for name in (*LOSSES, *KOLEO) for dtype in ("fp64", "fp32")), *MASKS, *RUN, *MODELS]
CHECKS += TRAIN


@pytest.fixture(scope="module")
def held(forks: Any) -> dict[str, bool]:
    """What each check came to, by its name."""
    words = HERE / "check_v2.py", HERE / "golden" / "v2", HERE / "adapter_v2.py", "-v"
    report = forks.run(*words, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}).stdout
    lines = re.findall(r"^(\S+) +\S+ \(bar .*?\)(.*)$", report, re.M)
    return {name: "FALLS SHORT" not in rest for name, rest in lines}


def test_every_check_is_named_here(held: dict[str, bool]) -> None:
    assert sorted(held) == sorted(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_check_holds(name: str, held: dict[str, bool]) -> None:
    assert held[name]
