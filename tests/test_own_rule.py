"""A user's own rule: the same bits on every backend, its compile and cache, and what is said where it cannot run."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    assert_same_bits,
    assert_same_results,
    instruction_set,
    make_parameters,
    needs_triton,
    pairwise,
    results,
    set_grads,
)
from own_rules import OWN, Everything, Plain, Signum
from steps import assert_same_optimizers, assert_untouched, parameters, snapshot, train

import fusedopt
from fusedopt import _compile
from fusedopt.backends import BACKENDS, native
from fusedopt.binding import RULES, Rule, RuleError, rule_of

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler found; install one, or set CXX")

ROOT = Path(fusedopt.__file__).parent.parent
SHAPES = ((5, 7), (3, 700), (4099,), (), (0,))
FORMATS = [
    {"dtype": dtype, "state_dtype": state_dtype, "options": options}
    for row in pairwise(
        dtype=(torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float64),
        state_dtype=(None, "float32", "bfloat16", "int8"),
        options=(
            {},
            {"master": "split16"},
            {"master": "float32", "max_grad_norm": 0.5},
            {"rounding": "stochastic", "zero_grads": True},
        ),
    )
    for dtype, state_dtype, options in [row.values()]
    if options.get("master") != "split16" or dtype != torch.float16
]


def stepped(optimizer: type, backend: str | None, dtype: torch.dtype, steps: int = 4, **options: Any) -> dict[str, Any]:
    params = make_parameters(SHAPES, dtype)
    made = optimizer(params, backend=backend, min_quantized_size=0, **options)
    for step in range(steps):
        set_grads(params, step)
        made.step()
    return results(made)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("case", FORMATS, ids=lambda case: "-".join(map(str, [*case.values()][:2])))
def test_same_bits(name: str, case: dict[str, Any]) -> None:
    if name == "Everything" and case["dtype"] == torch.float64:
        pytest.skip("torch's root of a double may be one rounding off")
    options = {"state_dtype": case["state_dtype"], **case["options"]}
    expected = stepped(OWN[name], "eager", case["dtype"], **options)
    assert_same_results(stepped(OWN[name], "cpu", case["dtype"], **options), expected)


def test_same_bits_on_every_instruction_set() -> None:
    """Each has kernels of its own."""
    expected = stepped(Everything, "eager", torch.float32)
    numbers = set()
    for name in native().instruction_sets():
        with instruction_set(name):
            assert_same_results(stepped(Everything, "cpu", torch.float32), expected)
            numbers.add(_compile.rule_number(Everything.rule))
    assert len(numbers) == len(native().instruction_sets())


def test_changing_the_instruction_set_midway_changes_no_bit() -> None:
    expected, actual = Signum(parameters(), backend="eager"), Signum(parameters(), backend="cpu")
    train(expected, range(4))
    for step in range(4):
        with instruction_set(native().instruction_sets()[-(step % 2)]):
            train(actual, [step])
    assert_same_optimizers(actual, expected)


def test_against_the_formula() -> None:
    """In float64, though the rule bears a built-in one's name."""
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    param, momentum, expected = torch.nn.Parameter(start.clone()), torch.zeros_like(start), start.clone()
    optimizer = Signum([param], lr=0.1, weight_decay=0.3, backend="cpu")
    assert optimizer.rule(optimizer.param_groups[0]).name == "adam" in RULES
    for step in range(3):
        param.grad = torch.cos(start * (step + 1)) - 0.5
        optimizer.step()
        momentum = 0.75 * momentum + 0.25 * param.grad
        expected = expected - 0.1 * (torch.sign(momentum) + 0.3 * expected)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-15)


UNDER_THE_INTERPRETER = """
import numpy, torch
numpy.seterr(all="ignore")
from helpers import assert_same_results
from own_rules import OWN
from test_own_rule import stepped
for name, optimizer in OWN.items():
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"state_dtype": "int8", "rounding": "stochastic"})):
        expected = stepped(optimizer, "eager", dtype, **options)
        assert_same_results(stepped(optimizer, "triton", dtype, **options), expected)
        print(name, dtype)
"""


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_same_bits_in_triton() -> None:
    needs_triton()
    printed = finish(start(UNDER_THE_INTERPRETER, TRITON_INTERPRET="1"))
    assert len(printed.splitlines()) == 2 * len(OWN)


# --- compiling, and what is kept ---


