"""From files to crops to the step, beside the original's Pillow pipeline and albumentations.

Photographs of 500 x 375 pixels; 2 crops of 224 pixels and 8 of 96 of each, with the original's probabilities.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.measure import CORES, DEVICE, ON_GPU, QUICK, require, times_ms
from bench.test_step import HALF, MAIN, NITER_PER_EP, Case, made, over
from fastdino import EvalTransform, vit_small, vit_tiny
from fastdino.data.augment import apply_crop
from fastdino.data.decode import decode_array, open_image
from fastdino.data.loader import CropLoader, EpochSampler
from fastdino.data.params import crop_params, draw_crops
from fastdino.data.ring import PackedBuffer
from fastdino.data.sequences import SequenceSource
from fastdino.data.views import View
from fastdino.eval.features import stream
from fastdino.train.config import TrainConfig
from fastdino_kernels import CropTable, PackedImages, multi_crop_augment

N_IMAGES, BATCH = (96, 32) if ON_GPU else (24, 8)
BUDGET_MS = 500 if QUICK else 3000
WIDTH, HEIGHT = 500, 375
RECIPE = TrainConfig().crops()
GROUPS = ((RECIPE.globals, 0), (RECIPE.locals, len(RECIPE.globals)))  # views, and the number of the first


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    """JPEG files, cut from scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    rng, files = np.random.default_rng(0), [BytesIO() for _ in range(N_IMAGES)]
    for i, photo in zip(range(N_IMAGES), cycle(map(Image.fromarray, load_sample_images().images))):
        x, y = (int(rng.integers(0, side + 1)) for side in (photo.width - WIDTH, photo.height - HEIGHT))
        photo.crop((x, y, x + WIDTH, y + HEIGHT)).save(files[i], "JPEG", quality=90)
    return [file.getvalue() for file in files]


@pytest.mark.parametrize("provider", ["ours exact", "ours fast"])
def test_kernels(provider: str, timed: Any, encoded: list[bytes]) -> None:
    if not ON_GPU:
        pytest.skip("the kernels that make crops need a CUDA device")
    buffer, made = PackedBuffer(pin=False), []
    buffer.reserve([(WIDTH, HEIGHT)] * N_IMAGES)
    for i, data in enumerate(encoded):
        buffer.view(i)[:] = decode_array(open_image(data))
    images = PackedImages(*(x.to(DEVICE) for x in buffer.images()))
    for views, first in GROUPS:
        table = draw_crops(0, 0, range(N_IMAGES), [WIDTH] * N_IMAGES, [HEIGHT] * N_IMAGES, views, first)
        made.append((CropTable(*(x.to(DEVICE) for x in table)), views[0].size))

    def run() -> list[Tensor]:
        arguments = {"dtype": torch.bfloat16, "exact": provider == "ours exact"}
        return [multi_crop_augment(images, table, size, **arguments) for table, size in made]

    plain = multi_crop_augment(  # the same arithmetic by PyTorch, in the CPU's memory
        PackedImages(*(x.cpu() for x in images)), CropTable(*(x[:4].cpu() for x in made[0][0])), 224
    )
    off = (run()[0][:4].float().cpu() - plain).abs().mean()
    require(off < 0.02, f"{off:.4f} of a deviation from the reference")
    # Each crop's box is read once, three bytes a pixel; bf16 crops are written once.
    n_bytes = sum(3 * int((t.box[:, 2].long() * t.box[:, 3]).sum()) + 6 * len(t.image) * s**2 for t, s in made)
    timed(run, n_bytes=n_bytes, n_images=N_IMAGES)


def pillow_crops(index: int, image: Any) -> list[Any]:
    """The crops that ours are compared with, of the same boxes and colours."""
    crops = []
    for views, first in GROUPS:
        rows = crop_params(draw_crops(0, 0, [index], [WIDTH], [HEIGHT], views, first))
        crops += [apply_crop(image, params, views[0].size) for params in rows]
    return crops


def albumentations_crops() -> Callable[[int, Any], list[Any]]:
    """With parameters of its own."""
    A = pytest.importorskip("albumentations", reason="albumentations is not installed")
    views = []
    for view in RECIPE.views:
        crop = A.RandomResizedCrop((view.size,) * 2, scale=view.scale, interpolation=2), A.HorizontalFlip(p=view.flip)
        color = A.ColorJitter(0.4, 0.4, 0.2, 0.1, p=view.jitter), A.ToGray(p=view.gray)
        blur = A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=view.blur), A.Solarize(p=view.solarize)
        views.append(A.Compose([*crop, *color, *blur]))
    return lambda _, image: [transform(image=image)["image"] for transform in views]


