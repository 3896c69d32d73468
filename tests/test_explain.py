"""Which backend runs, how one is asked for, and what `explain` says of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import assert_same_optimizers, assert_untouched, parameters, snapshot, train

import fusedopt
from fusedopt.backends import BACKENDS, Eager, _from_environment, requested_backend

ROOT = Path(fusedopt.__file__).parent.parent
NO_SUCH_BACKEND = f"there is no backend 'gpu'; choose one of {', '.join(BACKENDS)}"


def output(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDOPT_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every parameter that the eager backend has stepped."""
    stepped: list[Any] = []
    original = Eager.step

    def step(update: Any) -> None:
        stepped.append(update.param)
        original(update)

    monkeypatch.setattr(Eager, "step", staticmethod(step))
    return stepped


def runs_on(eager_steps: list[Any], optimizer: torch.optim.Optimizer) -> str:
    """The backend that a step of `optimizer` takes."""
    eager_steps.clear()
    train(optimizer, [0])
    return "eager" if eager_steps else "cpu"


def test_every_backend_is_explained() -> None:
    explanation = fusedopt.explain()
    assert [name for name, _, _ in explanation] == list(BACKENDS)
    for name, status, serves in explanation:
        reason = BACKENDS[name].unavailable()
        assert status.startswith("runs") if reason is None else reason in status
        assert serves and status in str(explanation) and serves in str(explanation)


def test_a_backend_that_does_not_run_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in BACKENDS.values():
        with monkeypatch.context() as patch:
            patch.setattr(backend, "unavailable", lambda: "the moon is full; wait")
            assert f"{backend.name}: does not run: the moon is full; wait" in [
                f"{name}: {status}" for name, status, _ in fusedopt.explain()
            ]


def test_explain_says_what_is_in_use() -> None:
    assert "in use: the first that can step the parameter" in str(fusedopt.explain())
    with fusedopt.use_backend("eager"):
        assert "in use: eager" in str(fusedopt.explain())


def test_an_asked_for_backend_that_does_not_run_is_explained() -> None:
    """Also by the command, which is to say why."""
    explained = output("import fusedopt; print(fusedopt.explain())", FUSEDOPT_BACKEND="gpu")
    assert f"in use: none; FUSEDOPT_BACKEND: {NO_SUCH_BACKEND}" in explained
    assert output("import runpy, sys; sys.argv[1:] = ['explain']; runpy.run_module('fusedopt')").startswith("cpu ")


def test_use_backend_nests_and_restores() -> None:
    assert requested_backend() is None
    with fusedopt.use_backend("eager"):
        with fusedopt.use_backend("cpu"):
            assert requested_backend() == "cpu"
        assert requested_backend() == "eager"
        with pytest.raises(KeyError), fusedopt.use_backend("cpu"):
            raise KeyError
        assert requested_backend() == "eager"
        with pytest.raises(ValueError, match=NO_SUCH_BACKEND), fusedopt.use_backend("gpu"):
            raise AssertionError("the block must not run")
        assert requested_backend() == "eager"
    assert requested_backend() is None


def test_use_backend_decides_from_step_to_step(eager_steps: list[Any]) -> None:
    optimizer = fusedopt.AdamW(parameters())
    assert runs_on(eager_steps, optimizer) == "cpu"
    with fusedopt.use_backend("eager"):
        assert runs_on(eager_steps, optimizer) == "eager"
    assert runs_on(eager_steps, optimizer) == "cpu"


def test_an_optimizers_own_backend_goes_first(eager_steps: list[Any]) -> None:
    with fusedopt.use_backend("cpu"):
        assert runs_on(eager_steps, fusedopt.AdamW(parameters(), backend="eager")) == "eager"
    with fusedopt.use_backend("eager"):
        assert runs_on(eager_steps, fusedopt.AdamW(parameters(), backend="cpu")) == "cpu"


def test_changing_the_backend_midway_changes_no_bit() -> None:
    expected = fusedopt.AdamW(parameters(), weight_decay=0.1)
    train(expected, range(6))
    actual = fusedopt.AdamW(parameters(), weight_decay=0.1)
    train(actual, range(2))
    with fusedopt.use_backend("eager"):
        train(actual, range(2, 4))
    train(actual, range(4, 6))
    assert_same_optimizers(actual, expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_cannot_run_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS[name], "unavailable", lambda: "the moon is full; wait")
    with pytest.raises(RuntimeError, match=f"backend: the backend '{name}' cannot run here: the moon is full; wait"):
        fusedopt.SGD(parameters(), backend=name)
    with pytest.raises(RuntimeError, match="use_backend: .* the moon is full"), fusedopt.use_backend(name):
        raise AssertionError("the block must not run")


