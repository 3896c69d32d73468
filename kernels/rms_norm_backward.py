"""RMSNorm in Triton, backward.

A program takes every so many rows, a group, and sums their gradients of the weight. The groups are summed after that.
Their number depends on the shape alone and every sum has a fixed order: the bits are those of any GPU with as many
threads in a warp. Where not even the sums of a row fit in registers, programs share a row, and read it twice.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from .codecs import decode, pointer
from .functions import divide
from .rms_norm_forward import normalized, number, ragged_mask, scale
from .rows import load, narrow, row_offset


@triton.jit
def _scaled(
    grad, weight, offset,
    y_storage: tl.constexpr, weight_storage: tl.constexpr, casting: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    """The gradient of the normalized row; `weight` as it is stored."""
    values = decode(grad, y_storage).to(real)
    if weight_storage is not None:
        values *= scale(weight, offset, weight_storage, casting, real)
    return values


@triton.jit
def _grad_x(scaled, x, rstd, mean, added, x_storage: tl.constexpr, total_storage: tl.constexpr):
    values = (scaled - x * (rstd * mean)[:, None]) * rstd[:, None]
    if total_storage is not None:
        values += decode(added, total_storage).to(values.dtype)
    return narrow(values, x_storage)


@triton.jit(
    do_not_specialize=[
        "grad_y", "grad_y_outer", "grad_y_inner", "grad_total", "grad_total_outer", "grad_total_inner",
        "x", "x_outer", "x_inner", "weight", "rstd", "grad_x", "partial", "rows", "inner", "offset",
    ]
)  # fmt: skip
def fusedopt_rms_norm_backward(
    grad_y: tl.int64, grad_y_outer: tl.int64, grad_y_inner: tl.int64,
    grad_total: tl.int64, grad_total_outer: tl.int64, grad_total_inner: tl.int64,
    x: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    weight: tl.int64, rstd: tl.int64, grad_x: tl.int64, partial: tl.int64,
    rows: tl.int64, inner: tl.int64, offset: tl.float64,
    x_storage: tl.constexpr, total_storage: tl.constexpr, weight_storage: tl.constexpr, y_storage: tl.constexpr,
    casting: tl.constexpr, double: tl.constexpr, summed: tl.constexpr,
    columns: tl.constexpr, tile_rows: tl.constexpr, chunk: tl.constexpr, stages: tl.constexpr,
    nested: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """One group of rows: every so many of them, and the sum of their gradients of the weight.

    summed: whether that is wanted. stages: of the loop over rows; all but one are rows on their way.
    """
    real: tl.constexpr = tl.float64 if double else tl.float32
    chunks: tl.constexpr = tl.cdiv(columns, chunk)
    offset = number(offset, real)
    x = pointer(x, x_storage, aligned)
    grad_y = pointer(grad_y, y_storage, aligned)
    grad_x = pointer(grad_x, x_storage, aligned)
    rstd = pointer(rstd, "float64" if double else "float32", False)
    if total_storage is not None:
        grad_total = pointer(grad_total, total_storage, aligned)
    weights, sums = (), ()
    if weight_storage is not None:
        weight = pointer(weight, weight_storage, aligned) + tl.zeros([1, 1], tl.int32)
        everywhere = tl.full([tile_rows], True, tl.int1)
        for i in tl.static_range(chunks):
            column = i * chunk + tl.arange(0, chunk)
            here = ragged_mask(everywhere, column, columns, columns < (i + 1) * chunk)
            weights = weights + (load(weight + column[None, :], here),)
            if summed:
                sums = sums + (tl.zeros([tile_rows, chunk], real),)

    blocks = tl.cdiv(rows, tile_rows)
    for block in tl.range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0), num_stages=stages):
        row = block * tile_rows + tl.arange(0, tile_rows).to(tl.int64)
        there = row < rows
        inverse = tl.load(rstd + row, there, 0)
        x_row = x + row_offset(row, inner, x_outer, x_inner, x_storage, nested, aligned)[:, None]
        start = row_offset(row, inner, grad_y_outer, grad_y_inner, y_storage, nested, aligned)
        grad_y_row = grad_y + start[:, None]
        if total_storage is not None:
            start = row_offset(row, inner, grad_total_outer, grad_total_inner, total_storage, nested, aligned)
            grad_total_row = grad_total + start[:, None]
        products = tl.zeros([tile_rows, chunk], real)
        found, new_sums = (), ()
        for i in tl.static_range(chunks):
            column = i * chunk + tl.arange(0, chunk)
            mask = ragged_mask(there, column, columns, columns < (i + 1) * chunk)
            stored, grad = load(x_row + column[None, :], mask), load(grad_y_row + column[None, :], mask)
            weight_here = None if weight_storage is None else weights[i]
            values = decode(stored, x_storage).to(real)
            scaled = _scaled(grad, weight_here, offset, y_storage, weight_storage, casting, real)
            products += scaled * (values * inverse[:, None])
            if summed:
                product = decode(grad, y_storage).to(real) * normalized(values, inverse, x_storage, casting)
                new_sums = new_sums + (sums[i] + product,)
            found = found + ((stored, grad),)
        sums = new_sums
        mean = divide(tl.sum(products, 1), tl.full([], columns, real))
        for i in tl.static_range(chunks):
            column = i * chunk + tl.arange(0, chunk)
            mask = ragged_mask(there, column, columns, columns < (i + 1) * chunk)
            stored, grad = found[i]
            weight_here = None if weight_storage is None else weights[i]
            added = None if total_storage is None else load(grad_total_row + column[None, :], mask)
            scaled = _scaled(grad, weight_here, offset, y_storage, weight_storage, casting, real)
            result = _grad_x(scaled, decode(stored, x_storage).to(real), inverse, mean, added, x_storage, total_storage)
            tl.store(grad_x + row[:, None] * columns + column[None, :], result, mask)

    if summed:
        start = tl.program_id(0).to(tl.int64) * columns
        partial = pointer(partial, "float64" if double else "float32", aligned) + start
        for i in tl.static_range(chunks):
            column = i * chunk + tl.arange(0, chunk)
            tl.store(partial + column, tl.sum(sums[i], 0), column < columns)


@triton.jit(
    do_not_specialize=[
        "grad_y", "grad_y_outer", "grad_y_inner", "x", "x_outer", "x_inner", "weight", "rstd", "means", "inner",
        "offset",
    ]
)  # fmt: skip
def fusedopt_rms_norm_means(
    grad_y: tl.int64, grad_y_outer: tl.int64, grad_y_inner: tl.int64, x: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    weight: tl.int64, rstd: tl.int64, means: tl.int64, inner: tl.int64, offset: tl.float64,
    x_storage: tl.constexpr, weight_storage: tl.constexpr, y_storage: tl.constexpr,
    casting: tl.constexpr, double: tl.constexpr, columns: tl.constexpr, chunk: tl.constexpr,
    nested: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Of one row that is too long for registers: the mean that its gradient takes."""
    real: tl.constexpr = tl.float64 if double else tl.float32
    offset = number(offset, real)
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    there = row >= 0
    inverse = tl.load(pointer(rstd, "float64" if double else "float32", False) + row)
    x = pointer(x, x_storage, aligned) + row_offset(row, inner, x_outer, x_inner, x_storage, nested, aligned)[:, None]
    start = row_offset(row, inner, grad_y_outer, grad_y_inner, y_storage, nested, aligned)
    grad_y = pointer(grad_y, y_storage, aligned) + start[:, None]
    if weight_storage is not None:
        weight = pointer(weight, weight_storage, aligned) + tl.zeros([1, 1], tl.int32)
    products = tl.zeros([1, chunk], real)
    for first in tl.range(0, columns, chunk, num_stages=2):
        column = first + tl.arange(0, chunk)
        mask = ragged_mask(there, column, columns, columns % chunk != 0)
        weight_here = None if weight_storage is None else load(weight + column, mask)
        grad = load(grad_y + column[None, :], mask)
        scaled = _scaled(grad, weight_here, offset, y_storage, weight_storage, casting, real)
        products += scaled * (decode(load(x + column[None, :], mask), x_storage).to(real) * inverse[:, None])
    mean = divide(tl.sum(products, 1), tl.full([], columns, real))
    tl.store(pointer(means, "float64" if double else "float32", False) + row, mean)


