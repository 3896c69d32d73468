"""The rule language: what is refused, and that the torch reference and the C++ form compute the same."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, same_bits, values

from fusedopt import binding
from fusedopt.backends import native
from fusedopt.binding import FUNCTIONS, RULES, RuleError, rule_of

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def function_from(source: str, directory: Path) -> Callable[..., Any]:
    """The function that `source` defines, in a file of its own: a rule's source is read when it is checked."""
    path = directory / "rule.py"
    path.write_text(source)
    namespace: dict[str, Any] = {}
    exec(compile(source, str(path), "exec"), namespace)
    return namespace["rule"]


def test_header_is_current() -> None:
    assert binding.header(list(RULES.values())) == (CSRC / "rules.h").read_text(), "run `make rules`"


# --- what a rule may not contain ---

ONLY_ASSIGNMENTS = "only `name = expression` is allowed"
STATEMENTS = [
    ("if p: p = g", ONLY_ASSIGNMENTS),
    ("for i in g: p = i", ONLY_ASSIGNMENTS),
    ("while p: p = g", ONLY_ASSIGNMENTS),
    ("with p: p = g", ONLY_ASSIGNMENTS),
    ("try: p = g\n    finally: p = m", ONLY_ASSIGNMENTS),
    ("match p:\n        case _: p = g", ONLY_ASSIGNMENTS),
    ("p += g", "not `p += g`"),
    ("p: float = g", ONLY_ASSIGNMENTS),
    ("p = m = g", ONLY_ASSIGNMENTS),
    ("assert p", ONLY_ASSIGNMENTS),
    ("raise p", ONLY_ASSIGNMENTS),
    ("del m", ONLY_ASSIGNMENTS),
    ("pass", ONLY_ASSIGNMENTS),
    ("global q", ONLY_ASSIGNMENTS),
    ("import math", ONLY_ASSIGNMENTS),
    ("def inner(): return p", ONLY_ASSIGNMENTS),
    ("class Inner: q = 1", ONLY_ASSIGNMENTS),
    ("sqrt(g)", ONLY_ASSIGNMENTS),
    ("return p, m", ONLY_ASSIGNMENTS),
    ("p, m = m, p", "only one plain name may be assigned"),
    ("p[0] = g", "only one plain name may be assigned"),
    ("p.data = g", "only one plain name may be assigned"),
    ("l2 = g", "the scalar 'l2' may not be assigned"),
    ("sqrt = g", "'sqrt' is the name of a function"),
]
NOT_ALLOWED = "is not allowed: only + - * / and abs, sign, sqrt, minimum, maximum, where"
EXPRESSIONS = [
    *((text, NOT_ALLOWED) for text in ("p ** g", "p // g", "p % g", "p @ g", "p & g", "p << g", "~p", "+p", "not p")),
    *((text, NOT_ALLOWED) for text in ("p and g", "p if g else m", "(q := p)", "[p]", "(p, g)", "{p}", "{p: g}")),
    *((text, NOT_ALLOWED) for text in ("[x for x in p]", "lambda: p", "p[0]", "p[:1]", "p.real", "p.abs()", "f'{p}'")),
    *((text, NOT_ALLOWED) for text in ("'text'", "b'text'", "None", "...", "1j", "1j * p", "(yield)", "exp(p)")),
    *((text, NOT_ALLOWED) for text in ("sqrt(x=p)", "sqrt(*p)", "sqrt(sqrt)(p)", "torch.sqrt(p)", "minimum(p, **g)")),
    ("True", "a boolean is not allowed"),
    ("p * False", "a boolean is not allowed"),
    ("sqrt", "the name 'sqrt' is not defined in the rule"),
    ("momentum * g", "the name 'momentum' is not defined in the rule"),
    ("later + g", "the name 'later' is not defined in the rule"),
    ("sqrt()", "sqrt takes 1 argument(s), got 0"),
    ("sqrt(p, g)", "sqrt takes 1 argument(s), got 2"),
    ("maximum(p)", "maximum takes 2 argument(s), got 1"),
    ("where(p < g, p)", "where takes 3 argument(s), got 2"),
    ("p < g", "a comparison is allowed only as the first argument of `where`"),
    ("p * (p < g)", "a comparison is allowed only as the first argument of `where`"),
    ("where(p < g, p < g, g)", "a comparison is allowed only as the first argument of `where`"),
    ("where(p, p, g)", "must be one comparison"),
    ("where(p < g < m, p, g)", "must be one comparison"),
    ("where(p is g, p, g)", "must be one comparison"),
    ("where(p in g, p, g)", "must be one comparison"),
    ("where(not p < g, p, g)", "must be one comparison"),
    ("where(p < g and g < m, p, g)", "must be one comparison"),
    ("where(l2 < lr, p, g)", "it compares two scalars"),
    ("where(p < g, l2, lr)", "where of scalars alone"),
    ("g * (l2 * lr)", "it combines two scalars"),
    ("g * (l2 + 1)", "it combines two scalars"),
    ("g * (1 - 0.5)", "it combines two scalars"),
    ("l2 * lr * g", "it combines two scalars"),
    ("lr", "only scalars in it"),
    ("-lr", "only scalars in it"),
    ("0.5", "only scalars in it"),
    ("sqrt(lr)", "sqrt of scalars alone"),
    ("g * abs(-lr)", "abs of scalars alone"),
    ("maximum(lr, 0)", "maximum of scalars alone"),
    ("g / lr", "it divides by a scalar"),
    ("g / 2", "it divides by a scalar"),
    ("g / -lr", "it divides by a scalar"),
    ("lr / g", "it divides a number by a tensor"),
    ("0.5 / g", "it divides a number by a tensor"),
    ("-lr / g", "it divides a number by a tensor"),
    # Wherever it stands.
    ("m + -(g / lr)", "it divides by a scalar"),
    ("sqrt(g / lr)", "it divides by a scalar"),
    ("maximum(g / lr, m)", "it divides by a scalar"),
    ("maximum(m, g / lr)", "it divides by a scalar"),
    ("where(g / lr < m, p, g)", "it divides by a scalar"),
    ("where(m < g / lr, p, g)", "it divides by a scalar"),
    ("where(p < g, g / lr, g)", "it divides by a scalar"),
    ("where(p < g, g, g / lr)", "it divides by a scalar"),
]


