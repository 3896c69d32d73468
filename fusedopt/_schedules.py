"""Coefficients of Newton-Schulz iterations, and what they do to a singular value.

A step takes every singular value s to `a s + b s^3 + c s^5`. Each schedule is a list of (a, b, c), one for each step,
made for that step's range of singular values: a step too many, or from the beginning again, would flip signs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

Coefficients = tuple[float, float, float]


class Schedule(NamedTuple):
    """repeats: whether the last step may be repeated without end."""

    steps: tuple[Coefficients, ...]
    repeats: bool = False


def _safe(steps: Sequence[Coefficients], margin: float) -> tuple[Coefficients, ...]:
    """The steps for singular values up to `margin` times what they were made for."""
    return tuple((a / margin, b / margin**3, c / margin**5) for a, b, c in steps)


_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

SCHEDULES = {
    # Keller Jordan, kellerjordan.github.io/posts/muon, 2024; torch.optim.Muon's. It does not converge: singular values
    # end between 0.68 and 1.13.
    "jordan": Schedule(((3.4445, -4.7750, 2.0315),), repeats=True),
    # Amsel et al., arXiv:2505.16932: the best for singular values from 0.001 to 1, with their margin for rounding.
    "polar_express": Schedule((*_safe(_POLAR_EXPRESS, 1.01), (1.875, -1.25, 0.375)), repeats=True),
    # You Jiacheng, for modded-nanogpt, 2025.
    "you": Schedule(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # Grishina et al., arXiv:2506.10935: by Chebyshev's alternation. Beyond 1 its values explode, so it has a margin.
    "cans": Schedule(
        _safe(
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            1.01,
        )
    ),
    # Of degree three: two thirds of the products of the others.
    "cubic5": Schedule(
        (
            (3.36566, -3.34210, 0.0),
            (2.57444, -1.49574, 0.0),
            (2.53690, -1.43126, 0.0),
            (2.44189, -1.27640, 0.0),
            (2.22305, -0.96307, 0.0),
        )
    ),
}


def coefficients_of(coefficients: str | Sequence[Sequence[float]], steps: int | None) -> tuple[Coefficients, ...]:
    """One (a, b, c) for each of `steps` steps; None for as many as are given.

    Raises:
        ValueError: unknown, not triples of numbers, or fewer than `steps`.
    """
    if isinstance(coefficients, str):
        if coefficients not in SCHEDULES:
            raise ValueError(f"coefficients={coefficients!r}: choose one of {', '.join(SCHEDULES)}, or give triples")
        schedule = SCHEDULES[coefficients]
    else:
        schedule = Schedule(tuple(map(_triple, coefficients)))
        if not schedule.steps:
            raise ValueError("coefficients is empty; give a triple (a, b, c) for each step")
    if steps is None:
        steps = len(schedule.steps)
    if not 1 <= steps < 100:
        raise ValueError(f"steps={steps}: choose a number from 1 to 99")
    if steps > len(schedule.steps) and not schedule.repeats:
        raise ValueError(
            f"steps={steps}: these coefficients are made for at most {len(schedule.steps)} steps, and repeated they "
            "would flip signs; ask for fewer, or take 'jordan' or 'polar_express', which go on"
        )
    return tuple(itertools.islice(itertools.chain(schedule.steps, itertools.repeat(schedule.steps[-1])), steps))


def _triple(values: Sequence[float]) -> Coefficients:
    if isinstance(values, int | float | str) or len(values) != 3:
        raise ValueError(f"coefficients has {values!r}; each step takes a triple (a, b, c)")
    a, b, c = map(float, values)
    return a, b, c


def singular_value_after(steps: Sequence[Coefficients], value: float) -> float:
    for a, b, c in steps:
        value = a * value + b * value**3 + c * value**5
    return value


# --- the Gram form ---

_PERTURBATION = 4e-4
"""By which rounding in 16 bits moves the eigenvalues of X X^T, measured by the authors of the Gram form."""


_LARGEST_CONDITION = 1e4

_LARGEST_GROWTH = 150.0


@functools.cache
def restarts_in_float16(steps: tuple[Coefficients, ...]) -> tuple[int, ...]:
    """Before which steps the Gram form returns to the matrix itself, where all is stored in float16.

    Between two returns all is computed from X X^T, whose small eigenvalues rounding makes negative; what follows then
    drifts away from the matrix. Chosen are the fewest places, and of these the best, where the product so far stays
    well conditioned even so (after Dao et al., Gram Newton-Schulz, 2025).
    """
    for count in range(len(steps)):
        places = itertools.combinations(range(1, len(steps)), count)
        condition, best = min((_condition(steps, place), place) for place in places)
        if condition < _LARGEST_CONDITION:
            return best
    return tuple(range(1, len(steps)))


def restarts_with_bfloat16_factors(steps: Sequence[Coefficients]) -> tuple[int, ...]:
    """The same, where what is stored and summed is float32 and only factors are rounded, to bfloat16.

    A part of two steps, and a first one of three where its slopes allow, comes to about the error of the standard form
    with the same factors, measured for spectra from flat to of rank one; three steps later on come to several times it.
    """
    growth = math.prod(a * a for a, _, _ in steps[:2])
    return tuple(range(3 if growth <= _LARGEST_GROWTH else 2, len(steps), 2))


def _condition(steps: Sequence[Coefficients], restarts: tuple[int, ...]) -> float:
    """The worst condition number of the product Q between two returns, over singular values from 1e-10 to 1."""
    values = [10 ** (-10 + 10 * k / 200) for k in range(201)]
    worst = 1.0
    for begin, end in itertools.pairwise((0, *restarts, len(steps))):
        eigenvalues, products = [value**2 - _PERTURBATION for value in values], [1.0] * len(values)
        for a, b, c in steps[begin:end]:
            factors = [a + b * eigenvalue + c * eigenvalue**2 for eigenvalue in eigenvalues]
            products = [product * factor for product, factor in zip(products, factors, strict=True)]
            eigenvalues = [value * factor**2 for value, factor in zip(eigenvalues, factors, strict=True)]
        sizes = [abs(product) for product in products]
        worst = max(worst, max(sizes) / min(sizes) if min(sizes) else math.inf)
        values = [abs(value * product) for value, product in zip(values, products, strict=True)]
    return worst
