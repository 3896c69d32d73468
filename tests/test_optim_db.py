"""torch's own database of optimizer inputs, against fusedopt: same results, states, errors and signatures."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from helpers import NOT_YET, set_grads
from steps import another_order, as_in_torch, assert_near, on_every_backend, parameters, train
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, optim_db
from torch.testing._internal.common_utils import set_default_dtype

import fusedopt
from fusedopt.optim import OPTIMIZERS
from fusedopt.optimizer import GROUP_OPTIONS, OPTIONS

STEPS = 5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
COUNTERPARTS = {cls.torch_class: cls for cls in OPTIMIZERS.values() if cls.torch_class is not None}
INFOS = [info for info in optim_db if info.optim_cls in COUNTERPARTS]


def inputs() -> list[Any]:
    """Every input of the database, for every dtype it is made for."""
    return [
        pytest.param(info, dtype, given.kwargs, id=f"{info.optim_cls.__name__}-{str(dtype)[6:]}-{given.desc}")
        for info in INFOS
        for dtype in DTYPES
        for given in info.optim_inputs_func("cpu", dtype)
    ]


def error_inputs() -> list[Any]:
    return [
        pytest.param(info, error, id=f"{info.optim_cls.__name__}-{error.optimizer_error_input.desc}")
        for info in INFOS
        for error in info.optim_error_inputs_func("cpu", torch.float32)
    ]


@on_every_backend
@pytest.mark.parametrize(("info", "dtype", "kwargs"), inputs())
def test_inputs(info: OptimizerInfo, dtype: torch.dtype, kwargs: dict[str, Any], backend: str) -> None:
    """torch's parameters and states; for bfloat16 those of torch in float32, since torch rounds every operation."""
    # Counters have the default dtype, in torch too; NAdam's product, as float32, would cost float64 its digits.
    with set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32):
        check_input(info, dtype, kwargs, backend)


def check_input(info: OptimizerInfo, dtype: torch.dtype, kwargs: dict[str, Any], backend: str) -> None:
    ours_class = COUNTERPARTS[info.optim_cls]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    expected = [torch.nn.Parameter(param.detach().to(wide)) for param in parameters(dtype)]
    theirs = info.optim_cls(expected, **copy.deepcopy(kwargs))
    for step in range(STEPS):
        set_grads(source := parameters(dtype), step)
        for param, given in zip(expected, source, strict=True):
            param.grad = given.grad.to(wide)
        theirs.step()
    flags: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}]
    if "fused" in inspect.signature(ours_class).parameters:
        flags += [{"fused": True}, {"fused": False}]
    for flag in flags:
        ours = ours_class(parameters(dtype), **copy.deepcopy(kwargs), **flag, backend=backend)
        actual = train(ours, range(STEPS))
        for mine, other in zip(actual, expected, strict=True):
            assert mine.dtype == dtype
            assert_near(mine, other, STEPS, f"parameter with {flag}")
            states = ours.state.get(mine, {})
            assert list(states) == list(theirs.state.get(other, {}))
            for name, value in states.items():
                reference = theirs.state[other][name]
                if name in ours.counters:
                    assert (value.dtype, value.shape) == (reference.dtype, ())
                    # NAdam's product is rounded once a step.
                    assert value.item() == pytest.approx(reference.item(), rel=STEPS * torch.finfo(value.dtype).eps)
                else:
                    assert (value.dtype, value.stride()) == (dtype, reference.stride())
                    assert_near(value, reference, STEPS, f"state {name} with {flag}")


@pytest.mark.parametrize(("info", "error"), error_inputs())
def test_error_inputs(info: OptimizerInfo, error: Any) -> None:
    given = error.optimizer_error_input
    ours = COUNTERPARTS[info.optim_cls]
    if error.error_on is OptimizerErrorEnum.STEP_ERROR:
        optimizer = ours(given.params, **given.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()
    elif issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            ours(given.params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            ours(given.params, **given.kwargs)


def bad_arguments(cls: Any) -> list[dict[str, Any]]:
    """Each number of the signature below its range, and the combinations that torch refuses."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    bad: list[dict[str, Any]] = []
    for name, default in defaults.items():
        if isinstance(default, tuple):
            bad += [
                {name: tuple(value if i == j else b for j, b in enumerate(default))}
                for i, _ in enumerate(default)
                for value in (1.0, -0.5)
            ]
        elif isinstance(default, int | float) and not isinstance(default, bool):
            bad.append({name: -0.5})
    if "nesterov" in defaults:
        bad += [{"nesterov": True}, {"nesterov": True, "momentum": 0.5, "dampening": 0.5}]
    if "fused" in defaults:
        bad.append({"fused": True, "foreach": True})
    return bad


@pytest.mark.parametrize("ours", COUNTERPARTS.values(), ids=lambda cls: cls.__name__)
def test_bad_arguments_are_refused_in_torchs_words(ours: Any) -> None:
    param = torch.nn.Parameter(torch.ones(1))
    refused = 0
    for arguments in bad_arguments(ours.torch_class):
        try:
            ours.torch_class([param], **arguments)
        except (ValueError, RuntimeError) as error:
            with pytest.raises(type(error)) as raised:
                ours([param], **arguments)
            assert str(raised.value) == str(error), arguments
            refused += 1
    assert refused >= 3


@pytest.mark.parametrize("ours", COUNTERPARTS.values(), ids=lambda cls: cls.__name__)
def test_signature(ours: Any) -> None:
    """A call that torch accepts means the same here; what is fusedopt's own can only be given by name."""
    theirs = inspect.signature(ours.torch_class)
    mine = list(inspect.signature(ours).parameters.values())
    expected = [(p.name, p.kind, p.default) for p in theirs.parameters.values()]
    assert [(p.name, p.kind, p.default) for p in mine[: len(expected)]] == expected
    not_yet = {name: False for name in NOT_YET if ours is fusedopt.Adam}
    assert {p.name: (p.kind, p.default) for p in mine[len(expected) :]} == {
        name: (inspect.Parameter.KEYWORD_ONLY, value) for name, value in {**not_yet, **OPTIONS}.items()
    }
    param = [torch.nn.Parameter(torch.ones(1))]
    defaults = {**ours.torch_class(param).defaults, **GROUP_OPTIONS}
    found = as_in_torch(ours, ours(param).defaults)
    assert found == defaults and (list(found) == list(defaults) or another_order(ours))
    assert list(inspect.signature(ours.step).parameters) == list(inspect.signature(ours.torch_class.step).parameters)


def test_every_counterpart_is_in_the_database() -> None:
    assert {info.optim_cls for info in INFOS} == set(COUNTERPARTS)


@pytest.mark.parametrize("cls", COUNTERPARTS.values(), ids=lambda cls: cls.__name__)
def test_what_cannot_be_honoured_is_refused(cls: Any) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="differentiable=True: .* use torch.optim"):
        cls([param], differentiable=True)
    with pytest.raises(RuntimeError, match="differentiable=True"):
        cls([{"params": [param], "differentiable": True}])
    if "fused" in inspect.signature(cls).parameters:
        with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
            cls([param], differentiable=True, fused=True)
    if "capturable" not in inspect.signature(cls).parameters:
        return
    optimizer = cls([param], capturable=True)
    with pytest.raises(RuntimeError, match="capturable=True: .* set capturable=False"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3)) and not optimizer.state[param].get("step")
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()
    assert not torch.equal(param, torch.ones(3))
