"""Folders, tar shards, parquet files, sequences and digits: the same images whatever they are kept in."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from fastdino.data.decode import BadImage, open_image
from fastdino.data.digits import load_digits
from fastdino.data.sequences import SequenceSource
from fastdino.data.shards import ParquetSource, TarSource
from fastdino.data.sources import FolderSource, expand, open_source
from fastdino.errors import UserError


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


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(photo_folder, tmp_path_factory):
    """Four shards of eight images, named and labelled as WebDataset does."""
    folder = tmp_path_factory.mktemp("shards")
    source = FolderSource(photo_folder)
    for number in range(4):
        with tarfile.open(folder / f"train-{number:03}.tar", "w") as archive:
            for index in range(8 * number, 8 * number + 8):
                add(archive, f"{index:05}.jpg", source[index])
                add(archive, f"{index:05}.cls", f"{source.labels[index]}\n".encode())
                add(archive, f"{index:05}.json", b"{}")
    return folder


def test_tar_shards_hold_the_folders_images_and_labels(shards, photo_folder):
    folder = FolderSource(photo_folder)
    for path in (
        shards,
        shards / "train-{000..003}.tar",
        shards / "train-*.tar",
        shards / "train-{000,001,00[23]}.tar",
    ):
        source = open_source(path)
        assert isinstance(source, TarSource)
        assert [source[i] for i in range(32)] == [folder[i] for i in range(32)]
        assert source.labels.tolist() == folder.labels.tolist()
        assert list(source.classes) == ["0", "1", "2", "3"]
    assert "32 images in 4 files from" in source.describe()
    assert source.name(9) == f"{shards}/train-001.tar/00009.jpg"
    one = open_source(shards / "train-002.tar")
    assert (len(one), one[3]) == (8, folder[19])
    assert one.labels is None  # all of one class


@pytest.mark.parametrize(
    ("texts", "classes"),
    [
        (["cat", "dog", "cat", "dog"], ["cat", "dog"]),  # words that repeat are labels
        (["a cat asleep", "a dog", "two dogs", "nobody"], ["left", "right"]),  # captions are not: the folders are
        (None, ["left", "right"]),
    ],
    ids=["words", "captions", "folders"],
)
def test_tar_labels_come_from_texts_or_from_folders(photos, tmp_path, texts, classes):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for i, folder in enumerate(("left", "right", "left", "right")):
            name = f"{folder}/{'long' * 40}.{i}"  # a key ends at the first dot
            add(archive, f"{name}.png".replace(".", "_", 1), jpeg(photos[i]))
            if texts:
                add(archive, f"{name}.txt".replace(".", "_", 1), texts[i].encode())
    source = open_source(tmp_path / "a.tar")
    assert list(source.classes) == classes
    assert source.labels.tolist() == [0, 1, 0, 1]


def jpeg(photo):
    buffer = io.BytesIO()
    Image.fromarray(photo[:40, :50]).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_tar_cut_in_the_middle_gives_its_complete_images(shards, tmp_path, photo_folder):
    whole = (shards / "train-000.tar").read_bytes()
    with tarfile.open(shards / "train-000.tar") as archive:
        ends = [member.offset_data + member.size for member in archive if member.name.endswith(".jpg")]
    for cut, expected in ((ends[4] - 100, 4), (ends[4] + 300, 5), (ends[0], 1)):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        source = open_source(tmp_path / "cut.tar")
        assert [source[i] for i in range(len(source))] == [FolderSource(photo_folder)[i] for i in range(expected)]
        assert "cut.tar cut short, the complete images are used" in source.describe()
        assert len(source.damage) == (cut != ends[0])  # of the member that it ends inside of
        assert "\n" not in source.describe()


def test_a_tar_that_is_cut_while_it_is_read_is_an_error_of_one_image(shards, tmp_path):
    shutil.copy(shards / "train-000.tar", tmp_path / "a.tar")
    source = open_source(tmp_path / "a.tar")
    os.truncate(tmp_path / "a.tar", int(source.where[5, 1]) + 10)
    assert source[4]
    with pytest.raises(OSError, match="ends inside it"):
        source[5]


@pytest.fixture(scope="module", params=["structs", "bytes"])
def parquet_files(request, photo_folder, tmp_path_factory):
    """Two files of 16 images in row groups of 5."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("parquet")
    source = FolderSource(photo_folder)
    for number in range(2):
        indices = range(16 * number, 16 * number + 16)
        images = [{"bytes": source[i], "path": None} if request.param == "structs" else source[i] for i in indices]
        table = pyarrow.table({"id": list(indices), "image": images, "label": source.labels[list(indices)]})
        parquet.write_table(table, folder / f"{number}.parquet", row_group_size=5)
    return folder


def test_parquet_files_hold_the_folders_images_and_labels(parquet_files, photo_folder):
    folder = FolderSource(photo_folder)
    for path in (parquet_files, parquet_files / "{0..1}.parquet"):
        source = open_source(path)
        assert isinstance(source, ParquetSource)
        order = np.random.default_rng(0).permutation(32)
        assert [source[i] for i in order] == [folder[i] for i in order]
        assert source.labels.tolist() == folder.labels.tolist()
    assert "32 images in 2 files" in source.describe()


def test_parquet_keeps_few_row_groups(parquet_files, monkeypatch):
    source = open_source(parquet_files)
    monkeypatch.setattr(source, "CACHED_BYTES", 1)
    expected = [open_source(parquet_files)[i] for i in range(32)]
    for i in (0, 31, 16, 0, 7):
        assert source[i] == expected[i]
        assert len(source._cache) == 1


def test_sequences_of_images_arrays_and_bytes_are_sources(photos):
    gray = photos[0][..., 0]
    items = [photos[0], Image.fromarray(photos[1]), gray, {"image": Image.fromarray(gray)}, jpeg(photos[2])]
    source = SequenceSource(items, labels=[3, 3, 10, 10, 3])
    assert np.array_equal(source[0], photos[0])
    assert np.array_equal(source[1], photos[1])
    assert np.array_equal(source[2], np.stack([gray] * 3, -1))
    assert np.array_equal(source[3], source[2])
    assert source[4] == items[4]
    assert (list(source.classes), source.labels.tolist()) == (["3", "10"], [0, 0, 1, 1, 0])
    with pytest.raises(BadImage, match="numbers from 0 to 255, of which no color is known"):
        open_image(SequenceSource([photos[0].astype(float)])[0])
    with pytest.raises(BadImage, match=r"expected an array \(H, W, 3\)"):
        open_image(SequenceSource([np.zeros((8, 8, 4), np.uint8)])[0])
    with pytest.raises(ValueError, match="labels: expected 5, one for each image, got 1"):
        SequenceSource(items, labels=[1])
    with pytest.raises(ValueError, match="at least one"):
        SequenceSource([])


def test_braces_and_stars_expand_in_order(tmp_path):
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]


def test_what_is_no_source_is_refused_in_one_line(tmp_path, shards, photos):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "text.tar").write_text("no archive, but more than a block" * 100)
    (tmp_path / "text.parquet").write_text("no table")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        add(archive, "a.jpg", jpeg(photos[0]))
    for path, words in (
        ("nowhere", "found nothing at"),
        ("none-*.tar", "found nothing at"),
        ("none-{0..3}.tar", "No such file"),
        ("notes.txt", "expected a folder, .tar or .parquet files, found"),
        ("text.tar", "expected an uncompressed tar file"),
        ("zipped.tar", "expected an uncompressed tar file"),
        ("empty.tar", "no image in"),
        ("text.parquet", "expected a parquet file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            open_source(tmp_path / path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
