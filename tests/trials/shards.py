"""Damaged tar shards and parquet files: every image is read to the byte, or counted and named.

cd tests && python -m trials.shards [--tars 400] [--parquets 500] [--quick]
"""

import faulthandler
import io
import os
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from trials.runs import Table, trial_parser

from fastdino.data.decode import BadImage, decode
from fastdino.data.shards import ParquetSource, TarSource
from fastdino.errors import UserError

N = 12
BLOCK = tarfile.BLOCKSIZE


def pictures() -> list[bytes]:
    """JPEG files of a few kilobytes, all different."""
    rng, files = np.random.default_rng(0), []
    for _ in range(N):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def shard(images: list[bytes], pax: bool = False) -> bytes:
    """A tar file of them; some names are long enough for headers of their own."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) as archive:
        for i, data in enumerate(images):
            member = tarfile.TarInfo(f"{'long/' * 30 if i % 5 == 4 else ''}{i:03}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _headers(data: bytes) -> list[int]:
    return [i for i in range(0, len(data), BLOCK) if data[i + 257 : i + 262] == b"ustar"]


def _flip(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def _zero(data: bytes, at: int, size: int) -> bytes:
    return data[:at] + bytes(size) + data[at + size :]


def _in_header(data: bytes, rng: random.Random, at: int, n: int) -> bytes:
    return _flip(data, rng.choice(_headers(data)) + at + rng.randrange(n), rng.randrange(8))


def _noise(data: bytes, rng: random.Random, at: int, size: int) -> bytes:
    return data[:at] + rng.randbytes(size) + data[at + size :]


def _without(data: bytes, at: int, size: int) -> bytes:
    return data[:at] + data[at + size :]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a flipped bit in a header": lambda data, rng: _in_header(data, rng, 0, 345),
    "two flipped bits in headers": lambda data, rng: _in_header(_in_header(data, rng, 0, 157), rng, 148, 8),
    "a flipped bit anywhere": lambda data, rng: _flip(data, rng.randrange(len(data)), rng.randrange(8)),
    "a header of zeros": lambda data, rng: _zero(data, rng.choice(_headers(data)), BLOCK),
    "a header of noise": lambda data, rng: _noise(data, rng, rng.choice(_headers(data)), BLOCK),
    "four kilobytes of noise": lambda data, rng: _noise(data, rng, rng.randrange(len(data) - 4096), 4096),
    "cut anywhere": lambda data, rng: data[: rng.randrange(len(data))],
    "a block missing": lambda data, rng: _without(data, BLOCK * rng.randrange(len(data) // BLOCK), BLOCK),
    "garbage behind it": lambda data, rng: data + rng.randbytes(3000),
    "twice": lambda data, rng: data + data,
}


def tar_outcome(data: bytes, images: list[bytes], path: Path) -> list[str]:
    """What is wrong with how a damaged shard is read."""
    path.write_bytes(data)
    try:
        source = TarSource([path])
    except UserError as error:
        return [] if str(path) in str(error) and "\n" not in str(error) else [f"said {error}"]
    found, altered = set[bytes](), 0
    for i in range(len(source)):
        try:
            item = source[i]
        except OSError:
            altered += 1
            continue
        found.add(item)
        altered += item not in images
        with suppress(BadImage):
            decode(item)
    lost = sum(image not in found for image in images)
    # Where neighbours are lost together, their number is told from their bytes: it may be off by one.
    known = altered + len(source.damage) + bool(source.damage)
    if lost > known and not source.cut:
        return [f"{lost} images are lost, {altered} others read, and said was: {source.describe()}"]
    return []


def parquet(images: list[bytes], path: Path, where: list[str] | None = None) -> bytes:
    """A parquet file as Hugging Face writes it; where: paths in place of bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"bytes": None if where else data, "path": where[i] if where else f"{i}.jpg"} for i, data in enumerate(images)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array([i % 3 for i in range(len(rows))])})
    pq.write_table(table, path, row_group_size=4)
    return path.read_bytes()


def parquet_outcome(data: bytes, path: Path) -> list[str]:
    """What is wrong with how a damaged parquet file is read: it or its items are refused, or read."""
    path.write_bytes(data)
    try:
        source = ParquetSource([path])
        for i in range(min(len(source), 100)):
            with suppress(OSError, BadImage):
                decode(source[i])
    except UserError as error:
        return [] if str(path) in str(error) and "\n" not in str(error) else [f"said {error}"]
    return []


def in_a_fork(do: Callable[[], list[str]]) -> list[str]:
    """What a trial finds; or that it ended its process, or hung."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        faulthandler.dump_traceback_later(30, exit=True)
        try:
            words = do()
        except BaseException as error:
            words = [f"{type(error).__name__}: {error}"]
        os.write(writer, "\n".join(words).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with open(reader, "rb") as file:
        words = file.read().decode().splitlines()
    return [f"ended by {status}"] if status else words


def hostile_paths(folder: Path) -> dict[str, str]:
    """Paths in a parquet file that lead out of its folder, or to what is no file."""
    secret = folder / "secret.jpg"
    secret.write_bytes(pictures()[0])
    data = folder / "data"
    data.mkdir()
    (data / "link.jpg").symlink_to(secret)
    (data / "circle.jpg").symlink_to("circle.jpg")
    (data / "folder.jpg").mkdir()
    os.mkfifo(data / "pipe.jpg")
    names = [
        "../secret.jpg",
        str(secret),
        "link.jpg",
        "circle.jpg",
        "folder.jpg",
        "pipe.jpg",
        "/dev/zero",
        "a\0b",
        "x" * 5000,
    ]
    return {name[:20]: name for name in names}


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--tars", type=int, default=400)
    parser.add_argument("--parquets", type=int, default=500)
    args = parser.parse_args()
    n_tars, n_parquets = (40, 20) if args.quick else (args.tars, args.parquets)
    table, rng, images = Table(), random.Random(args.seed), pictures()
    with tempfile.TemporaryDirectory() as name:
        path, kinds = Path(name) / "a.tar", list(MUTATIONS)
        whole = [shard(images), shard(images, pax=True)]
        for i in range(n_tars):
            kind = kinds[i % len(kinds)]
            data = MUTATIONS[kind](whole[(i // len(kinds)) % 2], rng)
            table.add(f"a shard with {kind}", f"number {i}", tar_outcome(data, images, path))
        path = Path(name) / "a.parquet"
        good = parquet(images, path)
        for i in range(n_parquets):
            changed = bytearray(good)
            for _ in range(rng.choice([1, 1, 4, 64])):
                changed[rng.randrange(len(good))] = rng.randrange(256)
            data = bytes(changed[: rng.randrange(len(good))] if i % 10 == 9 else changed)
            # Half of the damage where the file says what is in it, at its end.
            if i % 2:
                data = good[:-2000] + bytes(changed[-2000:])
            table.add("a damaged parquet file", f"number {i}", in_a_fork(lambda data=data: parquet_outcome(data, path)))
        for short, target in hostile_paths(Path(name)).items():
            file = Path(name) / "data" / "b.parquet"
            parquet(images[:1], file, [target])

            def escapes(file: Path = file) -> list[str]:
                try:
                    return [f"read {len(ParquetSource([file])[0])} bytes"]
                except OSError:
                    return []

            table.add("a path that leads out of the folder", repr(short), in_a_fork(escapes))
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
