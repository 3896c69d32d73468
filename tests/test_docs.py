"""The code in README.md and CONTRIBUTING.md runs as it stands."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import binding, optim, rules

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    """The Python code blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)


def module_of(source: str, directory: Path) -> Any:
    """`source` as a module: a rule's own source is read, and must be in a file."""
    path = directory / "rule.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("rule", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme() -> None:
    model = torch.nn.Linear(3, 2)
    for block in blocks("README.md"):
        if "fusedopt.Optimizer" in block or "fusedopt.patch" in block:
            continue  # in tests of their own
        if "cuda" in block and not torch.cuda.is_available():
            continue
        if block.startswith("def "):
            stated = (ROOT / "fusedopt" / "rules.py").read_text().splitlines()
            assert [line for line in block.splitlines() if line not in stated] == [], "the rule it quotes has changed"
            continue
        names: dict[str, Any] = {"model": model, "torch": torch, "fusedopt": fusedopt, "G": torch.eye(3)}
        exec(block, names)
        assert isinstance(names["opt"], fusedopt.AdamW | fusedopt.Muon)
        model(torch.ones(3)).sum().backward()
        names["opt"].step()


def test_adding_an_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer that CONTRIBUTING.md adds, against its paper."""
    rule_source, class_source = blocks("CONTRIBUTING.md")
    rule = binding.rule_of(module_of(rule_source, tmp_path).signum)
    assert "struct signum" in binding.cpp(rule) and not hasattr(rules, "signum")
    monkeypatch.setitem(binding.RULES, "signum", rule)
    names = dict(vars(optim))
    exec(class_source, names)
    assert_signum(names["Signum"])


def test_a_rule_of_your_own(tmp_path: Path) -> None:
    (source,) = (block for block in blocks("README.md") if "fusedopt.Optimizer" in block)
    optimizer = module_of("import fusedopt\n" + source, tmp_path).Signum
    assert_signum(optimizer)
    if shutil.which("c++"):
        assert_signum(optimizer, backend="cpu")


def assert_signum(optimizer_class: Any, backend: str = "eager") -> None:
    """Three steps with decay, in float64."""
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    param, momentum, expected = torch.nn.Parameter(start.clone()), torch.zeros_like(start), start.clone()
    optimizer = optimizer_class([param], lr=0.1, beta=0.7, weight_decay=0.3, backend=backend)
    for step in range(3):
        param.grad = torch.cos(start * (step + 1)) - 0.5
        optimizer.step()
        momentum = 0.7 * momentum + 0.3 * param.grad
        expected = expected - 0.1 * (torch.sign(momentum) + 0.3 * expected)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-15)
