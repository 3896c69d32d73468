"""Storage formats: the reference against brute force, and every instruction set against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, assert_same_bits, instruction_set, same_bits, set_grad, surroundings, values
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import native
from fusedopt.codecs import (
    BLOCK,
    SCALE_SUFFIX,
    STATE_DTYPES,
    STORAGE_DTYPES,
    Codes,
    blocks,
    decode,
    encode,
    magnitudes,
    map_of,
    state_dtype,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = [dtype for dtype in STORAGE_DTYPES if dtype.itemsize == 2]
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
everywhere = pytest.mark.parametrize("instructions", native().instruction_sets())


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded to a 16-bit format by looking for the nearest of all its values; of two equally near, the even.

    A format's values, from zero up, are in the order of their bits, and infinity follows the largest as if it were the
    next power of two.
    """
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(torch.int16))
    table = torch.arange(infinity, dtype=torch.int16).view(dtype).double()
    top = 2.0 ** (int(torch.tensor(torch.finfo(dtype).max).frexp().exponent))
    table = torch.cat([table, torch.tensor([top], dtype=torch.float64)])
    size = x.double().abs()
    below = (torch.searchsorted(table, size, right=True) - 1).clamp(0, infinity - 1)
    down, up = size - table[below], table[below + 1] - size
    bits = below + ((down > up) | ((down == up) & (below % 2 == 1)))
    rounded = bits.to(torch.int16).view(dtype) * torch.where(x.signbit(), -1, 1).to(dtype)
    return torch.where(x.isnan(), torch.tensor(float("nan"), dtype=dtype), rounded)


def hard_to_round(dtype: torch.dtype) -> Tensor:
    """float32 values at, and one step beside, every value of a 16-bit format and every middle between two."""
    every = every_value(dtype).double()
    finite = every[every.isfinite()].sort().values
    top = torch.finfo(dtype).max
    overflow = torch.tensor([top], dtype=torch.float64) + (finite[-1] - finite[-2]) / 2
    exact = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, overflow, -overflow]).float()
    infinity = torch.tensor(float("inf"))
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3.4028234e38])
    return torch.cat([exact, torch.nextafter(exact, infinity), torch.nextafter(exact, -infinity), special])


def any_bits(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator, dtype=torch.int32).view(torch.float32)


