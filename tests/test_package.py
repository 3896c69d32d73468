"""The package as users get it: a wheel, installed in a clean environment and run outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from fusedopt._version import __version__

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE")
FOLDERS = ("csrc", "fusedopt", "kernels", "bench")

USE = """
import sys, torch
before = set(sys.modules)
import fusedopt
loaded = set(sys.modules) - before
lazy = ("triton", "fusedopt._native", "fusedopt.kernels", "fusedopt.bench")
early = {name for name in loaded if name.startswith(lazy)}
assert not early, f"importing fusedopt also loads {early}"
assert fusedopt.__file__.startswith(sys.prefix), fusedopt.__file__
import fusedopt.bench, fusedopt.kernels
assert fusedopt.bench.__file__.startswith(sys.prefix) and fusedopt.kernels.__file__.startswith(sys.prefix)

def step(optimizer_class, **options):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(1000))
    param.grad = torch.randn(1000)
    optimizer_class([param], lr=0.1, weight_decay=0.5, **options).step()
    return param.detach()

expected = step(torch.optim.AdamW)
"""
NATIVE = """
torch.testing.assert_close(step(fusedopt.AdamW, backend="cpu"), expected)
assert "fusedopt._native" in sys.modules
print(fusedopt.__version__)
"""
OWN_RULE = """
import torch, fusedopt

def rule(p, g, lr):
    p = p - lr * g
    return p

class Mine(fusedopt.Optimizer):
    rule = fusedopt.rule_of(rule)

    def scalars(self, group, step):
        return {"lr": group["lr"]}

param = torch.nn.Parameter(torch.ones(1000))
param.grad = torch.ones(1000)
Mine([param], {"lr": 0.25}, backend="cpu").step()
assert (param == 0.75).all()
"""
EAGER = """
torch.testing.assert_close(step(fusedopt.AdamW), expected)
try:
    step(fusedopt.AdamW, backend="cpu")
except Exception as error:
    print(f"refused: {error}")
print(fusedopt.explain())
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what would steer the build or let the checkout be imported.

    CUDA kernels take minutes to build, and are built into the module that the other tests run.
    """
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("FUSEDOPT_")}
    return {**kept, "PIP_NO_INDEX": "1", "FUSEDOPT_CUDA": "0", **changes}


def run(*command: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=environment(**changes), text=True, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources without anything built from them."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """Changes to the environment that leave no compiler to be found."""
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty"), "CXX": ""}


def build_and_install(source: Path, tmp_path: Path, **changes: str) -> tuple[Path, str]:
    """Builds the wheel and installs it; returns the new environment's Python and what the build said on standard error.

    The environment has nothing but the wheel of its own. A .pth file makes it find torch in the running environment's
    site-packages, which saves the download; .pth files over there, such as an editable install's, are not followed, and
    the wheel comes first on the path.
    """
    pip = [sys.executable, "-m", "pip"]
    wheel_command = [*pip, "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    built = run(*wheel_command, cwd=source, **changes)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "clean", with_pip=False, symlinks=True)
    python = tmp_path / "clean" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    (site_packages,) = tmp_path.glob("clean/lib/python3*/site-packages")
    (site_packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    shutil.rmtree(source)
    return python, built.stderr


def test_wheel_runs_natively(source: Path, tmp_path: Path) -> None:
    python, _ = build_and_install(source, tmp_path, FUSEDOPT_NATIVE="1")
    assert run(python, "-I", "-c", USE + NATIVE, cwd=tmp_path).stdout.strip() == __version__
    assert "eager" in run(python.with_name("fusedopt"), "explain", cwd=tmp_path).stdout
    (tmp_path / "own_rule.py").write_text(OWN_RULE)
    run(python, "-I", "own_rule.py", cwd=tmp_path, FUSEDOPT_CACHE=str(tmp_path / "cache"))


def test_wheel_without_compiler_runs_eagerly(source: Path, tmp_path: Path, no_compiler: dict[str, str]) -> None:
    python, said = build_and_install(source, tmp_path, **no_compiler)
    assert "no C++ compiler found" in said
    refusal, _, table = run(python, "-I", "-c", USE + EAGER, cwd=tmp_path).stdout.partition("\n")
    assert "refused" in refusal and "native module" in refusal
    assert "eager" in table and "native module" in table


@pytest.mark.parametrize(
    "variables, compiler_exists, message",
    [
        ({"FUSEDOPT_NATIVE": "1"}, False, "no C++ compiler found"),
        ({"FUSEDOPT_NATIVE": "yes"}, True, "use auto, 1 or 0"),
        ({"CXX": "no-such-compiler"}, True, "CXX='no-such-compiler'"),
        ({"CXX": "false"}, True, "could not build the native module"),
        ({"CXXFLAGS": "-O3 -ffast-math"}, True, "breaks bit-exact results"),
    ],
)
def test_build_refuses(
    source: Path, no_compiler: dict[str, str], variables: dict[str, str], compiler_exists: bool, message: str
) -> None:
    env = environment(**{**({} if compiler_exists else no_compiler), **variables})
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=source, env=env, text=True, capture_output=True)
    assert done.returncode != 0 and message in " ".join(done.stderr.split()), done.stderr
    assert not list(source.rglob("_native*.so"))
