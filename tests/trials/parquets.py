"""Damaged parquet files and hostile paths in them: read or refused in one line, and nothing leaves the folder.

cd tests && python -m trials.parquets [--files 500] [--quick]
"""

import os
import random
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

from trials.runs import Table, trial_parser
from trials.shards import in_a_fork, pictures

from fastdino.data.decode import BadImage, decode
from fastdino.data.shards import ParquetSource
from fastdino.errors import UserError


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
    names = ["../secret.jpg", str(secret), "link.jpg", "circle.jpg", "folder.jpg", "pipe.jpg", "/dev/zero", "a\0b"]
    names += ["x" * 5000, "../data/../secret.jpg"]
    return {name[:20]: name for name in names}


def _damaged(good: bytes, rng: random.Random, i: int) -> bytes:
    """Some bytes exchanged, of half the files where the file says what is in it, at its end; every tenth is cut."""
    changed = bytearray(good)
    first = len(good) - 2000 if i % 2 else 0
    for _ in range(rng.choice([1, 1, 4, 64])):
        changed[rng.randrange(first, len(good))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(good))] if i % 10 == 9 else changed)


def _reads(file: Path) -> list[str]:
    """Whether the only image of a file is refused, which it should be."""
    try:
        return [f"read {len(ParquetSource([file])[0])} bytes"]
    except OSError:
        return []


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--files", type=int, default=500)
    args = parser.parse_args()
    table, rng, images = Table(), random.Random(args.seed), pictures()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.parquet"
        good = parquet(images, path)
        damaged = [_damaged(good, rng, i) for i in range(40 if args.quick else args.files)]
        trials = [partial(parquet_outcome, data, path) for data in damaged]
        for i, words in enumerate(in_a_fork(trials)):
            table.add("a damaged parquet file", f"number {i}", words)
        hostile, trials = hostile_paths(Path(name)), []
        for i, target in enumerate(hostile.values()):
            file = Path(name) / "data" / f"{i}.parquet"
            parquet(images[:1], file, [target])
            trials.append(partial(_reads, file))
        for short, words in zip(hostile, in_a_fork(trials)):
            table.add("a path that leads out of the folder", repr(short), words)
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
