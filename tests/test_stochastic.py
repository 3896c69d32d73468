"""Stochastic rounding of 16-bit parameters: what it gives, and the random numbers it is made of."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from configs import row_id, rows
from helpers import (
    LAYOUTS,
    assert_same_bits,
    assert_same_results,
    make_parameters,
    pairwise,
    results,
    set_grad,
    set_grads,
    threads,
)
from narrow import NARROW, PLACES, SHAPES, at, every_low_half, joined, rounded, rounded_to_24_bits, step, stored
from steps import on_every_backend
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.codecs import random_words, rounding_key, rounding_keys
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

everywhere = pytest.mark.parametrize("place", PLACES)
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)

# --- what it gives ---


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values of a 16-bit format next below and next above, or x itself, by looking among all of them."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    table = every[~every.isnan()].unique()
    below = torch.searchsorted(table, x, right=True) - 1
    above = torch.searchsorted(table, x)
    return table[below.clamp(0, len(table) - 1)], table[above.clamp(0, len(table) - 1)]


@functools.cache
def hard_to_round(dtype: torch.dtype) -> Tensor:
    """Every value of the format, their middles and what is a float32 beside each; and any bits."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].double().unique()
    exact = torch.cat([finite, (finite[1:] + finite[:-1]) / 2]).float()
    infinity = torch.tensor(float("inf"))
    bits = torch.randint(-(1 << 31), 1 << 31, (200_003,), generator=torch.Generator().manual_seed(5))
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4028234e38, 65519.0, 65520.0, -65504.1])
    beside = [torch.nextafter(exact, infinity), torch.nextafter(exact, -infinity)]
    return torch.cat([exact, *beside, special, bits.int().view(torch.float32)])


@everywhere
@narrow
def test_only_the_two_neighbours_occur(dtype: torch.dtype, place: str) -> None:
    """What the format holds never moves, and from its largest number on everything is as to nearest."""
    x = hard_to_round(dtype)
    nearest = rounded(x, dtype)
    below, above = neighbours(x, dtype)
    settled = ~(x.abs() < torch.finfo(dtype).max)
    for seed in range(3):
        found, _ = stored(x, place, dtype, rounding="stochastic", seed=seed)
        assert_same_bits(found[settled], nearest[settled])
        wide = found.float()
        assert ((wide == below) | (wide == above))[~settled].all()
        assert 0.2 < (found != nearest)[~settled & (below != above)].float().mean() < 0.5


@everywhere
def test_only_the_two_neighbours_occur_in_24_bits(place: str) -> None:
    x = every_low_half().flatten()[::3]
    settled = ~(x.abs() < float.fromhex("0x1.fffep127"))
    below = (x.view(torch.int32) & -256).view(torch.float32)
    above = torch.where(below == x, x, (below.view(torch.int32) + 256).view(torch.float32))
    for seed in range(3):
        found = joined(*stored(x, place, master="split8", rounding="stochastic", seed=seed))
        assert_same_bits(found[settled], rounded_to_24_bits(x)[settled])
        assert ((found == below) | (found == above))[~settled].all()
        assert (found != rounded_to_24_bits(x))[~settled].float().mean() > 0.2


FRACTIONS = (1 / 256, 1 / 16, 5 / 16, 1 / 2, 3 / 4, 255 / 256)
# The unit in each binade: normal numbers, large and small, and subnormal ones.
BINADES: dict[Any, list[tuple[float, float]]] = {
    torch.bfloat16: [(1.0, 2.0**-7), (-1.5, 2.0**-7), (2.0**100, 2.0**93), (2.0**-130, 2.0**-133), (0.0, 2.0**-133)],
    torch.float16: [(1.0, 2.0**-10), (-1.5, 2.0**-10), (2.0**-14, 2.0**-24), (2.0**-20, 2.0**-24), (0.0, 2.0**-24)],
    "split8": [(1.0, 2.0**-15), (-1.5, 2.0**-15), (2.0**-130, 2.0**-141)],
}


