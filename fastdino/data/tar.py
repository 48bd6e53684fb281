"""Images in tar files, many to a file, read at random."""

import errno
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastdino.data.sources import EXTENSIONS, MAX_BYTES, class_folders, kind, labels_of, several
from fastdino.errors import UserError, printable

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # what a tar file ends in; behind it anything may lie
MAX_OPEN = 1024  # shards that stay open, and no more than a quarter of the files that the process may open
BEGINNING = re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|II\*\0|MM\0\*", re.DOTALL)  # of an image file


class TarSource:
    """Every image in uncompressed tar shards, in the shards' own order, by offset: no shard is ever unpacked.

    Labels as WebDataset keeps them, in a member `key.cls` (or, if those are short words that repeat, `key.txt`) beside
    `key.jpg`; otherwise the folders inside the shards name classes, as for FolderSource. Raises UserError where there
    is no image, or a shard is no tar. A damaged header loses its own member alone; a shard that was cut gives its
    complete members. damage: a line for each member that is known to be lost; where neighbours are lost together, as
    many as their bytes had room for. What lay behind a cut is unknown: it is said, and not counted.
    Members are read by `pread`, not through a memory map: a shard cut under a map ends the process with SIGBUS.
    """

    def __init__(self, shards: Sequence[str | Path], extensions: tuple[str, ...] = EXTENSIONS) -> None:
        self.shards = [str(shard) for shard in shards]
        self.cut: list[str] = []
        self.damage: list[str] = []
        self.names: list[str] = []
        self._open: dict[int, io.FileIO] = {}
        self._max_open = max(1, min(MAX_OPEN, open_files_limit() // 4))
        where: list[tuple[int, int, int, int]] = []  # shard, offset, bytes, checksum of the header
        keys: list[str] = []
        texts: dict[str, dict[str, str]] = {"cls": {}, "txt": {}}
        for number, shard in enumerate(self.shards):
            for name, offset, size, mark in self._members(shard):
                folder, file = os.path.split(name)
                stem, _, extension = file.partition(".")
                key = f"{number}/{folder}/{stem}"
                if f".{extension.lower()}".endswith(extensions) and stem:
                    self.names.append(name)
                    where.append((number, offset, size, mark))
                    keys.append(key)
                elif extension in texts and size < 256:
                    texts[extension][key] = self._read(number, offset, size).decode(errors="replace").strip()
        if not where:
            raise UserError(f"no image in {several(self.shards)} (looked for {', '.join(e[1:] for e in extensions)})")
        self.where = np.array(where, dtype=np.int64)
        self.classes, self.labels = class_folders(self.names)
        for found in texts.values():
            names = [found.get(key, "") for key in keys]
            if all(names) and (found is texts["cls"] or 2 * len(set(names)) <= len(names)):
                self.classes, self.labels = labels_of(names)
                break

    def _members(self, shard: str) -> list[tuple[str, int, int, int]]:
        """(name, offset, bytes, checksum of the header) of the complete files in a shard."""
        members: list[tuple[str, int, int, int]] = []
        spans: list[int] = []  # bytes of each member, with its headers
        gaps: list[tuple[int, int, int]] = []  # where, bytes, marks of headers
        try:
            with open(shard, "rb") as file:
                n_bytes, end = os.fstat(file.fileno()).st_size, 0
                for member, after in _headers(file, n_bytes):
                    gaps += (strange := _strange(file, end, member.offset))
                    end = after
                    # Links and folders may state a size and have no data; of a sparse file the holes are left out.
                    if min(after, member.offset_data + member.size) > n_bytes:
                        self.damage.append(f"{printable(shard)}/{printable(member.name)}: the shard ends inside it")
                        break
                    spans.append(after - member.offset)
                    if not member.isreg() or os.path.basename(member.name).startswith("."):
                        continue
                    if lost := _lost(member, file):
                        if not strange or strange[0][1] > 2 * BLOCK:  # else that is its other header, counted already
                            self.damage.append(f"{printable(shard)}/{printable(member.name)}: {lost}")
                    else:
                        mark = zlib.crc32(os.pread(file.fileno(), BLOCK, member.offset_data - BLOCK))
                        members.append((member.name, member.offset_data, member.size, mark))
                if end > n_bytes or os.pread(file.fileno(), len(END), end) != END:
                    self.cut.append(shard)
                    gaps += _strange(file, end, n_bytes)
        except (tarfile.TarError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(f"{printable(shard)}: expected an uncompressed tar file: {reason}") from error
        usual = sum(spans) / len(spans) if spans else n_bytes
        for start, size, n_marks in gaps:
            # As many as have left a mark of a header, or would have room there; one at the least.
            n_lost = max(1, n_marks, round(size / usual))
            where = f"{printable(shard)}, of {len(members)} whole members"
            lost = f"lost behind a damaged header at byte {start:,} of {n_bytes:,}, {size:,} bytes skipped"
            self.damage += [f"{where}: {lost} ({i + 1} of about {n_lost})" for i in range(n_lost)]
        return members

    def _file(self, number: int) -> io.FileIO:
        """A shard, opened; closed when the last thread has read from it, unless it is among the first, which stay open.

        Reads are at random: a cache of the shards read last would be hit no more often, and need a lock.
        """
        if file := self._open.get(number):
            return file
        file = self._opened(number)
        return self._open.setdefault(number, file) if len(self._open) < self._max_open else file

    def _opened(self, number: int) -> io.FileIO:
        """A shard, opened now; where the process has too many files open, fewer of ours stay open."""
        while True:
            try:
                return io.FileIO(self.shards[number])
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
            with suppress(KeyError):  # other threads do the same
                self._open.popitem()
            self._max_open = len(self._open)

    def _read(self, number: int, offset: int, size: int) -> bytes:
        file = self._file(number)
        return os.pread(file.fileno(), size, offset)

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> bytes:
        shard, offset, size, mark = self.where[index].tolist()
        if size > MAX_BYTES:
            raise OSError(f"{size:,} bytes are more than the {MAX_BYTES:,} that are read")
        data = self._read(shard, offset - BLOCK, BLOCK + size)
        if len(data) < BLOCK + size:
            raise OSError(f"{printable(self.shards[shard])} ends inside it")
        if zlib.crc32(data[:BLOCK]) != mark:
            raise OSError(f"{printable(self.shards[shard])} is another file than when it was opened")
        return data[BLOCK:]

    def name(self, index: int) -> str:
        return printable(f"{self.shards[self.where[index, 0]]}/{self.names[index]}")

    def describe(self) -> str:
        cut = f"; {several(self.cut)} cut short, the complete images are used" if self.cut else ""
        lost = f"; about {len(self.damage)} more are lost, as {self.damage[0]}" if self.damage else ""
        return f"{len(self):,} images in {several(self.shards)}, {kind(self)}{cut}{lost}"


def open_files_limit() -> int:
    """How many files this process may open at once."""
    try:
        import resource
    except ImportError:  # on Windows, where the C library opens 512
        return 512
    return int(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _lost(member: tarfile.TarInfo, file: BinaryIO) -> str:
    """Why the whole file of a member is no image that could be read, though it was one; or nothing."""
    if member.name.lower().endswith(EXTENSIONS):
        return "is stored as a sparse file, which is not read" if member.issparse() else ""
    # A long name has a header of its own. Where that is damaged, its first 100 bytes are left, or nothing.
    if len(os.fsencode(member.name)) not in (0, tarfile.LENGTH_NAME):
        return ""
    is_image = BEGINNING.match(os.pread(file.fileno(), 12, member.offset_data))
    return "an image whose long name is damaged" if is_image else ""


def _headers(file: BinaryIO, n_bytes: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """(header that can be read, where what it describes ends); the blocks of other headers are skipped one by one."""
    if file.read(BLOCK * 2048).find(b"ustar") < 0:
        file.seek(0)
        tarfile.open(fileobj=file, mode="r:").close()  # raises, unless it is of before 1988
    archive = tarfile.TarFile(fileobj=io.BytesIO(END))  # of nothing: it knows how to read a header, and keeps its place
    archive.fileobj = file
    start = 0
    while start < n_bytes:
        file.seek(start)
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # of zeros: an end, or what was never written
            piece = next(_pieces(file, start + BLOCK, n_bytes), None)
            start = piece[0] // BLOCK * BLOCK if piece else n_bytes
            continue
        except Exception:  # a damaged header, or one that it extends, makes tarfile raise nearly anything
            start += BLOCK
            continue
        if member.size < 0 or archive.offset <= start:  # it would be read again for ever
            start += BLOCK
            continue
        start = archive.offset
        yield member, start


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of what is not zero from start to end, by MiB at most; holes of a sparse file are not read."""
    while start < end:
        if hasattr(os, "SEEK_DATA"):
            try:
                start = file.seek(start, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
        if not (data := os.pread(file.fileno(), min(2**20, end - start), start)):
            return
        if stripped := data.lstrip(b"\0"):
            yield start + len(data) - len(stripped), stripped.rstrip(b"\0")
        start += len(data)


def _strange(file: BinaryIO, start: int, end: int) -> list[tuple[int, int, int]]:
    """(offset, bytes, marks of headers) of what lies between members, where only zeros should be; or nothing."""
    pieces = [(offset, len(data), data.count(b"ustar")) for offset, data in _pieces(file, start, end)]
    if not pieces:
        return []
    first, (last, size, _) = pieces[0][0], pieces[-1]
    return [(first, last + size - first, sum(n_marks for *_, n_marks in pieces))]
