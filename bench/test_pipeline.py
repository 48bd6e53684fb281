"""From files to crops to the step, beside the original's Pillow pipeline.

Images per second of wall time, and per second of CPU time (`images_per_cpu_s`), which is what a core does, whoever else
is on the machine. Photographs of 500 x 375 pixels; 2 crops of 224 pixels and 8 of 96 of each, with the original's
probabilities. The kernels that make crops on a GPU are timed there, by their bytes.
"""

import io
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

from bench.measure import CORES, DEVICE, ON_GPU, QUICK, require
from bench.peers import Absent, need
from bench.test_step import MAIN, NITER_PER_EP, Case, Step, made, over
from fastdino.data.augment import apply_crop, apply_crop_fast
from fastdino.data.decode import decode_array, open_image
from fastdino.data.loader import CropLoader, EpochSampler
from fastdino.data.params import MultiCropRecipe, ViewRecipe, crop_params, draw_crops
from fastdino.data.ring import PackedBuffer
from fastdino.data.sequences import SequenceSource
from fastdino.data.sources import FolderSource, ImageSource, open_source
from fastdino_kernels import CropTable, PackedImages, multi_crop_augment

N_IMAGES, BATCH = (24, 8) if QUICK and not ON_GPU else (96, 32)
ROUNDS = 2 if QUICK else 4
WIDTH, HEIGHT = 500, 375


def recipe(n_local: int) -> MultiCropRecipe:
    return MultiCropRecipe(
        globals=(
            ViewRecipe(size=224, scale=(0.4, 1.0), blur=1.0),
            ViewRecipe(size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2),
        ),
        locals=(ViewRecipe(size=96, scale=(0.05, 0.4)),) * n_local,
    )


RECIPE = recipe(8)
GROUPS = ((RECIPE.globals, 0), (RECIPE.locals, len(RECIPE.globals)))  # views, and the number of the first


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

    folder, photos = tmp_path_factory.mktemp("images"), load_sample_images().images
    rng = np.random.default_rng(0)
    for i in range(N_IMAGES):
        photo = Image.fromarray(photos[i % 2])
        x, y = (int(rng.integers(0, side + 1)) for side in (photo.width - WIDTH, photo.height - HEIGHT))
        photo.crop((x, y, x + WIDTH, y + HEIGHT)).save(folder / f"{i:03}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def encoded(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def pixels(encoded: list[bytes]) -> list[Any]:
    return [decode_array(open_image(data)) for data in encoded]


@pytest.fixture
def paced(timed: Any) -> Callable[..., Any]:
    """`timed` by the host's clock, with the CPU time that all threads of this process took beside it."""

    def time_it(
        run: Callable[[], object], n_images: int, extra: dict[str, Any] | None = None, rounds: int = ROUNDS
    ) -> None:
        wall, cpu = [], []
        for _ in range(rounds + 1):
            started, worked = time.perf_counter(), time.process_time()
            run()
            wall.append(1e3 * (time.perf_counter() - started))
            cpu.append(time.process_time() - worked)
        per_cpu_s = n_images / float(np.median(cpu[1:]))  # the first run fills caches
        timed(
            run, n_images=n_images, times=wall[1:],
            extra=lambda _: {"images_per_cpu_s": per_cpu_s, "cores": CORES, **(extra or {})},
        )  # fmt: skip

    return time_it


def into_a_buffer(encoded: list[bytes]) -> list[Any]:
    buffer, last = PackedBuffer(pin=False), []
    for start in range(0, N_IMAGES, BATCH):
        opened = [open_image(data) for data in encoded[start : start + BATCH]]
        buffer.reserve([(image.width, image.height) for image in opened])
        for i, image in enumerate(opened):
            image.write(buffer.view(i))
        last = [buffer.view(i) for i in range(len(opened))]
    return last


def with_pillow(encoded: list[bytes]) -> list[Any]:
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded]


