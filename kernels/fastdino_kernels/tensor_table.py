"""Many tensors, one launch: how a kernel finds its piece of a model.

A kernel over lists of tensors reads two tables on the device, which are built once and kept:

    rows      (tensors, W) int64   all about one tensor: its size, where its programs begin, the address and dtype of
                                   each of its operands (0 where it has none)
    programs  (programs,) int32    the tensor that a program works on, BLOCK elements of it

Tables are found again by the addresses that they hold, so an entry can become useless but never wrong: a model that is
built anew has other addresses, or has the old ones and then the old table is right. What may move from step to step
(gradients, as a rule) costs a new `rows`, a few KB copied from pinned memory without waiting for the device.
A CUDA graph keeps addresses of tables: those that a capture has used live as long as the tensors that it updates; of
the others the last few are kept.

Elements are taken in the order in which they lie in memory, so any tensor without gaps will do, if its operands lie in
the same order; `packed` makes copies of those that do not. Whole blocks of operands that begin at multiples of 16
bytes are read 128 bits at a time, the rest (the end of a tensor, an unaligned view) element by element.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastdino_kernels.launch import tl, triton

NUMEL, ALIGNED, FIRST_PROGRAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the first columns of `rows`

FP32, BF16, FP16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EMPTY = 16  # stands for the address of an empty tensor, which is none: 0 would say that the operand is absent
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

KEPT_TABLES = 64  # models in use at once, generously
KEPT_ROWS = 16  # sets of gradient addresses that an allocator goes round in
SPARES = 16  # pinned buffers at hand, because none can be allocated during a capture

Column = tuple[int, ...]  # one word per tensor


# `multiple_of` marks the instruction that made its argument: the pointer must be made here, not passed in.
@triton.jit
def _load(address, start, left, TYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        values = tl.load(tl.multiple_of(pointer, 16) + start + lanes)
    else:
        values = tl.load(pointer + start + lanes, mask=lanes < left, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(address, start, left, values, TYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + start + lanes, values.to(TYPE))
    else:
        tl.store(pointer + start + lanes, values.to(TYPE), mask=lanes < left)


@triton.jit
def load_fp32(row, OPERAND: tl.constexpr, TYPE: tl.constexpr, start, left, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Elements start to start + BLOCK of an operand, as fp32; zeros after the first `left`.

    OPERAND: the column of its address, which that of its dtype follows. TYPE: its dtype, None where the tensors of a
    list differ: then a branch per program, which costs code and a pass through shared memory, but no launch.
    """
    address = tl.load(row + OPERAND)
    if TYPE is not None:
        values = _load(address, start, left, TYPE, BLOCK, WHOLE)
    else:
        dtype = tl.load(row + OPERAND + 1)
        if dtype == FP32:
            values = _load(address, start, left, tl.float32, BLOCK, WHOLE)
        elif dtype == BF16:
            values = _load(address, start, left, tl.bfloat16, BLOCK, WHOLE)
        else:
            values = _load(address, start, left, tl.float16, BLOCK, WHOLE)
    return values