@pytest.mark.parametrize(("statement", "reason"), [*STATEMENTS, *((f"p = {text}", why) for text, why in EXPRESSIONS)])
def test_statement_is_refused(statement: str, reason: str, tmp_path: Path) -> None:
    # Where two statements stand on one line it would be a poor test of the line number.
    body = f'"""Doc."""\n    m = m + g\n    {statement}\n    later = g\n    return p, m\n'
    function = function_from(f"# A comment.\n\ndef rule(p, g, m, l2, lr):\n    {body}", tmp_path)
    with pytest.raises(RuleError) as caught:
        rule_of(function)
    error = caught.value
    assert reason in error.msg and "rule 'rule'" in error.msg
    assert (error.filename, error.lineno) == (str(tmp_path / "rule.py"), 6)
    assert error.text is not None and error.text.strip() == statement.splitlines()[0]
    assert "rule.py, line 6" in str(error)


RETURN = "it must return the parameter and then its states in order"
DEFINITIONS = [
    ("def rule(p, g, m, lr):\n    m = g", 2, "the last statement must be `return p, *states`"),
    ("def rule(p, g, m, lr):\n    'Doc.'", 1, "the last statement must be `return p, *states`"),
    ("def rule(p, g, m, lr):\n    m = g\n    return", 3, RETURN),
    ("def rule(p, g, m, lr):\n    m = g\n    return m, p", 3, RETURN + ", `return p, m`"),
    ("def rule(p, g, m, lr):\n    m = g\n    return g, m", 3, RETURN),
    ("def rule(p, g, m, lr):\n    m = g\n    return p, g", 3, RETURN),
    ("def rule(p, g, m, lr):\n    return p, lr", 2, RETURN),
    ("def rule(p, g, m, v, lr):\n    return p, v, m", 2, RETURN + ", `return p, m, v`"),
    ("def rule(p, g, m, lr):\n    return p - lr * g, m", 2, RETURN),
    ("def rule(p, g, m, lr):\n    return p, -m", 2, RETURN),
    ("def rule(p, g, m, lr):\n    return [p, m]", 2, RETURN),
    ("def rule(p, g, m):\n    return p, m, m", 2, RETURN),
    # What is not returned is a scalar, so this m may not be assigned.
    ("def rule(p, g, m, lr):\n    m = g\n    return p", 2, "the scalar 'm' may not be assigned"),
    ("def rule(p):\n    return p", 1, "the first two arguments must be the parameter and its gradient"),
    ("def rule(p, g, lr=1):\n    return p", 1, "arguments must be plain names"),
    ("def rule(p, g, *lr):\n    return p", 1, "arguments must be plain names"),
    ("def rule(p, g, **lr):\n    return p", 1, "arguments must be plain names"),
    ("def rule(p, g, *, lr):\n    return p", 1, "arguments must be plain names"),
    ("def rule(p, g, /, lr):\n    return p", 1, "arguments must be plain names"),
    ("def rule(p, g, sqrt):\n    p = p - sqrt * g\n    return p", 1, "'sqrt' is the name of a function"),
    ("keep = lambda f: f\n@keep\ndef rule(p, g):\n    return p", 2, "a decorator is not allowed"),
    ("def rule(p, g, state):\n    p = p - state * g\n    return p", 1, "'state' has a meaning in the C++"),
    ("def rule(p, g, lr):\n    T = p - lr * g\n    return p", 2, "'T' has a meaning in the C++"),
    ("def rule(p, g, lr):\n    p = (\n        p\n        - g / lr\n    )\n    return p", 4, "it divides by a scalar"),
]


