"""From files to crops, beside the original's Pillow pipeline: `pytest bench/test_pipeline.py`.

Images per second of wall time, and per second of CPU time, which is what a core does, whoever else is on the machine.
Photographs of 500 x 375 pixels; 2 crops of 224 pixels and 8 of 96 for each, with the original's probabilities. Peers
that are not installed are named as absent.
"""

import importlib.util
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.measure import environment
from fastdino.data.augment import apply_crop, apply_crop_fast
from fastdino.data.decode import decode_array, open_image
from fastdino.data.loader import CropLoader, EpochSampler
from fastdino.data.params import MultiCropRecipe, ViewRecipe, crop_params, draw_crops
from fastdino.data.ring import PackedBuffer
from fastdino.data.sources import FolderSource, ImageSource, open_source

N_IMAGES, BATCH = 96, 32
CORES = len(os.sched_getaffinity(0))
WIDTH, HEIGHT = 500, 375
RECIPE = MultiCropRecipe(
    globals=(
        ViewRecipe(size=224, scale=(0.4, 1.0), blur=1.0),
        ViewRecipe(size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2),
    ),
    locals=(ViewRecipe(size=96, scale=(0.05, 0.4)),) * 8,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_per_operation() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs cut from scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(N_IMAGES):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        x, y = (int(rng.integers(0, side + 1)) for side in (photo.width - WIDTH, photo.height - HEIGHT))
        photo.crop((x, y, x + WIDTH, y + HEIGHT)).save(folder / f"{i:03}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def encoded(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def pixels(encoded: list[bytes]) -> list[Any]:
    return [decode_array(open_image(data)) for data in encoded]


Timed = Callable[..., float]


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """Times `run`, which handles `n` things, prints a line, adds it to $BENCH_ROWS; things per second of CPU time."""

    def time_it(run: Callable[[], object], n: int, what: str = "images", rounds: int = 3) -> float:
        per_s, per_cpu_s = [], []

        def once() -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            per_s.append(n / (time.perf_counter() - wall))
            per_cpu_s.append(n / (time.process_time() - cpu))

        benchmark.pedantic(once, rounds=rounds, warmup_rounds=1)
        figures: dict[str, Any] = {
            "name": request.node.name.removeprefix("test_"),
            "what": what,
            "per_s": float(np.median(per_s[1:])),
            "per_cpu_s": float(np.median(per_cpu_s[1:])),
            "cores": CORES,
            **environment(),
        }
        benchmark.extra_info.update(figures)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n{name:44} {per_s:10,.0f} {what}/s {per_cpu_s:10,.0f} per CPU second".format(**figures), end=" ")
        if path := os.environ.get("BENCH_ROWS"):
            with open(path, "a") as file:
                file.write(json.dumps(figures) + "\n")
        return float(figures["per_cpu_s"])

    return time_it


def into_a_buffer(encoded: list[bytes]) -> None:
    buffer = PackedBuffer(pin=False)
    for start in range(0, N_IMAGES, BATCH):
        opened = [open_image(data) for data in encoded[start : start + BATCH]]
        buffer.reserve([(image.width, image.height) for image in opened])
        for i, image in enumerate(opened):
            image.write(buffer.view(i))


def with_pillow(encoded: list[bytes]) -> None:
    for data in encoded:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("how", [into_a_buffer, with_pillow], ids=["fastdino", "Pillow"])
def test_decode(timed: Timed, encoded: list[bytes], how: Callable[[list[bytes]], None]) -> None:
    timed(lambda: how(encoded), N_IMAGES)


def test_parameters(timed: Timed) -> None:
    sizes = [WIDTH] * BATCH, [HEIGHT] * BATCH
    timed(lambda: draw_crops(0, 0, range(BATCH), *sizes, RECIPE.views), BATCH * len(RECIPE.views), "crops")


def our_crops(apply: Callable[..., Any]) -> Callable[[Any], None]:
    def run(pixels: list[Any]) -> None:
        for i, image in enumerate(pixels):
            for views, first in ((RECIPE.globals, 0), (RECIPE.locals, len(RECIPE.globals))):
                for params in crop_params(draw_crops(0, 0, [i], [WIDTH], [HEIGHT], views, first)):
                    apply(image, params, views[0].size)

    return run


def albumentations_crops(pixels: list[Any]) -> None:
    import albumentations as A

    def view(recipe: ViewRecipe) -> Any:
        return A.Compose(
            [
                A.RandomResizedCrop((recipe.size, recipe.size), scale=recipe.scale, interpolation=2),
                A.HorizontalFlip(p=recipe.flip),
                A.ColorJitter(0.4, 0.4, 0.2, 0.1, p=recipe.jitter),
                A.ToGray(p=recipe.gray),
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=recipe.blur),
                A.Solarize(p=recipe.solarize),
            ]
        )

    views = [view(recipe) for recipe in RECIPE.views]
    for image in pixels:
        for transform in views:
            transform(image=image)


def torchvision_crops(pixels: list[Any]) -> None:
    from torchvision.transforms import InterpolationMode, v2

    def view(recipe: ViewRecipe) -> Any:
        return v2.Compose(
            [
                v2.RandomResizedCrop(recipe.size, recipe.scale, interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(recipe.flip),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], recipe.jitter),
                v2.RandomGrayscale(recipe.gray),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], recipe.blur),
                v2.RandomSolarize(128, recipe.solarize),
            ]
        )

    views = [view(recipe) for recipe in RECIPE.views]
    for image in pixels:
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        for transform in views:
            transform(tensor)


