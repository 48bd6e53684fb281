"""A run small enough to repeat: the digits, a narrow head, few steps."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastdino.data.sequences import SequenceSource
from fastdino.train import build
from fastdino.train.config import TrainConfig

TINY = {
    "epochs": 3,
    "batch_size_per_gpu": 256,  # 5 steps an epoch
    "patch_size": 12,  # 5 tokens of a global crop, 2 of a local one
    "local_crops_size": 12,
    "out_dim": 64,
    "hidden_dim": 32,
    "bottleneck_dim": 16,
    "local_crops_number": 2,
    "knn_freq": 0,
    "attention_images": 2,
    "num_workers": 0,
    "saveckp_freq": 1,
    "drop_path_rate": 0.2,
    "warmup_epochs": 1,
    "resume": True,
}


FIVE_STEPS = {"batch_size_per_gpu": 50}  # of a fifth of the digits


@pytest.fixture(autouse=True)
def _figures_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's two pictures take a quarter of its time, nearly all of it for letters: a pixel is written instead.

    They are drawn where tests look at them: by fixtures of whole modules (test_runs.py), and in test_curves.py.
    """

    def write(self: Figure, file: BinaryIO, *, format: str) -> None:
        Image.new("RGB", (1, 1)).save(file, format)

    monkeypatch.setattr(Figure, "savefig", write)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., TrainConfig]:
    """Makes a TrainConfig: `make_tiny(folder, flag=value, ...)`."""
    return lambda folder, **flags: TrainConfig.from_flags({**TINY, "output_dir": str(folder), **flags})


@pytest.fixture
def tiny(tmp_path: Path, make_tiny: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """The same, writing below this test's folder: `tiny("name", flag=value, ...)`."""
    return lambda folder="run", **flags: make_tiny(tmp_path / folder, **flags)


@pytest.fixture
def few_digits(fifth: list[SequenceSource], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Runs have a fifth of the digits; the flag with which an epoch has five steps of them as of all.

    For runs that are compared with each other, of which more images would say no more.
    """
    monkeypatch.setattr(build, "load_digits", lambda: fifth)
    return FIVE_STEPS


@pytest.fixture
def tiny_flags(photo_folder: Path) -> list[str]:
    """A command line without the output folder, for processes: on photographs, which take no scikit-learn to open."""
    photos = {"data_path": photo_folder, "preset": "none", "arch": "vit_nano", "global_crops_size": 24}
    flags = {**TINY, **photos, "batch_size_per_gpu": 6}  # five steps an epoch
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