@pytest.mark.parametrize("provider", ["ours", "Pillow"])
def test_decode(provider: str, paced: Any, encoded: list[bytes]) -> None:
    how = into_a_buffer if provider == "ours" else with_pillow
    expected, got = with_pillow(encoded[-2:]), how(encoded)[-2:]
    require(all(np.array_equal(*pair) for pair in zip(got, expected)), "not Pillow's pixels")
    paced(lambda: how(encoded), N_IMAGES)


def test_parameters(paced: Any) -> None:
    sizes = [WIDTH] * BATCH, [HEIGHT] * BATCH
    paced(lambda: draw_crops(0, 0, range(BATCH), *sizes, RECIPE.views), BATCH)


Crops = list[Any]  # uint8 arrays (S, S, 3), ten of each image


def with_our_parameters(apply: Callable[..., Any]) -> Callable[[Any], Crops]:
    def run(pixels: list[Any]) -> Crops:
        crops = []
        for i, image in enumerate(pixels):
            for views, first in GROUPS:
                for params in crop_params(draw_crops(0, 0, [i], [WIDTH], [HEIGHT], views, first)):
                    crops.append(apply(image, params, views[0].size))
        return crops

    return run


def albumentations_crops(pixels: list[Any]) -> Crops:
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
    return [transform(image=image)["image"] for image in pixels for transform in views]


def torchvision_crops(pixels: list[Any]) -> Crops:
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
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]
    return [transform(tensor).permute(1, 2, 0) for tensor in tensors for transform in views]


AUGMENTERS = {
    "ours fast": with_our_parameters(apply_crop_fast),
    "Pillow": with_our_parameters(apply_crop),  # and `ours exact` on a CPU
    "albumentations": albumentations_crops,
    "torchvision": torchvision_crops,
}


@pytest.mark.parametrize("provider", AUGMENTERS)
def test_augment(provider: str, paced: Any, pixels: list[Any]) -> None:
    if provider in ("albumentations", "torchvision"):
        try:
            need(provider)
        except Absent as reason:
            pytest.skip(str(reason))
    augment = AUGMENTERS[provider]
    got, exact = augment(pixels[:2]), AUGMENTERS["Pillow"](pixels[:2])
    assert [x.shape for x in got] == [x.shape for x in exact]
    if provider == "ours fast":  # others draw parameters of their own
        off = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(got, exact)])
        require(off <= 1.5, f"{off:.2f} levels from Pillow's")
    paced(lambda: augment(pixels), N_IMAGES)


def packed(pixels: list[Any]) -> PackedImages:
    """Decoded images in one buffer on the device."""
    buffer = PackedBuffer(pin=False)
    buffer.reserve([(WIDTH, HEIGHT)] * len(pixels))
    for i, image in enumerate(pixels):
        buffer.view(i)[:] = image
    return PackedImages(*(x.to(DEVICE) for x in buffer.images()))


@pytest.mark.parametrize("provider", ["ours exact", "ours fast"])
def test_kernels(provider: str, timed: Any, pixels: list[Any]) -> None:
    if not ON_GPU:
        pytest.skip("the kernels that make crops need a CUDA device")
    exact = provider == "ours exact"
    images, made = packed(pixels), []
    for views, first in GROUPS:
        table = draw_crops(0, 0, range(N_IMAGES), [WIDTH] * N_IMAGES, [HEIGHT] * N_IMAGES, views, first)
        made.append((CropTable(*(x.to(DEVICE) for x in table)), views[0].size))

    def run() -> list[Tensor]:
        arguments = {"dtype": torch.bfloat16, "exact": exact}
        return [multi_crop_augment(images, table, size, **arguments) for table, size in made]

    plain = multi_crop_augment(  # the same arithmetic by PyTorch, in the CPU's memory
        PackedImages(*(x.cpu() for x in images)), CropTable(*(x[:4].cpu() for x in made[0][0])), 224
    )
    off = (run()[0][:4].float().cpu() - plain).abs().mean()
    require(off < 0.02, f"{off:.4f} of a deviation from the reference")
    # Each crop's box is read once, three bytes a pixel; bf16 crops are written once.
    n_bytes = sum(3 * int((t.box[:, 2].long() * t.box[:, 3]).sum()) + 6 * len(t.image) * s**2 for t, s in made)
    timed(run, n_bytes=n_bytes, n_images=N_IMAGES)


