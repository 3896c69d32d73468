"""`swap` of an optimizer whose step a scheduler, a framework or a user has wrapped."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from helpers import set_grads
from steps import (
    assert_optimizers_near,
    assert_same_optimizers,
    assert_untouched,
    forbid_torch_steps,
    on_every_backend,
    parameters,
    parameters_of,
    scaler_of,
    snapshot,
    train,
)
from torch.optim import lr_scheduler

import fusedopt


def by_closure(optimizer: Any, called: list[str]) -> None:
    method = optimizer.step

    def patched_step(*args: Any, **kwargs: Any) -> Any:
        called.append("closure")
        return method(*args, **kwargs)

    optimizer.step = patched_step


def by_wraps(optimizer: Any, called: list[str]) -> None:
    method = optimizer.step

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        called.append("wraps")
        return method(*args, **kwargs)

    optimizer.step = wrapper


def by_method(optimizer: Any, called: list[str]) -> None:
    old_step = optimizer.step

    def new_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append("method")
        return old_step(*args, **kwargs)

    optimizer.step = types.MethodType(new_step, optimizer)


def by_lambda(optimizer: Any, called: list[str]) -> None:
    old_step = optimizer.step
    optimizer.step = lambda closure=None: called.append("lambda") or old_step(closure)


def by_a_function_that_holds_itself(optimizer: Any, called: list[str]) -> None:
    method = optimizer.step

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        called.append(wrapper.__name__)
        return method(*args, **kwargs)

    optimizer.step = wrapper


def by_scheduler(optimizer: Any, called: list[str]) -> None:
    lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)


def with_an_empty_cell(optimizer: Any, called: list[str]) -> None:
    method = optimizer.step

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        called.append("cell")
        return method(*args, **kwargs) if called else never

    optimizer.step = wrapper
    if called is None:
        never = None


WRAPPINGS: dict[str, tuple[Any, ...]] = {
    "closure": (by_closure,),
    "wraps": (by_wraps,),
    "lambda": (by_lambda,),
    "bound method": (by_method,),
    "a function that holds itself": (by_a_function_that_holds_itself,),
    "scheduler": (by_scheduler,),
    "closure around closure": (by_closure, by_closure),
    "closure around scheduler": (by_scheduler, by_closure),
    "method around scheduler": (by_scheduler, by_method),
    "scheduler around method": (by_method, by_scheduler),
    "an empty cell": (with_an_empty_cell,),
}


@on_every_backend
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_step_stays_wrapped(wrapping: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wrapper is still called, in order, around the fused step; closures and results pass through."""
    optimizer = torch.optim.AdamW(parameters(), lr=0.125)
    calls: list[str] = []
    for wrap in WRAPPINGS[wrapping]:
        wrap(optimizer, calls)
    train(optimizer, range(3))
    per_step = calls[: len(calls) // 3]
    fusedopt.swap(optimizer, backend=backend)
    forbid_torch_steps(monkeypatch)
    calls.clear()
    train(optimizer, range(3, 6))
    assert calls == per_step * 3
    assert optimizer.step(lambda: 7) == 7
    expected = torch.optim.AdamW(parameters(), lr=0.125)
    fusedopt.swap(expected)
    train(expected, range(6))
    set_grads(parameters_of(expected), 5)
    expected.step()
    assert_optimizers_near(optimizer, expected, steps=7)


@on_every_backend
def test_swapping_leaves_other_optimizers_alone(backend: str) -> None:
    """Of one class, wrapped by the same code, driven by the same kind of scheduler."""
    calls: list[str] = []
    swapped, other = torch.optim.AdamW(parameters()), torch.optim.AdamW(parameters())
    for optimizer in (swapped, other):
        by_scheduler(optimizer, calls)
        by_closure(optimizer, calls)
    before = snapshot(other)
    fusedopt.swap(swapped, backend=backend)
    assert_untouched(other, before)
    assert type(other) is torch.optim.AdamW
    train(swapped, range(2))
    train(other, range(2))
    train(torch.optim.AdamW(parameters()), range(2))
    assert calls == ["closure"] * 4
    assert_optimizers_near(swapped, other, steps=2)


def test_swapping_leaves_a_shared_wrapper_alone() -> None:
    """One function around the class's step, bound to each optimizer: the other one still needs torch's step."""

    def timed(method: Any) -> Any:
        return lambda *args, **kwargs: method(*args, **kwargs)

    shared = timed(torch.optim.AdamW.step)
    swapped, other = torch.optim.AdamW(parameters()), torch.optim.AdamW(parameters())
    for optimizer in (swapped, other):
        optimizer.step = functools.partial(shared, optimizer)
    fusedopt.swap(swapped)
    train(swapped, range(2))
    train(other, range(2))
    assert_optimizers_near(swapped, other, steps=2)


class Accelerated(torch.optim.Optimizer):
    """How Accelerate holds an optimizer: two bound steps taken when it is made, one in a closure."""

    def __init__(self, optimizer: Any, scaler: Any):
        self.optimizer, self.scaler, self.called = optimizer, scaler, 0
        self._optimizer_original_step_method = optimizer.step
        self._optimizer_patched_step_method = self.patch(optimizer.step)

    def patch(self, method: Any) -> Any:
        def patched_step(*args: Any, **kwargs: Any) -> Any:
            self.called += 1
            return method(*args, **kwargs)

        return patched_step

    def step(self, closure: Any = None) -> None:
        self.optimizer.step = self._optimizer_patched_step_method
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.optimizer.step = self._optimizer_original_step_method


class Lightning:
    """How Lightning holds an optimizer, with a property to reach it."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure=closure or (lambda: None))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("wrapper_class", [Accelerated, Lightning])
def test_a_wrapper_is_swapped_inside(wrapper_class: Any, scheduled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.AdamW(parameters(), lr=0.125)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5) if scheduled else None
    wrapper = Accelerated(optimizer, scaler_of(1.0)) if wrapper_class is Accelerated else Lightning(optimizer)
    assert fusedopt.swap(wrapper) is wrapper
    assert type(wrapper) is wrapper_class and type(optimizer) is fusedopt.AdamW
    forbid_torch_steps(monkeypatch)
    for step in range(3):
        set_grads(parameters_of(optimizer), step)
        wrapper.step()
        if scheduler is not None:
            scheduler.step()
    assert getattr(wrapper, "called", 3) == 3
    expected = fusedopt.AdamW(parameters(), lr=0.125)
    for step in range(3):
        expected.param_groups[0]["lr"] = 0.125 / 2 ** (step * scheduled)
        train(expected, [step])
    assert_same_optimizers(optimizer, expected)