class _Dataset(torch.utils.data.Dataset[Any]):
    """The original's way: an image at a time in a worker process, and over to the trainer."""

    def __init__(self, source: Sequence[bytes], made_of: Callable[[int, bytes], Any]) -> None:
        self.source, self.made_of = source, made_of

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.made_of(index, self.source[index])


def stacked(crops_of: Callable[[int, Any], list[Any]], index: int, data: bytes) -> tuple[Tensor, Tensor]:
    """The crops of an image by size."""
    crops = crops_of(index, decode_array(open_image(data)))
    large, small = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).contiguous() for x in (crops[:2], crops[2:]))
    return large, small


@pytest.mark.parametrize("workers", sorted({0, CORES}), ids=lambda n: f"{n} worker{'' if n == 1 else 's'}")
@pytest.mark.parametrize("provider", ["ours fast", "ours exact", "Pillow", "albumentations"])
def test_loader(provider: str, workers: int, timed: Any, encoded: list[bytes]) -> None:
    """By threads; others by processes."""
    source = SequenceSource(encoded)
    if provider.startswith("ours"):
        sampler, augment = EpochSampler(N_IMAGES, BATCH, 0), provider.split()[1]
        loader: Any = CropLoader(source, RECIPE, sampler, num_workers=workers, augment=augment)
        index, batch = next(iter(sampler))[0][1], next(iter(loader))
        exact = stacked(pillow_crops, index, source[index])[0].int()
        off = (batch.global_crops[:, 0].int() - exact).abs().float().mean()
        assert not batch.bad
        require(off <= (0 if augment == "exact" else 4), f"{off:.2f} levels off")
    else:
        crops = pillow_crops if provider == "Pillow" else albumentations_crops()
        options = {"num_workers": workers, "persistent_workers": workers > 0, "drop_last": True}
        loader = torch.utils.data.DataLoader(_Dataset(source, partial(stacked, crops)), BATCH, **options)
    run = partial(deque, loader, 0)  # from the first batch to the last
    timed(run, n_images=N_IMAGES, times=times_ms(run, BUDGET_MS, on_host=True))
    if isinstance(loader, CropLoader):
        loader.close()


def normalised(transform: EvalTransform, _: int, data: bytes) -> Tensor:
    """As evaluations are written with torchvision."""
    return transform(Image.open(BytesIO(data)))


@pytest.mark.parametrize("provider", ["ours", "plain"])
def test_features(provider: str, timed: Any, encoded: list[bytes]) -> None:
    """JPEG files to the features of a frozen ViT-S/16 (ViT-Ti/16 on a CPU) in bf16 (fp32), center crops of 224."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    backbone = (vit_small if ON_GPU else vit_tiny)().to(DEVICE, dtype).eval()
    views = _Dataset(encoded, partial(normalised, EvalTransform(224)))
    loader = torch.utils.data.DataLoader(views, BATCH, num_workers=CORES, persistent_workers=True)

    def ours() -> Tensor:
        batches = stream(
            backbone, SequenceSource(encoded), np.arange(N_IMAGES), View(256, 224), batch_size=BATCH, num_workers=CORES
        )
        return torch.cat([found["cls"] for _, found in batches])

    @torch.no_grad()
    def plain() -> Tensor:
        return torch.cat([backbone(batch.to(DEVICE, dtype)).float() for batch in loader])

    run = ours if provider == "ours" else plain
    off = (run() - plain()).abs().max() / plain().abs().max()
    require(off < (0.05 if ON_GPU else 1e-4), f"features differ by {off:.1e}")  # GPUs round mean and scale otherwise
    timed(run, n_images=N_IMAGES, times=times_ms(lambda: run().cpu(), BUDGET_MS, on_host=True))


@over([("ours graph" if ON_GPU else "ours eager", MAIN)])
def test_training(provider: str, case: Case, timed: Any, encoded: list[bytes]) -> None:
    """JPEG files to changed weights; `data_wait`: the share of the time that the step waits for crops."""
    n_steps = 20 if ON_GPU else 3
    source = SequenceSource(encoded * -(-case.batch * n_steps // N_IMAGES))
    sampler, dtype = EpochSampler(len(source), case.batch, 0), HALF[case.dtype] or torch.float32
    loader = CropLoader(source, RECIPE, sampler, num_workers=CORES, device=DEVICE, dtype=dtype)
    waits, iteration = [], cycle(range(NITER_PER_EP))

    def run() -> None:
        batches, waited = iter(loader), 0.0
        for _ in range(n_steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            step(batch.crops(DEVICE), next(iteration))
        batches.close()
        if ON_GPU:
            torch.cuda.synchronize()
        waits.append(1e3 * waited)

    with made(provider, case) as step:
        times = times_ms(run, BUDGET_MS, on_host=True)
    share = sum(waits[-len(times) :]) / sum(times)
    timed(run, n_images=n_steps * case.batch, times=times, data_wait=share, **case._asdict())
    loader.close()
