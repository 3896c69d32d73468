"""The Triton kernels under Triton's interpreter, against the reference. `test_triton.py` runs this file.

Triton decides at its import whether it interprets, so these tests need a process of their own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    assert_same_bits,
    pairwise,
    set_grad,
    values,
)
from test_codecs import any_bits, hard_to_round
from torch import Tensor
from updates import (
    DTYPES,
    LAID,
    SHAPES,
    STORED,
    assert_near_codes,
    at_step,
    buffered,
    case_of,
    hard_to_quantize,
    name_of,
    parts,
    updates,
)

from fusedopt._state import NARROW, new_master
from fusedopt.backends import Eager, Update, interpreted, native
from fusedopt.binding import RULES, rule_of
from fusedopt.codecs import (
    BLOCK,
    MASTERS,
    SIGNED,
    STATE_DTYPES,
    UNSIGNED,
    Codes,
    DynamicMap,
    Key,
    random_words,
)
from fusedopt.kernels import codecs as kernel_codecs
from fusedopt.kernels.driver import step_updates
from fusedopt.kernels.step import TILE
from fusedopt.kernels.tables import launches_of

assert interpreted(), "set TRITON_INTERPRET=1"
np.seterr(all="ignore")  # the interpreter computes with NumPy, which warns of every NaN
pytestmark = pytest.mark.usefixtures("one_thread")

assert TILE < math.prod(SHAPES[-1]) < 2 * TILE


# --- against the reference ---


def check(case: dict[str, Any]) -> None:
    ours, theirs = updates(case), updates(case)
    for step in range(2):
        now = at_step(ours, step, case)
        grads = [update.grad.clone() for update in now]
        step_updates(now)
        for update, grad in zip(now, grads):
            assert_same_bits(update.grad, grad, "gradient")
        for update in at_step(theirs, step, case):
            Eager.step(update)
    compare = assert_near_codes if case["param"] in (torch.float64, torch.complex128) else assert_same_bits
    for update, expected in zip(ours, theirs):
        for (name, found), reference in zip(parts(update).items(), parts(expected).values()):
            compare(found, reference, f"{name} {list(update.param.shape)}")


@pytest.mark.parametrize("row", pairwise(**STORED, **LAID), ids=name_of)
def test_same_bits_as_the_reference(row: dict[str, Any]) -> None:
    check(case_of(row))


@pytest.mark.slow
@pytest.mark.parametrize("narrow", STORED["narrow"], ids=str)
@pytest.mark.parametrize("state", STATE_DTYPES)
@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_format(rule: str, param: torch.dtype, state: str | None, narrow: tuple[Any, ...]) -> None:
    if narrow != (None, "nearest") and param not in NARROW:
        pytest.skip("only parameters of 16 bits have these")
    check(case_of({"rule": rule, "param": param, "state": state, "narrow": narrow}))


# --- codecs ---


def step_both(make: Callable[[], Update]) -> tuple[Update, Update]:
    """The same update by the kernel and by the reference."""
    ours, theirs = make(), make()
    step_updates([ours])
    Eager.step(theirs)
    return ours, theirs


maps = pytest.mark.parametrize("map", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])


@maps
def test_every_code(map: DynamicMap) -> None:
    """What each code means, and what numbers near a rounding become, for scales of any mantissa."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    ours, theirs = step_both(buffered(torch.zeros(256), map, codes))
    assert_same_bits(ours.param, theirs.param)
    x = hard_to_quantize(map)
    for factor in (1.0, -1.0, 0.7, 1.3e-38, 3e38, 1e-20):
        ours, theirs = step_both(buffered(x * factor, map))
        for name, found in parts(ours).items():
            assert_same_bits(found, parts(theirs)[name], f"{name} at {factor}")


@maps
def test_blocks_that_hold_no_numbers(map: DynamicMap) -> None:
    """NaN or infinity costs its block and no other; a block of subnormals is zero; the last block is shorter."""
    x = values((8 * BLOCK + 40,), 1).abs()
    x[5], x[BLOCK + 9], x[2 * BLOCK], x[8 * BLOCK + 39] = np.nan, np.inf, -np.inf, np.nan
    x[3 * BLOCK : 4 * BLOCK] = 1e-39
    x[4 * BLOCK : 5 * BLOCK] = 0
    ours, theirs = step_both(buffered(x, map))
    for name, found in parts(ours).items():
        assert_same_bits(found, parts(theirs)[name], name)
    (state,) = ours.states
    assert isinstance(state, Codes)
    lost = [0, 1, 2, 8]
    assert state.scale.isnan().nonzero().flatten().tolist() == lost
    assert state.scale[3] == 0 and state.scale[4] == 0 and (state.scale[5:8] > 0).all()


