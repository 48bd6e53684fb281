"""Images in tar and parquet files, many to a file, read at random."""

import errno
import io
import os
import re
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastdino.data.sources import EXTENSIONS, MAX_BYTES, class_folders, kind, labels_of, read_file, several
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


class ParquetSource:
    """Images in a column of parquet files, as Hugging Face stores them: bytes, or a struct with a field `bytes`.

    Row groups are read when one of their images is asked for, and the last `CACHED_BYTES` of them are kept.
    A column of whole numbers called label, labels or cls gives labels. Needs pyarrow (`pip install fastdino[parquet]`).
    Raises UserError without it, and where a file is no parquet or has no such column.
    """

    CACHED_BYTES = 2**30

    def __init__(self, files: Sequence[str | Path]) -> None:
        try:
            import pyarrow.parquet as parquet
            from pyarrow import types
        except ImportError as error:
            raise UserError("parquet files need pyarrow: pip install 'fastdino[parquet]'") from error
        self.paths = [str(file) for file in files]
        self.column = ""
        self.groups: list[tuple[int, int]] = []  # file, row group
        starts, labels = [0], []
        for number, path in enumerate(self.paths):
            try:
                with parquet.ParquetFile(path) as file:
                    schema = file.schema_arrow
                    label = next((c for c in ("label", "labels", "cls") if c in schema.names), None)
                    self.column = self.column or next((f.name for f in schema if _holds_images(f.type, types)), "")
                    if self.column not in schema.names or not _holds_images(schema.field(self.column).type, types):
                        found = printable(", ".join(schema.names))
                        raise UserError(f"{printable(path)}: no column of images (bytes), only {found}")
                    n_rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                    # Equal images are kept once: more rows than bytes can be true, by far more cannot.
                    if min(n_rows, default=0) < 0 or sum(n_rows) > 100 * os.path.getsize(path):
                        raise OSError(f"claims {sum(n_rows):,} rows in {os.path.getsize(path):,} bytes")
                    for group, n in enumerate(n_rows):
                        self.groups.append((number, group))
                        starts.append(starts[-1] + n)
                    if label and types.is_integer(schema.field(label).type):
                        labels.append(file.read([label])[label].to_numpy())
            except UserError:
                raise
            except Exception as error:  # a damaged file makes pyarrow raise nearly anything
                raise UserError(f"{printable(path)}: expected a parquet file: {_first_line(error)}") from error
        self.starts = np.array(starts)
        if not len(self):
            raise UserError(f"no image in {several(self.paths)}")
        self.classes: Sequence[str] = []
        self.labels: NDArray[np.int64] | None = None
        if sum(map(len, labels)) == len(self):
            self.classes, self.labels = labels_of([str(x) for x in np.concatenate(labels)])
        self._cache: dict[int, Any] = {}
        self._lock = threading.Lock()

    def _group(self, number: int) -> Any:
        """The column of one row group. Two threads may read the same one; neither waits for the other's disk."""
        import pyarrow.parquet as parquet

        with self._lock:
            if number in self._cache:
                self._cache[number] = self._cache.pop(number)  # the most recent are at the end
                return self._cache[number]
        file, group = self.groups[number]
        try:
            with parquet.ParquetFile(self.paths[file]) as opened:
                column = opened.read_row_group(group, [self.column])[self.column].combine_chunks()
        except Exception as error:
            raise OSError(_first_line(error)) from error
        with self._lock:
            self._cache[number] = column
            while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > self.CACHED_BYTES:
                del self._cache[next(iter(self._cache))]
        return column

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> bytes:
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        try:
            value = self._group(number)[index - int(self.starts[number])].as_py()
        except (IndexError, ValueError) as error:  # fewer rows than the index says, a path that is no text
            raise OSError(_first_line(error)) from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return self._beside(self.paths[self.groups[number][0]], value["path"])
        if not isinstance(data, bytes | None):
            raise OSError(f"expected bytes, found {type(data).__name__}")
        return data or b""

    def _beside(self, file: str, path: str) -> bytes:
        """An image that a parquet file only names: below its own folder, wherever links lead."""
        folder = Path(file).parent.resolve()
        try:
            found = (folder / path).resolve()
        except (ValueError, RuntimeError) as error:  # a zero byte, links in a circle
            raise OSError(f"{printable(path)}: {error}") from error
        if not found.is_relative_to(folder):
            raise OSError(f"{printable(path)} leads out of {printable(folder)}")
        return read_file(found)

    def name(self, index: int) -> str:
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        return f"{printable(self.paths[self.groups[number][0]])}, row {index} of all"

    def describe(self) -> str:
        return f"{len(self):,} images in {several(self.paths)}, {kind(self)}"


def _holds_images(kind: Any, types: Any) -> bool:
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type, types) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0] or type(error).__name__)


def _parquet(files: Sequence[str], extensions: tuple[str, ...]) -> ParquetSource:
    return ParquetSource(files)  # whose images have no names


SHARDS: dict[str, Callable[[Sequence[str], tuple[str, ...]], TarSource | ParquetSource]] = {
    ".tar": TarSource,
    ".parquet": _parquet,
}
