"""Batches that depend on nothing but seed, epoch and position."""

import io
import shutil
import struct
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.data.augment import IMAGENET_STD, apply_crop, normalize
from fastdino.data.decode import decode
from fastdino.data.loader import CropLoader, EpochSampler, useful_workers
from fastdino.data.masks import BatchMasks, BlockMasks
from fastdino.data.params import MultiCropRecipe, ViewRecipe, crop_params, draw_crops
from fastdino.data.sequences import SequenceSource
from fastdino.data.sources import FolderSource
from fastdino.data.views import View
from fastdino.data.views import views as image_views

RECIPE = MultiCropRecipe(
    globals=(ViewRecipe(size=32, scale=(0.4, 1.0)),) * 2, locals=(ViewRecipe(size=16, scale=(0.05, 0.4)),) * 3
)


def batches(
    source, *, workers=0, rank=0, world_size=1, epoch=0, first_batch=0, batch_size=4, seed=5, recipe=RECIPE, **options
):
    sampler = EpochSampler(len(source), batch_size, seed, rank, world_size)
    sampler.seek(epoch, first_batch)
    loader = CropLoader(source, recipe, sampler, num_workers=workers, **options)
    try:
        return list(loader)
    finally:
        loader.close()


def test_batches_have_the_steps_layout(photo_folder):
    batch = batches(FolderSource(photo_folder))[0]
    assert batch.global_crops.shape == (2, 4, 3, 32, 32)
    assert batch.local_crops.shape == (3, 4, 3, 16, 16)
    assert batch.global_crops.dtype == torch.uint8
    assert batch.bad == []


@pytest.mark.parametrize("augment", ["fast", "exact"])
@pytest.mark.parametrize("workers", [1, 2, 7])
def test_crops_do_not_depend_on_the_number_of_threads(photo_folder, workers, augment):
    source = FolderSource(photo_folder)
    one, two = (batches(source, workers=n, augment=augment) for n in (0, workers))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.local_crops, b.local_crops)


@pytest.mark.parametrize("augment", ["fast", "exact"])
def test_crops_do_not_depend_on_ranks(photo_folder, augment):
    source = FolderSource(photo_folder)
    alone = batches(source, batch_size=8, augment=augment)
    shared = [batches(source, rank=rank, world_size=2, workers=2, augment=augment) for rank in (0, 1)]
    for i, batch in enumerate(alone):
        for name in ("global_crops", "local_crops"):
            both = torch.stack([getattr(rank[i], name) for rank in shared], 2).flatten(1, 2)  # dealt one by one
            assert torch.equal(getattr(batch, name), both)


def test_exact_crops_are_the_tables_through_pillow(photo_folder):
    source = FolderSource(photo_folder)
    sampler = EpochSampler(len(source), 4, 5)
    sampler.seek(3)
    keys = next(iter(sampler))
    batch = batches(source, epoch=3, augment="exact", workers=2)[0]
    for b, (_, index) in enumerate(keys):
        pixels = np.asarray(decode(source[index]))
        for group, views, first in ((batch.global_crops, RECIPE.globals, 0), (batch.local_crops, RECIPE.locals, 2)):
            crops = draw_crops(5, 3, [index], [pixels.shape[1]], [pixels.shape[0]], views, first)
            for v, params in enumerate(crop_params(crops)):
                assert np.array_equal(group[v, b].permute(1, 2, 0), apply_crop(pixels, params, views[v].size))


