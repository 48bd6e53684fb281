"""Folders, shards and names as nobody would wish for: nothing crashes or hangs, and what is lost is named."""

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.cli import main
from fastdino.data.decode import BadImage, decode
from fastdino.data.shards import ParquetSource, TarSource
from fastdino.data.sources import MAX_BYTES, FolderSource, open_source, read_file
from fastdino.errors import UserError, printable


@pytest.fixture(scope="module")
def jpeg(photos):
    file = io.BytesIO()
    Image.fromarray(photos[0][:40, :50]).save(file, "JPEG")
    return file.getvalue()


def test_links_are_followed_once_and_never_round_in_circles(tmp_path, jpeg):
    real = tmp_path / "data" / "b"
    real.mkdir(parents=True)
    (real / "1.jpg").write_bytes(jpeg)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.jpg").write_bytes(jpeg)
    (tmp_path / "data" / "a").symlink_to(real)  # of a folder that is there itself
    (real / "up").symlink_to(tmp_path / "data")
    (real / "self").symlink_to(real)
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "3.jpg").symlink_to(real / "1.jpg")  # a file under two names is two images
    source = FolderSource(tmp_path / "data")
    assert source.paths == ["b/1.jpg", "b/3.jpg", "c/2.jpg"]
    assert list(source.classes) == ["b", "c"]


def test_what_is_no_file_is_left_out_and_said(tmp_path, jpeg):
    (tmp_path / "1.jpg").write_bytes(jpeg)
    os.mkfifo(tmp_path / "2.jpg")
    (tmp_path / "3.jpg").symlink_to("/dev/zero")
    (tmp_path / "4.jpg").symlink_to("nowhere")
    (tmp_path / "5.jpg").symlink_to("5.jpg")
    source = FolderSource(tmp_path)
    assert source.paths == ["1.jpg"]
    assert source.describe().endswith("no labels; left out 4 that cannot be opened or are no files, as 2.jpg")


def test_a_file_that_became_a_pipe_or_is_huge_is_an_error_of_one_image(tmp_path, jpeg):
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg)
    source = FolderSource(tmp_path)
    (tmp_path / "1.jpg").unlink()
    os.mkfifo(tmp_path / "1.jpg")
    os.truncate(tmp_path / "2.jpg", 20 * 2**30)  # no block of it is on the disk
    with pytest.raises(OSError, match="is no regular file"):
        source[0]
    with pytest.raises(OSError, match=f"21,474,836,480 bytes are more than the {MAX_BYTES:,} that are read"):
        source[1]
    with pytest.raises(OSError, match="directory"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a b.jpg", "a b.jpg"), ("\x1b[2J.jpg", r"\x1b[2J.jpg"), ("\udcff.jpg", r"\udcff.jpg"), ("é\n.jpg", r"é\n.jpg")],
)
def test_names_are_shown_without_what_a_terminal_or_a_file_would_choke_on(name, shown):
    assert printable(name) == shown
    assert printable(shown).encode()


def test_a_broken_image_with_a_hostile_name_is_counted_and_named(tmp_path, jpeg, tiny_photos_flags):
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg)
    for name in (b"\xff\xfe.jpg", b"\x1b[31mred.jpg", "é.jpg".encode()):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"broken")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastdino.train", "--data_path", str(tmp_path), "--output_dir", str(out)]
    ascii_terminal = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, *tiny_photos_flags], capture_output=True, check=False, env=ascii_terminal)
    assert done.returncode == 0, done.stderr
    assert b"skipped 3 unreadable of 33 images" in done.stdout
    assert rb"/\xe9.jpg: " in done.stdout
    assert b"\x1b" not in done.stdout
    named = (out / "bad_images.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in named] == [
        rf"{tmp_path}/\udcff\udcfe.jpg",
        rf"{tmp_path}/\x1b[31mred.jpg",
        f"{tmp_path}/é.jpg",
    ]
    assert json.loads((out / "log.txt").read_text())["bad_images"] == 3


@pytest.fixture
def tiny_photos_flags():
    flags = "--arch vit_nano --patch_size 8 --global_crops_size 16 --local_crops_number 0 --out_dim 16 --hidden_dim 8"
    more = "--bottleneck_dim 8 --epochs 1 --batch_size_per_gpu 16 --attention_images 0 --num_workers 0"
    return [*flags.split(), *more.split()]


def test_a_pipe_is_no_shard(tmp_path, jpeg):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "1.jpg").write_bytes(jpeg)
    assert len(open_source(tmp_path)) == 1
    with pytest.raises(UserError, match=r"found no regular file at .*a\.tar"):
        open_source(tmp_path / "a.tar")


def write_shard(path, names, jpeg):
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(jpeg)
            archive.addfile(member, io.BytesIO(jpeg))
    return path


