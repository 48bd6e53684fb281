"""Pickles of plain data: containers, text, numbers and NumPy arrays of numbers, read without running what they name.

A pickle calls what it names. Here it may name NumPy's way of making an array, and gets stand-ins for that, which check
what they are given; any other name ends the reading.
"""

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastdino.errors import UserError, printable

MAX_BYTES = 2**28  # those of Oxford and Paris have less than a MB


def load_plain(path: str | Path) -> Any:
    """What a pickle holds, arrays as lists. Raises UserError where it is missing, damaged, or holds anything else."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{printable(path)}: more than the {MAX_BYTES:,} bytes that are read")
    try:
        # latin1: how NumPy's bytes come out of a pickle of Python 2
        return _plain(_PlainUnpickler(io.BytesIO(data), encoding="latin1").load())
    except _Refused as error:
        raise UserError(f"{printable(path)} holds pickled code, which is refused and not run: {error}") from error
    except (Exception, MemoryError) as error:  # a damaged pickle makes the loader raise nearly anything
        what = printable(error) or type(error).__name__
        raise UserError(f"{printable(path)} is no pickle of plain data, or is damaged: {what}") from error


class _Refused(Exception):
    """A name that plain data does not need."""


class _DType:
    """Stands in for numpy.dtype: what kind of numbers, how many bytes each, in which order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        self.code, self.order = str(code), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    def values(self, data: Any) -> list[Any]:
        """Of an array's bytes, or of the list that an array of objects has."""
        if isinstance(data, list):
            return data
        if not re.fullmatch("[biufSU][0-9]+", self.code) or self.order not in "<>|":
            raise ValueError(f"an array of {self.code}")
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, f"{self.order}{self.code}").tolist()


class _Array:
    """Stands in for numpy.ndarray; `items` are its values, row after row."""

    items: list[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, dtype, _, data = state
        self.items = dtype.values(data)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: _DType, *_: Any) -> _Array:
    array = _Array()
    array.items = dtype.values(data)
    return array


def _scalar(dtype: _DType, data: Any) -> Any:
    return dtype.values(data)[0]


def _encode(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    # How protocols below 3 write bytes: as encoded text, or where there are none as a call.
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",
    **{
        (f"numpy.{core}.{module}", name): made
        for core in ("core", "_core")
        for module, name, made in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise _Refused(printable(f"{module}.{name}"))
        return STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent id")


def _plain(value: Any) -> Any:
    """Without stand-ins."""
    if isinstance(value, _Array):
        value = value.items
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bytes, int, float, type(None))):
        return value
    raise ValueError(f"a {type(value).__name__.strip('_')}")
