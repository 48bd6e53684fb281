"""Features on their way to a file: rows as they come, from several processes, then .npz, .parquet, .csv or .pth.

Until all rows are there they lie in `OUTPUT.partial/`: an array file for each kind of feature, of which any row can be
written at any time, and `done.npy`, which says of each row whether it was. A run that was killed goes on from there.
Memory holds a few thousand rows, however many there are. Axes: N images.
"""

import csv
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from fastdino import files
from fastdino.data.sources import ImageSource
from fastdino.errors import TrainingError, UserError

SYNC_EVERY = 10.0  # seconds of work that a kill may cost
CHUNK_BYTES = 2**26  # of rows that are in memory at once while a file is written
Array = NDArray[Any]


class Rows:
    """The rows of `OUTPUT.partial/`, of this process and its siblings."""

    def __init__(self, output: Path, n: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.n, self.settings = output.with_name(f"{output.name}.partial"), n, dict(settings)
        self._pending: list[NDArray[np.int64]] = []
        self._synced_at = time.monotonic()

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make the files, or keep those of an earlier run with the same settings. By one process, before all others.

        Raises TrainingError where the disk has no room for all rows: a map that found out later would end in SIGBUS.
        """
        said = self.folder / "settings.json"
        if said.is_file() and json.loads(said.read_text()) == self.settings:
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir()
            for name, shape in shapes.items():
                self._make(name, np.float32, (self.n, *shape))
            self._make("done", np.bool_, (self.n,))
            said.write_text(json.dumps(self.settings))  # last: without it the folder is no start
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise TrainingError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def _make(self, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
        """An array file of zeros, all of it on the disk."""
        path = self.folder / f"{name}.npy"
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # not on Windows, where a file has no holes
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

    def done(self) -> NDArray[np.bool_]:
        """(N,) which rows are written."""
        return np.load(self.folder / "done.npy")

    def write(self, indices: NDArray[np.int64], features: Mapping[str, torch.Tensor]) -> None:
        """Some rows. They count as done within ten seconds, once they are on the disk."""
        for name, values in features.items():
            # Opened anew each time: pages of a map that stays open count as memory of the process.
            np.load(self.folder / f"{name}.npy", mmap_mode="r+")[indices] = values.cpu().numpy()
        self._pending.append(indices)
        if time.monotonic() - self._synced_at > SYNC_EVERY:
            self.sync(features)

    def sync(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        """Put the rows on the disk, and only then mark them as done."""
        for name in names:
            _to_disk(self.folder / f"{name}.npy")
        done = np.load(self.folder / "done.npy", mmap_mode="r+")
        for indices in self._pending:
            done[indices] = True
        del done
        _to_disk(self.folder / "done.npy")
        self._pending, self._synced_at = [], time.monotonic()

    def chunks(self, name: str, keep: NDArray[np.int64]) -> Iterator[Array]:
        """Rows `keep` of an array, some at a time."""
        path = self.folder / f"{name}.npy"
        row_bytes = np.load(path, mmap_mode="r")[:1].nbytes
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, len(keep), step):
            yield np.load(path, mmap_mode="r")[keep[start : start + step]]

    def remove(self) -> None:
        """Once the output is written."""
        shutil.rmtree(self.folder)


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Table:
    """What a file will hold: columns of names and labels, which are in memory, and the features, which are not.

    keep: (M,) the rows that were written, of N images; all columns follow it.
    """

    rows: Rows
    keep: NDArray[np.int64]
    names: list[str]
    labels: NDArray[np.int64] | None
    classes: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, rows: Rows, source: ImageSource, shapes: Mapping[str, tuple[int, ...]]) -> "Table":
        """The rows that are there, beside the names and labels of their images."""
        keep = np.flatnonzero(rows.done())
        labels = None if source.labels is None else source.labels[keep]
        return cls(rows, keep, [source.name(int(i)) for i in keep], labels, source.classes, shapes)


def _write_npz(table: Table, file: BinaryIO) -> None:
    columns: dict[str, Array] = {"names": np.array(table.names)}
    if table.labels is not None:
        columns |= {"labels": table.labels, "classes": np.array(table.classes)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, values in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
        for name, shape in table.shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(table.keep), *shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in table.rows.chunks(name, table.keep):
                    member.write(chunk.tobytes())


def _aligned(table: Table, n_rows: int) -> Iterator[tuple[slice, dict[str, Array]]]:
    """The features, n_rows rows of all arrays at a time."""
    for start in range(0, len(table.keep), n_rows):
        at = slice(start, start + n_rows)
        yield at, {name: np.concatenate([*table.rows.chunks(name, table.keep[at])]) for name in table.shapes}


def _row_bytes(table: Table) -> int:
    return 4 * sum(int(np.prod(shape)) for shape in table.shapes.values())


def _write_parquet(table: Table, file: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [pa.field("name", pa.string())]
    if table.labels is not None:
        fields += [pa.field("label", pa.int64()), pa.field("class", pa.string())]
    for name, shape in table.shapes.items():
        told = {"shape": json.dumps(shape)}
        fields.append(pa.field(name, pa.list_(pa.float32(), int(np.prod(shape))), metadata=told))
    schema = pa.schema(fields)
    with pq.ParquetWriter(file, schema) as writer:
        for at, features in _aligned(table, max(1, CHUNK_BYTES // _row_bytes(table))):
            columns: list[Any] = [pa.array(table.names[at], pa.string())]
            if table.labels is not None:
                labels = table.labels[at]
                columns += [pa.array(labels), pa.array([table.classes[label] for label in labels], pa.string())]
            for name in table.shapes:
                flat = features[name].reshape(len(features[name]), -1)
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1]))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_csv(table: Table, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    has_labels = ["label", "class"] if table.labels is not None else []
    writer.writerow(["name", *has_labels, *(f"{n}_{i}" for n, (d,) in table.shapes.items() for i in range(d))])
    for at, features in _aligned(table, max(1, CHUNK_BYTES // _row_bytes(table) // 16)):
        rows = np.concatenate([*features.values()], axis=1)
        # As few digits as tell a float32 apart, as NumPy prints them.
        for i, row in enumerate(rows.astype(str).tolist(), at.start):
            label = [] if table.labels is None else [int(table.labels[i]), table.classes[table.labels[i]]]
            writer.writerow([table.names[i], *label, *row])
    text.detach()


def _write_pth(table: Table, file: BinaryIO) -> None:
    content: dict[str, Any] = {"names": table.names}
    if table.labels is not None:
        content |= {"labels": torch.from_numpy(table.labels), "classes": list(table.classes)}
    for name, shape in table.shapes.items():
        path = table.rows.folder / f"{name}.packed"  # without the rows of images that could not be read
        with path.open("wb") as packed:
            for chunk in table.rows.chunks(name, table.keep):
                packed.write(chunk.tobytes())
        size = len(table.keep) * int(np.prod(shape))
        content[name] = torch.from_file(str(path), size=size).unflatten(0, (len(table.keep), *shape))
    torch.save(content, file)


FORMATS: dict[str, Callable[[Table, BinaryIO], None]] = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".pth": _write_pth,
}


def check_output(output: Path, tokens: Sequence[str]) -> None:
    """Raises UserError where a file of that name cannot be written."""
    if output.suffix.lower() not in FORMATS:
        raise UserError(f"--output: expected a file that ends in {', '.join(FORMATS)}, got {output}")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output: expected a file in a folder that exists, got {output}")
    if output.suffix.lower() == ".csv" and "patch" in tokens:
        raise UserError("--tokens: patch is no single row of numbers, as .csv needs; use .npz, .parquet or .pth")
    if output.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise UserError("--output: .parquet needs pyarrow: pip install pyarrow") from error


def write(table: Table, output: Path) -> None:
    """The file, whole or not at all. Raises OSError; the rows are still there then."""
    files.replace(output, partial(FORMATS[output.suffix.lower()], table))
