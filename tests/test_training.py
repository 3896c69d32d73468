"""fusedopt inside what surrounds an optimizer: LR schedulers, GradScaler, clipping, averaging, subclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits, set_grads
from schedulers import REPLACES_LR, SCHEDULERS, advance
from steps import (
    CLASSES,
    assert_near,
    assert_optimizers_near,
    assert_same_optimizers,
    assert_untouched,
    on_every_backend,
    parameters,
    parameters_of,
    scaler_of,
    snapshot,
    train,
)
from torch.amp import GradScaler
from torch.optim import lr_scheduler, swa_utils

import fusedopt
from fusedopt.optim import OPTIMIZERS

# --- LR schedulers ---


def test_every_scheduler_of_torch_is_tested() -> None:
    public = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert set(SCHEDULERS) - {"SWALR"} == public


@on_every_backend
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.SGD])
def test_schedulers(cls: Any, name: str, tensor_lr: bool, backend: str) -> None:
    """The same course of lr, momentum and betas as torch's optimizer takes, and so the same parameters."""
    config: dict[str, Any] = {"weight_decay": 0.25, **({"momentum": 0.5} if cls is fusedopt.SGD else {})}
    courses, optimizers = [], []
    for kind, extra in ((cls, {"backend": backend}), (cls.torch_class, {})):
        lr = torch.tensor(0.125) if tensor_lr else 0.125
        optimizer = kind([{"params": parameters()}], lr=lr, **config, **extra)
        scheduler = SCHEDULERS[name](optimizer)
        course = []
        for step in range(8):
            train(optimizer, [step])
            advance(scheduler)
            group = optimizer.param_groups[0]
            assert isinstance(group["lr"], torch.Tensor) == tensor_lr or name in REPLACES_LR
            course.append((float(group["lr"]), group.get("momentum"), group.get("betas")))
        courses.append(course)
        optimizers.append(optimizer)
    assert courses[0] == courses[1] and len(set(courses[0])) > 1
    assert_optimizers_near(*optimizers, steps=8)


@pytest.mark.filterwarnings("error")
def test_a_resumed_scheduler_goes_on() -> None:
    """Scheduler and optimizer saved, rebuilt and loaded in either order, as training scripts do."""
    expected = fusedopt.AdamW(parameters(), lr=0.125)
    scheduler = SCHEDULERS["CosineAnnealingLR"](expected)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((expected.state_dict(), scheduler.state_dict(), parameters_of(expected)))
        train(expected, [step])
        scheduler.step()
    actual = fusedopt.AdamW(saved[2], lr=0.5)
    scheduler = SCHEDULERS["CosineAnnealingLR"](actual)
    scheduler.load_state_dict(saved[1])
    actual.load_state_dict(saved[0])
    for step in range(3, 6):
        train(actual, [step])
        scheduler.step()
    assert_same_optimizers(actual, expected)


# --- GradScaler ---

SCALED = [
    pytest.param(cls, config, id=f"{name}-{'fused' if config else 'plain'}")
    for name, cls in OPTIMIZERS.items()
    for config in ({}, {"fused": True})
    if not config or "fused" in cls([torch.ones(1)]).defaults
]


def scaled_step(scaler: GradScaler, optimizer: Any, step: int, scale: float, spoil: float | None = None) -> None:
    params = parameters_of(optimizer)
    set_grads(params, step)
    for param in params:
        param.grad.mul_(scale)
    if spoil is not None:
        params[1].grad[3] = spoil
    scaler.step(optimizer)
    scaler.update()


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), SCALED)
def test_grad_scaler(cls: Any, config: dict[str, Any], backend: str) -> None:
    """As without a scaler; a step of non-finite gradients is skipped, counters included."""
    scaler, scale = scaler_of(1024.0), 1024.0
    actual = cls(parameters(), lr=0.125, **config, backend=backend)
    expected = cls(parameters(), lr=0.125, **config, backend=backend)
    for step in range(6):
        if step in (0, 2):
            before = snapshot(actual)
            scaled_step(scaler, actual, step, scale, spoil=(float("inf"), 0, float("nan"))[step])
            scale /= 2
            assert scaler.get_scale() == scale
            assert_untouched(actual, before)
            continue
        scaled_step(scaler, actual, step, scale)
        train(expected, [step])
    # The scale is a power of two, so that unscaling is exact.
    assert_same_optimizers(actual, expected)
    assert "grad_scale" not in vars(actual) and "found_inf" not in vars(actual)


