"""Images in parquet files, many to a file, read at random."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdino.data.sources import kind, labels_of, read_file, several
from fastdino.errors import UserError, printable


class ParquetSource:
    """Images in a column of parquet files, as Hugging Face stores them: bytes, or a struct with a field `bytes`.

    Row groups are read when one of their images is asked for, and the last `CACHED_BYTES` of them are kept.
    A column of whole numbers called label, labels or cls gives labels. Needs pyarrow (`pip install pyarrow`).
    Raises UserError without it, and where a file is no parquet or has no such column.
    """

    CACHED_BYTES = 2**30

    def __init__(self, files: Sequence[str | Path]) -> None:
        try:
            import pyarrow.parquet as parquet
            from pyarrow import types
        except ImportError as error:
            raise UserError("parquet files need pyarrow: pip install pyarrow") from error
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
