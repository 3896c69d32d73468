"""Right, not just the same: every class against its oracle, and proof that the comparison sees every term."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from configs import CONFIGS, STEPS, row_id, rows
from helpers import make_parameters, set_grads, values
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import mutants
from oracles import PAPERS, oracle
from steps import USABLE
from torch import Tensor
from torch.nn import Parameter

from fusedopt.binding import RULES, Rule
from fusedopt.optim import OPTIMIZERS
from fusedopt.optimizer import GROUP_OPTIONS

SHAPES = [(33,), (5, 7), (), (0,), (2003,)]
MUON_RULES = {"muon_momentum", "muon", "muon_cautious"}
"""Two of them make a step, with what is no rule between; tests/test_muon.py has their oracle."""
every_row = pytest.mark.parametrize(("name", "config"), [pytest.param(*row, id=row_id(*row)) for row in rows()])
pytestmark = pytest.mark.usefixtures("one_thread", "counters_in_double")


@pytest.fixture
def counters_in_double() -> Iterator[None]:
    """Counters have the default dtype, torch's too; as float32 NAdam's product would cost a float64 step its digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients() -> list[list[Tensor]]:
    return [[values(shape, 6, step, index) for index, shape in enumerate(SHAPES)] for step in range(STEPS)]


@functools.cache
def truth(name: str, row: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return oracle(name, CONFIGS[name][row], make_parameters(SHAPES), gradients(), dtype)


def trained(cls: Any, config: dict[str, Any], backend: str, dtype: torch.dtype = torch.float64) -> Any:
    params = make_parameters(SHAPES, dtype)
    optimizer = cls(params, **config, backend=backend)
    for grads in gradients():
        for param, grad in zip(params, grads):
            param.grad = grad.to(dtype)
        optimizer.step()
    return optimizer


def error(optimizer: Any, name: str, row: int) -> float:
    """The largest difference from the oracle, of a parameter or a state, relative to the largest value of its tensor.

    Infinite where there is something else than numbers.
    """
    params, states = truth(name, row)
    worst = 0.0
    for ours, theirs, expected in zip(optimizer.param_groups[0]["params"], params, states):
        pairs = [(ours.detach(), theirs), *((optimizer.state[ours][key], value) for key, value in expected.items())]
        for a, b in pairs:
            if b.numel():
                difference = (a.double() - b).abs().max().item() / max(b.abs().max().item(), 1e-3)
                worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def tolerance(dtype: torch.dtype) -> float:
    """A step rounds a few values of full size, by half an epsilon each, the others being parts of them: four a step."""
    return 4 * STEPS * torch.finfo(dtype).eps


# --- the table of configurations ---


def test_every_class_has_rows_and_an_oracle() -> None:
    assert list(CONFIGS) and set(CONFIGS) == set(OPTIMIZERS)
    assert set(PAPERS) == {name for name, cls in OPTIMIZERS.items() if cls.torch_class is None}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_hyperparameter_is_tried(name: str) -> None:
    """Every option of a class has a value other than its default in some row, and every parameter decays in all."""
    defaults = OPTIMIZERS[name](make_parameters([(1,)])).defaults
    of_the_backend = {"foreach", "fused", "capturable", "differentiable", *GROUP_OPTIONS}
    fixed = {"decoupled_weight_decay"} if name == "AdamW" else set()
    tried = {key for row in CONFIGS[name] for key, value in row.items() if value != defaults[key]}
    assert tried == set(defaults) - of_the_backend - fixed
    assert all(row["weight_decay"] > 0 and row["lr"] > 0 for row in CONFIGS[name])


def rule_of_row(name: str, config: dict[str, Any]) -> Rule:
    optimizer = OPTIMIZERS[name](make_parameters([(1,)]), **config)
    return optimizer.rule(optimizer.param_groups[0])


def test_every_rule_is_tried() -> None:
    assert {rule_of_row(*row).name for row in rows()} | MUON_RULES == set(RULES)


# --- against the oracles ---


@pytest.mark.parametrize("backend", USABLE)
@every_row
def test_float64(name: str, config: dict[str, Any], backend: str) -> None:
    optimizer = trained(OPTIMIZERS[name], config, backend)
    assert error(optimizer, name, CONFIGS[name].index(config)) < tolerance(torch.float64)


@pytest.mark.parametrize("backend", USABLE)
@every_row
def test_float32(name: str, config: dict[str, Any], backend: str) -> None:
    optimizer = trained(OPTIMIZERS[name], config, backend, torch.float32)
    assert error(optimizer, name, CONFIGS[name].index(config)) < tolerance(torch.float32)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize(
    ("name", "config"), [pytest.param(*row, id=row_id(*row)) for row in rows() if row[0] not in PAPERS]
)
def test_float32_is_no_worse_than_torchs(name: str, config: dict[str, Any], backend: str) -> None:
    """The parameters' mean error. Of two thousand values a quarter more is far from chance."""
    row = CONFIGS[name].index(config)
    params = trained(OPTIMIZERS[name], config, backend, torch.float32).param_groups[0]["params"]
    exact, theirs, ours = (
        torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        for tensors in (truth(name, row)[0], truth(name, row, torch.float32)[0], params)
    )
    assert (ours - exact).abs().mean() < 1.25 * (theirs - exact).abs().mean()


def test_centered_variance_is_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant gradient's variance is zero. Where its averages sink to it they stop a few roundings above: that of
    the gradient, squared, above that of the square. Without the clamp the root of the difference is NaN."""
    config = {"lr": 0.01, "alpha": 0.9, "eps": 0.01, "centered": True}

    def finite(**more: float) -> bool:
        param = Parameter(torch.zeros(1000, dtype=torch.float32))
        grad = values((1000,), 7)
        optimizer = OPTIMIZERS["RMSprop"]([param], **config, **more, backend="eager")
        for step in range(300):
            param.grad = grad * 2 if step < 10 else grad
            optimizer.step()
        return bool(param.isfinite().all())

    assert finite() and finite(momentum=0.5)
    for name in ("rmsprop_centered", "rmsprop_centered_momentum"):
        unclamped = next(m for what, m in mutants(RULES[name]) if what.endswith("-> square_avg - grad_avg * grad_avg"))
        monkeypatch.setitem(RULES, name, unclamped)
    assert not finite() and not finite(momentum=0.5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_centered_variance_has_a_floor_in_8_bits(momentum: float) -> None:
    """It is 1/16 of the mean square: against the rule written out, where some elements vary less than that."""
    lr, alpha, eps, decay = 0.01, 0.5, 0.01, 0.1
    param = Parameter(values((1000,), 1, dtype=torch.float64))
    # Too small to be quantized, so that the rule is seen alone.
    optimizer: Any = OPTIMIZERS["RMSprop"](
        [param], lr, alpha, eps, decay, momentum, centered=True, state_dtype="int8", min_quantized_size=1001
    )
    p = param.detach().clone()
    square, mean, buffer = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    floored = 0
    for step in range(STEPS):
        param.grad = values((1000,), 2, dtype=torch.float64) + 0.3 * values((1000,), 3, step, dtype=torch.float64)
        g = param.grad + decay * p
        square = alpha * square + (1 - alpha) * g * g
        mean = alpha * mean + (1 - alpha) * g
        variance = torch.maximum(square - mean * mean, square / 16)
        floored += int((variance == square / 16).sum())
        change = g / (variance.sqrt() + eps)
        buffer = momentum * buffer + change
        p = p - lr * (buffer if momentum else change)
        optimizer.step()
        # The states are float32 in between, and so are these.
        square, mean, buffer = (state.float().double() for state in (square, mean, buffer))
    assert 100 < floored < 1000 * STEPS - 100
    assert (param.detach() - p).abs().max() < tolerance(torch.float32)


# --- what the comparison sees ---


@every_row
def test_every_scalar_is_seen(name: str, config: dict[str, Any]) -> None:
    """One per cent of any scalar, or as much of one that is zero, is far more than the tolerance."""
    cls: Any = OPTIMIZERS[name]

    def perturbed(scalar: str) -> Any:
        def scalars(self: Any, group: Any, *counters: Any) -> dict[str, Any]:
            named = cls.scalars(self, group, *counters)
            return {**named, scalar: named[scalar] * 1.01 or 0.01}

        return type(name, (cls,), {"scalars": scalars})

    row = CONFIGS[name].index(config)
    # The floor of a variance, which torch does not have, is seen below.
    for scalar in set(rule_of_row(name, config).scalars) - {"floor"}:
        seen = error(trained(perturbed(scalar), config, "eager"), name, row)
        assert seen > 1e6 * tolerance(torch.float64), f"{scalar} is not seen: {seen}"


@pytest.mark.parametrize("rule", [pytest.param(RULES[name], id=name) for name in RULES if name not in MUON_RULES])
def test_every_operation_is_seen(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with any one operation wrong or missing fails against the oracle, in one of the rows that use the rule."""
    users = [
        (name, CONFIGS[name].index(config), config) for name, config in rows() if rule_of_row(name, config) is rule
    ]
    found = list(mutants(rule))
    assert len(found) >= 6
    unseen = []
    for what, mutant in found:
        monkeypatch.setitem(RULES, rule.name, mutant)
        if all(
            error(trained(OPTIMIZERS[name], config, "eager"), name, row) < 1e3 * tolerance(torch.float64)
            for name, row, config in users
        ):
            unseen.append(what)
    # The clamp, which torch does not have, is for what rounding does to a constant gradient: tested apart.
    clamp = ("maximum(square_avg - grad_avg * grad_avg, floor * square_avg)", "floor * square_avg")
    assert [what for what in unseen if not what.startswith(clamp)] == []


# --- scalars ---


@every_row
def test_scalars_of_tensors(name: str, config: dict[str, Any]) -> None:
    """Zero-dimensional tensors, as in a captured step, give what floats do but for the last bits, and stay tensors."""
    optimizer: Any = OPTIMIZERS[name](make_parameters([(1,)]), **config)
    group = optimizer.param_groups[0]
    numbers = tuple(optimizer.counters.values()) or (0.0,)
    tensors = tuple(torch.tensor(number, dtype=torch.float64) for number in numbers)
    last: dict[str, float] = {}
    for step in range(40):
        numbers, tensors = optimizer.advance(group, *numbers), optimizer.advance(group, *tensors)
        assert [float(tensor) for tensor in tensors] == pytest.approx(numbers, rel=1e-14)
        floats, others = optimizer.scalars(group, *numbers), optimizer.scalars(group, *tensors)
        assert all(type(value) in (float, int) for value in floats.values())
        # A power's last bit counts 1 / (1 - beta) times over where it is taken from 1.
        condition = max(1 / (1 - beta) for beta in (*group.get("betas", (0,)), group.get("alpha", 0) % 1))
        assert {key: float(value) for key, value in others.items()} == pytest.approx(floats, rel=1e-15 * condition)
        changed = {key for key in floats if step and floats[key] != last[key]}
        assert changed <= {key for key, value in others.items() if isinstance(value, Tensor)}
        last = floats


# --- properties ---


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    row=st.sampled_from(rows()), seed=st.integers(0, 1 << 20), magnitude=st.integers(-30, 17), steps=st.integers(1, 5)
)
def test_finite_gradients_give_finite_results(row: Any, seed: int, magnitude: int, steps: int) -> None:
    """Where float64 stays in the range of float32, squares of gradients too, float32 stays finite."""
    name, config = row
    for dtype in (torch.float64, torch.float32):
        params = make_parameters([(300,)], dtype)
        optimizer: Any = OPTIMIZERS[name](params, **config, backend="eager")
        for step in range(steps):
            set_grads(params, seed + step)
            assert params[0].grad is not None
            params[0].grad *= 10.0**magnitude
            optimizer.step()
        tensors = [params[0].detach(), *optimizer.state.get(params[0], {}).values()]
        if dtype == torch.float64 and any(tensor.abs().max() > 1e38 for tensor in tensors):
            return
        assert all(tensor.isfinite().all() for tensor in tensors)
