"""What all tests share: golden data, images, and where the kernels run.

Where there is no GPU, tests marked `gpu` are skipped, the tests of the ops run the kernels in Triton's interpreter, and
all others take the ops' plain path, as a user without a GPU would, unless they ask for `ops`.
"""

import json
import os
import signal
import sys
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: for tensors this small a second thread only spins
# What the processor has, Inductor would else prove by compiling for it, six times.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from forks import Forks
from numpy.typing import NDArray
from PIL import Image
from quick_interpreter import quicken
from torch import nn

# A shell starts what it runs in the background with Ctrl-C ignored, and all that comes of it: a run that a test
# interrupts would be right not to hear it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton's own functions (tl.sum, tl.zeros) are made for the interpreter or not when triton is imported, ours when
    # they are; the environment variable does not stay, because subprocesses would inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    quicken()

from fastdino.data.digits import load_digits  # noqa: E402  (after the interpreter is on)
from fastdino.data.sequences import SequenceSource  # noqa: E402
from fastdino_kernels import launch  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


# Parts of the names of tests that take ten CPU seconds and more: they come first, so that no process ends alone with
# one of them.
LONG = "trials/ test_fsdp test_distributed test_readme test_nine_ test_fusion test_interrupt truly_collapses"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(part in item.nodeid for part in LONG.split()))
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# The interpreter is for tests of the ops, and for those that ask for `ops`: it is too slow for training runs. Off here,
# and not in a fixture, so that it is off for fixtures of whole modules, too.
KERNELS_ON_CPU = {"cpu"} & launch.TRITON_DEVICES
launch.TRITON_DEVICES -= {"cpu"}


@pytest.fixture(autouse=True)
def _interpreted_ops(request: pytest.FixtureRequest) -> Iterator[None]:
    added = KERNELS_ON_CPU if "kernels" in request.path.parts else set()
    with mock.patch.object(launch, "TRITON_DEVICES", launch.TRITON_DEVICES | added):
        yield


@pytest.fixture(params=["plain", "kernels"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with the ops' plain path on CPU tensors, and with the kernels interpreted."""
    if request.param == "plain":
        monkeypatch.setattr(launch, "TRITON_DEVICES", launch.TRITON_DEVICES - {"cpu"})
    elif KERNELS_ON_CPU:
        monkeypatch.setattr(launch, "TRITON_DEVICES", launch.TRITON_DEVICES | KERNELS_ON_CPU)
    else:
        pytest.skip("kernels run on CPU tensors in the interpreter only")
    return request.param


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
def forks() -> Iterator[Forks]:
    """Runs Python programs that need no process as people start it; see `forks`."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def fifth() -> list[SequenceSource]:
    """A fifth of the digits, to train on and held out."""
    return [
        SequenceSource([source[i] for i in range(n)], source.labels[:n].tolist())
        for source, n in zip(load_digits(), (256, 64))
    ]


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


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A timm with a convolutional network, which does not know dynamic_img_size, and a ViT, which does."""
    made = []

    class Network(nn.Module):
        def __init__(self, **options):
            super().__init__()
            made.append(options)
            self.num_features, self.layer = 6, nn.Conv2d(3, 6, 4, 4)

        def forward(self, x):
            return self.layer(x).mean((2, 3))

    def create_model(name, **options):
        if name == "resnet18" and "dynamic_img_size" in options:
            raise TypeError("unexpected keyword argument 'dynamic_img_size'")
        return Network(**options)

    names = ["resnet18", "resnet50", "vit_tiny_patch16_224"]
    module = types.SimpleNamespace(
        create_model=create_model, is_model=names.__contains__, list_models=lambda _: ["resnet18", "resnet50"]
    )
    monkeypatch.setitem(sys.modules, "timm", module)
    return made
