"""How a tensor is stored: a tile of elements read into float32 (or float64) and written back, in Triton.

The reference is fusedopt/codecs.py; both give the same bits. A tile is (rows, 256): a row is a block of an 8-bit state.
Storage formats have the names of csrc/codecs.h. Floats of 16 bits are read and written as bits, in integers: the
interpreter's own conversion to bfloat16 truncates.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from fusedopt.codecs import DynamicMap, magnitudes

FLOATS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
MASTERS = {torch.float32: "float32", torch.int16: "low16", torch.int8: "low8"}
"""The storage of a parameter, gradient or state by dtype, and of a master copy."""


@triton.jit
def pointer(address, storage: tl.constexpr, aligned: tl.constexpr):
    """`address`, an integer, as that of elements; `aligned` says that it is a multiple of 16 bytes."""
    if storage == "float32":
        found = address.to(tl.pointer_type(tl.float32))
    elif storage == "float64":
        found = address.to(tl.pointer_type(tl.float64))
    elif storage == "low16":
        found = address.to(tl.pointer_type(tl.int16))
    elif storage == "low8":
        found = address.to(tl.pointer_type(tl.int8))
    elif storage == "int8_signed" or storage == "int8_unsigned":
        found = address.to(tl.pointer_type(tl.uint8))
    else:
        tl.static_assert(storage == "bfloat16" or storage == "float16")
        found = address.to(tl.pointer_type(tl.uint16))
    return tl.multiple_of(found, 16) if aligned else found


@triton.jit
def decode(stored, storage: tl.constexpr):
    """Stored elements as float32, of float64 as float64."""
    if storage == "bfloat16":
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif storage == "float16":
        return stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@triton.jit
def encode(values, storage: tl.constexpr):
    """Elements to store, rounded to nearest, ties to even; double goes through float32 to the narrower formats."""
    if storage == "float64":
        return values.to(tl.float64)
    elif storage == "bfloat16":
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, rounded) >> 16).to(tl.uint16)
    elif storage == "float16":
        return values.to(tl.float32).to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        return values.to(tl.float32)


# --- 8 bits --------------------------------------------------------------------------------------------------------
# By tables in device memory, which stay in L1. Selecting among constants instead takes twice the instructions.


def tables(map: DynamicMap) -> torch.Tensor:
    """A map's value, threshold, offset, steepness and last, one after the other: float32, `TABLES` long.

    value: of each code. threshold: from which magnitude on the row is the next; row 8 shares the entry of row 0.
    offset, steepness, last: k = round((x - offset) * steepness), at most last. Rows 0 and 8 hold one number each, 0
    and 1; the line through both serves them.
    """
    value, first, top = magnitudes(map), torch.tensor(map.first[1:]), map.first[-1]
    values = torch.cat([-value[1 : map.zero + 1].flip(0), value])
    threshold = (value[first - 1] + value[first]) * 0.5
    offset = torch.tensor([0.0, *map.offset[1:-1]])
    steepness = torch.cat([torch.tensor([float(top)]), 1 / torch.tensor(map.slope[1:-1])])
    last = torch.tensor([top, *map.last[1:-1]]).float()
    return torch.cat([values, threshold, offset, steepness, last])


TABLES = tl.constexpr(256 + 4 * 8)


@triton.jit
def decode_int8(codes, scale, table):
    """The values of codes, whose rows have the scales `scale`."""
    return tl.load(table + codes.to(tl.int32)) * scale[:, None]


@triton.jit
def encode_int8(values, mask, table, signed: tl.constexpr):
    """Codes, and the scale of each row; elements outside of `mask` do not count."""
    values = values.to(tl.float32)
    if mask is not None:
        values = tl.where(mask, values, 0.0)
    # By their bits infinity is larger than any number, and NaN larger still.
    scale = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale = tl.where(scale < 2.0**-126, 0.0, scale)
    scale = tl.where(scale < float("inf"), scale, float("nan"))
    one = tl.full(scale.shape, 1, tl.float32)
    inverse = tl.where(scale > 0, tl.div_rn(one, tl.where(scale > 0, scale, one)), 0.0)
    # Negated where signed, since a signed byte holds -128 and not 128.
    x = values * (-inverse if signed else inverse)[:, None]
    # From 2^-23 on a row is guessed from the bits, nearly a logarithm: times 158 / 2^32 they count decades. Modulo 8
    # the guess is the row or the one before. Below there is only row 0. NaN counts as 0.
    size = tl.maximum(tl.abs(x) if signed else x, 2.0**-23)
    row = tl.umulhi(size.to(tl.uint32, bitcast=True), 158).to(tl.int32)
    row = (row + (size >= tl.load(table + 256 + (row & 7))).to(tl.int32)) & 7
    k = (size - tl.load(table + 264 + row)) * tl.load(table + 272 + row)
    # Thresholds are high enough for k to reach the row's first.
    k = tl.minimum(k, tl.load(table + 280 + row))
    if signed:
        k = (k.to(tl.int32, bitcast=True) ^ (x.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)
        k = tl.minimum(k, 127.0)
    # Adding 1.5 * 2^23 leaves no bits for a fraction, and the whole number in the last ones.
    code = (k + 12582912.0).to(tl.int32, bitcast=True)
    return (code ^ 127 if signed else code).to(tl.uint8), scale


# --- parameters ----------------------------------------------------------------------------------------------------


@triton.jit
def _mixed(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def random_words(index, key):
    """32 random bits for each row-major index; the key's two words are the halves of an int64."""
    first, second = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    word = index.to(tl.uint32) + first + (index >> 32).to(tl.uint32) * 0x9E3779B9
    return _mixed(_mixed(word) + second)


