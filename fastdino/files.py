"""Files that are replaced as a whole or appended to, and are on the disk when the call returns.

Whenever a process is killed or a machine loses power, the old file is there or the new one, complete. All raise
OSError, and leave the old file as it was then.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fastdino.errors import chain

TEMPORARY = ".partial"
_unfinished: set[Path] = set()  # what this process is writing


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file anew: `write` fills a temporary one of this process beside it, which then takes its place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    _unfinished.add(temporary)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # torch.save reports a full disk, and Ctrl-C, as an error of its own writer.
        cause = next((e for e in chain(error) if isinstance(e, (OSError, KeyboardInterrupt))), error)
        raise cause from None
    finally:
        _unfinished.discard(temporary)
    sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Add to the end of a file, which is made where it is missing."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise
    if not size:
        sync_folder(path.parent)


def copy(source: Path, path: Path) -> None:
    """The same content under another name. Not a link: people copy checkpoints over one another."""

    def write(file: BinaryIO) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file, 2**22)

    replace(path, write)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk; nothing on Windows, where a folder cannot be opened."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def abandon() -> None:
    """Delete what this process is still writing, for a process that ends at once."""
    for path in tuple(_unfinished):
        with suppress(OSError):
            path.unlink()


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left of `replace`. No other process may be writing there."""
    for path in folder.glob(f"*{TEMPORARY}"):
        with suppress(OSError):
            path.unlink()
