"""Storage formats: the reference against brute force, and every instruction set against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, assert_same_bits, instruction_set, same_bits, set_grad, surroundings, values
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import native
from fusedopt.codecs import STATE_DTYPES, STORAGE_DTYPES, decode, encode, state_dtype

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
