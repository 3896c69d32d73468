"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import needs_triton

needs_triton()

from fusedopt.backends import BACKENDS  # noqa: E402
from fusedopt.bench.aot import FORMATS, aot, compiled, figures, form, vector_accesses  # noqa: E402
from fusedopt.binding import RULES, RuleError, rule_of, triton_source  # noqa: E402
from fusedopt.kernels.step import fusedopt_step  # noqa: E402


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "name", ["interpreted.py", "gpu_on_cpu.py", "interpreted_norms.py", "interpreted_symmetric.py"]
)
def test_under_the_interpreter(name: str, request: pytest.FixtureRequest) -> None:
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    command += ["-m", request.config.option.markexpr]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]


def test_names_that_the_printed_rule_uses_are_refused() -> None:
    def rule(p, g, lr):  # type: ignore[no-untyped-def]
        divide = p - lr * g
        p = divide
        return p

    with pytest.raises(RuleError, match="'divide' has a meaning in the C.. or Triton"):
        rule_of(rule)


def test_printed_rule() -> None:
    def rule(p, g, m, lr):  # type: ignore[no-untyped-def]
        m = -m + 0.1 * sign(g) - 2 * (1 / -m)  # noqa: F821
        p = p - lr * where(m < -1, g / m, m)  # noqa: F821
        return p, m

    assert triton_source(rule_of(rule)) == (
        "def rule(p, g, m, lr):\n"
        "    m = negative(m) + number(0.1, p) * sign(g) - number(2, p) * divide(number(1, p), negative(m))\n"
        "    p = p - lr * where(m < negative(number(1, p)), divide(g, m), m)\n"
        "    return (p, m,)\n"
    )


# --- the backend ---


def test_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = BACKENDS["triton"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "torch sees no GPU" in str(triton.unavailable())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fusedopt.backends._triton_version", lambda: None)
    assert triton.unavailable() == "Triton is not installed; pip install 'triton>=3.6'"
    monkeypatch.setattr("fusedopt.backends._triton_version", lambda: "3.5.1")
    assert "Triton is 3.5.1, and it takes 3.6" in str(triton.unavailable())


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, param = BACKENDS["triton"], torch.ones(2)
    assert "it is on cpu, and the triton backend steps tensors on a GPU" in str(triton.refuses(param))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refuses(param) is None
    assert "negative or conjugate view" in str(triton.refuses(torch._neg_view(param)))
    assert "it is on meta" in str(triton.refuses(param.to("meta")))


# --- compiled ahead of time ---

SAMPLE = [
    ("adam", "float32", "sm_90"),
    ("adam", "bfloat16, int8", "sm_90"),
    ("adam", "bfloat16 split8 stochastic, int8", "sm_80"),
    ("ademamix", "float32, int8", "sm_100"),
    ("rmsprop_centered_momentum", "float16", "sm_90"),
    ("sgd", "float64", "sm_90"),
]


def check_compiled(rule: str, format: str, arch: str) -> None:
    described = form(RULES[rule], format)
    kernel = compiled(described, arch)
    found, ptx = figures(kernel), kernel.asm["ptx"]
    assert not found.spilled
    # The ragged end of a tensor is read and written element by element, in other instructions.
    assert (found.loads[128], found.stores[128]) == vector_accesses(described)
    # Nothing contracted, nothing approximate, no subnormal flushed.
    assert not re.findall(r"\bfma\.|\bmad\.[\w.]*f(?:32|64)|\.approx|div\.full|\.ftz", ptx)
    arithmetic = "f64" if format == "float64" else "f32"
    for name in ("divide", "sqrt"):
        if name in triton_source(RULES[rule]):
            assert re.search(rf"\b{name[:3] if name == 'divide' else name}\.rn\.{arithmetic}", ptx)


@pytest.mark.parametrize(("rule", "format", "arch"), SAMPLE)
def test_machine_code(rule: str, format: str, arch: str) -> None:
    check_compiled(rule, format, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_machine_code_of_every_kernel(rule: str, format: str, arch: str) -> None:
    check_compiled(rule, format, arch)


@pytest.mark.parametrize(("aligned", "dims"), [(False, 0), (False, 3)], ids=["unaligned", "strided"])
def test_machine_code_of_other_memory(aligned: bool, dims: int) -> None:
    """It accesses elements one by one, and spills nothing either."""
    found = figures(compiled(form(RULES["ademamix"], "bfloat16, int8", aligned, dims), "sm_90"))
    assert not found.spilled and not found.loads[128] and not found.stores[128]


def test_command() -> None:
    """Also for AMD's GPUs."""
    result = CliRunner().invoke(aot, ["--arch", "gfx942", "sm_90", "--rule", "sgd"])
    assert result.exit_code == 0, result.output
    for arch in ("gfx942", "sm_90"):
        lines = [line for line in result.output.splitlines() if arch in line]
        assert len(lines) == sum("int8" not in name for name in FORMATS)
        assert all(re.search(r"\d+ +0 +\d+ +\d+×128 .* \d+×128", line) for line in lines)


def test_no_value_compiles_a_kernel() -> None:
    """No argument of the kernel is specialized on its value but those that choose the kernel."""
    assert all(parameter.do_not_specialize for parameter in fusedopt_step.params if not parameter.is_constexpr)
