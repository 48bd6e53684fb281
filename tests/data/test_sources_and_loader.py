"""Folders, digits, and batches that depend on nothing but seed, epoch and position."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.data.augment import MultiCropRecipe, ViewRecipe
from fastdino.data.digits import load_digits
from fastdino.data.loader import EpochSampler, center_views, train_loader, useful_workers
from fastdino.data.sources import FolderSource
from fastdino.errors import UserError

RECIPE = MultiCropRecipe(
    globals=(ViewRecipe(size=32, scale=(0.4, 1.0)),) * 2, locals=(ViewRecipe(size=16, scale=(0.05, 0.4)),) * 3
)


def test_class_folders_give_labels(photo_folder):
    source = FolderSource(photo_folder)
    assert len(source) == 32
    assert list(source.classes) == ["class_0", "class_1", "class_2", "class_3"]
    assert source.labels.tolist() == sorted(list(range(4)) * 8)
    assert source.paths == sorted(source.paths)


def test_images_of_any_depth_and_kind_are_found(photo_folder, tmp_path):
    image = Image.open(next(photo_folder.rglob("*.jpg")))
    for name in ("a.PNG", "b/c/d.webp", "b/e.bmp", "f.tiff", "g.jpeg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"a file of another system")
    source = FolderSource(tmp_path)
    assert sorted(source.paths) == ["a.PNG", "b/c/d.webp", "b/e.bmp", "f.tiff", "g.jpeg"]
    assert source.labels is None


def test_one_subfolder_is_no_class(photo_folder, tmp_path):
    shutil.copytree(photo_folder / "class_0", tmp_path / "only")
    assert FolderSource(tmp_path).labels is None


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="found nothing at"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no image below"):
        FolderSource(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="found a file at"):
        FolderSource(tmp_path / "file")


def test_digits_are_split_the_same_way_every_time():
    train, held_out = load_digits()
    assert (len(train), len(held_out)) == (1437, 360)
    assert train[0].shape == (24, 24, 3)
    assert train[0].dtype == np.uint8
    assert np.bincount(held_out.labels).min() >= 34
    again, _ = load_digits()
    assert np.array_equal(train.images, again.images)
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in held_out.images)


def batches(source, *, workers=0, rank=0, world_size=1, epoch=0, first_batch=0, batch_size=4, seed=5):
    sampler = EpochSampler(len(source), batch_size, seed, rank, world_size)
    sampler.seek(epoch, first_batch)
    return list(train_loader(source, RECIPE, sampler, workers, pin_memory=False))


def test_batches_have_the_steps_layout(photo_folder):
    batch = batches(FolderSource(photo_folder))[0]
    assert batch.global_crops.shape == (2, 4, 3, 32, 32)
    assert batch.local_crops.shape == (3, 4, 3, 16, 16)
    assert batch.global_crops.dtype == torch.uint8
    assert batch.bad == []


def test_crops_do_not_depend_on_the_number_of_workers(photo_folder):
    source = FolderSource(photo_folder)
    for one, two in zip(batches(source), batches(source, workers=2), strict=True):
        assert torch.equal(one.global_crops, two.global_crops)
        assert torch.equal(one.local_crops, two.local_crops)


def test_epochs_and_seeds_differ_and_a_resume_continues(photo_folder):
    source = FolderSource(photo_folder)
    first = batches(source)
    assert not torch.equal(first[0].global_crops, batches(source, epoch=1)[0].global_crops)
    assert not torch.equal(first[0].global_crops, batches(source, seed=6)[0].global_crops)
    resumed = batches(source, first_batch=5)
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


def test_the_order_is_distributed_samplers():
    from torch.utils.data import DistributedSampler

    for epoch in (0, 4):
        theirs = DistributedSampler(range(11), num_replicas=2, rank=1, seed=3)
        theirs.set_epoch(epoch)
        ours = EpochSampler(11, 1, 3, rank=1, world_size=2)
        ours.seek(epoch)
        assert [index for ((_, index),) in ours] == list(theirs)


def test_a_bad_image_is_replaced_and_named(photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "photos")
    source = FolderSource(tmp_path / "photos")
    (source.folder / source.paths[3]).write_bytes(b"")
    (source.folder / source.paths[9]).unlink()
    lines = [line for batch in batches(source) for line in batch.bad]
    assert sorted(lines)[0] == f"{source.name(3)}: the file is empty"
    assert "No such file" in sorted(lines)[1]
    assert len(lines) == 2
    kept = np.concatenate([index for _, index in center_views(source, np.arange(32), 32, 24, 8, 0)])
    assert sorted(set(range(32)) - set(kept.tolist())) == [3, 9]


def test_workers_never_outnumber_the_cores():
    assert useful_workers(0, 1) == 0
    assert useful_workers(10_000, 1) < 10_000
    assert useful_workers(8, 10_000) == 1
