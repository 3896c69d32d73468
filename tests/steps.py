"""Parameters, gradients and comparisons for the tests that train a few steps."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from configs import row_id, rows
from helpers import NOT_YET, assert_same_results, make_parameters, results, same_bits, set_grads
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import BACKENDS
from fusedopt.optim import OPTIMIZERS

CLASSES = [pytest.param(cls, id=name) for name, cls in OPTIMIZERS.items()]
CONFIGURED = [pytest.param(OPTIMIZERS[name], row, id=row_id(name, row)) for name, row in rows()]
DROP_IN = [case for case in CLASSES if case.values[0].torch_class is not None]
DROP_IN_CONFIGURED = [
    pytest.param(OPTIMIZERS[name], row, id=row_id(name, row))
    for name, row in rows()
    if OPTIMIZERS[name].torch_class is not None and not (name == "Adam" and NOT_YET & row.keys())
]
_ON_CPU = torch.empty(1)
USABLE = [name for name, backend in BACKENDS.items() if not (backend.unavailable() or backend.refuses(_ON_CPU))]
on_every_backend = pytest.mark.parametrize("backend", USABLE)

SHAPES = ((5, 7), (33,), (), (0,))


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Fresh parameters, the same at every call."""
    return make_parameters(SHAPES, dtype)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def as_in_torch(cls: Any, group: dict[str, Any]) -> dict[str, Any]:
    """A group of `cls` without what torch's class does not have yet."""
    return {name: value for name, value in group.items() if not (issubclass(cls, fusedopt.Adam) and name in NOT_YET)}


def another_order(cls: Any) -> bool:
    """Whether torch's class has its options in another order: AdamW, before torch made it a kind of Adam."""
    return cls is fusedopt.AdamW and bool(NOT_YET)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[Parameter]:
    """Steps over fixed gradients; the parameters."""
    params = parameters_of(optimizer)
    for step in steps:
        set_grads(params, step)
        optimizer.step()
    return params


def scaler_of(scale: float) -> GradScaler:
    """A scaler with this scale, which it halves after a step it skipped."""
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.ones(()))  # creates its scale
    return scaler


def forbid_torch_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no step runs of the torch optimizers that fusedopt has."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch's own step was called")

    for cls in OPTIMIZERS.values():
        if cls.torch_class is not None:
            # The function that does a step has the name of its module.
            module = importlib.import_module(cls.torch_class._init_group.__module__)
            monkeypatch.setattr(module, module.__name__.rpartition(".")[2], refuse)


def assert_near(ours: Tensor, theirs: Tensor, steps: int, what: object = "") -> None:
    """Equal but for rounding, over `steps` steps of values of order 1.

    Both round a handful of times a step, by half an epsilon of what is then at hand: the tensor's largest value, at
    most 8 times over (a momentum buffer of gradients up to 3 that cancel). Dropping a term costs 1e-4 or more of it.
    """
    epsilon = max(torch.finfo(ours.dtype).eps, torch.finfo(theirs.dtype).eps)
    wide = torch.complex128 if theirs.is_complex() else torch.float64
    scale = max(theirs.abs().max().item(), 1.0) if theirs.numel() else 0.0
    torch.testing.assert_close(
        ours.detach().to(wide),
        theirs.detach().to(wide),
        rtol=0,
        atol=8 * steps * epsilon * scale,
        msg=lambda text: f"{what}: {text}",
    )


def assert_optimizers_near(ours: Any, theirs: Any, steps: int) -> None:
    """The parameters and states of a fusedopt optimizer are torch's, under the same names in the same order."""
    for mine, other in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert_near(mine, other, steps, "parameter")
        states, expected = ours.state.get(mine, {}), theirs.state.get(other, {})
        # torch's SGD of an old checkpoint holds a momentum buffer of None.
        expected = {name: value for name, value in expected.items() if value is not None}
        assert list(states) == list(expected)
        for name, value in states.items():
            assert_near(value, expected[name], steps, name)


def assert_same_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Every parameter and state has the same bits."""
    assert_same_results(results(a), results(b))


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """Everything a step or a load may change, for `assert_untouched`."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    params = [(param, param.detach().clone()) for param in parameters_of(optimizer)]
    states = {
        param: {name: (value, torch.as_tensor(value).clone()) for name, value in state.items() if value is not None}
        for param, state in optimizer.state.items()
    }
    return type(optimizer), groups, params, states, _attributes(optimizer)


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What each attribute is; the plan of a step is a cache."""
    return {
        name: value if isinstance(value, str) else id(value)
        for name, value in vars(optimizer).items()
        if name not in ("_plan", "_planned", "_rest", "_sharded")
    }


def assert_untouched(optimizer: torch.optim.Optimizer, before: Any) -> None:
    """The same class, attributes, groups and tensors, holding the same values."""
    cls, groups, params, states, attributes = before
    assert type(optimizer) is cls
    assert _attributes(optimizer) == attributes
    now = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert now == groups
    for param, (same_param, value) in zip(parameters_of(optimizer), params, strict=True):
        assert param is same_param and same_bits(param.detach(), value)
    assert set(optimizer.state) == set(states)
    for param, state in optimizer.state.items():
        assert {name: id(value) for name, value in state.items() if value is not None} == {
            name: id(value) for name, (value, _) in states[param].items()
        }
        assert all(same_bits(torch.as_tensor(state[name]), value) for name, (_, value) in states[param].items())
