"""Where images come from. A source has a length, items (encoded bytes or an array), names, and perhaps labels.

`open_source` tells folders, tar shards and parquet files apart; `sequences` wraps what Python holds. All of them are
read at random, from many threads at once, and survive that their files shrink: an item is then an OSError.
"""

import glob
import os
import re
import stat
import tarfile
import threading
from collections import deque
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastdino.errors import UserError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


MAX_BYTES = 2**29  # of an image's file: as many as the largest image has that is decoded, in RGB


class ImageSource(Protocol):
    """Images by index.

    labels: (n,) int64 class of each, or None. classes: their names. describe: one phrase for the log.
    """

    labels: NDArray[np.int64] | None
    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes | NDArray[np.uint8]:
        """Encoded bytes, or (H, W, 3) uint8 RGB. Raises OSError where a file cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What to call item `index` when something is wrong with it."""
        ...

    def describe(self) -> str: ...


class FolderSource:
    """Every image below a folder, in the order of its path.

    Where all of them lie in sub-folders, and there are at least two of those, the first level names the classes.
    Raises UserError where the folder is missing or holds no image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "a file" if self.folder.exists() else "nothing"
            raise UserError(f"expected a folder of images, found {what} at {printable(self.folder)}")
        self.paths, self.left_out = list_images(self.folder)
        if not self.paths:
            looked_for = ", ".join(e[1:] for e in EXTENSIONS)
            raise UserError(f"no image below {printable(self.folder)} (looked for {looked_for}){self._without()}")
        self.classes, self.labels = _class_folders(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        return read_file(self.folder / self.paths[index])

    def name(self, index: int) -> str:
        return printable(self.folder / self.paths[index])

    def describe(self) -> str:
        return f"{len(self):,} images in {printable(self.folder)}, {kind(self)}{self._without()}"

    def _without(self) -> str:
        if not self.left_out:
            return ""
        first = f", as {printable(self.left_out[0])}" if len(self.left_out) > 1 else f": {printable(self.left_out[0])}"
        return f"; left out {len(self.left_out)} that cannot be opened or are no files{first}"


def list_images(folder: Path) -> tuple[list[str], list[str]]:
    """(images below a folder, in the order of their paths; what is named like one and is no file, or cannot be listed).

    Links are followed, but no folder is listed twice: a link to where one is already would have no end.
    """
    paths: list[str] = []
    left_out: list[str] = []
    seen: set[tuple[int, int]] = set()
    # Folders that are linked come last, so that their images have the names of the folder itself where it is below.
    waiting, linked = [""], deque[str]()
    while waiting or linked:
        below = waiting.pop() if waiting else linked.popleft()
        try:
            status = os.stat(folder / below)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    path = f"{below}{os.sep}{entry.name}" if below else entry.name
                    if entry.is_dir():
                        (linked if entry.is_symlink() else waiting).append(path)
                    elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                        (paths if entry.is_file() else left_out).append(path)
        except OSError:
            left_out.append(below)
    return sorted(paths), sorted(left_out)


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises OSError, also for what is no regular file, or larger than MAX_BYTES."""
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # or a pipe would be waited for
    with open(opened, "rb") as file:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is no regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size:,} bytes are more than the {MAX_BYTES:,} that are read")
        return file.read()


def kind(source: ImageSource) -> str:
    """What a source says of its labels."""
    return f"{len(source.classes)} classes (for k-NN only)" if source.labels is not None else "no labels"


def labels_of(names: Sequence[str]) -> tuple[Sequence[str], NDArray[np.int64] | None]:
    """(classes, labels) from the class name of each image. One class is none."""
    classes = sorted(set(names), key=lambda name: (len(name) if name.isdecimal() else 0, name))  # 2 before 10
    if len(classes) < 2:
        return [], None
    index = {name: i for i, name in enumerate(classes)}
    return classes, np.array([index[name] for name in names], dtype=np.int64)


def _class_folders(paths: Sequence[str]) -> tuple[Sequence[str], NDArray[np.int64] | None]:
    parts = [Path(path).parts for path in paths]
    return labels_of([p[0] for p in parts]) if all(len(p) > 1 for p in parts) else ([], None)