def encoded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference."""
    stored = torch.empty(x.shape, dtype=dtype)
    encode(x, stored)
    return stored


def stepped(grads: Sequence[Tensor], dtype: torch.dtype, backend: str = "cpu") -> list[Tensor]:
    """Gradients brought to the storage of a parameter by a step that does nothing else: 0 - 1 * (-g + 0 * 0)."""
    params = [Parameter(torch.zeros(grad.shape, dtype=dtype)) for grad in grads]
    for param, grad in zip(params, grads):
        set_grad(param, grad)
    fusedopt.SGD(params, lr=1.0, maximize=True, backend=backend).step()
    return [param.detach() for param in params]


def buffered(x: Tensor, dtype: torch.dtype, backend: str = "cpu") -> Tensor:
    """A gradient brought to the storage of a state: 0.5 * 0 + 1 * (g + 0 * 0)."""
    param = Parameter(torch.zeros_like(x))
    param.grad = x
    optimizer: Any = fusedopt.SGD([param], lr=0.0, momentum=0.5, backend=backend)
    optimizer.state[param]["momentum_buffer"] = torch.zeros(x.shape, dtype=dtype)
    optimizer.step()
    return optimizer.state[param]["momentum_buffer"]


# --- the reference ---


@narrow
def test_reference_keeps_every_value(dtype: torch.dtype) -> None:
    every = every_value(dtype)
    for arithmetic in (torch.float32, torch.float64):
        decoded = decode(every, arithmetic)
        assert_same_bits(decoded, every.to(arithmetic))
        assert_same_bits(encoded(decoded, dtype), every)
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert encoded(decode(zeros, torch.float32), dtype).signbit().tolist() == [False, True]


@narrow
def test_reference_rounds_to_nearest(dtype: torch.dtype) -> None:
    x = torch.cat([hard_to_round(dtype), any_bits(1 << 20, 0)])
    assert_same_bits(encoded(x, dtype), nearest(x, dtype))
    # torch's own conversion is right too; of subnormals some processors' are not.
    normal = x.abs() >= torch.finfo(torch.float32).smallest_normal
    assert_same_bits(encoded(x[normal], dtype), x[normal].to(dtype))


def test_brute_force_is_right() -> None:
    x = hard_to_round(torch.float16)
    with np.errstate(over="ignore"):
        assert_same_bits(nearest(x, torch.float16), torch.from_numpy(x.numpy().astype(np.float16)))
    assert nearest(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(2.0**-134)]), torch.bfloat16).tolist() == [1, 1 + 2**-6, 0]


@narrow
def test_reference_rounds_doubles_through_float32(dtype: torch.dtype) -> None:
    tie = hard_to_round(dtype).double()
    for x in (tie, tie * (1 + 2.0**-40), tie * (1 - 2.0**-40)):
        assert_same_bits(encoded(x, dtype), encoded(x.float(), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*STORAGE_DTYPES, torch.complex64, torch.complex128], ids=str)
def test_reference_writes_in_place(dtype: torch.dtype, layout: str) -> None:
    stored = LAYOUTS[layout](values((3, 4, 5), 0, dtype=dtype))
    arithmetic = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    beside, address = surroundings(stored), stored.data_ptr()
    x = decode(stored, arithmetic) + 1
    assert x.dtype == arithmetic and x.shape == (*stored.shape, *([2] if dtype.is_complex else []))
    encode(x, stored)
    assert stored.data_ptr() == address and same_bits(surroundings(stored), beside)
    assert_same_bits(decode(stored, arithmetic), x.to(dtype.to_real()).to(arithmetic))


@pytest.mark.parametrize("part", [torch.float32, torch.float64], ids=str)
def test_reference_resolves_views(part: torch.dtype) -> None:
    z = values((7,), 1, dtype=part.to_complex())
    assert_same_bits(decode(z.conj(), part), torch.stack([z.real, -z.imag], dim=-1))
    assert_same_bits(decode(z.conj().imag, part), -z.imag)


def test_state_dtype() -> None:
    table = {
        option: [
            [state_dtype(option, kind, dtype) for kind in ("signed", "unsigned")]
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
        ]
        for option in STATE_DTYPES
    }
    single, narrow = torch.float32, torch.bfloat16
    real = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    assert table == {
        None: [[dtype, dtype] for dtype in real],
        "float32": [[single, single]] * 4 + [[torch.complex64] * 2],
        "bfloat16": [[narrow, single]] * 4 + [[torch.complex64] * 2],
        "int8": [[torch.uint8] * 2] * 4 + [[torch.complex64] * 2],
    }


# --- the native codec, through steps that do nothing but convert ---


@everywhere
@narrow
def test_native_reads_every_value(dtype: torch.dtype, instructions: str) -> None:
    every = every_value(dtype)
    with instruction_set(instructions):
        assert_same_bits(stepped([every], torch.float32)[0], every.float(), "as a gradient")
        assert_same_bits(stepped([every], torch.float64)[0], every.double(), "as a gradient, in double")
        assert_same_bits(stepped([every], dtype)[0], every, "there and back")
        # As many elements as are left over by the widest vector.
        pieces = every.split(7)
        assert_same_bits(torch.cat(stepped(pieces, torch.float32)), every.float(), "piecemeal")
        state = buffered(every.float(), dtype)
        assert_same_bits(state, every, "as a state")


@everywhere
@narrow
def test_native_rounds_as_the_reference(dtype: torch.dtype, instructions: str) -> None:
    x = torch.cat([hard_to_round(dtype), any_bits(4_000_003, 1)])
    expected = encoded(x, dtype)
    with instruction_set(instructions):
        assert_same_bits(stepped([x], dtype)[0], expected, "parameter")
        assert_same_bits(buffered(x, dtype), expected, "state")
        assert_same_bits(buffered(x[:300_000].double(), dtype), expected[:300_000], "state, from double")
        few = hard_to_round(dtype)[::29]
        assert_same_bits(torch.cat(stepped(few.split(7), dtype)), encoded(few, dtype), "piecemeal")


@everywhere
def test_native_rounds_double_to_float32(instructions: str) -> None:
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (300_001,), generator=generator, dtype=torch.int64)
    single = any_bits(300_001, 3)
    finite = single[single.isfinite() & torch.nextafter(single, torch.tensor(float("inf"))).isfinite()]
    middle = (finite.double() + torch.nextafter(finite, torch.tensor(float("inf"))).double()) / 2
    x = torch.cat([bits.view(torch.float64), middle, middle * (1 + 2.0**-45), middle * (1 - 2.0**-45)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = torch.from_numpy(x.numpy().astype(np.float32))
    assert_same_bits(stepped([x], torch.float32, "eager")[0], expected, "reference")
    with instruction_set(instructions):
        assert_same_bits(stepped([x], torch.float32)[0], expected, "parameter")
        assert_same_bits(stepped([expected], torch.float64)[0], expected.double(), "widened")


@pytest.mark.slow
@narrow
def test_native_rounds_all_of_float32(dtype: torch.dtype) -> None:
    for first in range(-(1 << 31), 1 << 31, 1 << 22):
        x = torch.arange(first, first + (1 << 22), dtype=torch.int64).to(torch.int32).view(torch.float32)
        expected = encoded(x, dtype)
        for instructions in native().instruction_sets():
            with instruction_set(instructions):
                assert same_bits(stepped([x], dtype)[0], expected), f"{instructions}, from {first:#x}"


# --- 8 bits ---

REFERENCE = "reference"
every_kind = pytest.mark.parametrize("kind", ["signed", "unsigned"])
by_all = pytest.mark.parametrize("by", [REFERENCE, *native().instruction_sets()])

SMALLEST, LARGEST = 2.0**-126, torch.finfo(torch.float32).max
ONE = 0x3F800000  # the bits of 1.0; those of the float32 numbers in [0, 1] are the integers up to it


def papers_magnitudes(kind: str) -> list[Fraction]:
    """0; in the decade up to 10^(i - 6) the middles of 2^i equal parts, or unsigned of twice as many; 1."""
    found = [Fraction(0)]
    for i in range(7):
        parts = 2**i if kind == "signed" else 2 ** (i + 1)
        middles = [Fraction(2 * j + 1, 2 * parts) for j in range(parts)]
        found += [Fraction(10) ** (i - 6) * (1 + 9 * middle) / 10 for middle in middles]
    return [*found, Fraction(1)]


def numbers(kind: str) -> Tensor:
    """What the 256 codes stand for at the scale 1, in double."""
    positive = magnitudes(map_of(kind)).double()
    return positive if kind == "unsigned" else torch.cat([-positive[1:-1].flip(0), positive])


def quantized(x: Tensor, kind: str, by: str = REFERENCE) -> Codes:
    """By the reference, or in a step on an instruction set: Lion's first average is 0 + 1 * (g - 0), and Adamax's first
    maximum |g| + 0."""
    if by == REFERENCE:
        stored = Codes(torch.empty(x.shape, dtype=torch.uint8), torch.empty(blocks(x.numel())), map_of(kind))
        encode(x, stored)
        return stored
    param = Parameter(torch.zeros_like(x))
    param.grad = x
    options: Any = {"state_dtype": "int8", "min_quantized_size": 0, "backend": "cpu"}
    if kind == "signed":
        name, optimizer = "exp_avg", fusedopt.Lion([param], betas=(0.5, 0.0), **options)
    else:
        name, optimizer = "exp_inf", fusedopt.Adamax([param], betas=(0.0, 0.0), eps=0.0, **options)
    with instruction_set(by):
        optimizer.step()
    state = optimizer.state[param]
    return Codes(state[name], state[name + SCALE_SUFFIX], map_of(kind))


def dequantized(stored: Codes, kind: str, by: str = REFERENCE) -> Tensor:
    """By the reference, or in a step: SGD subtracts its buffer from 0, and AMSGrad keeps the larger of 0 and a second
    moment that decays by less than a rounding."""
    if by == REFERENCE:
        return decode(stored, torch.float32)
    param = Parameter(torch.zeros(stored.codes.shape))
    param.grad = torch.zeros_like(param)
    if kind == "signed":
        name, optimizer = "momentum_buffer", fusedopt.SGD([param], lr=1.0, momentum=1.0, backend="cpu")
    else:
        name, optimizer = "exp_avg_sq", fusedopt.Adam([param], betas=(0.5, 1 - 2.0**-50), amsgrad=True, backend="cpu")
        optimizer.state[param]["max_exp_avg_sq"] = torch.zeros_like(param)
    optimizer.state[param] |= {name: stored.codes.clone(), name + SCALE_SUFFIX: stored.scale.clone()}
    with instruction_set(by):
        optimizer.step()
    return -param.detach() if kind == "signed" else optimizer.state[param]["max_exp_avg_sq"]


def codes_of(x: Tensor, kind: str, by: str = REFERENCE) -> Tensor:
    """The codes of numbers in [-1, 1], found in blocks that begin with a 1 and so have the scale 1."""
    rows = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).view(-1, BLOCK - 1)
    stored = quantized(torch.nn.functional.pad(rows, (1, 0), value=1.0).flatten(), kind, by)
    assert (stored.scale == 1).all()
    return stored.codes.view(-1, BLOCK)[:, 1:].flatten()[: len(x)].int()


def assert_nearest(x: Tensor, codes: Tensor, kind: str, tolerance: float = 3e-6) -> None:
    """`codes` stand for the numbers nearest to x; or, where x is this near to the middle of two, for the other."""
    table = numbers(kind)
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(x.double(), middles)
    wrong = codes != nearest
    x, codes, nearest = x[wrong].double(), codes[wrong], nearest[wrong]
    assert ((codes - nearest).abs() == 1).all()
    middle = middles[torch.minimum(codes, nearest)]
    assert ((x - middle).abs() <= tolerance * middle.abs()).all()


def hard_to_quantize(kind: str) -> Tensor:
    """In order: 2000 numbers to each side of every magnitude, of every middle of two, where rows end too, and of the
    powers of 2; and a million others."""
    table = magnitudes(map_of(kind))
    points = torch.cat([table, (table[1:] + table[:-1]) / 2, 2.0 ** -torch.arange(40.0)]).view(torch.int32)
    others = any_bits(1 << 20, 5).view(torch.int32) % ONE
    bits = torch.cat([(points[:, None] + torch.arange(-2000, 2001)).flatten(), others])
    return bits[(bits >= 0) & (bits <= ONE)].unique().to(torch.int32).view(torch.float32)


def blocks_of_any_size(kind: str) -> Tensor:
    """Blocks whose elements and whose largest are of any size that is kept, and a part of one."""
    generator = torch.Generator().manual_seed(7)
    top = torch.randint(-126, 128, (1000, 1), generator=generator)
    exponent = top - 30 * torch.rand((1000, BLOCK), generator=generator)
    x = torch.randn((1000, BLOCK), generator=generator).clamp(-1, 1) * 2.0**exponent.clamp(-150, 127.99)
    x[:, 7] = x.abs().amax(1).clamp(SMALLEST)
    return (x if kind == "signed" else x.abs()).flatten()[: -BLOCK // 3]


@every_kind
def test_magnitudes_are_the_papers(kind: str) -> None:
    """Within 4 units in the last place, as stated; as are bitsandbytes', whose codes these are."""
    ours, exact = magnitudes(map_of(kind)).numpy(), papers_magnitudes(kind)
    assert ours.dtype == np.float32 and len(ours) == len(exact) == (129 if kind == "signed" else 256)
    assert all(abs(Fraction(float(m)) - e) <= 4 * Fraction(float(np.spacing(m))) for m, e in zip(ours, exact))
    assert ours[0] == 0 and ours[-1] == 1