AUGMENTERS = {
    "exact-Pillow": our_crops(apply_crop),
    "fast": our_crops(apply_crop_fast),
    "albumentations": albumentations_crops,
    "torchvision": torchvision_crops,
}


@pytest.mark.parametrize("how", AUGMENTERS)
def test_augment(timed: Timed, pixels: list[Any], how: str) -> None:
    if how in ("albumentations", "torchvision") and not importlib.util.find_spec(how):
        pytest.skip(f"{how} is absent")
    timed(lambda: AUGMENTERS[how](pixels), N_IMAGES)


def test_fast_crops_take_a_quarter_of_pillows_time(pixels: list[Any]) -> None:
    """Decoded in the same run, in turns, so that a busy machine is as busy for both."""
    times: dict[str, list[float]] = {"exact-Pillow": [], "fast": []}
    for _ in range(3):
        for how, taken in times.items():
            started = time.process_time()
            AUGMENTERS[how](pixels)
            taken.append(time.process_time() - started)
    assert np.median(times["exact-Pillow"]) / np.median(times["fast"]) >= 4


class _Dataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The way of processes: an image's crops in a worker, and over to the trainer."""

    def __init__(self, source: ImageSource, apply: Callable[..., Any]) -> None:
        self.source, self.apply = source, apply

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = decode_array(open_image(self.source[index]))
        groups = []
        for views, first in ((RECIPE.globals, 0), (RECIPE.locals, len(RECIPE.globals))):
            rows = crop_params(draw_crops(0, 0, [index], [WIDTH], [HEIGHT], views, first))
            crops = [self.apply(image, params, views[0].size) for params in rows]
            groups.append(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous())
        return groups[0], groups[1]


@pytest.mark.parametrize("augment", ["fast", "exact"])
@pytest.mark.parametrize("workers", sorted({0, 1, CORES}))
@pytest.mark.parametrize("how", ["threads", "processes"])
def test_loader(timed: Timed, folder: Path, how: str, workers: int, augment: str) -> None:
    source = FolderSource(folder)
    if how == "threads":
        loader: Any = CropLoader(source, RECIPE, EpochSampler(N_IMAGES, BATCH, 0), num_workers=workers, augment=augment)
    else:  # their CPU time is their own: per CPU second says nothing here
        dataset = _Dataset(source, apply_crop if augment == "exact" else apply_crop_fast)
        loader = torch.utils.data.DataLoader(
            dataset, BATCH, num_workers=workers, persistent_workers=workers > 0, drop_last=True
        )
    timed(lambda: [None for _ in loader], N_IMAGES, rounds=2)
    if how == "threads":
        loader.close()


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_read(timed: Timed, folder: Path, encoded: list[bytes], tmp_path: Path, kind: str) -> None:
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(folder, arcname=".")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is absent")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": encoded}), tmp_path / "a.parquet", row_group_size=32)
    source = open_source(folder if kind == "folder" else tmp_path)
    order = np.random.default_rng(0).permutation(N_IMAGES).tolist() * 20
    assert sorted(source[i] for i in range(N_IMAGES)) == sorted(encoded)
    timed(lambda: [source[i] for i in order], len(order))