@pytest.mark.parametrize(("source", "line", "reason"), DEFINITIONS)
def test_definition_is_refused(source: str, line: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RuleError) as caught:
        rule_of(function_from(source + "\n", tmp_path))
    assert reason in caught.value.msg
    assert caught.value.lineno == line


@pytest.mark.parametrize("source", ["rule = lambda p, g: p", "async def rule(p, g):\n    return p"])
def test_only_plain_functions(source: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a rule must be a function defined with `def`"):
        rule_of(function_from(source + "\n", tmp_path))


def test_what_a_rule_says_of_itself() -> None:
    rule = RULES["ademamix"]
    assert rule.states == ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    assert rule.scalars == ("decay", "w1", "w2", "w3", "step_size", "step_slow", "eps")
    assert rule_of(rule.function) is rule
    assert all(rule.name == name for name, rule in RULES.items())


# --- the reference ---


def numpy_reference(function: types.FunctionType) -> Callable[..., Any]:
    """The rule over numpy arrays: IEEE arithmetic by other hands than torch's."""
    functions = {
        "abs": np.abs,
        "sign": lambda x: (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype),
        "sqrt": np.sqrt,
        "minimum": np.minimum,
        "maximum": np.maximum,
        "where": np.where,
    }
    assert set(functions) == set(FUNCTIONS)
    bound = types.FunctionType(function.__code__, functions)

    def call(*args: Any) -> tuple[Any, ...]:
        with np.errstate(all="ignore"):
            result = bound(*args)
        return result if isinstance(result, tuple) else (result,)

    return call


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_reference_against_numpy(rule: binding.Rule) -> None:
    """In float32 every bit, special values too; in float64, whose root torch may round wrongly, to its precision."""
    scalars = [0.37 + 0.11 * index for index in range(len(rule.scalars))]
    for dtype, awkward in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        arrays = [values((3001,), 3, index, dtype=dtype, awkward=awkward) for index in range(2 + len(rule.states))]
        arrays[2:] = [state.abs() if index % 2 else state for index, state in enumerate(arrays[2:])]
        before = [array.clone() for array in arrays]
        exact = np.float32 if dtype == torch.float32 else np.float64
        actual = rule.reference(*arrays, *(float(exact(scalar)) for scalar in scalars))
        expected = numpy_reference(rule.function)(*(array.numpy() for array in arrays), *map(exact, scalars))
        assert len(actual) == len(expected) == 1 + len(rule.states)
        for name, a, b in zip(("p", *rule.states), actual, map(torch.from_numpy, expected)):
            if dtype == torch.float32:
                assert_same_bits(a, b, name)
            else:
                # The root may be off by one rounding, and what is made of it is divided by a number above 0.3.
                torch.testing.assert_close(a, b, rtol=4e-16, atol=4e-15, equal_nan=True, msg=name)
        for array, copy in zip(arrays, before):
            assert_same_bits(array, copy)


def test_square_root_is_correctly_rounded(tmp_path: Path) -> None:
    """For every mantissa of either parity of exponent: the rest are these times a power of four."""
    source = "def rule(p, g):\n    p = sqrt(g)\n    return p\n"
    root = rule_of(function_from(source, tmp_path)).reference
    for first in range(0x3F800000, 0x40800000, 1 << 22):
        x = torch.arange(first, first + (1 << 22), dtype=torch.int32).view(torch.float32)
        (r,) = root(x, x)
        # Half a last place of r beside r has 25 bits, so its square is exact in double.
        x, r = x.double(), r.double()
        assert bool(((r - 2**-24) ** 2 < x).all() and (x < (r + 2**-24) ** 2).all())
    tiny = torch.arange(0, 1 << 23, 7, dtype=torch.int32).view(torch.float32)
    assert_same_bits(root(tiny, tiny)[0], torch.from_numpy(np.sqrt(tiny.numpy())))
    powers = torch.from_numpy(np.exp2(np.arange(-149, 128)).astype(np.float32))
    around = torch.cat([(powers.view(torch.int32) + step).view(torch.float32) for step in (-2, -1, 0, 1, 2)])
    assert_same_bits(root(around, around)[0], torch.from_numpy(np.sqrt(around.double().numpy()).astype(np.float32)))


# --- C++ ---

TRIAL = """
def rule(
    p, g,
    smaller, larger, capped, floored, low_first, sign_of, size, root, less, at_most, more, at_least, same, other,
    limited, chosen, negated, difference, nested, quotient, twice, over, inverse, written, local, doubly,
    low, high
):
    '''Everything a rule may contain.'''
    smaller = minimum(p, g)
    larger = maximum(p, g)
    capped = minimum(g, high)
    floored = maximum(g, low)
    low_first = minimum(low, maximum(0.1, g))
    sign_of = sign(g)
    size = abs(g)
    root = sqrt(g)
    less = where(p < g, p, g)
    at_most = where(p <= g, p, g)
    more = where(p > g, p, g)
    at_least = where(p >= g, p, g)
    same = where(p == g, 1, g)
    other = where(p != g, g, 0.1)
    limited = where(low < g, high, g)
    chosen = where(g >= 0.3, p, low)
    negated = -p * -low - -g * -0.5
    difference = p - (g - (p - low))
    nested = p / (g / (p * g)) / g
    quotient = p / g * low + 0.1 * g - p * (g + p)
    twice = (p + g) * (p - g)
    over = low * (1 / g)
    inverse = 1 / g
    written = written * high + low
    q = g * g
    q = q + p
    local = q
    p = p - low * g
    doubly = -(-g) + (-(-p) - -(-g))
    return p, smaller, larger, capped, floored, low_first, sign_of, size, root, less, at_most, more, at_least, same, \\
        other, limited, chosen, negated, difference, nested, quotient, twice, over, inverse, written, local, doubly
"""

HARNESS = """
#include "functions.h"
namespace fusedopt {
%s
template <class T>
void run(long n, T* p, const T* g, T* states, const T* scalar) {
  for (long i = 0; i < n; ++i) {
    T state[rule::states];
    for (int k = 0; k < rule::states; ++k) state[k] = states[k * n + i];
    rule::apply<T>(p[i], g[i], state, scalar);
    for (int k = 0; k < rule::states; ++k) states[k * n + i] = state[k];
  }
}
}
extern "C" void run32(long n, float* p, const float* g, float* s, const float* c) { fusedopt::run(n, p, g, s, c); }
extern "C" void run64(long n, double* p, const double* g, double* s, const double* c) { fusedopt::run(n, p, g, s, c); }
"""
FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
}


