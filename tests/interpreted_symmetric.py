"""Grouped matrix products in Triton under its interpreter, against float64.

`test_triton.py` runs this file, as interpreted.py. Tiles are small, for the interpreter is slow: most cases take some
milliseconds for each tile.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import assert_same_bits, pairwise, surroundings, values
from torch import Tensor

import fusedopt
from fusedopt._matrix import Workspace
from fusedopt._orthogonalize import METHODS, newton_schulz, plan
from fusedopt._schedules import coefficients_of
from fusedopt.backends import interpreted
from fusedopt.kernels.codecs import pointer
from fusedopt.kernels.symmetric import multiply, symmetric
from fusedopt.kernels.symmetric_kernel import rectangular, triangular
from fusedopt.kernels.symmetric_tiles import Tile

assert interpreted(), "set TRITON_INTERPRET=1"
np.seterr(all="ignore")  # the interpreter computes with NumPy, which warns of every NaN
pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
TILE = Tile(16, 16, 16, 128, 2)
NAN = float("nan")

# --- how matrices lie: beside them is NaN, which a product with 0 would not hide ---


def by_rows(x: Tensor) -> Tensor:
    return x.clone()


def by_columns(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def padded_rows(x: Tensor) -> Tensor:
    """By a multiple of 16 bytes, whatever there is in a row."""
    batch, n, k = x.shape
    wide = torch.full((batch + 1, n + 1, -(-k // 8) * 8 + 8), NAN, dtype=x.dtype)
    wide[:batch, :n, :k] = x
    return wide[:batch, :n, :k]


def padded_columns(x: Tensor) -> Tensor:
    return padded_rows(x.mT).mT


def unaligned(x: Tensor) -> Tensor:
    batch, n, k = x.shape
    wide = torch.full((batch, n, k + 3), NAN, dtype=x.dtype)
    wide[:, :, 1:-2] = x
    return wide[:, :, 1:-2]


def stepped(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": by_rows,
    "columns": by_columns,
    "padded rows": padded_rows,
    "padded columns": padded_columns,
    "unaligned": unaligned,
    "stepped": stepped,
}
# Batches, rows and columns: a tile, less, ragged in one size or all, sizes that are no whole 16 bytes, and none at all.
GROUPS: dict[str, list[tuple[int, int, int]]] = {
    "one": [(1, 16, 16)],
    "whole": [(1, 32, 16), (2, 32, 32)],
    "ragged depth": [(1, 32, 24)],
    "ragged": [(2, 24, 40), (1, 40, 8)],
    "odd": [(1, 17, 33), (3, 5, 7), (2, 1, 19)],
    "empty": [(0, 16, 16), (2, 0, 8), (1, 16, 0), (1, 32, 16)],
}
AXES: dict[str, Any] = {
    "group": list(GROUPS),
    "dtype": [FLOAT, HALF, BFLOAT],
    "layout": list(LAYOUTS),
    "out": [None, "rows", "columns", "padded rows", "padded columns", "unaligned"],
}
CASES = pairwise(**AXES)


def case_id(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def assert_rounded(found: Tensor, exact: Tensor, sizes: Tensor, terms: int, what: str) -> None:
    """`found` is `exact` but for roundings: for each term half a unit in float32 of the sum of sizes, and its own."""
    dtype = found.dtype
    bound = terms * torch.finfo(FLOAT).eps / 2 * sizes
    bound += torch.finfo(dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(dtype).smallest_normal
    wrong = ~((found.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{what}: {found[wrong][:3]} for {exact[wrong][:3]}"


def placed(layout: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return LAYOUTS[layout or "rows"](torch.full(shape, NAN, dtype=dtype))


def of_group(case: dict[str, Any]) -> list[Tensor]:
    return [
        LAYOUTS[case["layout"]](values(shape, 1, index, dtype=case["dtype"]))
        for index, shape in enumerate(GROUPS[case["group"]])
    ]


def outputs(case: dict[str, Any], shapes: list[tuple[int, ...]]) -> list[Tensor] | None:
    if case["out"] is None:
        return None
    return [placed(case["out"], shape, case["dtype"]) for shape in shapes]


def nothing_beside(out: list[Tensor] | None) -> None:
    for each in out or []:
        assert surroundings(each).isnan().all()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gram(case: dict[str, Any]) -> None:
    """X X^T, which is symmetric by itself."""
    xs = of_group(case)
    before = [x.clone() for x in xs]
    out = outputs(case, [(*x.shape[:2], x.shape[1]) for x in xs])
    found = symmetric(xs, None, None, 0.0, 0.75, out=out, tile=TILE)
    nothing_beside(out)
    for index, (x, r, old) in enumerate(zip(xs, found, before, strict=True)):
        assert out is None or r is out[index]
        assert_same_bits(x, old)
        assert_same_bits(r, r.mT)
        wide = x.double()
        assert_rounded(r, 0.75 * wide @ wide.mT, 0.75 * wide.abs() @ wide.mT.abs(), x.shape[2] + 1, f"matrix {index}")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_polynomial(case: dict[str, Any]) -> None:
    """alpha C + beta A B + diagonal I, whose A and B commute but for their rounding; the result is symmetric still."""
    dtype, place = case["dtype"], LAYOUTS[case["layout"]]
    alpha, beta, diagonal = -1.25, 0.375, 3.3
    roots = [values((batch, n, n), 2, index) for index, (batch, n, _) in enumerate(GROUPS[case["group"]])]
    symmetrical = [root + root.mT for root in roots]
    a = [place(r.to(dtype)) for r in symmetrical]
    b = [place((r @ r / max(r.shape[-1], 1)).to(dtype)) for r in symmetrical]
    b = [(each + each.mT) / 2 for each in b]
    c = [place((r.sin()).to(dtype)) for r in symmetrical]
    out = outputs(case, [tuple(r.shape) for r in roots])
    found = symmetric(a, b, c, alpha, beta, diagonal=diagonal, out=out, tile=TILE)
    nothing_beside(out)
    for index, (x, y, z, q) in enumerate(zip(a, b, c, found, strict=True)):
        assert_same_bits(q, q.mT)
        x, y, z = x.double(), y.double(), z.double()
        identity = torch.eye(x.shape[1], dtype=torch.float64)
        exact = alpha * z + beta * x @ y + diagonal * identity
        sizes = abs(alpha) * z.abs() + beta * x.abs() @ y.abs() + diagonal * identity
        # On the diagonal and above; what is below is what is above.
        assert_rounded(q.triu(), exact.triu(), sizes, x.shape[1] + 4, f"matrix {index}")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_multiply(case: dict[str, Any]) -> None:
    xs = of_group(case)
    qs = [values((len(x), x.shape[1], x.shape[1]), 3, i, dtype=case["dtype"]) for i, x in enumerate(xs)]
    out = outputs(case, [tuple(x.shape) for x in xs])
    found = multiply(qs, xs, -1.5, out=out, tile=TILE)
    nothing_beside(out)
    for index, (q, x, y) in enumerate(zip(qs, xs, found, strict=True)):
        assert y.shape == x.shape and (out is None or y is out[index])
        q, x = q.double(), x.double()
        exact, sizes = q @ x - 1.5 * x, q.abs() @ x.abs() + 1.5 * x.abs()
        assert_rounded(y, exact, sizes, q.shape[1] + 2, f"matrix {index}")


@pytest.mark.parametrize("size", [(1, 17, 32), (1, 16, 35)])
@pytest.mark.parametrize("place", [padded_rows, padded_columns])
def test_sizes_that_are_no_whole_16_bytes(place: Callable[[Tensor], Tensor], size: tuple[int, int, int]) -> None:
    """Where addresses and strides are."""
    x = place(values(size, 1, dtype=HALF))
    r, y = padded_rows(torch.zeros(1, size[1], size[1], dtype=HALF)), place(torch.zeros(size, dtype=HALF))
    symmetric([x], None, None, 0.0, 1.0, out=[r], tile=TILE)
    multiply([r], [x], 1.0, out=[y], tile=TILE)
    nothing_beside([r, y])
    wide, q = x.double(), r.double()
    assert_rounded(r, wide @ wide.mT, wide.abs() @ wide.mT.abs(), size[2] + 1, "gram")
    assert_rounded(y, q @ wide + wide, q.abs() @ wide.abs() + wide.abs(), size[1] + 2, "product")


@pytest.mark.parametrize("tile", [Tile(16, 32, 8, 128, 2), Tile(32, 16, 64, 128, 2)])
def test_tiles_that_are_not_square(tile: Tile) -> None:
    q, x = values((2, 72, 72), 1), values((2, 72, 80), 2)
    (found,) = multiply([q], [x], 0.5, tile=tile)
    exact, sizes = q.double() @ x.double() + 0.5 * x.double(), q.double().abs() @ x.double().abs() + 0.5 * x.abs()
    assert_rounded(found, exact, sizes, 74, "product")


# --- which tile ---


@triton.jit
def order_of_tiles(tiles: tl.int64, down, across, rows: tl.int64, columns: tl.int64, count, half: tl.constexpr):
    at = tl.arange(0, 1024)
    tile = tl.load(tiles.to(tl.pointer_type(tl.int32)) + at, at < count, 0)
    if half:
        row, column = triangular(tile, across)
    else:
        row, column = rectangular(tile, down, across)
    tl.store(pointer(rows, "float32", False).to(tl.pointer_type(tl.int32)) + at, row, at < count)
    tl.store(pointer(columns, "float32", False).to(tl.pointer_type(tl.int32)) + at, column, at < count)


def tiles_at(tiles: list[int], down: int, across: int, half: bool) -> list[tuple[int, int]]:
    given = torch.tensor(tiles, dtype=torch.int32)
    rows, columns = torch.full_like(given, -1), torch.full_like(given, -1)
    for start in range(0, len(tiles), 1024):
        part = slice(start, start + 1024)
        addresses = [each[part].data_ptr() for each in (given, rows, columns)]
        count = len(given[part])
        order_of_tiles[(1,)](addresses[0], down, across, *addresses[1:], count, half=half)
    return list(zip(rows.tolist(), columns.tolist()))


def expected_order(down: int, across: int, half: bool) -> list[tuple[int, int]]:
    """Bands of 8 rows, each column by column."""
    return [
        (row, column)
        for top in range(0, down, 8)
        for column in range(across)
        for row in range(top, min(top + 8, down))
        if row <= column or not half
    ]


@pytest.mark.parametrize("across", [1, 2, 7, 8, 9, 15, 16, 17, 36, 43])
def test_every_tile_once(across: int) -> None:
    order = expected_order(across, across, True)
    assert tiles_at(list(range(len(order))), across, across, True) == order
    for down in (1, 8, 13):
        order = expected_order(down, across, False)
        assert tiles_at(list(range(len(order))), down, across, False) == order


@pytest.mark.parametrize("across", [1000, 4097, 23169])
def test_tiles_of_the_largest_matrices(across: int) -> None:
    """Where a root in float32 is not exact: around where each band and its rectangle begin."""
    wanted = {}
    for top in range(0, across, 8 * (across // 500)):
        height = min(8, across - top)
        first = top * across - top * (top - 1) // 2
        wanted[first] = (top, top)
        wanted[first + height * (height + 1) // 2 - 1] = (top + height - 1, top + height - 1)
        rest = height * (across - top - height)
        if rest:
            wanted[first + height * (height + 1) // 2] = (top, top + height)
            column = random.Random(top).randrange(rest // height)
            at = first + height * (height + 1) // 2 + column * height + height - 1
            wanted[at] = (top + height - 1, top + height + column)
        last = first + height * (height + 1) // 2 + rest - 1
        wanted[last] = (top + height - 1, across - 1)
    assert tiles_at(list(wanted), across, across, True) == list(wanted.values())


def test_many_problems() -> None:
    """More than are looked through at once, of 0, 1, 3 and 6 tiles."""
    sizes = [(0, 2, 20, 33)[index % 4 if index > 120 else 1] for index in range(137)]
    xs = [values((1, size, 3), 4, index) for index, size in enumerate(sizes)]
    for x, r in zip(xs, symmetric(xs, None, None, 0.0, 1.0, tile=TILE), strict=True):
        assert_rounded(r, x.double() @ x.double().mT, x.abs().double() @ x.abs().double().mT, 4, f"of {len(x)}")


# --- awkward matrices ---


def test_nan_and_infinity_stay_in_their_rows() -> None:
    x = values((2, 40, 24), 1)
    x[0, 3, 5], x[1, 37, 2] = NAN, float("inf")
    (r,) = symmetric([x], None, None, 0.0, 1.0, tile=TILE)
    expected = torch.zeros(2, 40, 40, dtype=torch.bool)
    expected[0, 3, :] = expected[0, :, 3] = expected[1, 37, :] = expected[1, :, 37] = True
    assert_same_bits(~r.isfinite(), expected | ~(x @ x.mT).isfinite())
    assert r[0, 3].isnan().all() and r[0, :, 3].isnan().all()


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
def test_products_that_are_not_symmetric_are_made_so(dtype: torch.dtype) -> None:
    """What is above the diagonal counts."""
    a, b = values((1, 40, 40), 1, dtype=dtype), values((1, 40, 40), 2, dtype=dtype)
    (found,) = symmetric([a], [b], None, 0.0, 1.0, tile=TILE)
    exact = a.double() @ b.double()
    exact = exact.triu() + exact.triu(1).mT
    assert_rounded(found, exact, a.double().abs() @ b.double().abs() + exact.abs(), 41, "product")


def test_ties_round_to_even() -> None:
    """Sums that are exact in float32, and lie between two numbers of 16 bits."""
    one = torch.ones(1, 16, 2)
    for dtype, step in ((BFLOAT, 2**-8), (HALF, 2**-11)):
        second = torch.tensor([[1.0], [1.0]]).expand(2, 16).clone()
        second[1] = torch.arange(16) * step
        (found,) = multiply([torch.eye(16, dtype=dtype)[None]], [(one @ second).to(dtype)], 0.0, tile=TILE)
        assert_same_bits(found, (one @ second).to(dtype))
        tie = torch.full((1, 16, 16), step, dtype=dtype)
        (found,) = symmetric([tie], [torch.eye(16, dtype=dtype)[None]], None, 0.0, 1.0, diagonal=1.0, tile=TILE)
        expected = torch.full((16, 16), step).fill_diagonal_(1.0 + step).to(dtype)[None]
        assert_same_bits(found, expected)


@pytest.mark.parametrize("columns", [False, True])
def test_matrices_past_int32(columns: bool) -> None:
    """Rows so far apart that elements are more than 2^31 away; memory that is not touched takes none."""
    far, size = 2**29 + 8, 18
    memory = torch.empty(size * far + size, dtype=HALF)
    place = memory.as_strided((1, size, size), (1, 1, far) if columns else (1, far, 1))
    x = values((1, size, size), 1, dtype=HALF)
    place.copy_(x)
    expected = symmetric([x], None, None, 0.0, 1.0, tile=TILE)[0]
    assert_same_bits(symmetric([place], None, None, 0.0, 1.0, tile=TILE)[0], expected)
    assert_same_bits(symmetric([x], None, None, 0.0, 1.0, out=[place], tile=TILE)[0], expected)
    assert_same_bits(multiply([x], [place], 1.0, tile=TILE)[0], multiply([x], [expected], 1.0, tile=TILE)[0])


def test_expanded_matrices() -> None:
    x = values((1, 24, 16), 1)
    (found,) = symmetric([x.expand(3, 24, 16)], None, None, 0.0, 1.0, tile=TILE)
    (one,) = symmetric([x], None, None, 0.0, 1.0, tile=TILE)
    assert_same_bits(found, one.expand(3, 24, 24))


def test_nothing_to_do() -> None:
    assert symmetric([], None, None, 0.0, 1.0) == [] and multiply([], [], 0.0) == []
    (found,) = symmetric([torch.ones(1, 4, 0)], None, [torch.ones(1, 4, 4)], 2.0, 1.0, diagonal=1.0, tile=TILE)
    assert_same_bits(found, 2 * torch.ones(1, 4, 4) + torch.eye(4))


def test_default_tile() -> None:
    x = values((1, 72, 40), 1)
    (found,) = symmetric([x], None, None, 0.0, 1.0)
    assert_rounded(found, x.double() @ x.double().mT, x.double().abs() @ x.double().mT.abs(), 41, "product")


# --- what is refused ---

X = torch.ones(1, 16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: symmetric([X], [X[:, :8]], None, 0.0, 1.0), r"b is \(1, 8, 16\) .* it must be \(1, 16, 16\)"),
        (lambda: symmetric([X], None, [X[:, :8]], 1.0, 1.0), r"c is \(1, 8, 16\)"),
        (lambda: symmetric([X], None, [X.half()], 1.0, 1.0), "c is .* torch.float16 on cpu; .* torch.float32"),
        (lambda: symmetric([X.double()], None, None, 0.0, 1.0), "float64; float16, bfloat16 and float32 are"),
        (lambda: symmetric([X], None, None, 0.0, 1.0, out=[X]), "out is a, b or c"),
        (lambda: multiply([X], [X.clone()], 0.0, out=[X]), "out is a, b or c"),
        (lambda: multiply([X], [X], 0.0, out=[torch.ones(1, 16, 32)[:, :, ::2]]), r"out has strides \(512, 32, 2\)"),
        (lambda: multiply([X], [X.to("meta")], 0.0), "b is .* on meta"),
        (lambda: multiply([X[:, :8]], [X], 0.0), "it must be"),
        (lambda: symmetric([X, X.half()], None, None, 0.0, 1.0), "a is .* torch.float16 on cpu; .* torch.float32"),
        (lambda: symmetric([X[0]], None, None, 0.0, 1.0), "a has 2 dimensions"),
    ],
)
def test_refused(call: Callable[[], object], message: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            call()


def test_one_launch_for_matrices_of_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one for each way in which they lie."""
    from fusedopt.kernels import symmetric as module

    launched: list[int] = []
    real = module._launch
    monkeypatch.setattr(module, "_launch", lambda members, *rest: launched.append(len(members)) or real(members, *rest))
    monkeypatch.setattr(module, "_plans", {})
    shapes = [(1, 16, 32), (2, 24, 8), (1, 8, 64)]
    xs = [values(shape, 1, index) for index, shape in enumerate(shapes)]
    symmetric(xs, None, None, 0.0, 1.0, tile=TILE)
    assert launched == [3]
    symmetric([*xs, by_columns(xs[0]), unaligned(xs[1])], None, None, 0.0, 1.0, tile=TILE)
    assert sorted(launched) == [1, 1, 3, 3]


