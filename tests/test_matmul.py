"""The native matrix product: against float64, on every kind of memory, symmetric, rounded to bfloat16."""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import assert_same_bits, exchange_api, instruction_set, pairwise, surroundings, values
from torch import Tensor

from fusedopt.backends import BACKENDS, native

if reason := BACKENDS["cpu"].unavailable():
    pytest.skip(reason, allow_module_level=True)

KERNELS = [*native().instruction_sets(), *(["bfloat16"] if native().has_bfloat16_matmul else [])]
"""Each instruction set's in float32, and the one whose operands are rounded."""
SIZES = (1, 2, 3, 17, 31, 33, 100, 257)
DEPTHS = (1, 2, 3, 17, 100, 383, 385, 767, 769, 1600)
"""Of the inner dimension: on either side of the 384 words that are packed at a time, of one value or of two."""


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(native().instruction_set() if request.param == "bfloat16" else request.param):
        yield request.param


def padded(x: Tensor) -> Tensor:
    whole = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0)
    whole[..., 1:-2] = x
    return whole[..., 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": Tensor.clone,
    "columns": lambda x: x.mT.clone(memory_format=torch.contiguous_format).mT,
    "rows apart": padded,
    "columns apart": lambda x: padded(x.mT).mT,
    "batch last": lambda x: x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1),
}
"""Ways for matrices to lie in memory; each gives a copy of the same values."""