def test_a_damaged_header_loses_its_own_image_alone_and_is_said(tmp_path, jpeg):
    path = write_shard(tmp_path / "a.tar", [f"{i}.jpg" for i in range(5)], jpeg)
    span = -(-len(jpeg) // 512) * 512 + 512
    data = bytearray(path.read_bytes())
    data[2 * span + 3] ^= 1
    path.write_bytes(data)
    source = TarSource([path])
    assert [name for name in source.names] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg"]
    assert [source[i] for i in range(4)] == [jpeg] * 4
    (line,) = source.damage
    assert f"{path}, of 4 whole members" in line
    assert source.describe().count("about 1 more are lost") == 1
    assert not source.cut


def test_what_a_shard_has_lost_counts_against_the_images_that_may_be_bad(tmp_path, jpeg, tiny_photos_flags, capsys):
    path = write_shard(tmp_path / "a.tar", [f"{i:02}.jpg" for i in range(20)], jpeg)
    data = bytearray(path.read_bytes())
    span = -(-len(jpeg) // 512) * 512 + 512
    for i in (2, 9):
        data[i * span] ^= 1
    path.write_bytes(data)
    flags = ["train", "--data_path", str(path), "--output_dir", str(tmp_path / "out"), *tiny_photos_flags]
    assert main(flags) == 1
    assert "more than 10% of the images cannot be read (2 of 18 so far)" in capsys.readouterr().err


def test_more_shards_than_files_can_be_open(tmp_path, jpeg):
    for i in range(60):
        write_shard(tmp_path / f"{i:03}.tar", ["0.jpg", "1.jpg"], jpeg)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 12, before[1]))
    try:
        source = TarSource(sorted(map(str, tmp_path.glob("*.tar"))))
        wrong = []

        def read(start: int) -> None:
            wrong.extend(i for i in range(start, len(source), 4) if source[i] != jpeg)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not wrong
    assert len(source) == 120


@pytest.mark.parametrize("path", ["../secret.jpg", "link.jpg", "/dev/zero", "a\0b", "folder"])
def test_parquet_files_name_images_of_their_own_folder_alone(tmp_path, jpeg, path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "secret.jpg").write_bytes(jpeg)
    data = tmp_path / "data"
    (data / "folder").mkdir(parents=True)
    (data / "own.jpg").write_bytes(jpeg)
    (data / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": name} for name in ("own.jpg", path)]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), data / "a.parquet")
    source = ParquetSource([data / "a.parquet"])
    assert source[0] == jpeg
    with pytest.raises(OSError, match=r"leads out of|zero byte|null byte|directory|no regular file"):
        source[1]


def test_a_damaged_parquet_file_is_refused_in_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    path = Path(tmp_path / "\x1b.parquet")
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(UserError) as caught:
        ParquetSource([path])
    assert r"\x1b.parquet: expected a parquet file: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_of_another_kind_are_bad_images():
    with pytest.raises(BadImage, match="expected an array"):
        decode(np.zeros((4, 4, 4), np.uint8))


def test_a_link_to_a_shard_that_is_gone_is_said(tmp_path, jpeg):
    write_shard(tmp_path / "a.tar", ["0.jpg"], jpeg)
    (tmp_path / "b.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"b\.tar: expected an uncompressed tar file: No such file"):
        open_source(tmp_path)


def test_a_shard_with_room_to_spare_is_read_at_once(tmp_path, jpeg):
    path = write_shard(tmp_path / "a.tar", ["0.jpg", "1.jpg"], jpeg)
    os.truncate(path, 2**40)  # as a download reserves it; no block of it is on the disk
    source = TarSource([path])
    assert source.names == ["0.jpg", "1.jpg"]
    assert not source.damage


@pytest.mark.parametrize(
    "wrong",
    [{"size": "-5000"}, {"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "x"}, {"size": "9" * 30}],
    ids=lambda wrong: next(iter(wrong.items()))[0] + next(iter(wrong.values()))[:3],
)
def test_a_wrong_number_in_a_header_loses_one_image_or_cuts_the_shard(tmp_path, jpeg, wrong):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(4):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size, member.pax_headers = len(jpeg), wrong if i == 2 else {}
            archive.addfile(member, io.BytesIO(jpeg))
    source = TarSource([tmp_path / "a.tar"])
    assert [source[i] for i in (0, 1)] == [jpeg] * 2
    assert len(source.damage) == 1
    assert source.names[:2] == ["0.jpg", "1.jpg"]
    assert source.cut or "3.jpg" in source.names


def test_a_folder_in_place_of_an_image_takes_no_descriptor(tmp_path):
    held = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="directory"):
            read_file(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == held


def test_parquet_files_that_claim_far_more_rows_than_bytes_are_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array([b""] * 1_000_000)}), path)
    with pytest.raises(UserError, match=r"claims 1,000,000 rows in [\d,]+ bytes"):
        ParquetSource([path])
    pq.write_table(pa.table({"\x1b[31m": ["x"]}), path)
    with pytest.raises(UserError, match=r"only \\x1b\[31m"):
        ParquetSource([path])
