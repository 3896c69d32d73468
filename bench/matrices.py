"""The iteration of Newton and Schulz as Muon has it, plainly, and what it costs: what others are measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .presets import Shape

STEPS = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan's
EPS = 1e-7  # the least norm that is divided by

# An implementation rounds X, its products and what it adds them to: that many times what rounding X alone comes to.
LIMIT = 8


class Flops(NamedTuple):
    """Of the iteration, a multiplication and an addition counted as two.

    dense: each product computed whole; for n x m with m = a n, 5 steps, (20 a + 10) n^3.
    symmetric: half of those that are symmetric, X X^T and its square: (15 a + 5) n^3.
    """

    dense: float
    symmetric: float


def flops(shapes: Iterable[Shape]) -> Flops:
    """Of all matrices with these shapes."""
    dense = symmetric = 0
    for shape in shapes:
        n, m = sorted(shape)
        dense += len(STEPS) * (4 * n * n * m + 2 * n**3)
        symmetric += len(STEPS) * (3 * n * n * m + n**3)
    return Flops(dense, symmetric)


def newton_schulz(matrix: Tensor, rounded: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The iteration in the matrix's own dtype, with X rounded by `rounded` before each step and at last."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPS)
    for a, b, c in STEPS:
        x = rounded(x)
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = rounded(x)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)