@pytest.fixture
def compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """As in a new process with an empty cache; says how often the compiler has run."""
    log, wrapper = tmp_path / "log", tmp_path / "c++"
    log_run = f'case "$*" in --version) echo "c++ $VERSION"; exit;; *) echo run >> {log};; esac'
    wrapper.write_text(f'#!/bin/sh\n{log_run}\nexec {COMPILER} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("FUSEDOPT_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    yield lambda: len(log.read_text().splitlines()) if log.exists() else 0
    _compile._compiler.cache_clear()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process knows of compiled rules."""
    monkeypatch.setattr(_compile, "_compiled", {})
    monkeypatch.setattr(_compile, "_numbers", {})
    _compile._compiler.cache_clear()


def step_natively(optimizer: type = Signum) -> None:
    param = torch.nn.Parameter(torch.ones(9))
    param.grad = torch.ones(9)
    optimizer([param], backend="cpu").step()
    assert bool((param != 1).all())


def test_compiled_once_and_kept(compiles: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_natively()
    step_natively()
    assert compiles() == 1
    forget(monkeypatch)
    step_natively()
    assert compiles() == 1
    (library,) = (tmp_path / "cache").iterdir()
    library.unlink()
    forget(monkeypatch)
    step_natively()
    assert compiles() == 2
    monkeypatch.setenv("VERSION", "of another compiler")
    forget(monkeypatch)
    step_natively()
    assert compiles() == 3


IN_A_PROCESS = "import test_own_rule; test_own_rule.step_natively(); print('stepped')"


def test_processes_share_the_cache(compiles: Callable[[], int], tmp_path: Path) -> None:
    """Also where they compile at the same time."""
    for process in [start(IN_A_PROCESS) for _ in range(2)]:
        assert finish(process) == "stepped\n"
    at_once = compiles()
    assert 1 <= at_once <= 2 and all(path.suffix == ".so" for path in (tmp_path / "cache").iterdir())
    step_natively()
    assert compiles() == at_once


def test_threads_compile_once(compiles: Callable[[], int]) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(_compile.rule_number(Plain.rule))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiles() == 1 and len(found) == 4 and len(set(found)) == 1


DAMAGE = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "bent": lambda whole: whole[:-1] + b"?",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_library_is_built_anew(
    damage: Callable[[bytes], bytes], compiles: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_natively()
    (library,) = (tmp_path / "cache").iterdir()
    whole = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(damage(whole))
    forget(monkeypatch)
    step_natively()
    assert compiles() == 2
    forget(monkeypatch)
    step_natively()
    assert compiles() == 2


def test_a_cache_that_cannot_be_written(
    compiles: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    step_natively()
    assert compiles() == 1 and (tmp_path / "cache").read_text() == "a file"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSEDOPT_CACHE", str(tmp_path / "own"))
    assert _compile._cache_directory() == tmp_path / "own"
    monkeypatch.delenv("FUSEDOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _compile._cache_directory() == tmp_path / "fusedopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _compile._cache_directory() == tmp_path / ".cache" / "fusedopt"


def rule_from(source: str, directory: Path) -> Rule:
    """A rule in a file of its own, where its source can be read."""
    path = directory / "rule.py"
    path.write_text(source)
    namespace: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), namespace)
    return rule_of(namespace["rule"])


def test_rules_of_one_name_and_of_one_body(compiles: Callable[[], int], tmp_path: Path) -> None:
    """Another body is another rule, and equal code shares its kernels."""
    numbers = []
    for index, factor in enumerate((2, 3, 2)):
        directory = tmp_path / str(index)
        directory.mkdir()
        source = f"def rule(p, g):\n    p = p - {factor} * g\n    return p\n"
        numbers.append(_compile.rule_number(rule_from(source, directory)))
    assert numbers[0] == numbers[2] != numbers[1] and compiles() == 2


def test_built_in_rules_are_not_compiled(compiles: Callable[[], int]) -> None:
    assert [_compile.rule_number(rule) for rule in RULES.values()] == list(range(len(RULES))) and compiles() == 0


def test_the_native_module_keeps_its_headers_and_flags() -> None:
    headers = native().kernel_headers()
    assert {"step.h", "rules.h"} <= headers.keys()
    for name, text in headers.items():
        assert text == (Path(__file__).parent.parent / "csrc" / name).read_text(), f"{name}: rebuild the native module"
    for name in native().instruction_sets():
        assert {"-O3", "-ffp-contract=off"} <= set(native().kernel_flags()[name].split())


# --- where it cannot be compiled ---


def two_states_too_many(p, g, a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    p = p - g
    return p, a, b, c, d, e, f


class TooMany(fusedopt.Optimizer):
    rule = rule_of(two_states_too_many)
    states = dict.fromkeys("abcdef", "signed")

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, {"lr": 1.0}, **options)

    def scalars(self, group: Any, step: Any) -> dict[str, Any]:
        return {}


OBSTACLES = {
    "none": (Signum, "", "no C++ compiler found (CXX, c++, g++ or clang++); install one, set CXX to one, or use"),
    "missing": (Signum, "no-such-c++", "CXX='no-such-c++' names no program that can be run; set it to GCC or Clang"),
    "failing": (Signum, "sh -c 'echo the moon is full >&2; exit 1'", "the moon is full"),
    "silent": (Signum, "false", "failed; set CXX to GCC or Clang, or use backend='eager'\nexit status 1"),
    "useless": (Signum, "true", "own_rule.so"),
    "limits": (TooMany, COMPILER, "it has 6 states, and 4 are the most; use backend='eager'"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_it_runs_eagerly_where_it_cannot_be_compiled(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, cxx, reason = OBSTACLES[obstacle]
    assert cxx is not None
    expected = optimizer(parameters(), backend="eager")
    train(expected, range(2))
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("FUSEDOPT_CACHE", str(tmp_path / "cache"))
    if obstacle == "none":
        monkeypatch.setenv("PATH", str(tmp_path))
    forget(monkeypatch)
    assert "cannot be compiled" not in str(fusedopt.explain())
    actual = optimizer(parameters())
    with pytest.warns(UserWarning, match="cannot be compiled for the CPU") as said:
        train(actual, range(2))
    assert len(said) == 1 and reason in str(said[0].message)
    assert_same_optimizers(actual, expected)
    assert reason in str(fusedopt.explain())
    _compile._compiler.cache_clear()


def test_an_explicit_request_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-c++")
    forget(monkeypatch)
    optimizer = Signum(parameters(), backend="cpu")
    before = snapshot(optimizer)
    message = "backend='cpu' cannot step parameter 0 of group 0: rule 'adam' cannot be compiled"
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=message):
        train(optimizer, [0])
    assert_untouched(optimizer, before)
    with fusedopt.use_backend("cpu"), pytest.raises(RuntimeError, match="CXX='no-such-c..' names no program"):
        train(Signum(parameters()), [0])
    _compile._compiler.cache_clear()


def test_a_rule_without_gradients_is_in_no_ones_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose rule cannot be compiled, and whose parameters take no part: nothing is said of it either."""

    class Either(fusedopt.SGD):
        states = {**fusedopt.SGD.states, **TooMany.states}

        def rule(self, group: Any) -> Rule:
            return TooMany.rule if group["lr"] == 2 else super().rule(group)

    forget(monkeypatch)
    params = parameters()
    optimizer = Either([{"params": params[:2], "lr": 1.0}, {"params": params[2:], "lr": 2}], backend="cpu")
    set_grads(params[:2], 0)
    before = params[0].detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not torch.equal(params[0], before)


# --- what a class and a rule may be ---


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"states": {"m": "sgned"}}, "Mine.states['m'] must be 'signed' or 'unsigned', got 'sgned'"),
        ({"states": {"step": "signed"}}, "Mine.states has 'step', which names something else"),
        ({"states": {"master": "signed"}}, "Mine.states has 'master', which names something else"),
        ({"states": {"m": "signed", "m_scale": "signed"}}, "Mine.states has 'm_scale', which names something else"),
    ],
)
def test_states_that_cannot_be(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(TypeError) as error:
        type("Mine", (fusedopt.Optimizer,), body)
    assert reason in str(error.value)


@pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if not backend.unavailable()])
def test_what_a_class_lacks_is_named(backend: str) -> None:
    class Stateless(Signum):
        states = {}

    class Unscaled(Signum):
        def scalars(self, group: Any, step: Any) -> dict[str, Any]:
            return {"decay": 1.0}

    for cls, reason in (
        (Stateless, "Stateless.states does not declare 'class_', a state of its rule 'adam'"),
        (Unscaled, "Unscaled.scalars does not return 'lr', a scalar of its rule"),
    ):
        optimizer = cls(parameters(), backend=backend)
        before = snapshot(optimizer)
        with pytest.raises(TypeError, match=reason):
            train(optimizer, [0])
        assert_untouched(optimizer, before)


