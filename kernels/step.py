"""One kernel for many tensors: a rule over tiles of all tensors stored alike, which a table in device memory describes.

The table has a row of int64 for each tensor, `width(states, dims)` long:

    0  number of elements (of a complex tensor twice as many)
    1  its row of the scalars
    2  key of stochastic rounding: the first word below, the second above
    3  number of its first tile
    4  address of the parameter
    5  of the gradient
    6  of the master copy
    7  of the first state, and 8 of its scales; 9 and 10 of the second; ...
    then, where tensors are strided, the sizes of `dims` dimensions in walking order, and the strides in elements along
    them of the parameter, gradient, master and each state

Unused words are 0. Beside it lie, in float64, rows of the rule's scalars with the gradient scale last, and, in int32,
the tensor of each tile. Two more float64, `control`, are a factor of the gradient scale and, where it is not 0, that
nothing is to be written. Everything that differs from step to step is read from memory, so no value compiles anything.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fusedopt.binding import Rule
from fusedopt.codecs import BLOCK

from .codecs import (
    TABLES,
    decode,
    decode_int8,
    decode_parameter,
    encode,
    encode_int8,
    encode_parameter,
    pointer,
    random_words,
    split,
)

TILE = 8 * BLOCK  # elements; 16 for each of 128 threads, so that 8-bit codes too are read 16 bytes at a time

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(TILE // BLOCK)


def width(states: int, dims: int) -> int:
    return 7 + 2 * states + dims * (4 + states)


@triton.jit
def _place(at, sizes, strides, dims: tl.constexpr):
    """Where the elements at positions `at` of the walk lie, in elements."""
    if dims == 0:
        return at
    else:
        offset = tl.zeros(at.shape, tl.int64)
        for d in tl.static_range(dims - 1, 0, -1):
            size = tl.load(sizes + d)
            offset += (at % size) * tl.load(strides + d)
            at = at // size
        return offset + at * tl.load(strides)


@triton.jit
def _table(tables, storage: tl.constexpr):
    return tables + (0 if storage == "int8_signed" else TABLES)


@triton.jit
def _scales(row, index, start):
    """The scales of a tile's rows, and which of them there are."""
    blocks = start // _BLOCK + tl.arange(0, _ROWS)
    return pointer(tl.load(row + 8 + 2 * index), "float32", False) + blocks, blocks * _BLOCK < tl.load(row)


@triton.jit
def _read_state(row, tables, index, start, place, mask, storage: tl.constexpr, aligned: tl.constexpr):
    state = tl.load(pointer(tl.load(row + 7 + 2 * index), storage, aligned) + place, mask)
    if storage == "int8_signed" or storage == "int8_unsigned":
        scales, there = _scales(row, index, start)
        return decode_int8(state, tl.load(scales, there), _table(tables, storage))
    else:
        return decode(state, storage)


@triton.jit
def _write_state(values, row, tables, index, start, place, mask, storage: tl.constexpr, aligned: tl.constexpr):
    state = pointer(tl.load(row + 7 + 2 * index), storage, aligned) + place
    if storage == "int8_signed" or storage == "int8_unsigned":
        codes, scale = encode_int8(values, mask, _table(tables, storage), storage == "int8_signed")
        scales, there = _scales(row, index, start)
        tl.store(state, codes, mask)
        tl.store(scales, scale, there)
    else:
        tl.store(state, encode(values, storage), mask)


