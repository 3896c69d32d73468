"""`swap`: a running torch optimizer becomes fusedopt's, in place."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from typing_extensions import Unpack

from . import _checks, _foreign
from ._muon import Muon
from ._state import converted, converted_master, dtype_of, local_shard, master_dtype
from ._stepper import parameter_names
from .backends import check_backend, choose, requested_backend
from .codecs import SCALE_SUFFIX
from .optim import OPTIMIZERS
from .optimizer import GROUP_OPTIONS, OPTIONS, Optimizer, Options

_T = TypeVar("_T", bound=torch.optim.Optimizer)

_OURS: tuple[type[Optimizer], ...] = (*OPTIMIZERS.values(), Muon)
_KNOWN = {cls.torch_class: cls for cls in _OURS if cls.torch_class is not None}


def swap(optimizer: _T, **options: Unpack[Options]) -> _T:
    """Make an optimizer of torch, bitsandbytes or torchao a fusedopt one, in place, and return it.

    The object keeps its identity, parameter groups, state, step counts, hyperparameters and hooks, and every LR
    scheduler attached before or after keeps driving it. A `step` that a scheduler or a framework has wrapped stays
    wrapped, around the fused step. An optimizer of fusedopt's is returned as it is, with the options applied.

    Args:
        optimizer: one of torch.optim's, of bitsandbytes' in 8 or 32 bits, or torchao's low-bit Adam or AdamW, or a
            wrapper (like Accelerate's) with one as its `optimizer`. bitsandbytes' Adam decays decoupled, so it becomes
            AdamW. States of 8 bits stay in 8 bits, others of theirs become float32, unless `state_dtype` is given.
        options: `state_dtype`, `min_quantized_size`, `master`, `rounding`, `seed`, `max_grad_norm`, `zero_grads` and
            `backend`, as for every optimizer here; existing states are converted. One that is None or not given stays
            as it is.

    Raises:
        TypeError: the optimizer is none that fusedopt has; subclasses are not taken, since they may step differently.
        RuntimeError, ValueError: an option or a group cannot be honoured. On any error nothing has changed.
    """
    given = {name: value for name, value in options.items() if value is not None}
    inner = getattr(optimizer, "optimizer", None)
    if type(optimizer) not in _KNOWN and isinstance(inner, torch.optim.Optimizer):
        _swap(inner, optimizer, given)
    else:
        _swap(optimizer, None, given)
    return optimizer


def _swap(optimizer: Any, wrapper: Any, options: dict[str, Any]) -> None:
    old = type(optimizer)
    peer = _foreign.counterpart(optimizer)
    new = old if isinstance(optimizer, Optimizer) else OPTIMIZERS[peer] if peer else _KNOWN.get(old)
    if new is None:
        known = ", ".join(cls.__name__ for cls in _KNOWN)
        raise TypeError(
            f"swap does not know {old.__module__}.{old.__qualname__}; it knows torch.optim's {known}, "
            f"{_foreign.KNOWN} (not their subclasses, whose step may differ)"
        )
    unknown = options.keys() - OPTIONS.keys()
    if unknown:
        raise TypeError(f"swap has no option {min(unknown)!r}; it has {', '.join(OPTIONS)}")
    backend = check_backend(options.pop("backend", None), "backend")
    _checks.check_max_grad_norm(options.get("max_grad_norm"))
    whole = {name: options.pop(name) for name in ("max_grad_norm", "zero_grads") if name in options}
    groups, states = optimizer.param_groups, optimizer.state
    if peer:
        names = [parameter_names(group, index) for index, group in enumerate(groups)]
        translated = _foreign.translate(optimizer, new, names)
        groups, states = translated.groups, translated.states
    changed = [{**new.group_options, **_options_of(group), **options} for group in groups]
    for index, (group, group_options) in enumerate(zip(groups, changed, strict=True)):
        _check_group(states, new, {**group, **group_options}, index)
    changes = _rewrapped(optimizer, wrapper, new)

    if new is old and not options and not whole and backend is None:
        return
    optimizer.__class__ = new
    optimizer._backend = backend or getattr(optimizer, "_backend", None)
    vars(optimizer).update(whole)
    if peer:
        _take_over(optimizer, new, translated, "state_dtype" in options)
        options = {**_options_of(translated.defaults), **options}
    # Older releases of torch lack an option or two; __setstate__ gives it to groups that do not have it.
    for name, default in _defaults_of(new).items():
        optimizer.defaults.setdefault(name, default)
    optimizer.defaults.update(options)
    for group, group_options in zip(optimizer.param_groups, changed, strict=True):
        group.update(group_options)
        for param in group["params"]:
            if param in optimizer.state:
                _convert(optimizer.state[param], param, new, group, options)
    optimizer.__setstate__({})
    for change in changes:
        change()


def _take_over(optimizer: Any, new: Any, translated: _foreign.Translated, one_state_dtype: bool) -> None:
    """Put what was translated in the place of the peer's own."""
    optimizer.defaults = {**_defaults_of(new), **translated.defaults}
    for group, ours in zip(optimizer.param_groups, translated.groups, strict=True):
        group.clear()
        group.update(ours)
    for param, state in translated.states.items():
        optimizer.state[param] = dict(state)
    for param, state_dtype in () if one_state_dtype else translated.state_dtypes.items():
        param.optimizer_state_dtype = state_dtype  # type: ignore[attr-defined]


def _defaults_of(new: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = new([torch.nn.Parameter(torch.empty(1, 1))]).defaults  # Muon takes matrices only
    return defaults


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in GROUP_OPTIONS if name in group}


def _check_group(states: Any, new: type[Optimizer], group: dict[str, Any], index: int) -> None:
    """Check that the group can be stepped, with its options."""
    if group.get("differentiable"):
        raise RuntimeError(_checks.NOT_DIFFERENTIABLE)
    _checks.check_options(group)
    for param, what in zip(group["params"], parameter_names(group, index)):
        _checks.check_param(param, local_shard(param), what)
        _checks.check_master(param, group["master"], what)
        if group.get("capturable"):
            _checks.check_capturable(choose(local_shard(param), requested_backend(), what), what)
        state = states.get(param, {})
        _checks.check_state(param, state, new.states, what, same_device=False)
        if master_dtype(param, group):
            _checks.check_master_state(param, state.get("master"), what, same_device=False)
        _checks.check_counters({name: state[name] for name in new.counters if name in state}, what)


def _convert(
    state: dict[str, Any], param: torch.Tensor, new: type[Optimizer], group: dict[str, Any], options: dict[str, Any]
) -> None:
    """Store a parameter's state as the options that were given say."""
    if "state_dtype" in options or "min_quantized_size" in options:
        for name, kind in new.states.items():
            if state.get(name) is None:
                continue
            entries = converted(state, name, param, kind, dtype_of(param, kind, group))
            state.pop(name + SCALE_SUFFIX, None)
            state.update(entries)
    if "master" in options and "master" in state:
        dtype = master_dtype(param, group)
        master = state.pop("master")
        if dtype:
            state["master"] = converted_master(master, param, dtype)


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