@pytest.mark.parametrize(
    ("dtype", "master"),
    [*((torch.bfloat16, master) for master in MASTERS), (torch.float16, None), (torch.float16, "float32")],
    ids=str,
)
@pytest.mark.parametrize("key", [None, Key(0x9ABCDEF0, 0xFEDCBA98)], ids=["nearest", "stochastic"])
def test_rounding(dtype: torch.dtype, master: str | None, key: Key | None) -> None:
    """Numbers at and beside values and middles of two, and any others, written to parameters by `p = 0 - 1 * -x`.

    First, halves whose fraction is just the random number; last, NaN as GPUs have it, and numbers near the largest,
    which would become infinity if drawn upwards.
    """
    drawn = random_words(key or Key(0, 0), 100, torch.device("cpu"))
    extreme = torch.tensor([0x7FFFFFFF, -1, *[0x7F7F8001, 0x7F7FFF81] * 30], dtype=torch.int64).to(torch.int32)
    x = torch.cat(
        [
            (drawn >> 8).float() * 2.0**-48,
            hard_to_round(dtype)[:: 17 if key or master else 5],
            any_bits(1 << 13, 5),
            extreme.view(torch.float32),
        ]
    )

    def make() -> Update:
        param = torch.zeros(x.shape, dtype=dtype)
        low = MASTERS[master]
        beside = None if low is None else new_master(param, low)
        return Update(RULES["sgd"], param, -x, [], (0.0, 1.0), master=beside, key=key)

    ours, theirs = step_both(make)
    for name, found in parts(ours).items():
        assert_same_bits(found, parts(theirs)[name], name)


@triton.jit
def _words(index, key, out):
    at = tl.arange(0, 8)
    tl.store(out + at, kernel_codecs.random_words(tl.load(index + at), tl.load(key)).to(tl.int64))


def test_random_words_of_large_tensors() -> None:
    key, out = Key(0x9ABCDEF0, 0xFEDCBA98), torch.zeros(8, dtype=torch.int64)
    index = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 7, 2**40, 2**45 + 3])
    packed = torch.tensor([key.first | (key.second - 2**32) << 32])
    _words[(1,)](index, packed, out)
    whole = [random_words_at(key, number) for number in index.tolist()]
    assert out.tolist() == whole


def random_words_at(key: Key, index: int) -> int:
    """The reference's, of one index: it counts from 0, so the key is moved by the upper half and the lower."""
    moved = Key((key.first + (index >> 32) * 0x9E3779B9 + index) % 2**32, key.second)
    return int(random_words(moved, 1, torch.device("cpu"))[0])


# --- the table ---


