"""The CUDA kernels without a GPU: run on the CPU by a stand-in for the driver, and their machine code."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fusedopt.backends import BACKENDS  # noqa: E402
from fusedopt.bench.cuda_aot import architectures, figures  # noqa: E402
from fusedopt.binding import RULES  # noqa: E402

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="there is no native module")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' own source, compiled for the CPU into a library with the driver's functions."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-Wno-unused-function", "-shared", "-fPIC"]
    flags += ["-fsanitize=bounds", "-fsanitize-undefined-trap-on-error"]  # an index beyond a table ends the process
    command = [*shlex.split(COMPILER), *flags, str(HERE / "emulated_cuda.cpp"), "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    return library


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_what_make_neon_compares_compiles() -> None:
    """That has compilers of its own, so nothing else would notice that kernels.cpp no longer fits the kernels."""
    assert COMPILER is not None
    command = [*shlex.split(COMPILER), "-std=c++17", "-fsyntax-only", "-DFUSEDOPT_ISA=neon", str(HERE / "kernels.cpp")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["emulated.py", "gpu_on_cpu.py"])
def test_on_the_stand_in(name: str, stand_in: Path, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / name)]
    command += ["-m", request.config.option.markexpr]
    environment = {**os.environ, "FUSEDOPT_CUDA_DRIVER": str(stand_in)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]


def test_without_a_driver() -> None:
    """The reason and the remedy, from a process that has no driver to load."""
    code = "from fusedopt.backends import native; print(native().cuda_unavailable(0))"
    environment = {**os.environ, "FUSEDOPT_CUDA_DRIVER": "libnowhere.so"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said = run.stdout
    assert ("libnowhere.so" in said and "install NVIDIA's driver" in said) or "FUSEDOPT_CUDA=1" in said


def built() -> list[str]:
    return architectures() if BACKENDS["cpu"].unavailable() is None else []


@pytest.mark.skipif(not built(), reason="the native module was built without CUDA kernels")
@pytest.mark.parametrize("rule", [*RULES, "norm"])
def test_machine_code(rule: str) -> None:
    """Of every architecture: nothing spilled, and whole parts accessed 16 bytes at a time."""
    found = figures(rule)
    for (architecture, name), kernel in found.items():
        where = f"{name} of {architecture}: {kernel}"
        assert not kernel.spilled, where
        # Five blocks of 128 threads fit into 65536 registers, and two of float64.
        assert kernel.registers <= (255 if name.endswith("_double") else 102), where
        if rule == "norm":
            # Eight of float32, four of each format of 16 bits, sixteen of float64.
            assert kernel.loads[128] == (8 + 4 + 4 + 16 if name == "squares" else 0), where
            continue
        # Of parameter, gradient, master copy and each state: 2 accesses of float32, or 4 of float64, without a master.
        wide = 2 * (3 + len(RULES[rule].states)) if name.endswith("_float") else 4 * (2 + len(RULES[rule].states))
        assert (kernel.loads[128], kernel.stores[128]) == (wide, wide), where
    assert {architecture for architecture, _ in found} == set(built())
    kernels = {"squares", "sums"} if rule == "norm" else {f"{rule}_float", f"{rule}_double"}
    assert {name for _, name in found} == kernels
