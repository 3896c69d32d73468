"""The kernel of grouped products, compiled for GPUs that need not be here, as `aot` does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from fusedopt.bench import aot_norms
from fusedopt.kernels.symmetric import Form
from fusedopt.kernels.symmetric_kernel import fusedopt_product
from fusedopt.kernels.symmetric_tiles import tile_of

FAMILIES = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna"}
"""As `fusedopt.kernels.symmetric_tiles.family` gives them."""


class Product(NamedTuple):
    """Whether it is symmetric, whether there is a C, and whether A, B, C and the result lie by rows."""

    symmetric: bool
    added: bool
    by_rows: tuple[bool, bool, bool, bool]


PRODUCTS = {
    "X X^T": Product(True, False, (True, False, True, True)),
    "X X^T, X tall": Product(True, False, (False, True, True, True)),
    "R R + R": Product(True, True, (True, True, True, True)),
    "Q X + X": Product(False, True, (True, True, True, True)),
    "Q X + X, X tall": Product(False, True, (True, False, False, False)),
}
"""Those of a Newton-Schulz iteration."""


def form(name: str, dtype: torch.dtype, arch: str, n: int = 4096, aligned: bool = True, whole: bool = True) -> Form:
    """The kernel for one of `PRODUCTS` of an n x n matrix, on a GPU with as many multiprocessors as an H200."""
    product = PRODUCTS[name]
    tile = tile_of([(1, n, n)], product.symmetric, dtype, FAMILIES[arch], 132, aligned)
    return Form(dtype, *product, aligned, whole, tile)


def compiled(form: Form, arch: str) -> Any:
    return aot_norms.compiled(fusedopt_product, form.arguments(64 if arch.startswith("gfx") else 32), arch)


def multiplications(kernel: Any) -> Counter[str]:
    """What multiplies and adds in machine code: of tensor cores HMMA (Ampere), HGMMA (Hopper), UTCHMMA (Blackwell)."""
    if "amdgcn" in kernel.asm:
        return Counter(re.findall(r"\bv_mfma_\w+", kernel.asm["amdgcn"]))
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = Counter(re.findall(r"\b(HGMMA|UTCHMMA|HMMA|FFMA2?)\b", code))
    found["FFMA"] += 2 * found.pop("FFMA2", 0)  # Blackwell's do two at once
    return +found
