"""What all tests share: the golden data, and images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One archive of numbers computed with the original implementation; JSON strings inside come out parsed."""

    def __init__(self, name: str) -> None:
        self.archive = np.load(GOLDEN / f"{name}.npz")

    def __contains__(self, key: str) -> bool:
        return key in self.archive.files

    def __getitem__(self, key: str) -> Any:
        value = self.archive[key]
        return json.loads(str(value)) if value.dtype.kind == "U" else torch.from_numpy(np.asarray(value))

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        """Everything below `prefix.`, as a state dict."""
        return {k[len(prefix) + 1 :]: self[k] for k in self.archive.files if k.startswith(prefix + ".")}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Opens an archive by name: `golden("vit_fp64")`."""
    return Golden


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    scale = float(expected.detach().abs().max())
    return float((got.detach().double() - expected.detach().double()).abs().max()) / max(scale, 1e-300)


@pytest.fixture(scope="session")
def rel() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Largest difference over the largest expected value: `rel(got, expected)`."""
    return relative_error


@pytest.fixture(scope="session")
def photos() -> list[NDArray[np.uint8]]:
    """Real photographs, (H, W, 3) uint8, that scikit-learn and scikit-image carry."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]


@pytest.fixture(scope="session")
def photo_folder(photos: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 small JPEGs cut from the photographs, in a class folder per photograph."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(32):
        photo = Image.fromarray(photos[i % 4])
        x, y = (int(rng.integers(0, side - 120)) for side in photo.size)
        path = folder / f"class_{i % 4}" / f"{i:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo.crop((x, y, x + 120, y + 100)).save(path, quality=90)
    return folder