class Planned:
    """These updates as a native plan has them, each parameter in a group of its own."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self.updates = updates
        specs = [self.spec(update, index) for index, update in enumerate(updates)]
        self.groups = [{"params": [update.param]} for update in updates]
        self.state = {update.param: self.state_of(update) for update in updates}
        self.set_grads(updates)
        self.plan = native().Plan(specs, self.state, self.groups, set(self.state), set(), set(), True)

    @staticmethod
    def spec(update: Update, index: int) -> Any:
        return native().GroupSpec(
            rule=native().rule_number(update.rule.name),
            scalars=len(update.rule.scalars),
            maximize=update.grad_scale < 0,
            states=list(update.rule.states),
            is_signed=[isinstance(state, Codes) and state.map.zero > 0 for state in update.states],
            counters=[],
            has_master=update.master is not None,
            stochastic=update.key is not None,
            first_parameter=index,
            captured=False,
        )

    @staticmethod
    def state_of(update: Update) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {} if update.master is None else {"master": update.master}
        for name, held in zip(update.rule.states, update.states):
            state |= {name: held.codes, f"{name}_scale": held.scale} if isinstance(held, Codes) else {name: held}
        return state

    def set_grads(self, updates: Sequence[Update]) -> None:
        self.updates = updates
        for update in updates:
            set_grad(update.param, update.grad)

    def launches(self, step: int, grad_scale: float) -> list[Any]:
        draws = [(3, step)] * len(self.groups)
        scalars = lambda group, counter: (self.updates[group].scalars, ())  # noqa: E731
        assert self.plan.prepare(self.state, self.groups, scalars, grad_scale, draws, False, False)
        found = [launch for _, launch in self.plan.launches]
        self.plan.finish(True)
        return found


@pytest.mark.parametrize("row", pairwise(**STORED, **LAID), ids=name_of)
def test_the_native_module_makes_the_same_tables(row: dict[str, Any]) -> None:
    case = case_of(row)
    for step in range(2):
        now = at_step(updates(case), step, case)
        planned = Planned(now).launches(step, abs(now[0].grad_scale))
        resolved = [replace(update, grad=update.grad.resolve_conj().resolve_neg()) for update in now]
        expected = {form_of(launch): launch for launch, _ in launches_of(resolved)}
        assert {form_of(launch) for launch in planned} == set(expected)
        for launch in planned:
            other = expected[form_of(launch)]
            copied = any(update.grad.is_neg() or update.grad.is_conj() for update in now)
            words = [rows_of(each, copied) for each in (launch, other)]
            assert words[0] == words[1]
            assert bytes(launch.tiles) == bytes(other.tiles)
            assert len(launch.parameters) == len(other.parameters)


def form_of(launch: Any) -> tuple[Any, ...]:
    return (launch.device, *launch.form)


def rows_of(launch: Any, copied: bool) -> list[Any]:
    """The rows of the table, each with its scalars; gradients that had to be copied lie anywhere."""
    table = torch.frombuffer(launch.table, dtype=torch.int64).view(len(launch.parameters), -1).tolist()
    scalars = torch.frombuffer(launch.scalars, dtype=torch.float64).tolist()
    count = len(scalars) // (max(row[1] for row in table) + 1)
    found = []
    for numel, scalar_row, key, tile, param, grad, *rest in table:
        own = scalars[scalar_row * count : (scalar_row + 1) * count]
        found.append((numel, own, key, tile, param, 0 if copied else grad, rest))
    return found


def test_what_changed_is_known() -> None:
    """New addresses are seen, also where an object is the same."""
    case = case_of({"rule": "adam", "param": torch.bfloat16, "state": "int8", "narrow": (None, "stochastic")})
    now = at_step(updates(case), 0, case)
    planned = Planned(now)

    def changed(step: int = 0, grad_scale: float = 1.0) -> set[str]:
        (launch,) = planned.launches(step, grad_scale)
        return {name for name in ("table", "scalars", "tiles") if getattr(launch, f"new_{name}")}

    assert changed() == {"table", "scalars", "tiles"}
    assert changed() == set()
    assert changed(grad_scale=0.5) == {"scalars"}
    assert changed(1, 0.5) == {"table"}  # the keys of stochastic rounding
    for update in now:
        update.param.data = update.param.data.clone()
    assert changed(1, 0.5) == {"table"}
    planned.set_grads([replace(update, grad=update.grad.clone()) for update in now])
    assert changed(1, 0.5) == {"table"}
    planned.updates = [replace(update, scalars=(0.3, *update.scalars[1:])) for update in now]
    assert changed(1, 0.5) == {"scalars"}
    now[-1].param.grad = None
    assert changed(1, 0.5) == {"table", "scalars", "tiles"}


def test_one_launch_for_each_form() -> None:
    """Whatever the number of tensors; a tensor at an odd address or in pieces goes by another kernel."""
    case = case_of({"rule": "adam", "param": torch.float32, "state": "float32", "narrow": (None, "nearest")})
    many = [update for _ in range(5) for update in at_step(updates(case), 0, case)]
    assert len(Planned(many).launches(0, 1.0)) == 1
    others = [at_step(updates({**case, "layout": layout}), 0, case) for layout in ("unaligned", "stepped")]
    found = Planned([*many, *others[0], *others[1]]).launches(0, 1.0)
    assert {launch.form[-3:-1] for launch in found} == {(True, 0), (False, 0), (False, 2)}


# --- rules ---


def everything(p, g, m, lr, c):  # type: ignore[no-untyped-def]
    m = -m + 0.1 * sign(g) - 2 * (1 / -m)  # noqa: F821
    v = where(abs(g) >= 0.25, minimum(m, c), maximum(m * 3, -0.5)) / (sqrt(abs(g)) + 1e-3)  # noqa: F821
    p = p - lr * v
    return p, m


def same_name() -> list[Any]:
    def rule(p, g, lr):  # type: ignore[no-untyped-def]
        p = p - lr * g
        return p

    first = rule_of(rule)

    def rule(p, g, lr):  # type: ignore[no-untyped-def]
        p = p + lr * g
        return p

    return [first, rule_of(rule)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_that_a_rule_may_say(dtype: torch.dtype) -> None:
    def make() -> Update:
        grad, m = (values((700,), seed, dtype=dtype, awkward=True) for seed in (1, 2))
        return Update(rule_of(everything), values((700,), 3, dtype=dtype), grad, [m], (0.1, 0.3))

    ours, theirs = step_both(make)
    for name, found in parts(ours).items():
        if dtype == torch.float32:
            assert_same_bits(found, parts(theirs)[name], name)
        else:
            # torch's double root may be off by one unit, which a quotient and a product take on. A literal that was
            # rounded to float32 would be off by 1e-8.
            torch.testing.assert_close(found, parts(theirs)[name], rtol=8 * 2**-52, atol=8 * 2**-52, equal_nan=True)


def test_rules_of_one_name() -> None:
    results = []
    for rule in same_name():
        ours, theirs = step_both(lambda rule=rule: Update(rule, torch.ones(3), torch.ones(3), [], (0.5,)))
        assert_same_bits(ours.param, theirs.param)
        results.append(ours.param[0].item())
    assert results == [0.5, 1.5]
    assert len({str(rule.triton.fn.__module__) for rule in same_name()}) == 2