@everywhere
@pytest.mark.parametrize("kind", BINADES, ids=str)
def test_rounding_is_unbiased(kind: Any, place: str) -> None:
    """Up with the probability of the fraction. Of n draws the share of ups has a variance of f (1 - f) / n.

    5 sigma for each share; and the squares of all of them, in units of theirs, are chi-squared, of variance 2 each.
    """
    cases = [(base, unit, f) for base, unit in BINADES[kind] for f in FRACTIONS]
    exact = torch.tensor([abs(base) + f * unit for base, unit, f in cases]) * torch.tensor(
        [math.copysign(1, base) for base, _, _ in cases]
    )
    base, unit, fraction = torch.tensor(cases, dtype=torch.float64).T
    size, seeds = 1 << 14, 4
    ups = torch.zeros(len(cases), dtype=torch.float64)
    for seed in range(seeds):
        x = exact[:, None].expand(-1, size).contiguous()
        if kind == "split8":
            found = joined(*stored(x, place, master="split8", rounding="stochastic", seed=seed))
        else:
            found = stored(x, place, kind, rounding="stochastic", seed=seed)[0].float()
        ups += ((found.double().abs() - base.abs()[:, None]) / unit[:, None]).sum(1)
    sigma = (fraction * (1 - fraction) / (size * seeds)).sqrt()
    z = (ups / (size * seeds) - fraction) / sigma
    assert z.abs().max() < 5, dict(zip(cases, z.tolist()))
    assert abs(z.square().sum() - len(cases)) < 5 * math.sqrt(2 * len(cases))


@everywhere
def test_many_steps_are_unbiased(place: str) -> None:
    """60 steps of 5/16 of a unit each, which to nearest would go nowhere."""
    count, size, unit = 60, 1 << 13, 2.0**-7
    param = Parameter(torch.full((size,), 1.25, dtype=torch.bfloat16))
    with at(place) as backend:
        optimizer = fusedopt.SGD([param], lr=1.0, rounding="stochastic", backend=backend)
        for _ in range(count):
            param.grad = torch.full((size,), -5 / 16 * unit, dtype=torch.bfloat16)
            optimizer.step()
    moved = (param.detach().double() - 1.25) / unit
    variance = count * 5 / 16 * 11 / 16
    assert abs(moved.mean() - count * 5 / 16) < 5 * math.sqrt(variance / size)
    # The variance of a sample variance of a nearly normal number is 2 / n of its square: steps are independent.
    assert abs(moved.var() / variance - 1) < 5 * math.sqrt(2 / size)


ROUNDED_PAIRS = pairwise(
    row=rows(),
    place=PLACES[1:],
    layout=list(LAYOUTS),
    dtype=NARROW,
    state_dtype=["float32", "bfloat16", "int8"],
    grad_dtype=[None, torch.float32],
    threads=[1, 3],
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{row_id(*case['row'])}-{i}") for i, case in enumerate(ROUNDED_PAIRS)]
)
def test_the_same_bits_everywhere(case: dict[str, Any]) -> None:
    """On every instruction set, however the parameter lies, on any number of threads: as the reference, contiguous."""
    check_same_bits(case)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row_id(*row)) for row in rows()])
def test_every_layout(row: Any) -> None:
    axes = itertools.product(LAYOUTS, NARROW, ("float32", "int8"), (None, torch.float32))
    for number, (layout, dtype, state_dtype, grad_dtype) in enumerate(axes):
        case = {"layout": layout, "dtype": dtype, "state_dtype": state_dtype, "grad_dtype": grad_dtype}
        check_same_bits({**case, "row": row, "place": PLACES[1 + number % (len(PLACES) - 1)], "threads": 1})


def check_same_bits(case: dict[str, Any]) -> None:
    name, config = case["row"]
    for master in ("split8", None) if case["dtype"] == torch.bfloat16 else (None,):
        found = []
        for place, layout, count in (("eager", "contiguous", 1), (case["place"], case["layout"], case["threads"])):
            params = make_parameters(SHAPES, case["dtype"], layout)
            with at(place) as backend, threads(count):
                optimizer: Any = OPTIMIZERS[name](
                    params,
                    **config,
                    backend=backend,
                    rounding="stochastic",
                    seed=7,
                    master=master,
                    state_dtype=case["state_dtype"],
                    min_quantized_size=100,
                )
                for number in range(3):
                    set_grads(params, number, case["grad_dtype"])
                    optimizer.step()
            found.append(results(optimizer))
        assert_same_results(*found)


# --- the random numbers ---


def mixed(word: int, *multipliers_and_shifts: int, bits: int) -> int:
    """Shift, multiply, shift, multiply, shift; in whole numbers of any size."""
    shift1, multiplier1, shift2, multiplier2, shift3 = multipliers_and_shifts
    word = (word ^ (word >> shift1)) * multiplier1 % 2**bits
    word = (word ^ (word >> shift2)) * multiplier2 % 2**bits
    return word ^ (word >> shift3)


