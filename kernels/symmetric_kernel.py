"""A grouped matrix product in Triton, beta A B + alpha C + diagonal I, of which half is computed where it is symmetric.

A program computes a tile of one matrix of one batch of one problem. It finds them by its number, in a table:

    firsts of each problem: its first tile
    row of each problem: rows, columns, depth, then of A, B, C and the result address, stride of the batch, stride

all int64. Along the other dimension the stride is 1. Addresses, strides and sizes are read from memory, and numbers are
plain arguments, so no value compiles anything.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from .codecs import decode, pointer
from .functions import sqrt
from .rows import INTERPRETED, load, narrow

_WORDS, _BAND = tl.constexpr(3 + 4 * 3), tl.constexpr(8)

# --- which tile ----------------------------------------------------------------------------------------------------
# Programs start in the order of their numbers, and those that run at a time should share rows of A and columns of B in
# the L2 cache. So tiles go column by column through bands of 8 rows: there 128 read 24 strips, in one row 129.


@triton.jit
def _problem(firsts, problems, tile):
    """That of a tile: the last that begins at it or before. A search would wait for one access after the other."""
    begun = tl.zeros([], tl.int32)
    for start in tl.range(0, problems, 128, num_stages=1):
        problem = start + tl.arange(0, 128)
        first = tl.load(firsts + problem, problem < problems, tile + 1)
        begun += tl.sum((first <= tile).to(tl.int32))
    return begun - 1


@triton.jit
def _before(band, across):
    """How many tiles of a triangle lie above a band."""
    row = band * _BAND
    return row * across - row * (row - 1) // 2


@triton.jit
def triangular(tile, across):
    """Row and column, of which none is below the diagonal, of a tile of a triangle `across` tiles wide."""
    # Row r begins at tile r (2 across - r + 1) / 2; solved for r. There the root is a whole number, and found: rounding
    # the square to float32 moves it by less than half its last digit. Just before, it may be rounded to the same one.
    # Below 23170 tiles, or a million rows and more, no square is past int32.
    side = 2 * across + 1
    row = (side.to(tl.float32) - sqrt((side * side - 8 * tile).to(tl.float32))) * 0.5
    band = row.to(tl.int32) // _BAND
    band -= (_before(band, across) > tile).to(tl.int32)
    top, inside = band * _BAND, tile - _before(band, across)
    height = tl.minimum(across - top, _BAND)
    # A band is a triangle, whose column c has c + 1 tiles, then a rectangle. Below 36 tiles the root is exact enough.
    peak = height * (height + 1) // 2
    column = ((sqrt((8 * inside + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    rest = tl.maximum(inside - peak, 0)
    row = tl.where(inside < peak, inside - column * (column + 1) // 2, rest % height)
    column = tl.where(inside < peak, column, height + rest // height)
    return top + row, top + column


@triton.jit
def rectangular(tile, down, across):
    """Row and column of a tile of a rectangle `down` times `across`."""
    top = tile // (_BAND * across) * _BAND
    inside = tile - top * across
    height = tl.minimum(down - top, _BAND)
    return top + inside % height, inside // height


# --- memory --------------------------------------------------------------------------------------------------------


@triton.jit
def _operand(address, storage: tl.constexpr, aligned: tl.constexpr):
    """As `pointer`, of what tensor cores take: integers would have to pass through registers on their way to them.

    The interpreter multiplies no bfloat16.
    """
    if INTERPRETED or storage == "float32":
        return pointer(address, storage, aligned)
    else:
        if storage == "bfloat16":
            found = address.to(tl.pointer_type(tl.bfloat16))
        else:
            found = address.to(tl.pointer_type(tl.float16))
        return tl.multiple_of(found, 16) if aligned else found


@triton.jit
def _multiplied(stored, storage: tl.constexpr):
    return decode(stored, storage) if INTERPRETED else stored


@triton.jit
def _multiple(number, storage: tl.constexpr, aligned: tl.constexpr):
    """A multiple of the elements of 16 bytes where `aligned`, said so that Triton knows of a number from memory."""
    if aligned:
        vector: tl.constexpr = 4 if storage == "float32" else 8
        return number // vector * vector
    else:
        return number


@triton.jit
def _matrix(
    words, place: tl.constexpr, matrix, row, column,
    storage: tl.constexpr, by_rows: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Address of a tensor's matrix, the offsets in it of rows and columns, and its stride."""
    address = tl.load(words + 3 + 3 * place)
    batch_stride = _multiple(tl.load(words + 4 + 3 * place), storage, aligned)
    stride = _multiple(tl.load(words + 5 + 3 * place), storage, aligned)
    if by_rows:
        offset = row[:, None] * stride + column[None, :]
    else:
        offset = row[:, None] + column[None, :] * stride
    return address, matrix * batch_stride + offset, stride


