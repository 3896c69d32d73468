"""`swap`: a running torch optimizer becomes fusedopt's, in place."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from . import _checks
from .backends import check_backend
from .codecs import state_dtype as dtype_of_state
from .optim import OPTIMIZERS
from .optimizer import Optimizer, check_state_dtype, local_shard, parameter_names

_T = TypeVar("_T", bound=torch.optim.Optimizer)

_KNOWN = {cls.torch_class: cls for cls in OPTIMIZERS.values() if cls.torch_class is not None}


def swap(optimizer: _T, *, state_dtype: str | None = None, backend: str | None = None) -> _T:
    """Make a torch optimizer a fusedopt one, in place, and return it.

    The object keeps its identity, parameter groups, state, step counts, hyperparameters and hooks, and every LR
    scheduler attached before or after keeps driving it. A `step` that a scheduler or a framework has wrapped stays
    wrapped, around the fused step. An optimizer of fusedopt's is returned as it is, with the options applied.

    Args:
        optimizer: one of torch.optim's, or a wrapper (like Accelerate's) with one as its `optimizer`.
        state_dtype: as for every optimizer here; existing states are converted.
        backend: as for every optimizer here.

    Raises:
        TypeError: the optimizer is none that fusedopt has; subclasses are not taken, since they may step differently.
        RuntimeError, ValueError: an option or a group cannot be honoured. On any error nothing has changed.
    """
    inner = getattr(optimizer, "optimizer", None)
    if type(optimizer) not in _KNOWN and isinstance(inner, torch.optim.Optimizer):
        _swap(inner, optimizer, state_dtype, backend)
    else:
        _swap(optimizer, None, state_dtype, backend)
    return optimizer


def _swap(optimizer: Any, wrapper: Any, state_dtype: str | None, backend: str | None) -> None:
    old = type(optimizer)
    new = old if isinstance(optimizer, Optimizer) else _KNOWN.get(old)
    if new is None:
        known = ", ".join(cls.__name__ for cls in _KNOWN)
        raise TypeError(
            f"swap does not know {old.__module__}.{old.__qualname__}; it knows torch.optim's {known} "
            "(not their subclasses, whose step may differ)"
        )
    check_backend(backend, "backend")
    check_state_dtype(state_dtype)
    converted = _check_groups(optimizer, new, state_dtype)
    changes = _rewrapped(optimizer, wrapper, new)

    if new is old and state_dtype is None and backend is None:
        return
    optimizer.__class__ = new
    optimizer._backend = backend or getattr(optimizer, "_backend", None)
    optimizer.defaults["state_dtype"] = state_dtype or optimizer.defaults.get("state_dtype")
    for group in optimizer.param_groups:
        group["state_dtype"] = state_dtype or group.get("state_dtype")
    for state, name, dtype in converted:
        state[name] = state[name].to(dtype)
    optimizer.__setstate__({})
    for change in changes:
        change()


def _check_groups(
    optimizer: Any, new: type[Optimizer], state_dtype: str | None
) -> list[tuple[dict[str, Any], str, torch.dtype]]:
    """Check that every group can be stepped; return the states that `state_dtype` converts."""
    converted = []
    for index, group in enumerate(optimizer.param_groups):
        if group.get("capturable"):
            raise RuntimeError(_checks.NOT_CAPTURABLE)
        if group.get("differentiable"):
            raise RuntimeError(_checks.NOT_DIFFERENTIABLE)
        for param, what in zip(group["params"], parameter_names(group, index)):
            _checks.check_param(param, local_shard(param), what)
            state = optimizer.state.get(param, {})
            states = {name: value for name, value in state.items() if name in new.states}
            _checks.check_state(param, states, what, same_device=False)
            _checks.check_counters({name: state[name] for name in new.counters if name in state}, what)
            if state_dtype is not None:
                converted += [
                    (state, name, dtype_of_state(state_dtype, new.states[name], param.dtype))
                    for name, value in states.items()
                    if value is not None
                ]
    return converted


def _rewrapped(optimizer: Any, wrapper: Any, new: type[Optimizer]) -> list[Callable[[], None]]:
    """What must change so that every wrapper of the old step calls the new one, as functions that do it."""
    if type(optimizer) is new:
        return []
    originals = set(_steps(type(optimizer)))

    # Called late, since the class's step gets torch's profiling hook when the class is first used.
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return new.step(*args, **kwargs)

    functools.update_wrapper(replacement, new.step)
    known: dict[Any, tuple[bool, Any]] = {}

    def search(value: Any) -> tuple[bool, Any]:
        """Whether `value` leads to the old step, and if so a copy that leads to the new one.

        A copy, since a wrapper may be shared with other optimizers.
        """
        if isinstance(value, types.MethodType):
            found, function = search(value.__func__)
            return found, types.MethodType(function, value.__self__)
        if isinstance(value, functools.partial):
            found, function = search(value.func)
            return found, functools.partial(function, *value.args, **value.keywords)
        if not isinstance(value, types.FunctionType):
            return False, value
        if value in originals:
            return True, replacement
        if value not in known:
            known[value] = False, value  # until it is searched, for a function may hold itself
            known[value] = search_closure(value)
        return known[value]

    def search_closure(value: types.FunctionType) -> tuple[bool, Any]:
        cells = [_replaced(cell, search) for cell in value.__closure__ or ()]
        if not any(found for found, _ in cells):
            return False, value
        closure = tuple(cell for _, cell in cells)
        copy = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        copy.__kwdefaults__ = value.__kwdefaults__
        functools.update_wrapper(copy, value)
        copy.__wrapped__ = replacement  # type: ignore[attr-defined]
        return True, copy

    changes: list[Callable[[], None]] = []
    if "step" in vars(optimizer):
        step = vars(optimizer)["step"]
        found, inner = search(step)
        if not found:
            raise RuntimeError(
                f"swap cannot find {type(optimizer).__name__}.step inside the {step!r} that replaced this optimizer's "
                "step; swap the optimizer before it is wrapped"
            )
        changes.append(functools.partial(setattr, optimizer, "step", inner))
    for name, value in list(vars(wrapper).items()) if wrapper is not None else ():
        found, inner = search(value)
        if found:
            changes.append(functools.partial(setattr, wrapper, name, inner))
    return changes


def _replaced(cell: types.CellType, search: Callable[[Any], tuple[bool, Any]]) -> tuple[bool, types.CellType]:
    """Whether the cell's content leads to the old step, and if so a new cell; else the cell itself, still shared."""
    try:
        found, content = search(cell.cell_contents)
    except ValueError:  # the variable has no value
        return False, cell
    return found, types.CellType(content) if found else cell


def _steps(cls: type) -> Iterator[Callable[..., Any]]:
    """The class's step and everything it wraps: with torch's profiling hook and without."""
    for base in cls.__mro__:
        step = vars(base).get("step")
        while step is not None:
            yield step
            step = getattr(step, "__wrapped__", None)
