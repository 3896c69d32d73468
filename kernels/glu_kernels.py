"""Gated linear units in Triton: an activation of one tensor times another, forward and backward, in one pass each.

It computes in float32 (of float64 in float64) and rounds once. Addresses, sizes and strides are plain arguments of
fixed types: no value compiles anything.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

import math

import triton
import triton.language as tl

from .codecs import decode, pointer
from .functions import divide
from .rows import load, narrow

_SQRT_HALF, _SQRT_2_OVER_PI = tl.constexpr(math.sqrt(0.5)), tl.constexpr(math.sqrt(2 / math.pi))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
_LOG2_E, _CUBIC, _OAI = tl.constexpr(math.log2(math.e)), tl.constexpr(0.044715), tl.constexpr(1.702)
# ln 2 in two parts. The first has 15 bits, so that its product with a whole number below 2^9 is exact.
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(math.log(2) - 0.693145751953125)

# --- mathematics ---------------------------------------------------------------------------------------------------


@triton.jit
def exp(x, narrow: tl.constexpr):
    """Of float32 within 2 units in the last place; 0 below -87, infinite above 88.3.

    `narrow`: the result is rounded to 16 bits. Then the GPU's own serves, with an error of up to |x| / 2^24.
    """
    if narrow or x.dtype == tl.float64:
        return tl.exp(x)
    else:
        near = tl.minimum(tl.maximum(x, -87.0), 89.0)
        # Adding 1.5 * 2^23 leaves no bits for a fraction.
        whole = (near * _LOG2_E + 12582912.0) - 12582912.0
        r = (near - whole * _LN2_HIGH) - whole * _LN2_LOW
        # Taylor's series; the first term left out is below 2^-27 of the sum.
        series = r * (1 / 5040) + 1 / 720
        series = series * r + 1 / 120
        series = series * r + 1 / 24
        series = series * r + 1 / 6
        series = series * r + 1 / 2
        series = series * (r * r) + r + 1
        power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(x < -87.0, 0.0, series * power)


@triton.jit
def sigmoid(x, narrow: tl.constexpr):
    one = tl.full([], 1, x.dtype)
    below = one + exp(-x, narrow)
    return one / below if narrow else divide(one, below)


@triton.jit
def _times(x, factor: tl.constexpr):
    """Of float64 with a factor in float64."""
    return x * tl.full([], factor, x.dtype)


@triton.jit
def _relu(x):
    return tl.where(x <= 0, tl.zeros_like(x), x)  # so that NaN stays


@triton.jit
def activation(x, kind: tl.constexpr, narrow: tl.constexpr):
    """The activation of the gate, and its derivative."""
    one = tl.full([], 1, x.dtype)
    if kind == "reglu":
        return _relu(x), tl.where(x <= 0, tl.zeros_like(x), one)
    elif kind == "relu2":
        return _relu(x) * _relu(x), _relu(x) + _relu(x)
    elif kind == "geglu":
        below = _times(one + tl.erf(_times(x, _SQRT_HALF)), 0.5)
        density = _times(exp(_times(x * x, -0.5), narrow), _DENSITY)
        return x * below, below + x * density
    elif kind == "geglu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), which loses no digits where u is far below 0.
        inner = _times(x + _times(x * x * x, _CUBIC), 2 * _SQRT_2_OVER_PI)
        slope = _times(one + _times(x * x, 3 * _CUBIC), 2 * _SQRT_2_OVER_PI)
        s = sigmoid(inner, narrow)
        return x * s, s + x * s * (one - s) * slope
    else:
        tl.static_assert(kind == "swiglu" or kind == "swiglu_oai")
        steep = _times(x, _OAI) if kind == "swiglu_oai" else x
        s = sigmoid(steep, narrow)
        return x * s, s * (one + steep * (one - s))


@triton.jit
def _clamped(gate, up, limit, kind: tl.constexpr):
    """gpt-oss clamps both and adds 1 to up. NaN stays."""
    if kind == "swiglu_oai":
        limit = tl.full([], limit, tl.float64).to(gate.dtype)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + tl.full([], 1, up.dtype)
    return gate, up


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _inputs(
    gate, up, gate_at, up_at, mask, pair_mask, limit,
    storage: tl.constexpr, kind: tl.constexpr, pairs: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    """Gate and up as they are multiplied, and as they were before they were clamped."""
    if pairs:
        both = load(gate + gate_at, pair_mask)
        gate, up = tl.split(tl.reshape(both, [both.shape[0], both.shape[1] // 2, 2]))
    else:
        gate = load(gate + gate_at, mask)
        up = gate if kind == "relu2" else load(up + up_at, mask)
    gate, up = decode(gate, storage).to(real), decode(up, storage).to(real)
    clamped_gate, clamped_up = _clamped(gate, up, limit, kind)
    return clamped_gate, clamped_up, gate, up


@triton.jit
def _forward(
    gate, up, y, gate_at, up_at, y_at, mask, pair_mask, limit,
    storage: tl.constexpr, kind: tl.constexpr, pairs: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    g, u, _, _ = _inputs(gate, up, gate_at, up_at, mask, pair_mask, limit, storage, kind, pairs, real)
    values, _ = activation(g, kind, storage != "float32")
    if kind != "relu2":
        values *= u
    tl.store(y + y_at, narrow(values, storage), mask)


@triton.jit
def _backward(
    grad_y, gate, up, grad_gate, grad_up, grad_y_at, gate_at, up_at, grad_gate_at, grad_up_at, mask, pair_mask, limit,
    storage: tl.constexpr, kind: tl.constexpr, pairs: tl.constexpr, grad_pairs: tl.constexpr, real: tl.constexpr,
):  # fmt: skip
    g, u, raw_gate, raw_up = _inputs(gate, up, gate_at, up_at, mask, pair_mask, limit, storage, kind, pairs, real)
    grad = decode(load(grad_y + grad_y_at, mask), storage).to(real)
    values, slope = activation(g, kind, storage != "float32")
    if kind == "relu2":
        tl.store(grad_gate + grad_gate_at, narrow(grad * slope, storage), mask)
    else:
        of_gate, of_up = grad * u * slope, grad * values
        if kind == "swiglu_oai":
            limit = tl.full([], limit, tl.float64).to(real)
            of_gate = tl.where(raw_gate <= limit, of_gate, tl.zeros_like(of_gate))
            of_up = tl.where((raw_up <= limit) & (raw_up >= -limit), of_up, tl.zeros_like(of_up))
        of_gate, of_up = narrow(of_gate, storage), narrow(of_up, storage)
        if grad_pairs:
            tl.store(grad_gate + grad_gate_at, tl.reshape(tl.join(of_gate, of_up), grad_gate_at.shape), pair_mask)
        else:
            tl.store(grad_gate + grad_gate_at, of_gate, mask)
            tl.store(grad_up + grad_up_at, of_up, mask)


@triton.jit
def _multiple(number, storage: tl.constexpr):
    """A multiple of the elements of 16 bytes, said so that Triton knows; `tl.multiple_of` does nothing to arguments."""
    vector: tl.constexpr = 2 if storage == "float64" else (4 if storage == "float32" else 8)
    return number // vector * vector


@triton.jit
def _columns(tile, width: tl.constexpr, pairs: tl.constexpr):
    """Those of a tile, of pairs twice as many."""
    count: tl.constexpr = 2 * width if pairs else width
    return tile * count + tl.arange(0, count)


@triton.jit
def _offsets(row, column, row_stride, step: tl.constexpr, storage: tl.constexpr, aligned: tl.constexpr):
    if aligned:
        row_stride = _multiple(row_stride, storage)
    return (row * row_stride)[:, None] + (column * step)[None, :]


@triton.jit
def _inside(row, column, rows, columns, storage: tl.constexpr, even: tl.constexpr):
    if even:
        columns = _multiple(columns, storage)
    return (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit(
    do_not_specialize=[
        "gate", "gate_stride", "up", "up_stride", "y", "y_stride", "rows", "columns", "across", "limit",
    ]
)  # fmt: skip
def fusedopt_glu(
    gate: tl.int64, gate_stride: tl.int64, up: tl.int64, up_stride: tl.int64, y: tl.int64, y_stride: tl.int64,
    rows: tl.int64, columns: tl.int64, across: tl.int64, limit: tl.float64,
    storage: tl.constexpr, kind: tl.constexpr, gate_step: tl.constexpr, up_step: tl.constexpr, pairs: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, even: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """One tile, of `across` beside each other. Whole ones are read and written without a mask."""
    real: tl.constexpr = tl.float64 if storage == "float64" else tl.float32
    gate, up, y = pointer(gate, storage, aligned), pointer(up, storage, aligned), pointer(y, storage, aligned)
    tile = tl.program_id(0).to(tl.int64)
    row = tile // across * tile_rows + tl.arange(0, tile_rows)
    column = _columns(tile % across, tile_columns, False)
    gate_at = _offsets(
        row, _columns(tile % across, tile_columns, pairs), gate_stride, 1 if pairs else gate_step, storage, aligned
    )  # fmt: skip
    up_at = _offsets(row, column, up_stride, up_step, storage, aligned)
    y_at = _offsets(row, column, y_stride, 1, storage, aligned)
    if ((tile // across + 1) * tile_rows <= rows) & ((tile % across + 1) * tile_columns <= columns):
        _forward(gate, up, y, gate_at, up_at, y_at, None, None, limit, storage, kind, pairs, real)
    else:
        mask = _inside(row, column, rows, columns, storage, even)
        both = _columns(tile % across, tile_columns, True)
        pair_mask = _inside(row, both, rows, 2 * columns, storage, even)
        _forward(gate, up, y, gate_at, up_at, y_at, mask, pair_mask, limit, storage, kind, pairs, real)


@triton.jit(
    do_not_specialize=[
        "grad_y", "grad_y_stride", "gate", "gate_stride", "up", "up_stride", "grad_gate", "grad_gate_stride",
        "grad_up", "grad_up_stride", "rows", "columns", "across", "limit",
    ]
)  # fmt: skip
def fusedopt_glu_backward(
    grad_y: tl.int64, grad_y_stride: tl.int64, gate: tl.int64, gate_stride: tl.int64, up: tl.int64, up_stride: tl.int64,
    grad_gate: tl.int64, grad_gate_stride: tl.int64, grad_up: tl.int64, grad_up_stride: tl.int64,
    rows: tl.int64, columns: tl.int64, across: tl.int64, limit: tl.float64,
    storage: tl.constexpr, kind: tl.constexpr, gate_step: tl.constexpr, up_step: tl.constexpr, pairs: tl.constexpr,
    grad_gate_step: tl.constexpr, grad_up_step: tl.constexpr, grad_pairs: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, even: tl.constexpr, aligned: tl.constexpr,
):  # fmt: skip
    """As `fusedopt_glu`."""
    real: tl.constexpr = tl.float64 if storage == "float64" else tl.float32
    gate, up, grad_y = pointer(gate, storage, aligned), pointer(up, storage, aligned), pointer(grad_y, storage, aligned)
    grad_gate, grad_up = pointer(grad_gate, storage, aligned), pointer(grad_up, storage, aligned)
    tile = tl.program_id(0).to(tl.int64)
    row = tile // across * tile_rows + tl.arange(0, tile_rows)
    column = _columns(tile % across, tile_columns, False)
    grad_y_at = _offsets(row, column, grad_y_stride, 1, storage, aligned)
    gate_at = _offsets(
        row, _columns(tile % across, tile_columns, pairs), gate_stride, 1 if pairs else gate_step, storage, aligned
    )  # fmt: skip
    up_at = _offsets(row, column, up_stride, up_step, storage, aligned)
    grad_gate_at = _offsets(
        row, _columns(tile % across, tile_columns, grad_pairs), grad_gate_stride, 1 if grad_pairs else grad_gate_step,
        storage, aligned,
    )  # fmt: skip
    grad_up_at = _offsets(row, column, grad_up_stride, grad_up_step, storage, aligned)
    if ((tile // across + 1) * tile_rows <= rows) & ((tile % across + 1) * tile_columns <= columns):
        _backward(
            grad_y, gate, up, grad_gate, grad_up, grad_y_at, gate_at, up_at, grad_gate_at, grad_up_at,
            None, None, limit, storage, kind, pairs, grad_pairs, real,
        )  # fmt: skip
    else:
        mask = _inside(row, column, rows, columns, storage, even)
        both = _columns(tile % across, tile_columns, True)
        pair_mask = _inside(row, both, rows, 2 * columns, storage, even)
        _backward(
            grad_y, gate, up, grad_gate, grad_up, grad_y_at, gate_at, up_at, grad_gate_at, grad_up_at,
            mask, pair_mask, limit, storage, kind, pairs, grad_pairs, real,
        )  # fmt: skip