@triton.jit
def _inside(row, column, rows, columns, whole: tl.constexpr):
    if whole:
        return None
    else:
        return (row < rows)[:, None] & (column < columns)[None, :]


# --- the kernel ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table", "problems", "alpha", "beta", "diagonal"])
def fusedopt_product(
    table: tl.int64, problems: tl.int32, alpha: tl.float32, beta: tl.float32, diagonal: tl.float32,
    storage: tl.constexpr, symmetric: tl.constexpr, added: tl.constexpr,
    a_by_rows: tl.constexpr, b_by_rows: tl.constexpr, c_by_rows: tl.constexpr, out_by_rows: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
    aligned: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """One tile; of a symmetric product it is stored twice, mirrored too. Products are summed in float32.

    storage: of all. added: there is a C. by_rows: elements of a row lie side by side, else those of a column.
    aligned: all addresses, strides and sizes are multiples of 16 bytes.
    whole: no tile is ragged.
    """
    table = table.to(tl.pointer_type(tl.int64))
    tile = tl.program_id(0)
    problem = _problem(table, problems, tile)
    tile -= tl.load(table + problem).to(tl.int32)
    words = table + problems + problem * _WORDS
    rows = _multiple(tl.load(words).to(tl.int32), storage, aligned)
    columns = _multiple(tl.load(words + 1).to(tl.int32), storage, aligned)
    depth = _multiple(tl.load(words + 2).to(tl.int32), storage, aligned)
    down, across = tl.cdiv(rows, tile_rows), tl.cdiv(columns, tile_columns)
    if symmetric:
        tl.static_assert(tile_rows == tile_columns)
        count = across * (across + 1) // 2
        tile_row, tile_column = triangular(tile % count, across)
    else:
        count = down * across
        tile_row, tile_column = rectangular(tile % count, down, across)
    matrix = (tile // count).to(tl.int64)
    row = tile_row * tile_rows + tl.arange(0, tile_rows)
    column = tile_column * tile_columns + tl.arange(0, tile_columns)
    inner = tl.arange(0, tile_depth)

    a, a_at, a_stride = _matrix(words, 0, matrix, row, inner, storage, a_by_rows, aligned)
    b, b_at, b_stride = _matrix(words, 1, matrix, inner, column, storage, b_by_rows, aligned)
    a, b = _operand(a, storage, aligned) + a_at, _operand(b, storage, aligned) + b_at
    a_step = tile_depth if a_by_rows else tile_depth * a_stride
    b_step = tile_depth * b_stride if b_by_rows else tile_depth
    total = tl.zeros([tile_rows, tile_columns], tl.float32)
    for start in tl.range(0, depth, tile_depth):
        left = _multiplied(load(a, _inside(row, start + inner, rows, depth, whole)), storage)
        right = _multiplied(load(b, _inside(start + inner, column, depth, columns, whole)), storage)
        total = tl.dot(left, right, total, input_precision="ieee")
        a += a_step
        b += b_step

    mask = _inside(row, column, rows, columns, whole)
    values = beta * total
    if added:
        c, c_at, _ = _matrix(words, 2, matrix, row, column, storage, c_by_rows, aligned)
        values += alpha * decode(load(pointer(c, storage, aligned) + c_at, mask), storage)
    out, out_at, _ = _matrix(words, 3, matrix, row, column, storage, out_by_rows, aligned)
    out = pointer(out, storage, aligned)
    # All that is the diagonal's own is in one branch, which leaves the others the registers.
    if not symmetric:
        tl.store(out + out_at, narrow(values, storage), mask)
    elif tile_row == tile_column:
        stored = narrow(values + tl.where(row[:, None] == column[None, :], diagonal, 0.0), storage)
        # Below the diagonal products were summed in another order, or other products.
        tl.store(out + out_at, tl.where(row[:, None] <= column[None, :], stored, tl.trans(stored)), mask)
    else:
        stored = narrow(values, storage)
        tl.store(out + out_at, stored, mask)
        # Transposed in shared memory, so that the mirrored tile too is written 16 bytes at a time, side by side.
        _, mirrored_at, _ = _matrix(words, 3, matrix, column, row, storage, out_by_rows, aligned)
        tl.store(out + mirrored_at, tl.trans(stored), _inside(column, row, columns, rows, whole))