def test_anchors_are_the_global_crops_at_another_size(photo_folder):
    """For a Gram teacher: drawn once, from the image itself; other crops stay as they are."""
    source, masks = (
        FolderSource(photo_folder),
        BatchMasks(BlockMasks(height=2, width=2, max_patches=2, min_patches=1), 0.5, (0.2, 0.5)),
    )
    options = {"augment": "exact", "masks": masks, "epoch": 3}
    batch = batches(source, recipe=replace(RECIPE, anchor_size=48), **options)[0]
    plain = batches(source, **options)[0]
    assert torch.equal(batch.global_crops, plain.global_crops)
    assert torch.equal(batch.local_crops, plain.local_crops)
    sampler = EpochSampler(len(source), 4, 5)
    sampler.seek(3)
    for b, (_, index) in enumerate(next(iter(sampler))):
        pixels = np.asarray(decode(source[index]))
        crops = draw_crops(5, 3, [index], [pixels.shape[1]], [pixels.shape[0]], RECIPE.globals)
        for v, params in enumerate(crop_params(crops)):
            assert np.array_equal(batch.anchors[v, b].permute(1, 2, 0), apply_crop(pixels, params, 48))
    views = batch.views(torch.device("cpu"))
    assert [tuple(x.shape[1:]) for x in views[-2:]] == [(3, 48, 48)] * 2
    assert len(views) == len(plain.views(torch.device("cpu"))) + 2
    assert torch.equal(views[-1], normalize(batch.anchors)[1])
    later = batches(source, recipe=replace(RECIPE, anchor_size=48, anchor_epoch=4), **options)[0]
    assert len(later.views(torch.device("cpu"))) == len(views) - 2


def test_epochs_and_seeds_differ_and_a_resume_continues(photo_folder):
    source = FolderSource(photo_folder)
    first = batches(source)
    assert not torch.equal(first[0].global_crops, batches(source, epoch=1)[0].global_crops)
    assert not torch.equal(first[0].global_crops, batches(source, seed=6)[0].global_crops)
    resumed = batches(source, first_batch=5, workers=2)
    assert len(resumed) == len(first) - 5
    for one, two in zip(first[5:], resumed, strict=True):
        assert torch.equal(one.global_crops, two.global_crops)


def test_ranks_share_each_batch_of_a_single_process():
    for n, world_size in ((32, 2), (30, 4), (7, 3)):
        per_rank = []
        for rank in range(world_size):
            sampler = EpochSampler(n, 2, 0, rank, world_size)
            sampler.seek(3)
            per_rank.append(list(sampler))
            assert len(per_rank[-1]) == len(sampler)
        alone = EpochSampler(n, 2 * world_size, 0)
        alone.seek(3)
        for i, batch in enumerate(alone):
            shared = [key for rank in per_rank for key in rank[i]]
            assert sorted(shared) == sorted(batch)


def test_an_epoch_sees_every_image_once():
    sampler = EpochSampler(20, 5, 0)
    sampler.seek(2)
    assert sorted(index for batch in sampler for _, index in batch) == list(range(20))