def test_plans_are_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory is planned once, with whatever numbers; other memory anew, and only so much is remembered."""
    from fusedopt.kernels import symmetric as module

    plans: dict[Any, Any] = {}
    monkeypatch.setattr(module, "_plans", plans)
    monkeypatch.setattr(module, "_MOST", 2)
    x, first, second = values((1, 16, 16), 1), torch.empty(1, 16, 16), torch.empty(1, 16, 16)
    for beta in (1.0, 2.0):
        symmetric([x], None, None, 0.0, beta, out=[first], tile=TILE)
    assert len(plans) == 1
    symmetric([x], None, None, 0.0, 3.0, out=[second], tile=TILE)
    multiply([x], [x], 0.0, tile=TILE)
    assert len(plans) == 2
    assert_same_bits(second, 1.5 * first)
    # As much memory, of another dtype, or seen the other way.
    halves = x.view(HALF)[:, :, :16]
    symmetric([halves], None, None, 0.0, 1.0, out=[first.view(HALF)[:, :, :16]], tile=TILE)
    symmetric([x.mT], None, None, 0.0, 1.0, out=[first], tile=TILE)
    assert_rounded(first, x.double().mT @ x.double(), x.double().abs().mT @ x.double().abs(), 17, "transposed")


def test_orders_agree() -> None:
    """Results do not depend on what else is in the launch."""
    xs = [values(shape, 1, i, dtype=HALF) for i, shape in enumerate([(1, 16, 32), (2, 40, 8), (1, 24, 64)])]
    alone = [symmetric([x], None, None, 0.0, 1.0, tile=TILE)[0] for x in xs]
    for order in itertools.permutations(range(3)):
        together = symmetric([xs[i] for i in order], None, None, 0.0, 1.0, tile=TILE)
        for index, found in zip(order, together, strict=True):
            assert_same_bits(found, alone[index])


# --- the iteration on them ---


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_orthogonalize(dtype: torch.dtype, method: str) -> None:
    """An element's error is of some units of the factors' last place, where no singular value is small."""
    for shape in [(40, 72), (72, 40), (2, 24, 60)]:
        g = values(shape, 3)
        with fusedopt.use_backend("triton"):
            found = fusedopt.orthogonalize(g, dtype=dtype, method=method)
        with fusedopt.use_backend("eager"):
            wanted = fusedopt.orthogonalize(g.double(), method=method)
        assert (found.double() - wanted).abs().max() < 16 * torch.finfo(dtype).eps


def test_shapes_are_orthogonalized_together() -> None:
    """As Muon has a GPU do it: with the bits of one shape after another."""
    xs = [values(shape, 4, index) for index, shape in enumerate([(2, 24, 40), (1, 40, 24), (1, 33, 70)])]
    steps = coefficients_of("jordan", 5)
    how = plan(24, 40, torch.device("cpu"), steps, HALF, "gram", "triton")
    scales = [1.0, 0.5, 2.0]
    together = newton_schulz(xs, steps, how, Workspace(), norm="schatten4", eps=1e-7, scales=scales)
    for x, scale, found in zip(xs, scales, together, strict=True):
        (alone,) = newton_schulz([x], steps, how, Workspace(), norm="schatten4", eps=1e-7, scales=[scale])
        assert found.shape == x.shape and found.dtype == HALF
        assert_same_bits(found, alone)
