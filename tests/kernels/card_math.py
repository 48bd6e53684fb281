"""The approximate instructions of an NVIDIA card, in Triton's interpreter, which has NumPy's exact functions.

Errors of fp32 functions, as documented (PTX ISA, "Floating Point Instructions"; CUDA C++ Programming Guide for log2):
exp2 2 ulp, division 2 ulp (a reciprocal of 1 ulp, then a product), log2 1 ulp. Whole powers of two stay exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

ULP = 2.0**-23
Array = NDArray[np.float32]


def _by_bits(x: Array) -> NDArray[np.float64]:
    """In [-1, 1], the same for the same input."""
    mixed = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape) * np.uint32(2654435761)
    return mixed / 2.0**31 - 1


# none is for comparison.
DIRECTIONS: dict[str, Callable[[Array], NDArray[np.float64]]] = {
    "none": lambda x: np.zeros(x.shape),
    "hash": _by_bits,
    "plus": lambda x: np.ones(x.shape),
    "minus": lambda x: -np.ones(x.shape),
}


def _off(exact: NDArray[np.float64], ulps: int, direction: NDArray[np.float64]) -> NDArray[np.float64]:
    power_of_two = np.abs(np.frexp(exact)[0]) == 0.5
    return np.where(power_of_two, exact, exact * (1 + ulps * ULP * direction))


@contextmanager
def card_math(direction: str) -> Iterator[None]:
    """Inside, fp32 exp2, log2 and division in interpreted kernels are as wrong as a card's may be."""
    error = DIRECTIONS[direction]

    def exp2(x: Array) -> NDArray[np.float64]:
        return _off(np.exp2(x.astype(np.float64)), 2, error(x))

    def log2(x: Array) -> NDArray[np.float64]:
        return _off(np.log2(x.astype(np.float64)), 1, error(x))

    def divide(x: Array, y: Array) -> NDArray[np.float64]:
        return x * _off(1 / y.astype(np.float64), 1, error(y)).astype(np.float32).astype(np.float64)

    def create(function: Callable[..., NDArray[np.float64]]) -> Callable:
        def build(self, *args: interpreter.TensorHandle) -> interpreter.TensorHandle:
            arrays = [np.asarray(x.data) for x in args]
            assert all(x.dtype == np.float32 for x in arrays)
            with np.errstate(all="ignore"):
                return interpreter.TensorHandle(function(*arrays).astype(np.float32), args[0].dtype.scalar)

        return build

    functions = {"create_exp2": create(exp2), "create_log2": create(log2), "create_fdiv": create(divide)}
    with mock.patch.multiple(interpreter.InterpreterBuilder, **functions):
        yield