class _Dataset(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The original's way: an image's crops by Pillow, in a worker process, and over to the trainer."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, crops = decode_array(open_image(self.source[index])), []
        for views, first in GROUPS:
            rows = crop_params(draw_crops(0, 0, [index], [WIDTH], [HEIGHT], views, first))
            made = np.stack([apply_crop(image, params, views[0].size) for params in rows])
            crops.append(torch.from_numpy(made).permute(0, 3, 1, 2).contiguous())
        return crops[0], crops[1]


@pytest.mark.parametrize("workers", sorted({0, CORES}), ids=lambda n: f"{n} worker{'' if n == 1 else 's'}")
@pytest.mark.parametrize("provider", ["ours fast", "ours exact", "Pillow"])
def test_loader(provider: str, workers: int, paced: Any, folder: Path) -> None:
    """Threads, or (Pillow) processes, whose CPU time is their own."""
    source = FolderSource(folder)
    if provider == "Pillow":
        loader: Any = torch.utils.data.DataLoader(
            _Dataset(source), BATCH, num_workers=workers, persistent_workers=workers > 0, drop_last=True
        )
        paced(lambda: [None for _ in loader], N_IMAGES)
        return
    sampler, augment = EpochSampler(N_IMAGES, BATCH, 0), provider.split()[1]
    loader = CropLoader(source, RECIPE, sampler, num_workers=workers, augment=augment)
    index, batch = next(iter(sampler))[0][1], next(iter(loader))
    exact = _Dataset(source)[index][0].int()
    off = (batch.global_crops[:, 0].int() - exact).abs().float().mean()
    assert not batch.bad
    require(off <= (0 if augment == "exact" else 4), f"{off:.2f} levels off")
    paced(lambda: [None for _ in loader], N_IMAGES)
    loader.close()


@pytest.mark.parametrize("provider", ["ours folder", "ours tar", "ours parquet"])
def test_read(provider: str, paced: Any, folder: Path, encoded: list[bytes], tmp_path: Path) -> None:
    """Bytes from the page cache, at random."""
    kind = provider.split()[1]
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(folder, arcname=".")
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": encoded}), tmp_path / "a.parquet", row_group_size=32)
    source = open_source(folder if kind == "folder" else tmp_path)
    order = np.random.default_rng(0).permutation(N_IMAGES).tolist() * 20
    assert sorted(source[i] for i in range(N_IMAGES)) == sorted(encoded)
    paced(lambda: [source[i] for i in order], len(order))


@pytest.fixture(scope="module")
def step(provider: str, case: Case) -> Iterator[Step]:
    with made(provider, case) as run:
        yield run


@over([("ours graph" if ON_GPU else "ours eager", MAIN)])
def test_training(provider: str, case: Case, step: Step, paced: Any, folder: Path, encoded: list[bytes]) -> None:
    """JPEG files to changed weights; `data_wait`: the share of the time that the step waits for crops."""
    n_steps = 20 if ON_GPU else 3
    source = SequenceSource(encoded * -(-case.batch * n_steps // N_IMAGES))
    loader = CropLoader(
        source, recipe(case.n_local), EpochSampler(len(source), case.batch, 0), num_workers=CORES, device=DEVICE
    )
    waited, total, count = 0.0, 0.0, iter(range(NITER_PER_EP))

    def run() -> None:
        nonlocal waited, total
        started, batches = time.perf_counter(), iter(loader)
        for _ in range(n_steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            step(batch.crops(DEVICE), next(count))
        batches.close()
        if ON_GPU:
            torch.cuda.synchronize()
        total += time.perf_counter() - started

    shares: dict[str, Any] = case.facts
    run()
    waited = total = 0.0
    run()
    shares["data_wait"] = waited / total
    paced(run, n_steps * case.batch, extra=shares, rounds=2)
    loader.close()