def multiply(
    kernel: str,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 1.0,
    symmetric: bool = False,
    threads: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.full((a.shape[0], a.shape[1], b.shape[2]), float("nan"))
    native().matmul(a, b, c, out, alpha, beta, symmetric, kernel == "bfloat16", threads)
    return out


def check(
    kernel: str, found: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 0.0, beta: float = 1.0
) -> None:
    """Each of k products and sums is rounded once, and so are those of every 384 words and the three of the result."""
    if kernel == "bfloat16":
        a, b = a.bfloat16(), b.bfloat16()
    a, b, c = a.double(), b.double(), torch.zeros(()) if c is None else alpha * c.double()
    inner = a.shape[-1]
    roundings = (inner + inner // 384 + 5) * torch.finfo(torch.float32).eps / 2
    bound = roundings * (abs(beta) * (a.abs() @ b.abs()) + c.abs())
    assert found.dtype == torch.float32
    assert bool(((found.double() - (beta * (a @ b) + c)).abs() <= bound).all())


def test_shapes(kernel: str) -> None:
    pairs = [(n, m, 17) for n, m in itertools.product(SIZES, repeat=2)]
    for index, (n, m, inner) in enumerate([*pairs, *((19, 45, inner) for inner in DEPTHS), (530, 1030, 40)]):
        a, b = values((2, n, inner), 1, index), values((2, inner, m), 2, index)
        check(kernel, multiply(kernel, a, b), a, b)


def test_layouts(kernel: str) -> None:
    """Any of them gives the same bits, and writes nothing beside the result."""
    a, b, c = values((3, 37, 830), 3), values((3, 830, 45), 4), values((3, 37, 45), 5)
    expected = multiply(kernel, a, b, c, 0.5, 1.5)
    check(kernel, expected, a, b, c, 0.5, 1.5)
    names = list(LAYOUTS)
    for row in pairwise(a=names, b=names, c=names, out=names):
        placed = {name: LAYOUTS[row[name]](x) for name, x in (("a", a), ("b", b), ("c", c))}
        out = LAYOUTS[row["out"]](torch.full_like(c, float("nan")))
        beside = surroundings(out)
        assert_same_bits(multiply(kernel, **placed, alpha=0.5, beta=1.5, out=out), expected)
        assert_same_bits(surroundings(out), beside)


@pytest.mark.parametrize("shape", [(1, 5, 7), (5, 1, 7), (5, 7, 1), (1, 1, 7), (5, 1, 1), (1, 7, 1)], ids=str)
def test_one_row_or_column(kernel: str, shape: tuple[int, int, int]) -> None:
    """It may have any strides, for one of them is never used."""

    def apart(x: Tensor) -> Tensor:
        return x.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, ::3, ::3] if 1 in x.shape[1:] else x

    n, inner, m = shape
    a, b = values((2, n, inner), 1), values((2, inner, m), 2)
    expected = multiply(kernel, a, b)
    out = apart(torch.full_like(expected, float("nan")))
    assert_same_bits(multiply(kernel, apart(a), apart(b), out=out), expected)
    same = a[:1].expand(2, -1, -1)
    assert_same_bits(multiply(kernel, same, b), multiply(kernel, same.clone(), b))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_in_place(kernel: str, layout: str) -> None:
    """c may be out, or an operand."""
    a, b, c = values((2, 40, 600), 6), values((2, 600, 70), 7), values((2, 40, 70), 8)
    expected = multiply(kernel, a, b, c, -0.75, 2.0)
    out = LAYOUTS[layout](c)
    assert_same_bits(multiply(kernel, a, b, out, -0.75, 2.0, out=out), expected)
    square = LAYOUTS[layout](values((2, 300, 300), 9))
    found = multiply(kernel, square, square, square, 3.0, -0.5)
    check(kernel, found, square, square, square, 3.0, -0.5)


@pytest.mark.parametrize("n", SIZES)
def test_symmetric(kernel: str, n: int) -> None:
    """The upper triangle's bits of the product that is computed whole, and their mirror image, exactly: here of a
    product that is not symmetric, where the two differ."""
    a, b, c = values((2, n, 830), 10), values((2, 830, n), 11), values((2, n, n), 12)
    whole = multiply(kernel, a, b, c, 0.5, 1.5)
    for of_c, of_out in itertools.product(LAYOUTS.values(), repeat=2):
        out = of_out(torch.full_like(c, float("nan")))
        beside = surroundings(out)
        found = multiply(kernel, a, b, of_c(c), 0.5, 1.5, symmetric=True, out=out)
        assert_same_bits(found.triu(), whole.triu())
        assert_same_bits(found, found.mT)
        assert_same_bits(surroundings(out), beside)
        again = of_out(c)
        assert_same_bits(multiply(kernel, a, b, again, 0.5, 1.5, symmetric=True, out=again), found)


def test_gram(kernel: str) -> None:
    """X times its own transpose, and polynomials of that."""
    x = values((2, 270, 900), 13)
    for rows in (x, LAYOUTS["columns"](x)):
        gram = multiply(kernel, rows, rows.mT, symmetric=True)
        check(kernel, gram, x, x.mT)
        cubic = multiply(kernel, gram, gram, gram, 2.0, -1.0, symmetric=True)
        check(kernel, cubic, gram, gram, gram, 2.0, -1.0)
        assert_same_bits(cubic, multiply(kernel, gram, gram, gram, 2.0, -1.0))


@pytest.mark.parametrize("symmetric", [False, True])
def test_threads(kernel: str, symmetric: bool) -> None:
    """The same bits for any number of them: a result is cut otherwise, and so is a batch."""
    for batch, n, inner in ((1, 300, 830), (7, 130, 260), (1, 1100, 33), (40, 40, 40)):
        a, b = values((batch, n, inner), 14), values((batch, inner, n), 15)
        first, *others = [multiply(kernel, a, b, symmetric=symmetric, threads=count) for count in (1, 2, 3, 5)]
        for other in others:
            assert_same_bits(other, first)
        alone = multiply(kernel, a[-1:], b[-1:], symmetric=symmetric)
        assert_same_bits(alone[0], first[-1])
    with exchange_api(False):
        assert_same_bits(multiply(kernel, a, b, symmetric=symmetric), first)


def test_empty(kernel: str) -> None:
    c = values((2, 3, 5), 16)
    assert_same_bits(multiply(kernel, torch.ones(2, 3, 0), torch.ones(2, 0, 5)), torch.zeros(2, 3, 5))
    assert_same_bits(multiply(kernel, torch.ones(2, 3, 0), torch.ones(2, 0, 5), c, 0.5), 0.5 * c)
    square = values((2, 20, 20), 17)
    square = square + square.mT
    empty = torch.ones(2, 20, 0)
    assert_same_bits(multiply(kernel, empty, empty.mT, square, 0.5, symmetric=True), 0.5 * square)
    for batch, n, inner, m in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0), (0, 0, 0, 0)):
        assert multiply(kernel, torch.ones(batch, n, inner), torch.ones(batch, inner, m)).shape == (batch, n, m)