class TarSource:
    """Every image in uncompressed tar shards, in the shards' own order, by offset: no shard is ever unpacked.

    Labels as WebDataset keeps them, in a member `key.cls` (or, if those are short words that repeat, `key.txt`) beside
    `key.jpg`; otherwise the folders inside the shards name classes, as for FolderSource. A shard that was cut gives its
    complete members, and `describe` says so. Raises UserError where there is no image, or a shard is no tar.
    Members are read by `pread`, not through a memory map: a shard cut under a map ends the process with SIGBUS.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.shards = [str(shard) for shard in shards]
        self.cut: list[str] = []
        self.files: list[int] = []
        self.names: list[str] = []
        where: list[tuple[int, int, int]] = []  # shard, offset, bytes
        keys: list[str] = []
        texts: dict[str, dict[str, str]] = {"cls": {}, "txt": {}}
        for number, shard in enumerate(self.shards):
            self.files.append(_open_file(shard))
            for name, offset, size in self._members(shard):
                folder, file = os.path.split(name)
                stem, _, extension = file.partition(".")
                key = f"{number}/{folder}/{stem}"
                if f".{extension.lower()}".endswith(EXTENSIONS) and stem:
                    self.names.append(name)
                    where.append((number, offset, size))
                    keys.append(key)
                elif extension in texts and size < 256:
                    texts[extension][key] = os.pread(self.files[-1], size, offset).decode(errors="replace").strip()
        if not where:
            raise UserError(f"no image in {_several(self.shards)} (looked for {', '.join(e[1:] for e in EXTENSIONS)})")
        self.where = np.array(where, dtype=np.int64)
        self.classes, self.labels = _class_folders(self.names)
        for found in texts.values():
            names = [found.get(key, "") for key in keys]
            if all(names) and (found is texts["cls"] or 2 * len(set(names)) <= len(names)):
                self.classes, self.labels = labels_of(names)
                break

    def _members(self, shard: str) -> list[tuple[str, int, int]]:
        """(name, offset, bytes) of the complete files in a shard."""
        n_bytes, end, members = os.path.getsize(shard), 0, []
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined] # which it would keep, a kilobyte for each
                    end = member.offset_data + member.size
                    if end > n_bytes:
                        break
                    if member.isreg() and not os.path.basename(member.name).startswith("."):
                        members.append((member.name, member.offset_data, member.size))
        except (tarfile.TarError, OSError) as error:
            if not members:
                raise UserError(f"{shard}: expected an uncompressed tar file: {error}") from error
        if end + 2 * tarfile.BLOCKSIZE > n_bytes:  # an archive ends in two empty blocks
            self.cut.append(shard)
        return members

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> bytes:
        shard, offset, size = self.where[index].tolist()
        data = os.pread(self.files[shard], size, offset)
        if len(data) < size:
            raise OSError(f"{self.shards[shard]} ends inside it")
        return data

    def name(self, index: int) -> str:
        return f"{self.shards[self.where[index, 0]]}/{self.names[index]}"

    def describe(self) -> str:
        cut = f"; {_several(self.cut)} cut short, the complete images are used" if self.cut else ""
        return f"{len(self):,} images in {_several(self.shards)}, {kind(self)}{cut}"


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
            from pyarrow import ArrowException, types
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
                    if self.column not in schema.names:
                        raise UserError(f"{path}: no column of images (bytes), only {', '.join(schema.names)}")
                    for group in range(file.num_row_groups):
                        self.groups.append((number, group))
                        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
                    if label and types.is_integer(schema.field(label).type):
                        labels.append(file.read([label])[label].to_numpy())
            except (ArrowException, OSError) as error:
                raise UserError(f"{path}: expected a parquet file: {str(error).splitlines()[0]}") from error
        self.starts = np.array(starts)
        if not len(self):
            raise UserError(f"no image in {_several(self.paths)}")
        self.classes: Sequence[str] = []
        self.labels: NDArray[np.int64] | None = None
        if sum(map(len, labels)) == len(self):
            self.classes, self.labels = labels_of([str(x) for x in np.concatenate(labels)])
        self._cache: dict[int, Any] = {}
        self._lock = threading.Lock()

    def _group(self, number: int) -> Any:
        """The column of one row group. Two threads may read the same one; neither waits for the other's disk."""
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        with self._lock:
            if number in self._cache:
                self._cache[number] = self._cache.pop(number)  # the most recent are at the end
                return self._cache[number]
        file, group = self.groups[number]
        try:
            with parquet.ParquetFile(self.paths[file]) as opened:
                column = opened.read_row_group(group, [self.column])[self.column].combine_chunks()
        except ArrowException as error:
            raise OSError(f"{self.paths[file]}: {str(error).splitlines()[0]}") from error
        with self._lock:
            self._cache[number] = column
            while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > self.CACHED_BYTES:
                del self._cache[next(iter(self._cache))]
        return column

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> bytes:
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        value = self._group(number)[index - int(self.starts[number])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return (Path(self.paths[self.groups[number][0]]).parent / value["path"]).read_bytes()
        return data or b""

    def name(self, index: int) -> str:
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        return f"{self.paths[self.groups[number][0]]}, row {index} of all"

    def describe(self) -> str:
        return f"{len(self):,} images in {_several(self.paths)}, {kind(self)}"


def _holds_images(kind: Any, types: Any) -> bool:
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type, types) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _open_file(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _several(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} files from {paths[0]} on"


def expand(pattern: str) -> list[str]:
    """`train-{000..003}.tar`, `{a,b}/*.tar` -> paths in order; those of a brace need not exist, those of a star do."""
    alternatives: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        if span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = span.groups()
            alternatives.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        elif re.fullmatch(r"\{.*\}", part):
            alternatives.append(part[1:-1].split(","))
        else:
            alternatives.append([part])
    paths = ["".join(parts) for parts in product(*alternatives)]
    return [found for path in paths for found in (sorted(glob.glob(path)) if glob.has_magic(path) else [path])]


SHARDS: dict[str, type[TarSource] | type[ParquetSource]] = {".tar": TarSource, ".parquet": ParquetSource}


def open_source(path: str | Path) -> ImageSource:
    """A folder of images, a tar or parquet file, a folder of those, or a pattern (`*`, `{000..146}`) for them.

    Raises UserError, in one line, where nothing of that is there.
    """
    text = str(path)
    if os.path.isdir(text):
        for extension, kind in SHARDS.items():
            if shards := sorted(str(file) for file in Path(text).iterdir() if file.suffix.lower() == extension):
                return kind(shards)
        return FolderSource(text)
    files = [text] if os.path.exists(text) else expand(text)
    if not files or (files == [text] and not os.path.exists(text)):
        raise UserError(f"expected a folder of images, tar or parquet files, found nothing at {text}")
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if len(kinds) == 1 and (extension := kinds.pop()) in SHARDS:
        return SHARDS[extension](files)
    raise UserError(f"expected a folder, .tar or .parquet files, found {_several(files)}")
