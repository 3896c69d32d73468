"""How a tensor is stored: the reference form of every storage format. csrc/ gives the same bits.

States are stored in a floating dtype or in 8 bits (`Codes`), parameters in a floating dtype with or without a master
copy (`MASTERS`). What is read is float32 (float64 for float64 parameters), and so is what a rule gives back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STATE_DTYPES = (None, "float32", "bfloat16", "int8")
"""What `state_dtype` may be; None is torch's own choice, the parameter's dtype."""

STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

SCALE_SUFFIX = "_scale"
"""A state NAME in 8 bits is kept as NAME, the codes, and NAME_scale."""


def state_dtype(option: str | None, kind: str, param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state of `kind` "signed" or "unsigned" under the optimizer's `state_dtype` option.

    An unsigned state (a second moment) stays float32 under "bfloat16": with eight bits of mantissa an average at
    beta = 0.999 never decays. Complex parameters keep complex state. uint8 stands for `Codes`.
    """
    if param_dtype.is_complex:
        return torch.complex64 if option == "float32" else param_dtype
    if option is None:
        return param_dtype
    if option == "int8":
        return torch.uint8
    return torch.bfloat16 if option == "bfloat16" and kind == "signed" else torch.float32


# --- 8 bits --------------------------------------------------------------------------------------------------------
# Dynamic block-wise quantization (Dettmers, arXiv:1511.04561; Dettmers et al., arXiv:2110.02861), with the codes of
# bitsandbytes. Every 256 elements in row-major order are a block, the last one may be shorter, and a block has a
# scale, its absolute maximum. A code stands for a multiple in [-1, 1] of the scale. The magnitudes lie in seven
# decades, 1e-6 to 1, each with twice as many as the one below, evenly spaced; and 0; and 1.

BLOCK = 256


@dataclass(frozen=True)
class DynamicMap:
    """A map between codes and multiples of the scale, stated by the magnitude's index k.

    k counts the magnitudes from 0. In row r, the decade, k stands for `slope[r] * k + offset[r]`, which is one fused
    multiply-add. Row 0 is the number 0, row 8 the number 1. A code is `zero + k`, for a negative number `zero - k`.
    """

    zero: int
    first: tuple[int, ...]  # k at which a row begins
    slope: tuple[float, ...]
    offset: tuple[float, ...]

    @property
    def last(self) -> tuple[int, ...]:
        return (*(first - 1 for first in self.first[1:]), self.first[-1])


# The slopes and offsets are those of the decades, 10^(i-6) * (0.1 + 0.9 * (j + 1/2) / n) of n values. As float32 they
# give bitsandbytes' values, which are not evenly spaced in float32, within 4 units in the last place; two offsets of
# the unsigned map are one unit off for that.
SIGNED = DynamicMap(
    zero=127,
    first=(0, 1, 2, 4, 8, 16, 32, 64, 128),
    slope=(0.0, 9e-07, 4.5e-06, 2.25e-05, 0.0001125, 0.0005625, 0.0028125, 0.0140625, 0.0),
    offset=(0.0, -3.5e-07, -5.75e-06, -6.875e-05, -0.00074375, -0.00771875, -0.07859375, -0.79296875, 1.0),
)
UNSIGNED = DynamicMap(
    zero=0,
    first=(0, 1, 3, 7, 15, 31, 63, 127, 255),
    slope=(0.0, 4.5e-07, 2.25e-06, 1.125e-05, 5.625e-05, 0.00028125, 0.00140625, 0.00703125, 0.0),
    offset=(0.0, -1.25e-07, -4.625e-06, -6.3125e-05, -0.000715625, -0.0075781248, -0.077890625, -0.78945309, 1.0),
)


class Codes(NamedTuple):
    """A state in 8 bits.

    codes: uint8, of the parameter's shape.
    scale: float32, contiguous, one for each block and perhaps unused ones after them; NaN where the block held NaN or
        infinity, and then all of it reads as NaN.
    """

    codes: Tensor
    scale: Tensor
    map: DynamicMap


