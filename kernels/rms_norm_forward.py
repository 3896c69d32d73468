"""RMSNorm in Triton, forward: some rows of a tensor, in chunks of a power of two of their columns.

Only the last chunk may be ragged: no row is padded to a power of two. Rows that fit are kept in registers; longer ones
are read again, soon enough to be in the cache. Addresses and numbers are plain arguments of fixed types; no value but
the number of columns compiles anything.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from .codecs import decode, pointer
from .functions import divide, sqrt
from .rows import load, narrow, rounded, row_offset


@triton.jit
def ragged_mask(there, column, columns: tl.constexpr, ragged: tl.constexpr):
    """None where all is there."""
    if ragged:
        return there[:, None] & (column < columns)[None, :]
    elif there.shape[0] == 1:
        return None  # a single row is there
    else:
        return there[:, None]


@triton.jit
def number(value, real: tl.constexpr):
    """A double in the arithmetic type."""
    return tl.full([], value, tl.float64).to(real)


@triton.jit
def scale(stored, offset, storage: tl.constexpr, casting: tl.constexpr, real: tl.constexpr):
    """What columns are multiplied with. But for "gemma" torch adds the offset in the weight's dtype."""
    values = decode(stored, storage).to(real) + offset
    return values if casting == "gemma" else rounded(values, storage)


@triton.jit
def normalized(x, rstd, storage: tl.constexpr, casting: tl.constexpr):
    values = x * rstd[:, None]
    return values if casting == "gemma" else rounded(values, storage)


@triton.jit
def _squares(stored, storage: tl.constexpr, casting: tl.constexpr, real: tl.constexpr):
    x = decode(stored, storage).to(real)
    return rounded(x * x, storage) if casting == "none" else x * x


@triton.jit
def _rstd(squares, eps, columns: tl.constexpr, storage: tl.constexpr, casting: tl.constexpr):
    """1 / sqrt(mean + eps); "none" rounds the mean, the sum and the result."""
    mean = divide(tl.sum(squares, 1), tl.full([], columns, squares.dtype))
    if casting == "none":
        mean = rounded(mean, storage)
    shifted = mean + eps
    if casting == "none":
        shifted = rounded(shifted, storage)
    rstd = divide(tl.full(shifted.shape, 1, shifted.dtype), sqrt(shifted))
    return rounded(rstd, storage) if casting == "none" else rstd


@triton.jit
def _read(x, residual, column, mask, x_storage: tl.constexpr, residual_storage: tl.constexpr, real: tl.constexpr):
    """x, or its sum with the residual, as it is stored."""
    stored = load(x + column[None, :], mask)
    if residual_storage is not None:
        added = decode(load(residual + column[None, :], mask), residual_storage).to(real)
        stored = narrow(decode(stored, x_storage).to(real) + added, x_storage)
    return stored


@triton.jit
def _write(
    stored, rstd, weight, offset, y, column, mask,
    x_storage: tl.constexpr, weight_storage: tl.constexpr, result: tl.constexpr, y_storage: tl.constexpr,
    casting: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    values = normalized(decode(stored, x_storage).to(real), rstd, x_storage, casting)
    if weight_storage is not None:
        values *= scale(load(weight + column[None, :], mask), offset, weight_storage, casting, real)
    if result != y_storage:
        values = rounded(values, result)
    tl.store(y + column[None, :], narrow(values, y_storage), mask)


@triton.jit(
    do_not_specialize=[
        "x", "x_outer", "x_inner", "residual", "residual_outer", "residual_inner", "weight", "y", "total", "rstd",
        "rows", "inner", "eps", "offset",
    ]
)  # fmt: skip
def fusedopt_rms_norm(
    x: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    residual: tl.int64, residual_outer: tl.int64, residual_inner: tl.int64,
    weight: tl.int64, y: tl.int64, total: tl.int64, rstd: tl.int64, rows: tl.int64, inner: tl.int64,
    eps: tl.float64, offset: tl.float64,
    x_storage: tl.constexpr, residual_storage: tl.constexpr, weight_storage: tl.constexpr,
    result: tl.constexpr, y_storage: tl.constexpr, casting: tl.constexpr, double: tl.constexpr,
    columns: tl.constexpr, tile_rows: tl.constexpr, chunk: tl.constexpr, kept: tl.constexpr,
    nested: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Some rows. `result` is the storage that y is rounded to before its own."""
    real: tl.constexpr = tl.float64 if double else tl.float32
    eps, offset = number(eps, real), number(offset, real)
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    there = row < rows
    x = pointer(x, x_storage, aligned) + row_offset(row, inner, x_outer, x_inner, x_storage, nested, aligned)[:, None]
    if residual_storage is not None:
        total = pointer(total, x_storage, aligned) + row[:, None] * columns
        start = row_offset(row, inner, residual_outer, residual_inner, residual_storage, nested, aligned)
        residual = pointer(residual, residual_storage, aligned) + start[:, None]
    if weight_storage is not None:
        weight = pointer(weight, weight_storage, aligned) + tl.zeros([1, 1], tl.int32)
    y = pointer(y, y_storage, aligned) + row[:, None] * columns
    rstd = pointer(rstd, "float64" if double else "float32", False) + row

    squares = tl.zeros([tile_rows, chunk], real)
    if kept:
        found = ()
        for i in tl.static_range(tl.cdiv(columns, chunk)):
            column = i * chunk + tl.arange(0, chunk)
            mask = ragged_mask(there, column, columns, columns < (i + 1) * chunk)
            stored = _read(x, residual, column, mask, x_storage, residual_storage, real)
            if residual_storage is not None:
                tl.store(total + column[None, :], stored, mask)
            squares += _squares(stored, x_storage, casting, real)
            found = found + (stored,)
        inverse = _rstd(squares, eps, columns, x_storage, casting)
        for i in tl.static_range(tl.cdiv(columns, chunk)):
            column = i * chunk + tl.arange(0, chunk)
            mask = ragged_mask(there, column, columns, columns < (i + 1) * chunk)
            _write(
                found[i], inverse, weight, offset, y, column, mask,
                x_storage, weight_storage, result, y_storage, casting, real,
            )  # fmt: skip
    else:
        for start in tl.range(0, columns, chunk, num_stages=2):
            column = start + tl.arange(0, chunk)
            mask = ragged_mask(there, column, columns, columns % chunk != 0)
            stored = _read(x, residual, column, mask, x_storage, residual_storage, real)
            if residual_storage is not None:
                tl.store(total + column[None, :], stored, mask)
            squares += _squares(stored, x_storage, casting, real)
        inverse = _rstd(squares, eps, columns, x_storage, casting)
        for start in tl.range(0, columns, chunk, num_stages=2):
            column = start + tl.arange(0, chunk)
            mask = ragged_mask(there, column, columns, columns % chunk != 0)
            # Not the stored sum: another thread may have written it.
            stored = _read(x, residual, column, mask, x_storage, residual_storage, real)
            _write(
                stored, inverse, weight, offset, y, column, mask,
                x_storage, weight_storage, result, y_storage, casting, real,
            )  # fmt: skip
    tl.store(rstd, inverse, there)