@triton.jit
def store_fp32(
    row, OPERAND: tl.constexpr, TYPE: tl.constexpr, start, left, values, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """The reverse of `load_fp32`: rounds to the operand's dtype. Leaves all after `left`, and an absent operand."""
    address = tl.load(row + OPERAND)
    if address != 0:
        if TYPE is not None:
            _store(address, start, left, values, TYPE, BLOCK, WHOLE)
        else:
            dtype = tl.load(row + OPERAND + 1)
            if dtype == FP32:
                _store(address, start, left, values, tl.float32, BLOCK, WHOLE)
            elif dtype == BF16:
                _store(address, start, left, values, tl.bfloat16, BLOCK, WHOLE)
            else:
                _store(address, start, left, values, tl.float16, BLOCK, WHOLE)


def common_type(tensors: Sequence[Tensor]) -> Any:
    """The Triton dtype of a list whose tensors have one dtype (an empty list will do with any), None if they differ."""
    dtypes = {x.dtype for x in tensors} or {torch.float32}
    return TRITON_DTYPES[dtypes.pop()] if len(dtypes) == 1 else None


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their stretch of memory, each once."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_order(a: Tensor, b: Tensor) -> bool:
    return (a.is_contiguous() and b.is_contiguous()) or all(
        i == j or size == 1 for i, j, size in zip(a.stride(), b.stride(), a.shape)
    )


def packed(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The tensors, with a copy in the place of each that has gaps, or lies in another order than its like."""
    if like is None:
        return [x if _is_dense(x) else x.contiguous() for x in tensors]
    return [
        x if _same_order(x, base) else torch.empty_like(base, dtype=x.dtype).copy_(x) for x, base in zip(tensors, like)
    ]


def unpack_(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """What a kernel wrote to the copies that `packed` made, brought home."""
    for x, copy in zip(tensors, copies):
        if copy is not x:
            x.copy_(copy)


def operand_columns(tensors: Sequence[Tensor], at: Sequence[int], n_rows: int) -> tuple[Column, Column]:
    """Addresses and dtypes of tensors that belong to the rows `at`; zeros in the others."""
    addresses, dtypes = [0] * n_rows, [0] * n_rows
    for i, x in zip(at, tensors):
        addresses[i], dtypes[i] = x.data_ptr() or EMPTY, DTYPE_CODES[x.dtype]
    return tuple(addresses), tuple(dtypes)


def scalar_column(tensors: Sequence[Tensor], at: Sequence[int], n_rows: int) -> Column:
    """Addresses of 0-D tensors that belong to the rows `at`; 0 in the others."""
    addresses = [0] * n_rows
    for i, x in zip(at, tensors):
        addresses[i] = x.data_ptr()
    return tuple(addresses)


def element_column(x: Tensor | None, n_rows: int) -> Column:
    """Addresses of the elements of a (rows,) tensor, one per row."""
    if x is None:
        return (0,) * n_rows
    return tuple(range(x.data_ptr(), x.data_ptr() + n_rows * x.itemsize, x.itemsize))


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class TensorTable:
    """The tables of one list of tensors on one device, for kernels with these BLOCK sizes."""

    def __init__(self, tensors: Sequence[Tensor], blocks: tuple[int, ...]) -> None:
        starts = [x.data_ptr() for x in tensors if x.numel() > 0]
        if len(set(starts)) < len(starts):  # programs would race for them
            raise ValueError(
                "tensors: expected each in memory of its own, got two at one address: list tied weights once"
            )
        self.device = tensors[0].device
        self.captured: list[Tensor] = []  # held, because a graph has their addresses
        self._memory = [StorageWeakRef(x.untyped_storage()) for x in tensors]
        self._rows: OrderedDict[tuple[Column, ...], Tensor] = OrderedDict()
        self._spares: list[Tensor] = []
        sizes = torch.tensor([x.numel() for x in tensors])
        self._sizes = tuple(sizes.tolist())
        self.programs: list[Tensor] = []
        self._first_programs: list[Column] = []
        for block in blocks:
            counts = ((sizes + block - 1) // block).clamp(min=1)  # an empty tensor has a step count to be kept, too
            tensor_of = torch.repeat_interleave(torch.arange(len(tensors), dtype=torch.int32), counts)
            self.programs.append(self._pin(tensor_of).to(self.device, non_blocking=True))
            self._first_programs.append(tuple((counts.cumsum(0) - counts).tolist()))

    def in_use(self) -> bool:
        """Whether any of the memory that this table was made for still exists."""
        return not all(ref.expired() for ref in self._memory)

    def rows(self, operands: Sequence[tuple[Column, Column]], scalars: Sequence[Column] = ()) -> Tensor:
        """(tensors, W) int64: size, alignment, first programs, then two columns per operand and one per scalar.

        operands: addresses and dtypes of tensors of the same size. scalars: addresses, which may be unaligned.
        """
        columns = (*(column for pair in operands for column in pair), *scalars)
        capturing = _capturing(self.device)
        rows = self._rows.pop(columns, None)
        if rows is None:
            aligned = tuple(int(not any(a % 16 for a in row)) for row in zip(*(addresses for addresses, _ in operands)))
            words = torch.tensor([self._sizes, aligned, *self._first_programs, *columns]).T.contiguous()
            if capturing:  # what is copied by the graph, at each replay, is for the graph alone
                return self._captured_copy(words)
            rows = self._pin(words).to(self.device, non_blocking=True)
        self._rows[columns] = rows  # the last one used comes last
        if capturing:
            self.captured.append(rows)
            return rows
        if len(self._rows) > KEPT_ROWS:
            self._rows.popitem(last=False)
        while self.device.type == "cuda" and len(self._spares) < SPARES:
            self._spares.append(self._pin(torch.empty_like(rows, device="cpu")))
        return rows

    def _captured_copy(self, words: Tensor) -> Tensor:
        if not self._spares:
            raise RuntimeError(f"expected a run of this op outside of a capture after every {SPARES} in one, got none")
        host = self._spares.pop().copy_(words)
        rows = host.to(self.device, non_blocking=True)
        self.captured += [host, rows]
        return rows

    def _pin(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self.device.type == "cuda" else x


_TABLES: OrderedDict[tuple, TensorTable] = OrderedDict()


def table_for(tensors: Sequence[Tensor], blocks: tuple[int, ...]) -> TensorTable:
    """The table of these tensors: built on the first call, found on the next ones. Never waits for the device.

    tensors: those that the kernel updates, on one device. blocks: elements per program of each kernel.
    """
    addresses = tuple(x.data_ptr() for x in tensors)
    key = (tensors[0].device, blocks, addresses, tuple(x.numel() for x in tensors))
    table = _TABLES.pop(key, None)
    if table is None or not table.in_use():
        if _capturing(tensors[0].device):
            raise RuntimeError("expected a run of this op before its capture in a CUDA graph, got its first run in one")
        for gone in [key for key, table in _TABLES.items() if not table.in_use()]:
            del _TABLES[gone]
        table = TensorTable(tensors, blocks)
    _TABLES[key] = table  # the last one used comes last
    droppable = [key for key, table in _TABLES.items() if not table.captured]
    for oldest in droppable[: len(droppable) - KEPT_TABLES] if len(droppable) > KEPT_TABLES else ():
        del _TABLES[oldest]
    return table
