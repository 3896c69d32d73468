"""Which tiles matrix products are computed in, and whether symmetric ones pay: from tables, with nothing tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What a program computes, and from how many columns of A at a time.

    threads: of a program. stages: how many times A and B are read ahead, and one.
    registers: a thread may take of whole tiles, so that more programs run at a time; None for as many as it likes.
    """

    rows: int
    columns: int
    depth: int
    threads: int
    stages: int
    registers: int | None = None


_TILES: dict[tuple[str, int], tuple[Tile, Tile, Tile, Tile]] = {
    # Tensor cores that read both operands from shared memory, 64 rows for 128 threads; a depth of 64 is 128 bytes, the
    # widest swizzle. Two programs of 96 KiB and 128 registers run at a time: one stores while the other multiplies. The
    # dense tile reads a quarter less for each product, and then there is room for one.
    ("hopper", 2): (
        Tile(128, 128, 64, 256, 3, 128), Tile(64, 64, 64, 128, 4), Tile(128, 256, 64, 256, 3), Tile(64, 128, 64, 128, 4)
    ),
    # They have memory of their own for sums, and a multiprocessor takes one large program.
    ("blackwell", 2): (
        Tile(128, 128, 64, 256, 4), Tile(64, 64, 64, 128, 4), Tile(128, 256, 64, 256, 3), Tile(64, 128, 64, 128, 4)
    ),
    # Operands pass through registers. Not more than the 99 KiB of shared memory that consumers' GPUs have.
    ("ampere", 2): (
        Tile(128, 128, 64, 256, 3), Tile(64, 64, 32, 128, 4), Tile(128, 128, 32, 128, 4), Tile(64, 64, 32, 128, 4)
    ),
    ("cdna", 2): (
        Tile(128, 128, 64, 256, 2), Tile(64, 64, 64, 256, 2), Tile(128, 128, 64, 256, 2), Tile(64, 64, 64, 256, 2)
    ),
    # Without tensor cores: a thread holds 32 sums, and 12 operands for them at a time.
    ("ampere", 4): (
        Tile(64, 64, 16, 128, 4), Tile(32, 32, 16, 64, 4), Tile(64, 64, 16, 128, 4), Tile(32, 32, 16, 64, 4)
    ),
    ("cdna", 4): (
        Tile(64, 64, 16, 256, 2), Tile(32, 32, 16, 64, 2), Tile(64, 64, 16, 256, 2), Tile(32, 32, 16, 64, 2)
    ),
}  # fmt: skip
"""By family of GPUs and bytes of an element, of a symmetric product, whose tiles are square, and of a dense one: the
tile, and a smaller one for where it would leave multiprocessors without work. As the field has them, not yet measured.
"""

_UNALIGNED = {2: Tile(64, 64, 32, 256, 2), 4: Tile(32, 32, 16, 128, 2)}
"""By bytes of an element, for matrices read and written element by element: each takes an address in registers."""


def family(capability: tuple[int, int], amd: bool = False) -> str:
    """Of GPUs that have the same tiles. Blackwell for consumers (12) is like Ampere here."""
    return "cdna" if amd else {9: "hopper", 10: "blackwell"}.get(capability[0], "ampere")


def tile_of(
    sizes: Sequence[tuple[int, int, int]],
    symmetric: bool,
    dtype: torch.dtype,
    gpu: str,
    cores: int,
    aligned: bool = True,
) -> Tile:
    """The tile for matrices of these (batch, rows, columns) together, on GPUs of a family with so many multiprocessors.

    It is the large one where that gives more than half of them a tile. Small ones take about twice as long for the same
    work, and so are faster only where they keep twice as many multiprocessors at it.
    """
    if not aligned:
        return _UNALIGNED[dtype.itemsize]
    if dtype.itemsize == 4 and gpu != "cdna":
        gpu = "ampere"
    large, small = _TILES[gpu, dtype.itemsize][:2] if symmetric else _TILES[gpu, dtype.itemsize][2:]
    count = sum(batch * count_of_tiles(rows, columns, large, symmetric) for batch, rows, columns in sizes)
    return large if 2 * count > cores else small


def count_of_tiles(rows: int, columns: int, tile: Tile, symmetric: bool) -> int:
    down, across = -(-rows // tile.rows), -(-columns // tile.columns)
    return down * (down + 1) // 2 if symmetric else down * across


def pays(n: int, k: int, batch: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether symmetric products of `batch` matrices (n, k) are expected to take less time than dense ones.

    The figures are taken from the literature, and hold until they are measured: kernels like these are slower than
    cuBLAS at n = 512 and below even in batches, and for a single matrix at 1024; from 2048 on they are 1.5 to 1.7 times
    as fast (flash-muon on H800 and A100, Emerging-Optimizers on H20). In between it is assumed that about 128
    multiprocessors must have a tile each. No figures are known of float32, where there are no tensor cores.
    """
    if dtype not in (torch.float16, torch.bfloat16) or capability < (8, 0) or k == 0:
        return False
    across = -(-n // 128)
    return n > 512 and batch * across * (across + 1) // 2 >= 128