@every_kind
def test_numbers_are_those_of_bitsandbytes(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=kind == "signed")
    difference = theirs.abs().view(torch.int32) - numbers(kind).float().abs().view(torch.int32)
    assert theirs.shape == (BLOCK,) and difference.abs().max() <= 4
    assert same_bits(theirs.sign(), numbers(kind).float().sign())


@every_kind
def test_magnitude_is_one_multiply_add(kind: str) -> None:
    """Of float32 numbers, rounded once."""
    map = map_of(kind)
    for k, magnitude in enumerate(magnitudes(map).numpy()):
        row = sum(k >= first for first in map.first) - 1
        exact = Fraction(float(np.float32(map.slope[row]))) * k + Fraction(float(np.float32(map.offset[row])))
        error, *errors = (
            abs(exact - Fraction(float(x))) for x in (magnitude, *np.nextafter(magnitude, np.float32([-1, 2])))
        )
        assert error < min(errors) or error == min(errors) and magnitude.view(np.int32) % 2 == 0


@by_all
@every_kind
def test_every_code_there_and_back(kind: str, by: str) -> None:
    scale = torch.tensor([1.0, 0.1, 3.0, 1.7e-30, 2.5e20, SMALLEST, LARGEST, 0.0, torch.nan, 5.0])
    # The last block is a part of one, without the largest code.
    codes = torch.arange(BLOCK, dtype=torch.uint8).repeat(len(scale))[:-77]
    exact = (numbers(kind).float().double() * scale.double()[:, None]).flatten()[:-77]
    decoded = dequantized(Codes(codes, scale, map_of(kind)), kind, by)
    assert_same_bits(decoded, exact.float(), "read")
    again = quantized(decoded, kind, by)
    kept = BLOCK * 7
    assert_same_bits(again.codes[:kept], codes[:kept], "written")
    assert_same_bits(again.scale[:9], scale[:9], "scale")


