"""The kernel of grouped products, compiled ahead of time: tensor cores, wide accesses, no spills; and its planning."""

from __future__ import annotations

import pytest
import torch
from helpers import needs_triton

needs_triton()

from fusedopt.bench.aot import ARCHITECTURES, figures  # noqa: E402
from fusedopt.bench.aot_norms import SHARED, copies  # noqa: E402
from fusedopt.bench.aot_symmetric import PRODUCTS, compiled, form, multiplications  # noqa: E402
from fusedopt.kernels.symmetric import Form  # noqa: E402
from fusedopt.kernels.symmetric_kernel import fusedopt_product  # noqa: E402
from fusedopt.kernels.symmetric_tiles import Tile, family, pays, tile_of  # noqa: E402

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}

# Which product, of what, size of the matrix, and whether its tiles are whole.
SAMPLE = [
    ("X X^T", HALF, "sm_90", 4096, True),
    ("X X^T, X tall", BFLOAT, "sm_90", 4096, True),
    ("R R + R", HALF, "sm_90", 4096, False),
    ("Q X + X", HALF, "sm_90", 4096, True),
    ("Q X + X, X tall", BFLOAT, "sm_80", 512, False),
    ("X X^T", FLOAT, "sm_80", 4096, True),
    ("R R + R", HALF, "sm_100", 4096, True),
    ("R R + R", BFLOAT, "gfx942", 4096, True),
]


def check(form: Form, arch: str) -> None:
    kernel = compiled(form, arch)
    found, multiplied, tile = figures(kernel), multiplications(kernel), form.tile
    assert not found.spilled, f"spills {found.spilled} bytes"
    assert found.shared <= SHARED[arch], f"takes {found.shared} bytes of shared memory"
    if arch.startswith("gfx"):
        assert multiplied
        return
    # Table and sizes aside, which are read once, in words of 32 and 64 bits.
    assert found.loads.total() - found.loads[128] <= 24
    if form.aligned:
        # To shared memory 16 bytes at a time: so many stages, those ahead of the loop and the one in it.
        read = tile.depth * (tile.rows + tile.columns) * form.dtype.itemsize
        copied = copies(kernel)
        assert set(copied) == {128}
        stages, rest = divmod(copied[128] * 16 * tile.threads, read)
        assert stages >= tile.stages and not rest
        # A tile on the diagonal once, any other twice.
        size = tile.rows * tile.columns * form.dtype.itemsize
        assert found.stores == {128: (3 if form.symmetric else 1) * size // 16 // tile.threads}
        assert found.loads[128] == (size // 16 // tile.threads if form.added else 0)
    if form.dtype == FLOAT:
        # The sums of a thread, for each column of A.
        assert set(multiplied) == {"FFMA"}
        assert multiplied["FFMA"] >= tile.rows * tile.columns * tile.depth // tile.threads
    else:
        assert set(multiplied) - {"FFMA"} == {TENSOR_CORES[arch]}
    if tile.registers and form.whole:
        # Two programs at a time.
        assert found.registers * tile.threads * 2 <= 65536 and found.shared * 2 <= SHARED[arch]


@pytest.mark.parametrize(("product", "dtype", "arch", "n", "whole"), SAMPLE)
def test_machine_code(product: str, dtype: torch.dtype, arch: str, n: int, whole: bool) -> None:
    check(form(product, dtype, arch, n, whole=whole), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("n", [64, 4096])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("product", PRODUCTS)
def test_machine_code_of_every_product(product: str, dtype: torch.dtype, whole: bool, n: int, arch: str) -> None:
    check(form(product, dtype, arch, n, whole=whole), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("product", PRODUCTS)
def test_machine_code_of_unaligned_matrices(product: str, dtype: torch.dtype, arch: str) -> None:
    found = figures(compiled(form(product, dtype, arch, aligned=False, whole=False), arch))
    assert not found.spilled and found.shared <= SHARED[arch]


def test_unaligned_matrices_spill_nothing() -> None:
    assert not figures(compiled(form("R R + R", HALF, "sm_90", aligned=False, whole=False), "sm_90")).spilled


def test_no_value_compiles_a_kernel() -> None:
    """Every argument that does not choose the kernel has a fixed type, and is not specialized on its value."""
    given = [parameter for parameter in fusedopt_product.params if not parameter.is_constexpr]
    assert given and all(parameter.do_not_specialize and parameter.annotation_type for parameter in given)


# --- planning ---


@pytest.mark.parametrize(
    ("capability", "amd", "expected"),
    [
        ((8, 0), False, "ampere"),
        ((8, 9), False, "ampere"),
        ((9, 0), False, "hopper"),
        ((10, 3), False, "blackwell"),
        ((12, 0), False, "ampere"),
        ((9, 4), True, "cdna"),
    ],
)
def test_family(capability: tuple[int, int], amd: bool, expected: str) -> None:
    assert family(capability, amd) == expected


def test_tile_leaves_few_multiprocessors_without_work() -> None:
    def rows(*sizes: tuple[int, int, int], symmetric: bool = True, dtype: torch.dtype = HALF) -> int:
        tile: Tile = tile_of(sizes, symmetric, dtype, "hopper", 132)
        return tile.rows

    # 16 rows of tiles make 136 of a triangle.
    for cores, expected in ((271, 128), (272, 64)):
        assert tile_of([(1, 2048, 2048)], True, HALF, "hopper", cores).rows == expected
    # 12 make 78, 11 make 66, and 6 make 21.
    assert rows((1, 1536, 1536)) == 128 and rows((1, 1408, 1408)) == 64
    assert rows((1, 1408, 1408), (1, 768, 768)) == 128
    assert rows((4, 768, 768)) == 128 and rows((1, 768, 768)) == 64
    # Dense tiles are 256 wide.
    assert rows((1, 1024, 2048), symmetric=False) == 64 and rows((1, 1024, 4096), symmetric=False) == 128
    assert rows((1, 4096, 4096), dtype=FLOAT) == 64


@pytest.mark.parametrize("products", [True, False])
def test_tiles_fit_in_consumers_gpus(products: bool) -> None:
    """99 KiB of shared memory in capabilities 8.6, 8.9 and 12."""
    for dtype in (HALF, FLOAT):
        for n in (64, 4096):
            tile = tile_of([(1, n, n)], products, dtype, "ampere", 82)
            assert (tile.rows + tile.columns) * tile.depth * dtype.itemsize * tile.stages <= 99 * 1024


@pytest.mark.parametrize(
    ("n", "k", "batch", "expected"),
    [
        (2048, 2048, 1, True),
        (4096, 16384, 1, True),
        (1024, 4096, 1, False),
        (1024, 1024, 4, True),
        (768, 768, 48, True),
        (512, 2048, 1000, False),
        (2048, 0, 1, False),
    ],
)
def test_pays(n: int, k: int, batch: int, expected: bool) -> None:
    for dtype in (HALF, BFLOAT):
        assert pays(n, k, batch, dtype, (9, 0)) == expected
        assert not pays(n, k, batch, dtype, (7, 5))
    assert not pays(n, k, batch, FLOAT, (9, 0))