def test_a_rule_whose_source_cannot_be_read() -> None:
    namespace: dict[str, Any] = {}
    exec("def mine(p, g):\n    return p", namespace)
    with pytest.raises(OSError, match="the source of rule 'mine' cannot be read .*: define it in a file or a notebook"):
        rule_of(namespace["mine"])


@pytest.mark.parametrize("number", ["1e999", "9007199254740993", "-1e999"])
def test_a_number_out_of_range(number: str, tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="the number is out of range"):
        rule_from(f"def rule(p, g):\n    p = p - {number} * g\n    return p\n", tmp_path)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_copies_and_checkpoints(duplicate: Callable[[Any], Any], state_dtype: str | None) -> None:
    def made() -> Any:
        return Everything(make_parameters(SHAPES), state_dtype=state_dtype, min_quantized_size=0, maximize=True)

    expected, original = made(), made()
    train(expected, range(4))
    train(original, range(2))
    copied, loaded = duplicate(original), made()
    loaded.load_state_dict(original.state_dict())
    for param, trained in zip(loaded.param_groups[0]["params"], original.param_groups[0]["params"]):
        param.data = trained.detach().clone()
    for optimizer in (copied, loaded, original):
        train(optimizer, range(2, 4))
        assert_same_optimizers(optimizer, expected)


def test_the_signature_has_every_option() -> None:
    assert Signum(parameters(), state_dtype="int8", seed=3).param_groups[0]["seed"] == 3
    with pytest.raises(TypeError, match="Signum got an unexpected argument 'beta'"):
        Signum(parameters(), beta=1)


def test_large_tensors_on_several_threads() -> None:
    def made(backend: str) -> Any:
        params = make_parameters([(300_001,)])
        optimizer = Everything(params, backend=backend)
        set_grads(params, 0)
        optimizer.step()
        return params[0]

    assert_same_bits(made("cpu"), made("eager"))