def splitmix64(state: int) -> int:
    golden = 11400714819323198485
    return mixed((state + golden) % 2**64, 30, 13787848793156543929, 27, 10723151780598845931, 31, bits=64)


def lowbias32(word: int) -> int:
    return mixed(word % 2**32, 16, 2146121005, 15, 2221713035, 16, bits=32)


def test_keys() -> None:
    """The first outputs published for SplitMix64 with the states 0 and 1234567; then as the keys are defined."""
    assert (splitmix64(0), splitmix64(1234567)) == (0xE220A8397B1DCDAF, 6457827717110365317)
    numbers = (0, 1, 2, 12345, 2**32, 2**63 + 1, 2**64 - 1)
    triples = list(itertools.product(numbers, repeat=3))
    for seed, number, parameter in triples:
        word = splitmix64((splitmix64((splitmix64(seed) + number) % 2**64) + parameter) % 2**64)
        assert rounding_key(seed, number, parameter) == (word % 2**32, word // 2**32)
    assert len({rounding_key(*triple) for triple in triples}) == len(triples)


def test_words_of_indices_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No parameter here is so large: the indices are given in place of counted."""
    key = rounding_key(1, 2, 3)
    for first in (0, 2**31 - 8, 2**32 - 8, 2**32, 2**33 + 5, 5 * 2**32 - 3, 2**40):
        index = torch.arange(first, first + 16)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "arange", lambda *_, known=index, **__: known)
            words = random_words(key, 16, torch.device("cpu"))
        expected = [
            lowbias32(lowbias32(i + key.first + (i // 2**32) * 0x9E3779B9) + key.second) for i in index.tolist()
        ]
        assert words.tolist() == expected


SAMPLE = 1 << 16


def words(seed: int = 0, number: int = 0, parameter: int = 0) -> Tensor:
    return random_words(rounding_key(seed, number, parameter), SAMPLE, torch.device("cpu"))


def assert_random_bits(x: Tensor) -> None:
    """Each of 32 bits is one half the time, 5 sigma; their chi-square over all bits is near 32, of variance 64."""
    ones = torch.stack([(x >> bit & 1).sum() for bit in range(32)]).double()
    z = (ones - len(x) / 2) / math.sqrt(len(x) / 4)
    assert z.abs().max() < 5 and abs(z.square().sum() - 32) < 5 * 8


NEIGHBOURING = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (2**32, 0, 0), (0, 2**32, 0)]


def test_words_are_balanced_and_uncorrelated() -> None:
    """In themselves, from element to element, and with those of other seeds, steps and parameters at every distance."""
    for name in NEIGHBOURING:
        x = words(*name)
        assert_random_bits(x)
        for distance in (1, 2, 3, 8, 16, 256, 512, 4096):
            assert_random_bits(x[distance:] ^ x[:-distance])
    for one, other in itertools.combinations(NEIGHBOURING, 2):
        a, b = words(*one), words(*other)
        for distance in range(4):
            assert_random_bits(a[distance:] ^ b[: SAMPLE - distance])
    # Neighbours' low bytes as pairs of 4 bits: 255 degrees of freedom, a standard deviation of sqrt(510).
    for x in (words(), words(3, 5, 7)):
        for shift in (0, 4, 8, 12, 28):
            pairs = ((x[1:] >> shift & 15) * 16 + (x[:-1] >> shift & 15)).bincount(minlength=256).double()
            expected = (SAMPLE - 1) / 256
            chi_square = ((pairs - expected).square() / expected).sum()
            assert abs(chi_square - 255) < 5 * math.sqrt(510)


def halves(count: int, place: str, steps: int = 1, groups: Sequence[int] = (), **options: Any) -> list[Tensor]:
    """Parameters of which each step rounds one and a half units: to a bit, for each parameter and step."""
    params = [Parameter(torch.zeros(SAMPLE, dtype=torch.bfloat16)) for _ in range(count)]
    found = []
    with at(place) as backend:
        cut = [*groups, count]
        split_up: Any = [{"params": params[a:b]} for a, b in zip([0, *cut], cut)]
        optimizer = fusedopt.SGD(split_up, lr=1.0, maximize=True, rounding="stochastic", backend=backend, **options)
        for _ in range(steps):
            for param in params:
                param.data.zero_()
                set_grad(param, torch.full((SAMPLE,), 1 + 2.0**-8))
            optimizer.step()
            found += [param.detach() > 1 for param in params]
    return found


@everywhere
def test_seed_step_and_parameter_all_matter(place: str) -> None:
    """The same three, the same bits; any other and half of them differ, within 5 sigma of a quarter each."""
    found = [*halves(2, place, steps=2), *halves(1, place, seed=1), *halves(1, place, seed=2**64 - 1)]
    for one, other in itertools.combinations(found, 2):
        assert abs((one != other).double().mean() - 0.5) < 5 / math.sqrt(4 * SAMPLE)
    for again, first in zip(halves(2, place, steps=2), found):
        assert torch.equal(again, first)
    # Up where the dropped bits, one half, and the word's carry.
    for index, ups in enumerate(halves(2, place, steps=2, seed=5)):
        number, parameter = divmod(index, 2)
        assert torch.equal(ups, (words(5, number, parameter) & 0xFFFF) >= 0x8000)


@everywhere
def test_parameters_are_numbered_through_all_groups(place: str) -> None:
    """Whatever the groups, and whether or not the others have a gradient."""
    expected = halves(4, place)
    for groups in ([1], [2], [1, 1, 3]):
        assert all(map(torch.equal, halves(4, place, groups=groups), expected))
    params = [Parameter(torch.zeros(SAMPLE, dtype=torch.bfloat16)) for _ in range(4)]
    set_grad(params[2], torch.full((SAMPLE,), 1 + 2.0**-8))
    with at(place) as backend:
        fusedopt.SGD(params, lr=1.0, maximize=True, rounding="stochastic", backend=backend).step()
    assert torch.equal(params[2] > 1, expected[2]) and not any(params[i].any() for i in (0, 1, 3))


@on_every_backend
def test_a_step_without_gradients_counts_too(backend: str) -> None:
    """Which step it is does not depend on whether there was anything to round."""
    params = [Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = fusedopt.AdamW(params, rounding="stochastic", backend=backend)
    optimizer.step()
    optimizer.add_param_group({"params": [Parameter(torch.ones(2, dtype=torch.bfloat16))]})
    optimizer.step()
    assert [group["rounding_step"] for group in optimizer.param_groups] == [2, 1]


@on_every_backend
@pytest.mark.parametrize("master", [None, "split8"])
def test_resuming_changes_no_bit(master: str | None, backend: str) -> None:
    """Seed and step are in the groups of a checkpoint, as numbers."""

    def make(params: Any, seed: int) -> Any:
        return fusedopt.AdamW(params, lr=0.01, rounding="stochastic", seed=seed, master=master, backend=backend)

    expected = make(make_parameters(SHAPES, torch.bfloat16), 11)
    for number in range(3):
        step(expected, number)
    file = io.BytesIO()
    torch.save(expected.state_dict(), file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    assert [(group["seed"], group["rounding_step"]) for group in checkpoint["param_groups"]] == [(11, 3)]
    params = [Parameter(param.detach().clone()) for param in expected.param_groups[0]["params"]]
    resumed = make(params, 0)
    resumed.load_state_dict(checkpoint)
    copied = copy.deepcopy(expected)
    other_seed = copy.deepcopy(expected)
    other_seed.param_groups[0]["seed"] = 12
    for optimizer in (expected, resumed, copied, other_seed):
        for number in range(3, 6):
            step(optimizer, number)
    assert_same_results(results(resumed), results(expected))
    assert_same_results(results(copied), results(expected))
    assert not torch.equal(other_seed.param_groups[0]["params"][-1], params[-1])


@pytest.mark.parametrize("seed", [0, 3, 2**32 + 1, 2**63 + 5, 2**64 - 1])
def test_keys_computed_on_a_device(seed: int) -> None:
    """The same numbers as in Python."""
    numbers = [0, 1, 7, 2**31, 2**40 + 3]
    for count in (0, 1, 2**33):
        found = rounding_keys(seed, torch.tensor(count), torch.tensor(numbers))
        expected = [rounding_key(seed, count, number) for number in numbers]
        assert [(word % 2**32, word >> 32 & 0xFFFFFFFF) for word in found.tolist()] == [tuple(key) for key in expected]