@every_kind
def test_quantized_to_the_nearest(kind: str) -> None:
    x = hard_to_quantize(kind)
    codes = codes_of(x, kind)
    assert codes[0] == map_of(kind).zero and (codes.diff() >= 0).all() and codes[-1] == 255
    assert_nearest(x, codes, kind)
    x = blocks_of_any_size(kind)
    stored = quantized(x, kind)
    assert_same_bits(stored.scale, torch.stack([block.abs().max() for block in x.split(BLOCK)]))
    scale = stored.scale.repeat_interleave(BLOCK)[: len(x)].double()
    # The reciprocal and the product round, and above 2^126 the reciprocal is subnormal, to 2^-22.
    assert_nearest(x.double() / scale, stored.codes.int(), kind, 3e-6 + 2.0**-21)


@by_all
@every_kind
def test_quantized_alike(kind: str, by: str) -> None:
    x, others = hard_to_quantize(kind), blocks_of_any_size(kind)
    codes = codes_of(x, kind)
    if kind == "signed":
        # There is a code for 1 and none for -1.
        assert_same_bits(codes_of(-x, kind, by), 127 - (codes - 127).clamp(max=127))
    if by != REFERENCE:
        assert_same_bits(codes_of(x, kind, by), codes)
        assert_same_bits(quantized(others, kind, by).scale, quantized(others, kind).scale)
        assert_same_bits(quantized(others, kind, by).codes, quantized(others, kind).codes)