def test_an_unknown_backend_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=f"backend: {NO_SUCH_BACKEND}"):
        fusedopt.SGD(parameters(), backend="gpu")


def test_a_tensor_the_backend_cannot_step_is_refused_by_name() -> None:
    """An explicit request never falls back; nothing has changed."""
    param = torch.nn.Parameter(torch.ones(4, device="meta"))
    param.grad = torch.ones(4, device="meta")
    other = torch.nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    optimizer = fusedopt.AdamW([("here", other), ("there", param)], backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot step parameter 'there': it is on meta"):
        optimizer.step()
    assert torch.equal(other, torch.ones(4)) and not optimizer.state


def test_environment_variable() -> None:
    """A process started with it never loads the native module, unless `use_backend` goes before it."""
    printed = output(
        "import sys, torch, fusedopt\nparam = torch.nn.Parameter(torch.ones(9))\nparam.grad = torch.ones(9)\n"
        "optimizer = fusedopt.SGD([param])\noptimizer.step()\nprint('fusedopt._native' in sys.modules)\n"
        "with fusedopt.use_backend('cpu'): optimizer.step()\nprint('fusedopt._native' in sys.modules)\n",
        FUSEDOPT_BACKEND="eager",
    )
    assert printed.split() == ["False", "True"]


@pytest.fixture
def reread_environment() -> Iterator[None]:
    _from_environment.cache_clear()
    yield
    _from_environment.cache_clear()


@pytest.mark.usefixtures("reread_environment")
@pytest.mark.parametrize(("value", "backend"), [("cpu", "cpu"), ("eager", "eager"), ("", "cpu")])
def test_values_of_the_environment_variable(
    value: str, backend: str, eager_steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", value)
    optimizer = fusedopt.AdamW(parameters())
    assert runs_on(eager_steps, optimizer) == backend
    with fusedopt.use_backend("eager"):
        assert runs_on(eager_steps, optimizer) == "eager"
    assert runs_on(eager_steps, fusedopt.AdamW(parameters(), backend="cpu")) == "cpu"


@pytest.mark.usefixtures("reread_environment")
def test_environment_variable_with_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", "gpu")
    optimizer = fusedopt.AdamW(parameters())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"FUSEDOPT_BACKEND: {NO_SUCH_BACKEND}"):
        train(optimizer, [0])
    assert_untouched(optimizer, before)


def test_without_the_native_module_training_goes_on(tmp_path: Path) -> None:
    """On the eager backend; `explain` says why, and an explicit request is refused with reason and remedy."""
    code = (
        "import sys, torch, fusedopt\nparam = torch.nn.Parameter(torch.ones(9))\nparam.grad = torch.ones(9)\n"
        "fusedopt.SGD([param], lr=0.5).step()\n"
        "assert (param == 0.5).all() and 'fusedopt._native' not in sys.modules\n"
        "print(fusedopt.explain())\n"
        "try: fusedopt.SGD([param], backend='cpu')\n"
        "except RuntimeError as error: print('REFUSED:', error)\n"
    )
    printed = output(code, FUSEDOPT_NATIVE_PATH=str(tmp_path))
    explained, _, refused = printed.partition("REFUSED:")
    for text in (explained, refused):
        assert f"FUSEDOPT_NATIVE_PATH={str(tmp_path)!r} holds no _native*.so" in text
        assert "install a C++ compiler and reinstall fusedopt" in text
    assert re.search("cpu +native", explained) and "does not run" in explained
    assert "the backend 'cpu' cannot run here" in refused


def test_importing_fusedopt_starts_nothing() -> None:
    """Neither the native module nor Triton is loaded; the native module not even by building an optimizer."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport fusedopt\n"
        "print(*set(sys.modules) - before)\n"
        "fusedopt.AdamW([torch.ones(1)])\nassert 'fusedopt._native' not in sys.modules\n"
    )
    loaded = set(output(code).split())
    assert "fusedopt.optim" in loaded
    assert not {name for name in loaded if name.startswith(("triton", "fusedopt._native", "fusedopt.kernels"))}
