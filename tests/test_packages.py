"""What people install and import: the ops alone, one version, and types that their own checkers resolve."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastdino
import fastdino_kernels

ROOT = Path(__file__).parent.parent
THEIRS = ["fastdino", "cv2", "PIL", "sklearn", "matplotlib", "xformers", "simplejpeg", "rich"]


def dependencies(pyproject):
    """Of a pyproject.toml, without a parser of TOML, which Python 3.10 does not have."""
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject.read_text(), re.DOTALL | re.MULTILINE)[1]
    return re.findall(r'^\s*"(.*?)",', block, re.MULTILINE)


def test_the_ops_ask_for_torch_and_triton_as_the_whole_does():
    of_the_ops = dependencies(ROOT / "kernels" / "pyproject.toml")
    assert [re.match(r"\w+", each)[0] for each in of_the_ops] == ["torch", "triton"]
    assert set(of_the_ops) <= set(dependencies(ROOT / "pyproject.toml"))


def test_there_is_one_version():
    assert fastdino.__version__ == fastdino_kernels.__version__
    found = [path for path in ROOT.glob("*/**/*.py") if re.search(r'^__version__ = "', path.read_text(), re.MULTILINE)]
    assert found == [ROOT / "kernels" / "fastdino_kernels" / "__init__.py"]
    for name in ("pyproject.toml", "kernels/pyproject.toml"):
        path = re.search(r'\[tool.hatch.version\]\npath = "(.*)"', (ROOT / name).read_text())[1]
        assert (ROOT / name).parent / path == found[0]


ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({THEIRS!r}))  # importing one raises
import torch, fastdino_kernels
loss = fastdino_kernels.dino_loss(torch.randn(3, 2, 8), torch.randn(2, 2, 8), torch.zeros(8), 0.1, 0.04)
fastdino_kernels.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.9)
print(fastdino_kernels.__file__, loss.shape == ())
"""


def run(*words, cwd=None, **env):
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=300)


def test_the_ops_are_imported_without_the_rest(tmp_path):
    shutil.copytree(ROOT / "kernels" / "fastdino_kernels", tmp_path / "fastdino_kernels")
    done = run(sys.executable, "-c", ALONE, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == [str(tmp_path / "fastdino_kernels" / "__init__.py"), "True"], done.stderr


def test_the_ops_build_a_wheel_of_their_own(tmp_path):
    pytest.importorskip("hatchling", reason="pip would have to fetch the build's tools")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path))
    done = run(sys.executable, *build, str(tmp_path / "kernels"))
    assert not done.returncode, done.stderr
    assert [path.name for path in tmp_path.glob("*.whl")] == [
        f"fastdino_kernels-{fastdino.__version__}-py3-none-any.whl"
    ]


USERS = """
# What --strict is, for this file alone.
# mypy: warn-return-any, disallow-any-generics, disallow-subclassing-any, disallow-untyped-calls, strict-equality
# mypy: disallow-untyped-defs, disallow-incomplete-defs, check-untyped-defs, disallow-untyped-decorators
import torch
from PIL import Image

import fastdino
from fastdino import FeatureExtractor, SequenceSource, load_backbone
from fastdino_kernels import center_update_, dino_loss, ema_update_


def main(images: list[Image.Image]) -> torch.Tensor:
    result = fastdino.train(dataset=SequenceSource(images), epochs=1)
    reveal_type(result)
    backbone = load_backbone("checkpoint.pth")
    rows = FeatureExtractor(backbone).transform(images)
    reveal_type(rows)
    center = torch.zeros(512)
    loss = dino_loss(torch.randn(10, 4, 512), torch.randn(2, 4, 512), center, 0.1, 0.04)
    center_update_(center, torch.randn(2, 4, 512), 0.9)
    ema_update_(list(backbone.parameters()), list(backbone.parameters()), 0.996)
    reveal_type(fastdino.features("photos/", backbone))
    fastdino.export("checkpoint.pth", "vit.onnx", "onnx")
    print(fastdino.__version__, rows.shape, result.before)
    return loss
"""


def test_a_users_script_is_strictly_typed(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(USERS)
    # With the project's flags for all that it imports, so that this is in the cache of a run of mypy over the project.
    done = run(sys.executable, "-m", "mypy", str(tmp_path / "script.py"), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r'type is "(.*?)[\["]', done.stdout) == [
        "fastdino.train.result.TrainResult",
        "numpy.ndarray",
        "fastdino.extract.Features",
    ]
    for package in (ROOT / "fastdino", ROOT / "kernels" / "fastdino_kernels"):
        assert (package / "py.typed").is_file()
