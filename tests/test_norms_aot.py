"""The kernels of RMSNorm and gated linear units, compiled ahead of time: no spills, wide accesses, enough threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import needs_triton

needs_triton()

from fusedopt.bench.aot import ARCHITECTURES, figures  # noqa: E402
from fusedopt.bench.aot_norms import (  # noqa: E402
    SHARED,
    Kernels,
    compiled,
    copies,
    glu_kernels,
    rms_norm_kernels,
)
from fusedopt.kernels import glu, rms_norm  # noqa: E402

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16

# Dtypes of x, residual or its gradient, weight and y, and the casting.
DTYPES: list[tuple[Any, ...]] = [
    (BFLOAT, None, BFLOAT, BFLOAT, "llama"),
    (BFLOAT, BFLOAT, FLOAT, FLOAT, "llama"),
    (FLOAT, FLOAT, FLOAT, FLOAT, "llama"),
    (BFLOAT, BFLOAT, BFLOAT, BFLOAT, "gemma"),
    (HALF, None, HALF, HALF, "none"),
]
COLUMNS = (64, 128, 256, 768, 1024, 2048, 2560, 4096, 5120, 6144, 7168, 8192, 11008, 12288, 16384, 32768, 65536)
SAMPLE = [
    (DTYPES[0], 64, "sm_90"),
    (DTYPES[1], 5120, "sm_90"),
    (DTYPES[2], 2048, "sm_80"),
    (DTYPES[3], 11008, "sm_100"),
    (DTYPES[4], 65536, "sm_90"),
    (DTYPES[0], 4096, "gfx942"),
]
KINDS = ("swiglu", "geglu", "geglu_tanh", "reglu", "relu2", "swiglu_oai")
GLU_SAMPLE = [
    ("swiglu", BFLOAT, False, "sm_90"),
    ("swiglu", FLOAT, True, "sm_80"),
    ("geglu", BFLOAT, False, "sm_90"),
    ("swiglu_oai", BFLOAT, True, "sm_100"),
    ("geglu_tanh", FLOAT, False, "gfx942"),
]


def check(kernels: Kernels, arch: str) -> None:
    for name, (kernel, arguments) in kernels.items():
        code = compiled(kernel, arguments, arch)
        found = figures(code)
        assert not found.spilled, f"{name} spills {found.spilled} bytes"
        assert found.shared <= SHARED[arch], f"{name} takes {found.shared} bytes of shared memory"
        if arch.startswith("gfx"):
            # Of 512 registers a quarter of 8 waves may have 256 each.
            assert found.registers <= 256, f"{name} takes {found.registers} registers"
            continue
        # Of 65536 registers a quarter of 2048 threads may have 128 each.
        assert found.registers <= 128, f"{name} takes {found.registers} registers"
        if name == "grad_weight":
            continue  # its threads read a column each, side by side
        wide, narrow = found.loads + copies(code), found.stores.copy()
        narrow.update(wide)
        del narrow[128]
        # 1 / RMS, means and the sums of a group of rows; a tensor read by fours or twos would take more.
        assert all(width in (32, 64) for width in narrow) and narrow.total() <= 8, f"{name}: {narrow}"
        assert wide[128] and (found.stores[128] or name == "means"), name


def norm_form(dtypes: tuple[Any, ...], columns: int, arch: str) -> Kernels:
    return rms_norm_kernels(rms_norm.Form(*dtypes, columns), arch)


def glu_form(kind: str, dtype: torch.dtype, pairs: bool, arch: str) -> Kernels:
    steps = (2, 2, 2, 2) if pairs else (1, 1, 1, 1)
    return glu_kernels(glu.Form(dtype, kind, steps, pairs, pairs, glu.THREADS * 16 // dtype.itemsize), arch)


@pytest.mark.parametrize(("dtypes", "columns", "arch"), SAMPLE)
def test_machine_code_of_rms_norm(dtypes: tuple[Any, ...], columns: int, arch: str) -> None:
    check(norm_form(dtypes, columns, arch), arch)


@pytest.mark.parametrize(("kind", "dtype", "pairs", "arch"), GLU_SAMPLE)
def test_machine_code_of_glu(kind: str, dtype: torch.dtype, pairs: bool, arch: str) -> None:
    check(glu_form(kind, dtype, pairs, arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_machine_code_of_every_rms_norm(dtypes: tuple[Any, ...], columns: int, arch: str) -> None:
    check(norm_form(dtypes, columns, arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT, HALF, FLOAT])
@pytest.mark.parametrize("kind", KINDS)
def test_machine_code_of_every_glu(kind: str, dtype: torch.dtype, pairs: bool, arch: str) -> None:
    if kind == "relu2" and pairs:
        pytest.skip("it has no second tensor")
    check(glu_form(kind, dtype, pairs, arch), arch)


@pytest.mark.parametrize("columns", [257, 6145, 40001])
def test_ragged_rows_spill_nothing(columns: int) -> None:
    form = rms_norm.Form(BFLOAT, BFLOAT, FLOAT, FLOAT, "llama", columns, nested=True, aligned=False)
    for kernel, arguments in rms_norm_kernels(form, "sm_90").values():
        assert not figures(compiled(kernel, arguments, "sm_90")).spilled


def test_no_value_compiles_a_kernel() -> None:
    """Every argument that does not choose the kernel has a fixed type, and is not specialized on its value."""
    forms = norm_form(DTYPES[0], 4096, "sm_90"), norm_form(DTYPES[0], 65536, "sm_90")
    for kernels in (*forms, glu_form("swiglu", FLOAT, False, "sm_90")):
        for kernel, _ in kernels.values():
            given = [parameter for parameter in kernel.params if not parameter.is_constexpr]
            assert given and all(parameter.do_not_specialize and parameter.annotation_type for parameter in given)