@triton.jit(
    do_not_specialize=[
        "grad_y", "grad_y_outer", "grad_y_inner", "grad_total", "grad_total_outer", "grad_total_inner",
        "x", "x_outer", "x_inner", "weight", "rstd", "means", "grad_x", "partial", "rows", "inner", "offset",
    ]
)  # fmt: skip
def fusedopt_rms_norm_backward_of_long_rows(
    grad_y: tl.int64, grad_y_outer: tl.int64, grad_y_inner: tl.int64,
    grad_total: tl.int64, grad_total_outer: tl.int64, grad_total_inner: tl.int64,
    x: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    weight: tl.int64, rstd: tl.int64, means: tl.int64, grad_x: tl.int64, partial: tl.int64,
    rows: tl.int64, inner: tl.int64, offset: tl.float64,
    x_storage: tl.constexpr, total_storage: tl.constexpr, weight_storage: tl.constexpr, y_storage: tl.constexpr,
    casting: tl.constexpr, double: tl.constexpr, summed: tl.constexpr, columns: tl.constexpr, chunk: tl.constexpr,
    nested: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """Some columns of one group of rows, of which the means are known."""
    real: tl.constexpr = tl.float64 if double else tl.float32
    offset = number(offset, real)
    column = tl.program_id(0) * chunk + tl.arange(0, chunk)
    x = pointer(x, x_storage, aligned) + column[None, :]
    grad_y = pointer(grad_y, y_storage, aligned) + column[None, :]
    grad_x = pointer(grad_x, x_storage, aligned) + column[None, :]
    if total_storage is not None:
        grad_total = pointer(grad_total, total_storage, aligned) + column[None, :]
    rstd = pointer(rstd, "float64" if double else "float32", False)
    means = pointer(means, "float64" if double else "float32", False)
    mask = ragged_mask(tl.full([1], True, tl.int1), column, columns, columns % chunk != 0)
    weight_here = None
    if weight_storage is not None:
        weight_here = load(pointer(weight, weight_storage, aligned) + column[None, :], mask)
    sums = tl.zeros([1, chunk], real)
    for at in tl.range(tl.program_id(1).to(tl.int64), rows, tl.num_programs(1), num_stages=3):
        row = at + tl.zeros([1], tl.int64)
        inverse, mean = tl.load(rstd + row), tl.load(means + row)
        start = row_offset(row, inner, x_outer, x_inner, x_storage, nested, aligned)
        values = decode(load(x + start[:, None], mask), x_storage).to(real)
        start = row_offset(row, inner, grad_y_outer, grad_y_inner, y_storage, nested, aligned)
        grad = load(grad_y + start[:, None], mask)
        added = None
        if total_storage is not None:
            start = row_offset(row, inner, grad_total_outer, grad_total_inner, total_storage, nested, aligned)
            added = load(grad_total + start[:, None], mask)
        scaled = _scaled(grad, weight_here, offset, y_storage, weight_storage, casting, real)
        result = _grad_x(scaled, values, inverse, mean, added, x_storage, total_storage)
        tl.store(grad_x + row[:, None] * columns, result, mask)
        sums += decode(grad, y_storage).to(real) * normalized(values, inverse, x_storage, casting)
    if summed:
        start = tl.program_id(1).to(tl.int64) * columns
        tl.store(pointer(partial, "float64" if double else "float32", aligned) + start + column[None, :], sums, mask)


@triton.jit(do_not_specialize=["partial", "groups", "columns", "grad_weight"])
def fusedopt_rms_norm_grad_weight(
    partial: tl.int64, groups: tl.int64, columns: tl.int64, grad_weight: tl.int64,
    storage: tl.constexpr, double: tl.constexpr,
):  # fmt: skip
    """The sums of some columns over the groups."""
    column = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    partial = pointer(partial, "float64" if double else "float32", False)
    sums = tl.zeros([64, 32], tl.float64 if double else tl.float32)
    for start in range(0, groups, 64):
        group = start + tl.arange(0, 64).to(tl.int64)
        there = (group < groups)[:, None] & (column < columns)[None, :]
        sums += tl.load(partial + group[:, None] * columns + column[None, :], there, 0)
    tl.store(pointer(grad_weight, storage, False) + column, narrow(tl.sum(sums, 0), storage), column < columns)