@pytest.mark.slow
@every_kind
def test_quantized_all_of_zero_to_one(kind: str) -> None:
    count = (BLOCK - 1) << 14
    before = map_of(kind).zero
    for first in range(0, ONE + 1, count):
        x = torch.arange(first, min(first + count, ONE + 1), dtype=torch.int32).view(torch.float32)
        codes = codes_of(x, kind)
        assert codes[0] >= before and (codes.diff() >= 0).all()
        assert_nearest(x, codes, kind)
        for instructions in native().instruction_sets():
            assert same_bits(codes_of(x, kind, instructions), codes), f"{instructions}, from {first:#x}"
        before = int(codes[-1])
    assert before == 255


@by_all
@every_kind
def test_blocks_of_nothing_and_lost_blocks(kind: str, by: str) -> None:
    """What is too small is zero; NaN and infinity are lost, with all of their block and nothing beside it."""
    below, above = (float(np.nextafter(np.float32(SMALLEST), np.float32(end))) for end in (0, 1))
    scale = {0.0: 0.0, 1e-45: 0.0, below: 0.0, SMALLEST: SMALLEST, above: above, LARGEST: LARGEST, 1.0: 1.0}
    scale |= {bad: torch.nan for bad in (torch.inf, -torch.inf, torch.nan)}
    tops = list(scale) * 2
    x = values((len(tops), BLOCK), 6).clamp(-2, 2) / 2
    x = (x if kind == "signed" else x.abs()) * torch.tensor(tops).nan_to_num(1.0, 1.0, -1.0).abs()[:, None]
    for i, top in enumerate(tops):
        x[i, 37 * i % 150] = top
    flat = x.flatten()[:-100]  # the last block, which is lost, is a part of one
    stored = quantized(flat, kind, by)
    assert_same_bits(stored.scale, torch.tensor([scale[top] for top in scale] * 2))
    for i, (block, codes) in enumerate(zip(flat.split(BLOCK), stored.codes.split(BLOCK))):
        assert_same_bits(codes, quantized(block, kind).codes, f"the block of {tops[i]}")
        read = dequantized(Codes(codes, stored.scale[i : i + 1], stored.map), kind, by)
        if not scale[tops[i]] > 0:
            assert_same_bits(read, torch.full_like(read, scale[tops[i]]))


