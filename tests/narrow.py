"""What the tests of 16-bit parameters share: every place a step can run, and numbers that are hard to round."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from helpers import instruction_set, set_grad, values
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import native
from fusedopt.codecs import encode

NARROW = (torch.bfloat16, torch.float16)
PLACES = ["eager", *native().instruction_sets()]

# Around a vector, a block of 512 and a thread's 16384 elements; the strided ones cross blocks in the midst of a row.
SHAPES = ((), (17,), (513,), (3, 5, 7), (2, 3, 11, 19), (130, 140))


@contextlib.contextmanager
def at(place: str) -> Iterator[str]:
    """The backend for a place, with its instruction set."""
    if place == "eager":
        yield place
    else:
        with instruction_set(place):
            yield "cpu"


@functools.cache
def gradients(step: int) -> list[Tensor]:
    return [values(shape, 2, step, index) for index, shape in enumerate(SHAPES)]


def step(optimizer: Any, number: int) -> None:
    """With float32 gradients, the same for parameters of every dtype."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, gradients(number), strict=True):
        set_grad(param, grad)
    optimizer.step()


def joined(param: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers of a split parameter: its bits above, and a signed number of the bits below."""
    high = param.detach().contiguous().view(torch.int16).int() << 16
    return (high + (low.contiguous().int() << 16 - 8 * low.element_size())).view(torch.float32)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To nearest; tests/test_codecs.py holds this against brute force."""
    stored = torch.empty_like(x, dtype=dtype)
    encode(x, stored)
    return stored


def rounded_to_24_bits(x: Tensor) -> Tensor:
    """To nearest, ties to even, by arithmetic: 15 bits follow the first, or 2^-141 is the unit."""
    wide = x.double()
    unit = 2.0 ** (wide.frexp().exponent.clamp(min=-125) - 16).double()
    return torch.where(wide.isfinite(), (wide / unit).round() * unit, wide).float()


def highs() -> list[int]:
    """Upper halves: zero, subnormals, odd and even, ones, the largest finite, infinity, NaN; each of both signs."""
    magnitudes = (0x0000, 0x0001, 0x007F, 0x0080, 0x0081, 0x1234, 0x3F7F, 0x3F80, 0x3F81, 0x42FF, 0x7F7E, 0x7F7F)
    magnitudes += (0x7F80, 0x7FC0)
    return [*magnitudes, *(0x8000 | magnitude for magnitude in magnitudes)]


@functools.cache
def every_low_half() -> Tensor:
    patterns = np.add.outer(np.array(highs(), dtype=np.uint32) << 16, np.arange(1 << 16, dtype=np.uint32))
    return torch.from_numpy(patterns.astype(np.uint32).view(np.float32))


def stored(x: Tensor, place: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Tensor, Any]:
    """float32 written to a parameter by a step that does nothing else, 0 - 1 * (-x + 0 * 0), and its master."""
    param = Parameter(torch.zeros(x.shape, dtype=dtype))
    set_grad(param, x)
    with at(place) as backend:
        optimizer: Any = fusedopt.SGD([param], lr=1.0, maximize=True, backend=backend, **options)
        optimizer.step()
    return param.detach(), optimizer.state.get(param, {}).get("master")
