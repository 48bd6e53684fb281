"""Where images come from. A source has a length, items (encoded bytes or an array), names, and perhaps labels.

`open_source` tells folders, tar shards and parquet files apart; `sequences` wraps what Python holds. All of them are
read at random, from many threads at once, and survive that their files shrink: an item is then an OSError.
"""

import glob
import os
import re
import stat
from collections import deque
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastdino.errors import UserError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
ARRAYS = (".npy",)  # images where channels or ranges are asked for, or where a folder holds nothing else
MAX_BYTES = 2**29  # of an image's file: as many as the largest image has that is decoded, in RGB


class ImageSource(Protocol):
    """Images by index.

    labels: (n,) int64 class of each, or None. classes: their names. describe: one phrase for the log.
    May have `damage`: a line for each image that is known to be lost, as TarSource does; those count as unreadable.
    """

    labels: NDArray[np.int64] | None
    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes | NDArray[Any]:
        """Encoded bytes, or (H, W, C): uint8, or what `levels` makes of it. Raises OSError, BadImage."""
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

    def __init__(self, folder: str | Path, extensions: tuple[str, ...] = EXTENSIONS) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "a file" if self.folder.exists() else "nothing"
            raise UserError(f"expected a folder of images, found {what} at {printable(self.folder)}")
        self.paths, self.left_out = list_images(self.folder, extensions)
        if not self.paths:
            self.paths, self.left_out = list_images(self.folder, ARRAYS)
        if not self.paths:
            looked_for = ", ".join(e[1:] for e in (*EXTENSIONS, *ARRAYS))
            raise UserError(f"no image below {printable(self.folder)} (looked for {looked_for}){self._without()}")
        self.classes, self.labels = class_folders(self.paths)

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


def list_images(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> tuple[list[str], list[str]]:
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
                    is_link = entry.is_symlink()
                    if os.path.isdir(entry) if is_link else entry.is_dir():
                        (linked if is_link else waiting).append(path)
                    elif entry.name.lower().endswith(extensions) and not entry.name.startswith("."):
                        is_file = os.path.isfile(entry) if is_link else entry.is_file()  # of a circle, they say no
                        (paths if is_file else left_out).append(path)
        except OSError:
            left_out.append(below)
    return sorted(paths), sorted(left_out)


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises OSError, also for what is no regular file, or larger than MAX_BYTES."""
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes. An opener, so that no descriptor is lost.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is no regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"{status.st_size:,} bytes are more than the {MAX_BYTES:,} that are read")
        return file.read(MAX_BYTES)


def kind(source: ImageSource) -> str:
    """What a source says of its labels."""
    return f"{len(source.classes)} classes" if source.labels is not None else "no labels"


def labels_of(names: Sequence[str]) -> tuple[Sequence[str], NDArray[np.int64] | None]:
    """(classes, labels) from the class name of each image. One class is none."""
    classes = sorted(set(names), key=lambda name: (len(name) if name.isdecimal() else 0, name))  # 2 before 10
    if len(classes) < 2:
        return [], None
    index = {name: i for i, name in enumerate(classes)}
    return classes, np.array([index[name] for name in names], dtype=np.int64)


def class_folders(paths: Sequence[str]) -> tuple[Sequence[str], NDArray[np.int64] | None]:
    """(classes, labels) from the first folder of each path; none where an image lies in no folder."""
    parts = [Path(path).parts for path in paths]
    return labels_of([p[0] for p in parts]) if all(len(p) > 1 for p in parts) else ([], None)


def several(paths: Sequence[str]) -> str:
    """Some files, in a few words."""
    first = printable(paths[0])
    return first if len(paths) == 1 else f"{len(paths)} files from {first} on"


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


def open_source(path: str | Path, extensions: tuple[str, ...] = EXTENSIONS) -> ImageSource:
    """A folder of images, a tar or parquet file, a folder of those, or a pattern (`*`, `{000..146}`) for them.

    extensions: of names that are images'. Raises UserError, in one line, where nothing of that is there.
    """
    from fastdino.data.shards import SHARDS  # which build on this module

    text = str(path)
    if os.path.isdir(text):
        for extension, kind in SHARDS.items():
            named = (file for file in Path(text).iterdir() if file.suffix.lower() == extension)
            # A broken link is a shard that is missing: opening it says so.
            if shards := sorted(str(file) for file in named if file.is_file() or not file.exists()):
                return kind(shards, extensions)
        return FolderSource(text, extensions)
    files = [text] if os.path.exists(text) else expand(text)
    if not files or (files == [text] and not os.path.exists(text)):
        raise UserError(f"expected a folder of images, tar or parquet files, found nothing at {printable(text)}")
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"expected a folder, .tar or .parquet files, found no regular file at {printable(file)}")
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if len(kinds) == 1 and (extension := kinds.pop()) in SHARDS:
        return SHARDS[extension](files, extensions)
    raise UserError(f"expected a folder, .tar or .parquet files, found {several(files)}")