@pytest.mark.parametrize("layout", LAYOUTS)
@every_kind
def test_blocks_are_in_row_major_order(kind: str, layout: str) -> None:
    x = values((2, 3, 10, 11), 8).abs()
    expected = quantized(x.flatten(), kind)
    codes = LAYOUTS[layout](torch.zeros(x.shape, dtype=torch.uint8))
    beside, stored = surroundings(codes), Codes(codes, torch.empty(blocks(x.numel())), map_of(kind))
    encode(LAYOUTS[layout](x), stored)
    assert_same_bits(codes.flatten(), expected.codes)
    assert_same_bits(stored.scale, expected.scale)
    assert same_bits(surroundings(codes), beside)
    assert_same_bits(decode(stored, torch.float64).flatten(), decode(expected, torch.float32).double())


@by_all
def test_negative_numbers_of_an_unsigned_state(by: str) -> None:
    """They read as zero, as part of a block whose scale they may be. RMSprop with alpha = 2 makes s - (g * g - s)."""
    grad = torch.linspace(0.0, 2.0, 3 * BLOCK)
    param = Parameter(torch.zeros(3 * BLOCK))
    param.grad = grad
    optimizer = fusedopt.RMSprop([param], alpha=2.0, eps=1.0, backend="eager" if by == REFERENCE else "cpu")
    state = {"step": torch.tensor(1.0), "square_avg": torch.full((3 * BLOCK,), 255, dtype=torch.uint8)}
    optimizer.state[param] |= {**state, "square_avg_scale": torch.ones(3)}
    with instruction_set(by if by != REFERENCE else native().instruction_set()):
        optimizer.step()
    x = 1 - (grad * grad - 1)
    expected = quantized(x.abs(), "unsigned")
    assert_same_bits(optimizer.state[param]["square_avg_scale"], expected.scale)
    assert_same_bits(optimizer.state[param]["square_avg"], expected.codes * (x > 0))
    assert expected.scale[0] == x[0] and expected.scale[2] == -x[-1]