@triton.jit
def _update(
    row,
    scalars,
    tables,
    control,
    start,
    at,
    mask,
    rule: tl.constexpr,
    param: tl.constexpr,
    grad: tl.constexpr,
    states: tl.constexpr,
    master: tl.constexpr,
    stochastic: tl.constexpr,
    aligned: tl.constexpr,
    dims: tl.constexpr,
    zero_grad: tl.constexpr,
    scalar_count: tl.constexpr,
):
    """Update the elements at positions `at` of one tensor, which begin at `start`; those outside of `mask` stay."""
    count: tl.constexpr = len(states)
    real: tl.constexpr = tl.float64 if param == "float64" else tl.float32
    sizes = row + 7 + 2 * count
    strides = sizes + dims
    param_at = pointer(tl.load(row + 4), param, aligned) + _place(at, sizes, strides, dims)
    grad_at = pointer(tl.load(row + 5), grad, aligned) + _place(at, sizes, strides + dims, dims)
    stored_grad = tl.load(grad_at, mask)
    if zero_grad:
        tl.store(grad_at, tl.zeros(stored_grad.shape, stored_grad.dtype), mask)
    stored = tl.load(param_at, mask)
    old = stored
    if master is not None:
        master_at = pointer(tl.load(row + 6), master, aligned) + _place(at, sizes, strides + 2 * dims, dims)
        old = tl.load(master_at, mask)
    p = decode_parameter(stored, old, param, master)
    scalars += tl.load(row + 1) * (scalar_count + 1)
    g = decode(stored_grad, grad).to(real) * (tl.load(scalars + scalar_count) * tl.load(control)).to(real)
    given = ()
    for i in tl.static_range(scalar_count):
        given = given + (tl.load(scalars + i).to(real),)
    values = ()
    for i in tl.static_range(count):
        place = _place(at, sizes, strides + (3 + i) * dims, dims)
        values = values + (_read_state(row, tables, i, start, place, mask, tl.constexpr(states[i]), aligned).to(real),)

    result = rule(p, g, *values, *given)

    p = result[0]
    words = random_words(at, tl.load(row + 2)) if stochastic else at
    if master == "low16" or master == "low8":
        high, low = split(p, words, master, stochastic)
        tl.store(param_at, high, mask)
        tl.store(master_at, low, mask)
    else:
        tl.store(param_at, encode_parameter(p, words, param, stochastic), mask)
        if master is not None:
            tl.store(master_at, p, mask)
    for i in tl.static_range(count):
        place = _place(at, sizes, strides + (3 + i) * dims, dims)
        _write_state(result[i + 1], row, tables, i, start, place, mask, tl.constexpr(states[i]), aligned)


# Not specialized on alignment either: they may lie anywhere.
@triton.jit(do_not_specialize=["table", "scalars", "tiles", "tables", "control"])
def fusedopt_step(
    table,
    scalars,
    tiles,
    tables,
    control,
    rule: tl.constexpr,
    param: tl.constexpr,
    grad: tl.constexpr,
    states: tl.constexpr,
    master: tl.constexpr,
    stochastic: tl.constexpr,
    aligned: tl.constexpr,
    dims: tl.constexpr,
    zero_grad: tl.constexpr,
    scalar_count: tl.constexpr,
):
    """One tile of one tensor. Whole tiles of tensors that lie in one piece are read and written without a mask."""
    tile = tl.program_id(0)
    words: tl.constexpr = 7 + 2 * len(states) + dims * (4 + len(states))
    row = table + tl.load(tiles + tile).to(tl.int64) * words
    numel = tl.load(row)
    start = (tile - tl.load(row + 3)) * (_ROWS * _BLOCK)
    at = start + tl.arange(0, _ROWS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    if tl.load(control + 1) == 0:
        if dims == 0:
            if start + _ROWS * _BLOCK <= numel:
                _update(
                    row, scalars, tables, control, start, at, None,
                    rule, param, grad, states, master, stochastic, aligned, dims, zero_grad, scalar_count,
                )  # fmt: skip
            else:
                _update(
                    row, scalars, tables, control, start, at, at < numel,
                    rule, param, grad, states, master, stochastic, aligned, dims, zero_grad, scalar_count,
                )  # fmt: skip
        else:
            _update(
                row, scalars, tables, control, start, at, at < numel,
                rule, param, grad, states, master, stochastic, aligned, dims, zero_grad, scalar_count,
            )  # fmt: skip


class Form(NamedTuple):
    """What one launch's tensors share, and one kernel is compiled for. Storage is by the names of csrc/codecs.h.

    aligned: every address is a multiple of 16 bytes. dims: of strided tensors, else 0. zero_grad: set gradients to 0.
    """

    rule: Rule
    param: str
    grad: str
    states: tuple[str, ...]
    master: str | None
    stochastic: bool
    aligned: bool
    dims: int
    zero_grad: bool = False

    def arguments(self) -> dict[str, object]:
        """The kernel's arguments from `rule` on."""
        return {**self._asdict(), "rule": self.rule.triton, "scalar_count": len(self.rule.scalars)}

    def options(self, amd: bool) -> dict[str, object]:
        """How it is compiled. Strided tensors need 64-bit divisions, and the registers of more threads for them."""
        options: dict[str, object] = {"num_warps": 8 if self.dims else 4, "enable_fp_fusion": False}
        # Left to itself, NVIDIA's assembler may spill to fit more threads in; Triton knows the option for it alone.
        return options if amd else {**options, "maxnreg": 255}