@triton.jit
def decode_parameter(stored, master, param: tl.constexpr, kind: tl.constexpr):
    """The parameter with what its master copy of storage `kind` knows beyond its own bits.

    A float32 master of which the parameter is not the rounded form is out of date: then the parameter counts. The bits
    of a split are not let through zero or infinity, beyond which lies NaN.
    """
    values = decode(stored, param)
    if kind == "float32":
        return tl.where(decode(encode(master, param), param) == values, master, values)
    elif kind == "low16" or kind == "low8":
        low = master.to(tl.int32)
        bits = values.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        beyond = ((magnitude == 0) & (low < 0)) | ((magnitude == 0x7F800000) & (low > 0))
        low = tl.where(beyond, 0, low << (0 if kind == "low16" else 8))
        return (bits + low).to(tl.float32, bitcast=True)
    else:
        return values


@triton.jit
def encode_parameter(values, words, param: tl.constexpr, stochastic: tl.constexpr):
    """A parameter without a split, rounded to nearest or by random `words`."""
    nearest = encode(values, param)
    if stochastic:
        bits = values.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Up with the probability of the dropped bits; from the largest finite number on to nearest.
        if param == "bfloat16":
            return tl.where(magnitude < 0x7F7F0000, ((bits + (words & 0xFFFF)) >> 16).to(tl.uint16), nearest)
        else:
            normal = (magnitude - 0x38000000 + (words & 0x1FFF)) >> 13
            # Subnormal halves are the multiples of 2^-24.
            multiple = tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True) * 2.0**24
            whole = multiple.to(tl.int32)
            up = multiple - whole.to(tl.float32) > (words >> 8).to(tl.int32).to(tl.float32) * 2.0**-24
            half = tl.where(magnitude < 0x38800000, (whole + up.to(tl.int32)).to(tl.uint32), normal)
            half = (half | ((bits >> 16) & 0x8000)).to(tl.uint16)
            return tl.where(magnitude < 0x477FE000, half, nearest)
    else:
        return nearest


@triton.jit
def split(values, words, low: tl.constexpr, stochastic: tl.constexpr):
    """bfloat16 and the next 16 or 8 bits.

    The upper part is rounded with ties away from zero, since the lower part, a signed number, holds -2^15 and not 2^15.
    """
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    width: tl.constexpr = 16 if low == "low16" else 8
    if low == "low8":
        nearest = bits + 0x7F + ((bits >> 8) & 1)
        if stochastic:
            nearest = tl.where(magnitude < 0x7F7FFF00, bits + (words & 0xFF), nearest)
        bits = nearest >> 8
    high = (bits + (1 << (width - 1))) >> width
    rest = bits - (high << width)
    is_nan = magnitude > 0x7F800000
    rest = tl.where(is_nan, 0, rest).to(tl.int16 if low == "low16" else tl.int8)
    return tl.where(is_nan, 0x7FC0, high).to(tl.uint16), rest