def test_a_smaller_last_batch_is_dropped_other_images_in_each_epoch():
    """So that a step never sees another shape, and would never be compiled or captured a second time."""
    left_out = []
    for epoch in range(20):
        sampler = EpochSampler(23, 5, 0)
        sampler.seek(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [5] * 4
        left_out.append(set(range(23)) - {index for batch in batches for _, index in batch})
    assert all(len(images) == 3 for images in left_out)
    assert len(set.union(*left_out)) > 15  # nobody is always left out


def test_the_order_is_distributed_samplers():
    from torch.utils.data import DistributedSampler

    for epoch in (0, 4):
        theirs = DistributedSampler(range(11), num_replicas=2, rank=1, seed=3)
        theirs.set_epoch(epoch)
        ours = EpochSampler(11, 1, 3, rank=1, world_size=2)
        ours.seek(epoch)
        assert [index for ((_, index),) in ours] == list(theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_and_named(photo_folder, tmp_path, workers):
    shutil.copytree(photo_folder, tmp_path / "photos")
    source = FolderSource(tmp_path / "photos")
    whole = batches(source, augment="exact")
    (source.folder / source.paths[3]).write_bytes(b"")
    (source.folder / source.paths[9]).unlink()
    half = source[20]
    (source.folder / source.paths[20]).write_bytes(half[: len(half) // 2])  # found out after its place was reserved
    got = batches(source, augment="exact", workers=workers)
    lines = sorted(line for batch in got for line in batch.bad)
    assert lines[0] == f"{source.name(3)}: the file is empty"
    assert "No such file" in lines[1]
    assert lines[2].startswith(f"{source.name(20)}: ")
    assert len(lines) == 3
    sampler = EpochSampler(len(source), 4, 5)
    for i, keys in enumerate(sampler):
        for b, (_, index) in enumerate(keys):
            same = torch.equal(got[i].global_crops[:, b], whole[i].global_crops[:, b])
            assert same == (index not in (3, 9, 20))
            if not same:  # the next one's pixels, cut by the numbers of the one that is missing
                pixels = np.asarray(decode(source[index + 1]))
                crops = draw_crops(5, 0, [index], [pixels.shape[1]], [pixels.shape[0]], RECIPE.globals)
                for v, params in enumerate(crop_params(crops)):
                    assert np.array_equal(got[i].global_crops[v, b].permute(1, 2, 0), apply_crop(pixels, params, 32))
    said: list[tuple[int, str]] = []
    views = image_views(source, np.arange(32), View(32, 24), 8, workers, lambda index, line: said.append((index, line)))
    kept = np.concatenate([index for _, index in views])
    assert sorted(set(range(32)) - set(kept.tolist())) == [index for index, _ in said] == [3, 9, 20]
    assert [line.partition(": ")[0] for _, line in said] == [source.name(index) for index in (3, 9, 20)]


@pytest.mark.parametrize("augment", ["fast", "exact"])
def test_odd_images_pass_and_broken_ones_are_named(photos, tmp_path, augment):
    """One of a kind in one folder, a whole epoch: crops of one colour come from the image that has it."""
    red, blue = (200, 0, 0), (0, 0, 200)
    Image.new("RGB", (1, 1), red).save(tmp_path / "0.png")
    Image.new("RGB", (30_000, 10), red).save(tmp_path / "1.jpg", quality=100, subsampling=0)
    Image.new("RGB", (10, 30_000), red).save(tmp_path / "2.png")
    # Two under wrong names, which play no part: an animation, of which the first frame counts, and a PNG.
    later = Image.new("RGB", (9, 9), blue)
    Image.new("RGB", (9, 9), red).save(tmp_path / "3.bmp", "GIF", save_all=True, append_images=[later])
    Image.new("RGB", (9, 9), red).save(tmp_path / "4.webp", "PNG")
    whole = io.BytesIO()
    Image.fromarray(photos[0]).save(whole, "JPEG")
    (tmp_path / "5.jpg").write_bytes(whole.getvalue()[:2000])
    (tmp_path / "6.png").write_bytes(b"text")
    (tmp_path / "7.bmp").write_bytes(b"")
    bomb = struct.pack("<2s8x4I2H24x", b"BM", 54, 40, 20_000, 20_000, 1, 24)  # a header of 1.2 GB, and nothing behind
    (tmp_path / "8.bmp").write_bytes(bomb)
    for i in range(9, 100):  # so that a tenth and more are readable
        Image.new("RGB", (12, 12), blue).save(tmp_path / f"9{i:03}.png")
    view = ViewRecipe(size=8, scale=(0.4, 1.0), jitter=0, gray=0, solarize=0, blur=0.5)
    source, sampler = FolderSource(tmp_path), EpochSampler(100, 10, 5)
    recipe = MultiCropRecipe(globals=(view,), locals=(view,))
    loader = CropLoader(source, recipe, sampler, num_workers=2, augment=augment)
    seen, bad = {}, []
    for keys, batch in zip(list(sampler), loader, strict=True):
        bad += batch.bad
        for b, (_, index) in enumerate(keys):
            seen[index] = batch.global_crops[0, b]
    loader.close()
    assert sorted({line.split(":")[0] for line in bad}) == [source.name(i) for i in (5, 6, 7, 8)]
    assert any("400000000 pixels" in line for line in bad)
    for index, crop in seen.items():
        expected = torch.tensor(red if index < 5 else blue)[:, None, None]
        assert (crop - expected).abs().max() <= 2, source.name(index)  # JPEG's red is 199


def test_a_source_without_a_readable_image_ends_in_black(tmp_path):
    broken = SequenceSource([b"no image"] * 30)
    for batch in batches(broken, workers=2):
        assert len(batch.bad) == 4 * 4  # a tenth of the images and one more, for each of four places
        assert batch.global_crops.amax() in (0, 255)  # solarized or not


class Shrinking(SequenceSource):
    """Its items vanish while it is read."""

    n_read = 0

    def __getitem__(self, index):
        self.n_read += 1
        if self.n_read > 30 and index % 5 == 0:
            raise OSError("it is gone")
        return super().__getitem__(index)


def test_a_source_that_shrinks_while_it_is_read_never_hangs(photos):
    source = Shrinking([photo[:100, :90] for photo in photos] * 10)
    got = batches(source, workers=3)
    assert len(got) == 15
    assert all("it is gone" in line for batch in got for line in batch.bad)
    assert any(batch.bad for batch in got)


def test_an_error_that_is_no_images_reaches_the_caller(photos):
    class Wrong(SequenceSource):
        def __getitem__(self, index):
            raise RuntimeError("a fault of the source's own")

    with pytest.raises(RuntimeError, match="a fault of the source's own"):
        batches(Wrong([photos[0]] * 8), workers=2)


def test_an_epoch_that_is_left_half_way_can_be_followed_by_another(photo_folder):
    source = FolderSource(photo_folder)
    sampler = EpochSampler(len(source), 4, 5)
    loader = CropLoader(source, RECIPE, sampler, num_workers=2)
    whole = batches(source, epoch=1)
    for _ in range(3):
        sampler.seek(0)
        next(iter(loader))
    sampler.seek(1, 2)
    for one, two in zip(whole[2:], loader, strict=True):
        assert torch.equal(one.global_crops, two.global_crops)
    loader.close()


def test_memory_stays_bounded_over_ten_thousand_images():
    """What is kept is three buffers, and none is more than twice what its last batch needed."""
    rng = np.random.default_rng(0)
    images = [np.zeros((int(h), int(w), 3), np.uint8) for h, w in rng.integers(8, 40, (10_000, 2))]
    large = 1500 * 1500 * 3
    images[5_000] = np.zeros((1500, 1500, 3), np.uint8)
    view = ViewRecipe(size=1, scale=(0.4, 1.0), jitter=0, blur=0, gray=0, solarize=0, flip=0)
    sampler = EpochSampler(len(images), 50, 0)
    loader = CropLoader(SequenceSource(images), MultiCropRecipe(globals=(view,), locals=()), sampler, num_workers=2)
    n_images, held = 0, []
    for batch in loader:
        n_images += batch.global_crops.shape[1]
        held.append(sum(len(buffer.bytes) for buffer in loader.buffers))
    loader.close()
    small = 50 * 40 * 40 * 3
    assert n_images == 10_000
    assert large < max(held) <= 2 * (large + 3 * small)
    assert held[-1] <= 2 * 3 * small


def test_workers_never_outnumber_the_cores():
    assert useful_workers(0, 1) == 0
    assert useful_workers(10_000, 1) < 10_000
    assert useful_workers(8, 10_000) == 1


def test_a_loader_says_what_it_holds_and_what_would_make_it_faster(photo_folder):
    source = FolderSource(photo_folder)

    def loader(**options):
        return CropLoader(source, RECIPE, EpochSampler(len(source), 4, 5), **options)

    fast, exact = loader(), loader(augment="exact", dct_scale=True, num_workers=1)
    exact.close()
    assert fast.memory() == int(120 * 100 * 3 * 1.25 * 4)
    assert exact.memory() == 3 * fast.memory()
    assert "close to Pillow's pixels; 1 batch of decoded images in memory, about 176 KiB" in fast.describe()
    assert "Pillow's pixels; 3 batches of decoded images in memory, about 527 KiB" in exact.describe()
    digits = CropLoader(SequenceSource([np.zeros((8, 8, 3), np.uint8)] * 9), RECIPE, EpochSampler(9, 4, 5))
    assert digits.describe().endswith("about 960 B")
    photographs = CropLoader(SequenceSource([np.zeros((375, 500, 3), np.uint8)] * 9), RECIPE, EpochSampler(9, 4, 5))
    assert photographs.describe().endswith("about 2.7 MiB")
    assert "--num_workers, now 0" in fast.advice()
    assert "--dct_scale true" in fast.advice()
    assert "--augment fast" not in fast.advice()
    assert "--augment fast" in exact.advice()
    assert "--dct_scale" not in exact.advice()


def test_dct_scaling_changes_only_what_is_far_too_large(photos, tmp_path):
    for name, side in (("small", 200), ("large", 427)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(photos[0][:side, : side + i]).save(tmp_path / name / f"{i}.jpg")
    for name, same in (("small", True), ("large", False)):  # the local crops need 16 / 0.05 ** 0.5 = 72 pixels
        source = FolderSource(tmp_path / name)
        whole, scaled = (batches(source, dct_scale=scale)[0].local_crops for scale in (False, True))
        assert torch.equal(whole, scaled) == same
        assert (whole.double().mean() - scaled.double().mean()).abs() < 20


class FakeCuda:
    """Streams and events that are written down, in the order in which a device would get them."""

    def __init__(self, monkeypatch):
        self.log = []
        monkeypatch.setattr("fastdino_kernels.augment.multi_crop_augment", self.augment)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: self.said("copy", tensor))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())

    def augment(self, images, crops, size, dtype, exact):
        return self.said("augment", torch.empty(len(crops.image), 3, size, size, dtype=dtype))

    def said(self, word, value=None):
        if self.log[-1:] != [word]:
            self.log.append(word)
        return value

    def event(self, blocking=False):
        name = "blocking" if blocking else "spinning"
        return SimpleNamespace(
            record=lambda stream: self.said(f"record {name} event"),
            synchronize=lambda: self.said(f"wait for {name} event"),
            name=name,
        )


def test_a_buffer_is_free_once_it_is_copied_and_no_core_spins(photo_folder, monkeypatch):
    """Crops may still be in the making, in the dtype that was asked for: only who uses them waits for those, on the
    device.
    """
    source = FolderSource(photo_folder)
    loader = CropLoader(source, RECIPE, EpochSampler(len(source), 4, 5), dtype=torch.bfloat16)
    loader.on_gpu, loader._stream = True, "side stream"
    cuda = FakeCuda(monkeypatch)
    batch = next(iter(loader))
    assert cuda.log == [
        "copy",  # images and both tables
        "record blocking event",
        "augment",
        "record spinning event",
        "wait for blocking event",
    ]
    assert batch.ready.name == "spinning"
    assert (batch.global_crops.shape, batch.local_crops.shape) == ((2, 4, 3, 32, 32), (3, 4, 3, 16, 16))
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["exact", "fast"])
def test_crops_made_on_a_gpu_are_pillows(photo_folder, augment):
    source, device = FolderSource(photo_folder), torch.device("cuda", torch.cuda.current_device())
    expected = batches(source, augment="exact")
    got = batches(source, workers=2, device=device, augment=augment)
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    bound = {"exact": 0.01, "fast": 1.5}[augment]
    for one, two in zip(expected, got, strict=True):
        for ours, theirs in zip(two.crops(device), one.crops(torch.device("cpu")), strict=True):
            levels = (ours.cpu().float() - theirs) * std * 255
            assert levels.abs().mean() < bound