def map_of(kind: str) -> DynamicMap:
    """The map of a state of `kind` "signed" or "unsigned"."""
    return {"signed": SIGNED, "unsigned": UNSIGNED}[kind]


def blocks(numel: int) -> int:
    """How many scales `numel` elements have."""
    return -(-numel // BLOCK)


def magnitudes(map: DynamicMap) -> Tensor:
    """The magnitude of every k, float32."""
    with torch.device("cpu"):
        k = torch.arange(map.first[-1] + 1)
        row = torch.bucketize(k, torch.tensor(map.first[1:]), right=True)
        slope, offset = (torch.tensor(values, dtype=torch.float32).double() for values in (map.slope, map.offset))
    # Exact in double, so that rounding to float32 is the only rounding, as of a fused multiply-add.
    return (slope[row] * k + offset[row]).float()


def quantize(values: Tensor, stored: Codes) -> None:
    """Write float32 `values` as codes and scales, in place.

    A block whose absolute maximum is below 2^-126, the smallest normal float32, counts as zero. One with NaN or
    infinity gets the scale NaN: it is lost, and seen to be, and no other block is. Of a magnitude x in [0, 1], the
    element times the reciprocal of the scale, the row is that of the thresholds between rows, and in it k is
    `round((x - offset) * (1 / slope))`, kept within the row. That is the nearest magnitude, or at x within 3e-6 of the
    middle of two the other one.
    """
    flat = values.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = padded.abs().amax(1)  # NaN where there is one
    scale = torch.where(scale < 2.0**-126, 0.0, scale)
    scale = torch.where(scale < torch.inf, scale, torch.nan)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    x = torch.where(scale.isnan()[:, None], 0.0, padded * inverse[:, None])
    negative = x < 0
    k = _index(x.abs(), stored.map)
    if stored.map.zero:
        code = torch.where(negative, stored.map.zero - k.clamp(max=stored.map.zero), stored.map.zero + k)
    else:
        code = torch.where(negative, 0, k)
    stored.codes.copy_(code.flatten()[: len(flat)].view(stored.codes.shape))
    stored.scale.view(-1)[: len(scale)].copy_(scale)


def _index(x: Tensor, map: DynamicMap) -> Tensor:
    """k of magnitudes in [0, 1]."""
    values = magnitudes(map).to(x.device)
    first, last = (torch.tensor(bounds, device=x.device) for bounds in (map.first, map.last))
    thresholds = (values[first[1:] - 1] + values[first[1:]]) * 0.5
    row = torch.bucketize(x, thresholds, right=True)
    slope, offset = (torch.tensor(table, dtype=torch.float32, device=x.device) for table in (map.slope, map.offset))
    steepness = torch.where(slope > 0, 1 / slope, 0.0)
    k = ((x - offset[row]) * steepness[row]).round().long()
    return torch.minimum(torch.maximum(k, first[row]), last[row])


def dequantize(stored: Codes) -> Tensor:
    """The float32 values: the magnitude times the scale, with its sign."""
    flat = stored.codes.reshape(-1).long() - stored.map.zero
    values = magnitudes(stored.map).to(flat.device)[flat.abs()]
    scale = stored.scale.reshape(-1).repeat_interleave(BLOCK)[: len(flat)]
    return (torch.where(flat < 0, -values, values) * scale).view(stored.codes.shape)


# --- states --------------------------------------------------------------------------------------------------------

State = Tensor | Codes


def decode(stored: State, dtype: torch.dtype) -> Tensor:
    """The stored values in the arithmetic dtype, float32 or float64; the parts of complex numbers in a last axis."""
    if isinstance(stored, Codes):
        return dequantize(stored).to(dtype)
    stored = stored.resolve_conj().resolve_neg()
    return (torch.view_as_real(stored) if stored.is_complex() else stored).to(dtype)


def encode(values: Tensor, stored: State) -> None:
    """Write `values` in place as `stored` is stored, rounding to nearest, ties to even."""
    if isinstance(stored, Codes):
        quantize(values.float(), stored)
    elif stored.is_complex():
        stored.copy_(torch.view_as_complex(values.contiguous()))
    else:
        stored.copy_(nearest(values, stored.dtype))


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` rounded to a floating dtype, ties to even."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    # In integers: the processor's and Triton's own conversions flush subnormals or truncate.
    values = values.float()
    bits = values.view(torch.int32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    quiet_nan = bits | 0x400000
    return (torch.where(values.isnan(), quiet_nan, rounded) >> 16).to(torch.int16).view(torch.bfloat16)


# --- parameters ----------------------------------------------------------------------------------------------------

MASTERS: dict[str | None, torch.dtype | None] = {
    None: None,
    "float32": torch.float32,
    "split16": torch.int16,
    "split8": torch.int8,
}
"""What `master` may be, and the dtype of the tensor that it keeps beside a parameter of 16 bits.

"float32" is a whole copy, of which the parameter is the rounded form. "split16" keeps the 16 bits of the mantissa that
bfloat16 lacks, so that the two are float32 exactly; "split8" keeps the upper half of them.
"""

ROUNDINGS = ("nearest", "stochastic")
"""How a parameter of 16 bits, or of 24 as split8 keeps it, is rounded."""


class Key(NamedTuple):
    """Of the random numbers of one parameter in one step: two words of 32 bits."""

    first: int
    second: int


def rounding_key(seed: int, step: int, parameter: int) -> Key:
    """The key of parameter number `parameter` of an optimizer with this seed, at this step.

    The output function of SplitMix64 (Steele et al., 2014) over the three numbers, one after the other.
    """
    word = 0
    for number in (seed, step, parameter):
        word = (word + number + 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        word ^= word >> 31
    return Key(word % 2**32, word >> 32)


def rounding_keys(seed: int, step: Tensor, parameters: Tensor) -> Tensor:
    """As `rounding_key`, of many parameters, computed where they are: int64, the first word below, the second above."""
    word = torch.zeros_like(parameters)
    for number in (seed - (seed >> 63 << 64), step, parameters):
        word = word + number + (0x9E3779B97F4A7C15 - 2**64)
        word = (word ^ _shifted(word, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
        word = (word ^ _shifted(word, 27)) * (0x94D049BB133111EB - 2**64)
        word = word ^ _shifted(word, 31)
    return word


def _shifted(word: Tensor, by: int) -> Tensor:
    """Right, of int64 whose sign is a bit like the others."""
    return (word >> by) & (2 ** (64 - by) - 1)


def random_words(key: Key, numel: int, device: torch.device) -> Tensor:
    """32 random bits for every element, int64: a hash of its row-major index and the key.

    Twice the mixing function lowbias32 (Wellons, "Prospecting for hash functions", 2018). The upper half of an index
    beyond 2^32 moves the key.
    """
    index = torch.arange(numel, device=device)
    word = index + key.first + (index >> 32) * 0x9E3779B9
    return _mixed(_mixed(word) + key.second)


def _mixed(word: Tensor) -> Tensor:
    # In int64, whose low 32 bits are right whatever overflows.
    word = word & 0xFFFFFFFF
    word = (word ^ word >> 16) * 0x7FEB352D & 0xFFFFFFFF
    word = (word ^ word >> 15) * 0x846CA68B & 0xFFFFFFFF
    return word ^ word >> 16


def decode_parameter(param: Tensor, master: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The parameter in the arithmetic dtype, with what its master copy knows beyond its own bits.

    A float32 master of which the parameter is not the rounded form is out of date, since someone has written to the
    parameter: then the parameter counts. Bits that were left below such a parameter move it by half a unit at most;
    they are not let through zero or infinity, beyond which lies NaN.
    """
    values = decode(param, dtype)
    if master is None:
        return values
    if master.dtype == torch.float32:
        return torch.where(nearest(master, param.dtype).to(dtype) == values, master.to(dtype), values)
    low = master.int() << (0 if master.dtype == torch.int16 else 8)
    low = torch.where((values == 0) & (low < 0) | values.isinf() & (low > 0), 0, low)
    return (values.view(torch.int32) + low).view(torch.float32)


def encode_parameter(values: Tensor, param: Tensor, master: Tensor | None, key: Key | None) -> None:
    """Write the updated values in place to the parameter and its master copy.

    Args:
        key: of the random numbers for stochastic rounding, or None to round to nearest, ties to even.
    """
    if master is not None and master.dtype == torch.float32:
        master.copy_(values)
    if master is not None and master.dtype != torch.float32:
        _split(values, param, master, key)
    elif key is not None and param.dtype in (torch.bfloat16, torch.float16):
        words = random_words(key, param.numel(), param.device).view(param.shape)
        param.copy_((_stochastic_bfloat16 if param.dtype == torch.bfloat16 else _stochastic_float16)(values, words))
    else:
        encode(values, param)


def _split(values: Tensor, param: Tensor, low: Tensor, key: Key | None) -> None:
    """bfloat16 and the next 16 or 8 bits.

    The upper part is rounded with ties away from zero, since the lower part, a signed number, holds -2^15 and not 2^15.
    """
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    width = 8 * low.element_size()
    dropped = 16 - width
    if dropped:
        rounded = bits + 0x7F + (bits >> 8 & 1)
        if key is not None:
            words = random_words(key, param.numel(), param.device).view(param.shape)
            rounded = torch.where(values.abs() < _largest(0x7F7FFF00), bits + (words & 0xFF), rounded)
        bits = rounded
    bits = bits >> dropped
    high = bits + (1 << width - 1) >> width
    low.copy_(torch.where(values.isnan(), 0, bits - (high << width)))
    high = torch.where(values.isnan(), 0x7FC0, high)
    param.copy_(high.to(torch.int16).view(torch.bfloat16))


def remainder(values: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """What `param`, bfloat16 and the nearest to float32 `values`, lacks of them: their next 16 or 8 bits.

    A parameter rounded to even from a tie may lack half a unit, one more than the type holds.
    """
    low = torch.iinfo(dtype)
    dropped = 16 - low.bits
    difference = values.view(torch.int32).long() - decode(param, torch.float32).view(torch.int32).long()
    return (difference + ((1 << dropped) >> 1) >> dropped).clamp(low.min, low.max).to(dtype)


def _largest(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32))


def _stochastic_bfloat16(values: Tensor, words: Tensor) -> Tensor:
    """Up with the probability of the dropped bits; from the largest finite number on to nearest."""
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    rounded = (bits + (words & 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.abs() < _largest(0x7F7F0000), rounded, nearest(values, torch.bfloat16))


def _stochastic_float16(values: Tensor, words: Tensor) -> Tensor:
    """As `_stochastic_bfloat16`. Subnormal halves are the multiples of 2^-24, to 24 bits of probability."""
    magnitude = values.view(torch.int32) & 0x7FFFFFFF
    normal = magnitude.long() - 0x38000000 + (words & 0x1FFF) >> 13
    multiple = values.abs() * 2.0**24
    fraction = multiple - multiple.floor()
    subnormal = multiple.floor().nan_to_num(0.0, 0.0).clamp(max=2.0**10).long()
    subnormal += fraction > (words >> 8).float() * 2.0**-24
    half = torch.where(magnitude < 0x38800000, subnormal, normal)
    half = torch.where(values < 0, half | 0x8000, half).to(torch.int16).view(torch.float16)
    return torch.where(values.abs() < 65504.0, half, values.half())