@on_every_backend
@pytest.mark.parametrize("cls", [case.values[0] for case in SCALED if case.values[1]])
def test_a_fused_step_unscales_without_writing_the_gradients(cls: Any, backend: str) -> None:
    """Unlike torch's fused optimizers, which unscale them in place."""
    optimizer = cls(parameters(), lr=0.125, fused=True, backend=backend)
    params = parameters_of(optimizer)
    scaler = scaler_of(3.0)
    set_grads(params, 0)
    grads = [param.grad for param in params]
    values = [grad.clone() for grad in grads]
    scaler.step(optimizer)
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert all(same_bits(grad, value) for grad, value in zip(grads, values, strict=True))
    expected = cls.torch_class(parameters(), lr=0.125)
    set_grads(parameters_of(expected), 0)
    for param in parameters_of(expected):
        param.grad /= 3
    expected.step()
    assert_optimizers_near(optimizer, expected, steps=1)


@on_every_backend
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping(fused: bool, scaled: bool, backend: str) -> None:
    """`clip_grad_norm_`, with a scaler after `unscale_`, as PyTorch's documentation has it."""
    pair = [
        fusedopt.AdamW(parameters(), lr=0.125, fused=fused, backend=backend),
        torch.optim.AdamW(parameters(), lr=0.125),
    ]
    for optimizer in pair:
        scaler = scaler_of(1024.0)
        params = parameters_of(optimizer)
        for step in range(4):
            set_grads(params, step)
            if scaled:
                for param in params:
                    param.grad *= 1024
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            if scaled:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
    assert_optimizers_near(*pair, steps=4)


# --- what else torch has around an optimizer ---


@pytest.mark.parametrize("cls", CLASSES)
def test_is_an_optimizer(cls: Any) -> None:
    optimizer = cls(parameters(), lr=0.25)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert repr(optimizer).startswith(f"{cls.__name__} (\nParameter Group 0\n") and "    lr: 0.25\n" in repr(optimizer)
    # transformers' Trainer calls these where an optimizer has them.
    assert not hasattr(optimizer, "train") and not hasattr(optimizer, "eval")


@on_every_backend
def test_profiler_shows_the_step(backend: str) -> None:
    optimizer = fusedopt.AdamW(parameters(), backend=backend)
    train(optimizer, [0])
    with torch.profiler.profile() as profile:
        train(optimizer, [1])
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def trained_model(kind: Any, wrap: Callable[[Any], Any] = lambda model: model, **config: Any) -> list[torch.Tensor]:
    """The parameters of a small model after five steps on fixed data."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = kind(model.parameters(), **config)
    wrapped = wrap(model)
    data = torch.randn(5, 6, 4)
    for batch in data:
        optimizer.zero_grad()
        wrapped(batch).square().mean().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def test_compiled_model() -> None:
    def compiled(model: Any) -> Any:
        return torch.compile(model, backend="eager", fullgraph=True)

    expected = trained_model(fusedopt.AdamW, lr=0.125)
    for actual, value in zip(trained_model(fusedopt.AdamW, compiled, lr=0.125), expected, strict=True):
        assert same_bits(actual, value)


def test_averaged_model() -> None:
    averages = []
    for kind in (fusedopt.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        optimizer = kind(model.parameters(), lr=0.125)
        for step in range(4):
            train(optimizer, [step])
            average.update_parameters(model)
        averages.append(list(average.parameters()))
    for ours, theirs in zip(*averages, strict=True):
        assert_near(ours, theirs, steps=4)


class Counting(fusedopt.AdamW):
    """A user's subclass."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.steps += 1
        return super().step(closure)


@on_every_backend
def test_subclass(backend: str) -> None:
    expected = fusedopt.AdamW(parameters(), lr=0.125)
    train(expected, range(4))
    optimizer = Counting(parameters(), lr=0.125, backend=backend)
    scheduler = lr_scheduler.ConstantLR(optimizer, 1.0)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(optimizer.steps))
    for step in range(4):
        train(optimizer, [step])
        scheduler.step()
    assert optimizer.steps == 4 and set(hooked) == {1, 2, 3, 4}
    assert "Counting (" in repr(optimizer)
    assert_same_optimizers(optimizer, expected)
