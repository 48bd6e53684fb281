"""Damaged, odd and exchanged shards: what is whole is read to the byte, what is lost is counted once and named."""

import io
import os
import random
import resource
import tarfile
import threading

import pytest
from trials.shards import BLOCK, MUTATIONS, pictures, shard, tar_outcome

from fastdino.data.shards import ParquetSource, TarSource
from fastdino.data.sources import MAX_BYTES
from fastdino.errors import UserError


@pytest.fixture(scope="module")
def images():
    return pictures()


@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_image_of_a_damaged_shard_is_lost_in_silence(tmp_path, images, kind):
    for seed in range(4):
        whole = shard(images, pax=seed % 2 == 1)
        data = MUTATIONS[kind](whole, random.Random(seed))
        assert tar_outcome(data, whole, images, tmp_path / "a.tar") == []


def add(archive, name, data, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data) if data else None)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.LNKTYPE, "linkname": "0.jpg", "size": 10**9},
        {"type": tarfile.DIRTYPE, "size": 10**9},
        {"pax_headers": {"GNU.sparse.map": "0,100", "GNU.sparse.size": str(10**9), "GNU.sparse.name": "a.npy"}},
    ],
    ids=["link", "folder", "sparse file"],
)
def test_a_size_that_is_not_that_of_the_data_cuts_no_shard(tmp_path, images, fields):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for i, data in enumerate(images[:4]):
            if i == 2:
                add(archive, "odd", bytes(100) if "pax_headers" in fields else b"", **fields)
            add(archive, f"{i}.jpg", data)
    source = TarSource([tmp_path / "a.tar"])
    assert [source[i] for i in range(len(source))] == images[:4]
    assert not source.damage
    assert not source.cut


def test_an_image_that_is_stored_with_holes_is_lost_and_named(tmp_path, images):
    sparse = {"GNU.sparse.map": "0,100", "GNU.sparse.size": "5000", "GNU.sparse.name": "b.bmp"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.jpg", images[0])
        add(archive, "b.bmp", bytes(100), pax_headers=sparse)
    source = TarSource([tmp_path / "a.tar"])
    assert source.names == ["a.jpg"]
    assert source.damage == [f"{tmp_path}/a.tar/b.bmp: is stored as a sparse file, which is not read"]


@pytest.mark.parametrize("part", ["its header", "its name"])
def test_a_long_name_that_is_damaged_is_one_image_lost(tmp_path, images, part):
    """Of the fifth image alone: a header, the name, then the image's own header and bytes."""
    data = bytearray(shard(images))
    start = bytes(data).index(b"././@LongLink")
    first = start if part == "its header" else start + BLOCK
    data[first : first + BLOCK] = bytes(BLOCK)
    (tmp_path / "a.tar").write_bytes(data)
    source = TarSource([tmp_path / "a.tar"])
    assert [source[i] for i in range(len(source))] == images[:4] + images[5:]
    assert len(source.damage) == 1


def test_damage_says_where_it_is_and_how_much_is_skipped(tmp_path, images):
    data = bytearray(shard(images[:4]))
    start = bytes(data).index(b"001.jpg")
    span = BLOCK + -(-len(images[1]) // BLOCK) * BLOCK
    data[start] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    skipped = len(bytes(data[start : start + span]).rstrip(b"\0"))
    assert TarSource([tmp_path / "a.tar"]).damage == [
        f"{tmp_path}/a.tar, of 3 whole members: lost behind a damaged header at byte {start:,} of {len(data):,}, "
        f"{skipped:,} bytes skipped (1 of about 1)"
    ]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "by a rename"])
def test_a_shard_that_is_exchanged_while_it_is_read_gives_no_bytes_of_another(tmp_path, images, in_place):
    path = tmp_path / "a.tar"
    path.write_bytes(shard(images))
    source = TarSource([path])
    source._max_open = 0  # as where there are more shards than can stay open
    assert source[3] == images[3]
    other = path if in_place else tmp_path / "b"
    other.write_bytes(shard(images[::-1]))
    os.replace(other, path)
    with pytest.raises(OSError, match=r"a\.tar is another file than when it was opened"):
        source[3]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.tar"):
        source[3]


def test_shards_are_read_when_others_have_taken_the_files_that_may_be_open(tmp_path, images):
    for i in range(40):
        (tmp_path / f"{i:02}.tar").write_bytes(shard(images[:1]))
    source = TarSource(sorted(tmp_path.glob("*.tar")))
    for i in range(20):
        source[i]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, wrong = len(os.listdir("/proc/self/fd")), []

    def read(start):
        try:
            wrong.extend(i for i in range(start, len(source), 4) if source[i] != images[0])
        except OSError as error:
            wrong.append(error)

    resource.setrlimit(resource.RLIMIT_NOFILE, (held, before[1]))
    try:
        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not wrong


def test_parquet_files_have_images_in_a_column_of_one_kind(tmp_path, images):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pq.write_table(pa.table({"image": pa.array(images[:2])}), good)
    pq.write_table(pa.table({"image": [1, 2]}), other)
    with pytest.raises(UserError, match=r"b\.parquet: no column of images \(bytes\), only image"):
        ParquetSource([good, other])
    source = ParquetSource([good])
    os.replace(other, good)
    with pytest.raises(OSError, match="expected bytes, found int"):
        source[0]


def test_a_member_larger_than_any_image_file_is_not_read(tmp_path, images):
    member = tarfile.TarInfo("a.jpg")
    member.size = MAX_BYTES + 1
    path = tmp_path / "a.tar"
    path.write_bytes(member.tobuf())
    os.truncate(path, BLOCK + -(-member.size // BLOCK) * BLOCK)  # no block of it is on the disk
    with open(path, "ab") as file:
        file.write(shard(images[:1]))
    source = TarSource([path])
    with pytest.raises(OSError, match="536,870,913 bytes are more than the 536,870,912 that are read"):
        source[0]
    assert source[1] == images[0]