def compiler() -> str:
    found = [shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")]
    return next((path for path in found if path), "")


@pytest.mark.skipif(not compiler(), reason="no C++ compiler found; install one, or set CXX")
@pytest.mark.parametrize("instructions", native().instruction_sets())
def test_cpp_against_reference(instructions: str, tmp_path: Path) -> None:
    """A rule of everything a rule may contain, over every pair of special values, in float32 and float64."""
    rule = rule_of(function_from(TRIAL, tmp_path))
    source, library = tmp_path / "rule.cpp", tmp_path / "rule.so"
    source.write_text(HARNESS % binding.cpp(rule))
    # The flags of CMakeLists.txt that bear on values.
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
    command = [compiler(), *flags, *FLAGS.get(instructions, []), f"-I{CSRC}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))

    for dtype, entry in ((torch.float32, loaded.run32), (torch.float64, loaded.run64)):
        info = torch.finfo(dtype)
        finite = [0.0, 0.1, 0.25, 0.3, 1.0, 1.5, 2.0, info.eps, info.tiny, info.smallest_normal / 8, info.max]
        special = [*finite, *(-x for x in finite), float("inf"), -float("inf"), float("nan")]
        pairs = torch.tensor(list(itertools.product(special, special)), dtype=dtype)
        p, g = torch.cat([pairs, values((5000, 2), 4, dtype=dtype)]).T.contiguous()
        states = values((len(rule.states), len(p)), 5, dtype=dtype)
        scalars = torch.tensor([0.1, 0.7], dtype=dtype)
        expected = rule.reference(p, g, *states, *scalars.tolist())
        entry(ctypes.c_long(len(p)), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (p, g, states, scalars)))
        results = {name: pair for name, *pair in zip(("p", *rule.states), (p, *states), expected)}
        if dtype == torch.float64:
            # torch's own root of a double may be one rounding off.
            torch.testing.assert_close(*results.pop("root"), rtol=info.eps, atol=0, equal_nan=True)
        assert [name for name, (a, b) in results.items() if not same_bits(a, b)] == [], dtype
