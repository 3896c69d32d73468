"""Grouped products on a GPU, with the tiles of the table: right, whatever lies in one launch, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, needs_triton, values
from torch import Tensor

needs_triton()

from fusedopt.kernels.symmetric import multiply, symmetric  # noqa: E402

pytestmark = pytest.mark.gpu

# Whole tiles, alone and in a batch; ragged ones; and sizes that are no whole 16 bytes.
SHAPES = [(1, 2048, 2304), (4, 768, 1024), (2, 520, 264), (1, 100, 77)]


def matrices(shapes: list[tuple[int, int, int]], dtype: torch.dtype, tall: bool = False) -> list[Tensor]:
    found = [(values(shape, 1, index) / shape[2] ** 0.5).to("cuda", dtype) for index, shape in enumerate(shapes)]
    return [x.mT.contiguous().mT for x in found] if tall else found


def assert_rounded(found: Tensor, exact: Tensor, sizes: Tensor, terms: int) -> None:
    """But for a unit of the sum of all sizes for each term in float32, which tensor cores may cut off, and rounding."""
    bound = terms * torch.finfo(torch.float32).eps * sizes
    bound += torch.finfo(found.dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(found.dtype).smallest_normal
    wrong = ~((found.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{found[wrong][:3]} for {exact[wrong][:3]}"


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("count", [1, len(SHAPES)], ids=["large", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products(dtype: torch.dtype, count: int, tall: bool) -> None:
    xs = matrices(SHAPES[:count], dtype, tall)
    rs = symmetric(xs, None, None, 0.0, 1.0)
    zs = symmetric(rs, rs, rs, -1.5, 0.5, diagonal=2.0)
    ys = multiply(zs, xs, 0.75)
    for x, r, z, y in zip(xs, rs, zs, ys, strict=True):
        assert_same_bits(r, r.mT)
        assert_same_bits(z, z.mT)
        n, k = x.shape[1:]
        x, identity = x.double(), torch.eye(n, dtype=torch.float64, device="cuda")
        assert_rounded(r, x @ x.mT, x.abs() @ x.mT.abs(), k + 1)
        r = r.double()
        exact = 0.5 * r @ r - 1.5 * r + 2 * identity
        assert_rounded(z, exact, 0.5 * r.abs() @ r.abs() + 1.5 * r.abs() + 2 * identity, n + 4)
        z = z.double()
        assert_rounded(y, z @ x + 0.75 * x, z.abs() @ x.abs() + 0.75 * x.abs(), n + 2)


def test_captured() -> None:
    """Replays read what is in the matrices then, and write the graph's own memory too."""
    xs, others = matrices(SHAPES, torch.float16), matrices(SHAPES[::-1], torch.float16)[::-1]
    expected = symmetric(others, None, None, 0.0, 1.0)
    out = [torch.empty_like(each) for each in expected]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        symmetric(xs, None, None, 0.0, 1.0, out=out)
        inside = symmetric(xs, None, None, 0.0, 1.0)
    for x, other in zip(xs, others, strict=True):
        x.copy_(other)
    graph.replay()
    for found, own, wanted in zip(out, inside, expected, strict=True):
        assert_same_bits(found, wanted)
        assert_same_bits(own, wanted)
