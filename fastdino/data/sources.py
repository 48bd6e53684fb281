"""Where images come from. A source has a length, items (encoded bytes or an array), names, and perhaps labels."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastdino.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


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
            raise UserError(f"expected a folder of images, found {what} at {self.folder}")
        self.paths = sorted(
            os.path.relpath(os.path.join(root, file), self.folder)
            for root, _, files in os.walk(self.folder, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        )
        if not self.paths:
            raise UserError(f"no image below {self.folder} (looked for {', '.join(e[1:] for e in EXTENSIONS)})")
        parts = [Path(path).parts for path in self.paths]
        self.classes: Sequence[str] = sorted({p[0] for p in parts}) if all(len(p) > 1 for p in parts) else []
        self.labels: NDArray[np.int64] | None = None
        if len(self.classes) > 1:
            index = {name: i for i, name in enumerate(self.classes)}
            self.labels = np.array([index[p[0]] for p in parts], dtype=np.int64)
        else:
            self.classes = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        return (self.folder / self.paths[index]).read_bytes()

    def name(self, index: int) -> str:
        return str(self.folder / self.paths[index])

    def describe(self) -> str:
        kind = f"{len(self.classes)} classes (for k-NN only)" if self.labels is not None else "no labels"
        return f"{len(self):,} images in {self.folder}, {kind}"