def test_not_finite(kernel: str) -> None:
    """NaN and infinity reach the elements that they do in torch, and no others; a product of no c reads none."""
    inner = 19
    a, b = values((2, 30, inner), 18), values((2, inner, 40), 19)
    a[0, 3, 18], a[1, 29, 0], b[0, 5, 7], b[1, 18, 39] = float("inf"), float("nan"), float("-inf"), float("nan")
    b[0, 18, 2] = 0.0
    found, exact = multiply(kernel, a, b), a.double() @ b.double()
    assert_same_bits(found.where(~exact.isfinite(), 0.0), exact.float().where(~exact.isfinite(), 0.0))
    assert bool(found.isfinite().eq(exact.isfinite()).all())
    nothing = torch.full((2, 30, 40), float("nan"))
    assert_same_bits(multiply(kernel, a, b, nothing, 0.0), found)
    assert bool(multiply(kernel, a, b, nothing, 1.0).isnan().all())


@pytest.mark.skipif("bfloat16" not in KERNELS, reason="this machine has no AVX512-BF16")
def test_rounding_to_bfloat16() -> None:
    """To nearest, ties to even: products with one are the operands, rounded, however they lie."""
    x = values((1, 40, 50), 20)
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3.38e38])
    x[0, :5, 4] = x[0, 5, :5] = halfway
    one = torch.eye(50)[None]
    for layout in LAYOUTS.values():
        assert_same_bits(multiply("bfloat16", layout(x), one), x.bfloat16().float())
    operand = values((1, 50, 40), 21)
    for layout in LAYOUTS.values():
        assert_same_bits(multiply("bfloat16", one, layout(operand)), operand.bfloat16().float())


@pytest.mark.skipif("bfloat16" in KERNELS, reason="this machine has AVX512-BF16")
def test_no_bfloat16() -> None:
    with pytest.raises(ValueError, match="AVX512-BF16"):
        multiply("bfloat16", torch.ones(1, 2, 2), torch.ones(1, 2, 2))


def test_refused() -> None:
    x = torch.ones(2, 4, 4)
    whole = torch.ones(2, 4, 8)

    def refused(message: str, error: type[Exception] = ValueError, /, **changed: object) -> None:
        arguments = dict(a=x, b=x, c=None, out=torch.ones(2, 4, 4), alpha=1.0, beta=1.0)
        arguments |= dict(symmetric=False, bfloat16=False, threads=1) | changed
        with pytest.raises(error, match=message):
            native().matmul(**arguments)

    # Through the exchange API torch itself says so.
    elsewhere = "meta" if hasattr(torch.Tensor, "__dlpack_c_exchange_api__") else "is not on the CPU"
    for name in ("a", "b", "c", "out"):
        refused(elsewhere, Exception, **{name: x.to("meta")})
        refused(f"{name} is not float32", TypeError, **{name: x.double()})
        refused(f"{name} is not float32", TypeError, **{name: x.bfloat16()})
        refused(f"{name} has 2 dimensions", **{name: x[0]})
        refused(f"{name} has strides", **{name: torch.ones(2, 4, 8)[:, :, ::2]})
        if name != "a":
            refused(rf"{name} is \(2, 4, 3\)|{name} is \(2, 3, 4\)", **{name: torch.ones(2, 3, 4)})
            refused(rf"{name} is \(1, 4, 4\) where", **{name: torch.ones(1, 4, 4)})
    refused("cannot be symmetric", b=torch.ones(2, 4, 3), out=torch.ones(2, 4, 3), symmetric=True)
    refused("out shares memory with a", out=x, b=torch.ones(2, 4, 4))
    refused("out shares memory with b", out=x, a=torch.ones(2, 4, 4))
    refused("out shares memory with a", a=whole[:, :, :4], out=whole[:, :, 4:])
    refused("c shares memory with out", c=whole[:, :, :4], out=whole[:, :, 2:6])
    square = torch.ones(2, 4, 4)
    refused("c shares memory with out", c=square.mT, out=square)
    refused("elements that share memory", out=torch.ones(1, 4, 4).expand(2, -1, -1))
    refused("elements that share memory", out=torch.ones(2, 1, 4).expand(-1, 4, -1))
    refused("elements that share memory", out=torch.ones(40).as_strided((2, 4, 4), (8, 2, 1)))


def test_in_a_forked_child() -> None:
    """After the parent's threads have worked: in the child they are gone."""
    a, b = values((3, 200, 130), 22), values((3, 130, 200), 23)
    best = native().instruction_set()
    expected, out = multiply(best, a, b, threads=2), torch.empty(3, 200, 200)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # kills it
        code = 1
        try:
            assert bytes(multiply(best, a, b, threads=2, out=out).numpy()) == bytes(expected.numpy())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # past pytest
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
