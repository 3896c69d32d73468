"""The native backend from step to step: what it has planned holds only while everything is as it was planned."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from configs import CONFIGS, row_id, rows
from helpers import (
    GRAD_LAYOUTS,
    LAYOUTS,
    assert_same_results,
    exchange_api,
    instruction_set,
    make_parameters,
    results,
    set_grads,
    threads,
    values,
)
from torch import Tensor
from torch.nn import Parameter

from fusedopt.backends import native
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(), (0,), (1,), (17,), (513,), (3, 5, 7), (2, 3, 4, 5), (33, 31)]
every_row = pytest.mark.parametrize(("name", "config"), [pytest.param(*row, id=row_id(*row)) for row in rows()])


def swap_data(change: Any) -> Any:
    def apply(optimizer: Any) -> None:
        for param in optimizer.param_groups[0]["params"][1:]:
            param.data = change(param.detach())

    return apply


def swap_states(change: Any) -> Any:
    def apply(optimizer: Any) -> None:
        for state in list(optimizer.state.values())[1:]:
            state.update({key: change(value) for key, value in state.items() if key not in optimizer.counters})

    return apply


def swap_counters(change: Any) -> Any:
    def apply(optimizer: Any) -> None:
        for state in list(optimizer.state.values())[1:]:
            state.update({key: change(state[key]) for key in optimizer.counters})

    return apply


def reverse_keys(optimizer: Any) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = dict(reversed(state.items()))


def exchange_keys(optimizer: Any) -> None:
    """The last two, mostly of one form."""
    for param, state in list(optimizer.state.items()):
        *others, a, b = list(state) if len(state) > 1 else [None, None]
        if b is not None:
            optimizer.state[param] = {key: state[key] for key in (*others, b, a)}


def reverse_states(optimizer: Any) -> None:
    pairs = list(optimizer.state.items())
    optimizer.state.clear()
    optimizer.state.update(reversed(pairs))


def reverse_parameters(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["params"] = group["params"][::-1]


def forget_and_replace(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    optimizer.state.pop(group["params"].pop(1), None)
    group["params"].insert(2, Parameter(torch.full_like(group["params"][0], 0.3)))


def split_group(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    taken = group["params"].pop(0)
    optimizer.param_groups.insert(0, {**group, "params": [taken], "lr": group["lr"] / 2})


CHANGES: dict[str, Any] = {
    "parameter's address": swap_data(Tensor.clone),
    "parameter's layout": swap_data(LAYOUTS["stepped"]),
    "parameter's dtype": swap_data(Tensor.bfloat16),
    "state's address": swap_states(Tensor.clone),
    "state's layout": swap_states(LAYOUTS["unaligned"]),
    "state's strides": swap_states(LAYOUTS["transposed"]),
    "state's dtype": swap_states(Tensor.bfloat16),
    "state of None": swap_states(lambda value: None),
    "state requires a gradient": swap_states(lambda value: value.clone().requires_grad_()),
    "counter's address": swap_counters(Tensor.clone),
    "counter's dtype": swap_counters(Tensor.double),
    "counter's shape": swap_counters(lambda value: value.reshape(1)),
    "counter a number": swap_counters(Tensor.item),
    "order of keys": reverse_keys,
    "order of two keys": exchange_keys,
    "order of states": reverse_states,
    "order of parameters": reverse_parameters,
    "another parameter": forget_and_replace,
    "another group": split_group,
}


@pytest.mark.parametrize("shape", [(8, 5), ()], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@every_row
def test_change_between_steps(name: str, config: dict[str, Any], change: str, shape: tuple[int, ...]) -> None:
    """Twice, since what is planned after a change must not be less careful. All is of one form, so that nothing but
    what changed gives it away."""
    found = []
    for backend in ("eager", "cpu"):
        optimizer: Any = OPTIMIZERS[name](make_parameters([shape] * 5), **config, backend=backend)
        with exchange_api(shape == ()):
            for step in range(6):
                set_grads([param for group in optimizer.param_groups for param in group["params"]], step)
                optimizer.step()
                if step in (1, 3):
                    CHANGES[change](optimizer)
        found.append(results(optimizer))
    assert_same_results(*found)


@every_row
def test_gradients_come_go_and_move(name: str, config: dict[str, Any]) -> None:
    """Some are None, each in its turn; those there are change their memory and dtype. So step counts differ too."""
    steps = list(itertools.product(GRAD_LAYOUTS, (torch.float32, torch.bfloat16)))
    for exchange in (True, False):
        found = []
        for backend in ("eager", "cpu"):
            optimizer: Any = OPTIMIZERS[name](make_parameters(SHAPES), **config, backend=backend)
            params = optimizer.param_groups[0]["params"]
            with exchange_api(exchange):
                for step, (layout, dtype) in enumerate(steps):
                    set_grads(params, step, dtype, layout)
                    for index, param in enumerate(params):
                        if (index + step // 2) % 3 == 0:
                            param.grad = None
                    optimizer.step()
            found.append(results(optimizer))
        assert_same_results(*found)


@pytest.mark.parametrize("instructions", native().instruction_sets())
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups(name: str, instructions: str) -> None:
    """Every row of the class as a group of one optimizer: other rules, scalars, signs. The last group joins later."""
    found = []
    for backend in ("eager", "cpu"):
        params = make_parameters([*SHAPES, (30_000,), (20_000,), (40_000,)])
        first, *others = [{"params": params[k::4], **row} for k, row in enumerate(CONFIGS[name])]
        optimizer: Any = OPTIMIZERS[name]([first, *others[:-1]], backend=backend)
        with threads(2), instruction_set(instructions):
            for step in range(5):
                if step == 2:
                    optimizer.add_param_group(others[-1])
                set_grads(params, step)
                optimizer.step()
        found.append(results(optimizer))
    assert_same_results(*found)


@every_row
def test_parameters_of_two_backends(name: str, config: dict[str, Any]) -> None:
    """A negative view has no memory of its own values, so it is stepped eagerly, in the midst of others."""
    found = []
    for backend in ("eager", None):
        params = make_parameters([(7,), (40,), (3, 5)])
        params.insert(1, Parameter(values((40,), 5).neg()))
        params[1].data = torch._neg_view(params[1].data)
        optimizer: Any = OPTIMIZERS[name](params, **config, backend=backend)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        assert params[1].is_neg()
        found.append(results(optimizer))
    assert_same_results(*found)
