"""Damaged tar shards: every image is read to the byte, or counted and named.

cd tests && python -m trials.shards [--shards 420] [--quick]
"""

import faulthandler
import io
import json
import os
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from trials.runs import Table, trial_parser

from fastdino.data.decode import BadImage, decode
from fastdino.data.shards import TarSource
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


def _block(data: bytes, rng: random.Random) -> int:
    """Where a block begins that holds something."""
    return BLOCK * rng.choice([i for i in range(len(data) // BLOCK) if any(data[i * BLOCK : (i + 1) * BLOCK])])


def _twice(data: bytes, at: int, size: int) -> bytes:
    return data[: at + size] + data[at:]


def _swapped(data: bytes, rng: random.Random) -> bytes:
    """What two headers that follow each other describe; a long name may so go to another member."""
    at = [*_headers(data), len(data.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK]
    i = rng.randrange(len(at) - 2)
    first, second, end = at[i : i + 3]
    return data[:first] + data[second:end] + data[first:second] + data[end:]


def _with_link(data: bytes, rng: random.Random) -> bytes:
    """A link, folder or pipe that states a size, and has no data."""
    link = tarfile.TarInfo("link")
    link.type, link.linkname = rng.choice([tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]), "a"
    link.size = rng.choice([1, 3000, 10**9])
    # Behind a plain member: between a long name and its member it would take the name.
    at = rng.choice([b for a, b in pairwise(_headers(data)) if data[a + 156 : a + 157] == tarfile.REGTYPE])
    return data[:at] + link.tobuf() + data[at:]


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
    "a block of zeros": lambda data, rng: _zero(data, _block(data, rng), BLOCK),
    "a block twice": lambda data, rng: _twice(data, _block(data, rng), BLOCK),
    "members swapped": _swapped,
    "a link that states a size": _with_link,
    "another behind it": lambda data, rng: data + data,
}


def tar_outcome(data: bytes, whole: bytes, images: list[bytes], path: Path) -> list[str]:
    """What is wrong with how a damaged shard is read. whole: as it was."""
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
    # What lay behind a cut cannot be known: that there is one has to be said.
    there = [image for image in images if image in data] if whole.startswith(data) else images
    lost = sum(image not in found for image in there)
    if lost > altered + len(source.damage) or (len(there) < len(images) and not source.cut):
        return [f"{lost} images are lost, {altered} others read, and said was: {source.describe()}"]
    return []


def in_a_fork(trials: Sequence[Callable[[], list[str]]]) -> list[list[str]]:
    """What each finds; or that it ended the fork they share, or hung: those after it then get another fork."""
    found: list[list[str]] = []
    while len(found) < len(trials):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            for do in trials[len(found) :]:
                faulthandler.dump_traceback_later(30, exit=True)
                try:
                    words = do()
                except BaseException as error:
                    words = [f"{type(error).__name__}: {error}"]
                os.write(writer, (json.dumps(words) + "\n").encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as file:
            found += map(json.loads, file)
        _, status = os.waitpid(pid, 0)
        if len(found) < len(trials):
            found.append([f"ended by {status}"])
    return found


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--shards", type=int, default=420)
    args = parser.parse_args()
    table, rng, images, kinds = Table(), random.Random(args.seed), pictures(), list(MUTATIONS)
    whole = [shard(images), shard(images, pax=True)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.tar"
        trials = []
        for i in range(56 if args.quick else args.shards):
            intact = whole[(i // len(kinds)) % 2]
            data = MUTATIONS[kinds[i % len(kinds)]](intact, rng)
            trials.append(partial(tar_outcome, data, intact, images, path))
        for i, words in enumerate(in_a_fork(trials)):
            table.add(f"a shard with {kinds[i % len(kinds)]}", f"number {i}", words)
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
