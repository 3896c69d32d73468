"""fusedopt under the frameworks that drive an optimizer, imitated by the calls they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from configs import CONFIGS
from helpers import same_bits, set_grads
from steps import (
    CLASSES,
    DROP_IN,
    assert_optimizers_near,
    assert_same_optimizers,
    on_every_backend,
    parameters,
    parameters_of,
    scaler_of,
    train,
)
from torch.amp import GradScaler
from torch.optim import lr_scheduler

import fusedopt


@on_every_backend
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_initializing_step(cls: Any, tensor_lr: bool, backend: str) -> None:
    """Distributed checkpoints and torchtitan create the state by a step of zero gradients at lr 0."""
    optimizer = cls(parameters(), lr=torch.tensor(0.125) if tensor_lr else 0.125, weight_decay=0.5, backend=backend)
    params = parameters_of(optimizer)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0) if tensor_lr else 0.0
    optimizer.step(closure=None)
    optimizer.param_groups[0]["lr"] = lr
    assert all(same_bits(param.detach(), value) for param, value in zip(params, before, strict=True))
    assert all(set(cls.counters) <= set(optimizer.state[param]) for param in params)


@pytest.mark.parametrize("cls", CLASSES)
def test_accelerate_prepare(cls: Any) -> None:
    """state_dict to load_state_dict before the first step, placeholders for the parameters, then other parameters."""
    expected = cls([{"params": parameters()}], lr=0.125, weight_decay=0.5)
    train(expected, range(3))
    optimizer = cls([{"params": parameters()}], lr=0.125, weight_decay=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    group = optimizer.param_groups[0]
    model = parameters_of(optimizer)
    for index in range(len(group["params"])):
        group["params"][index] = torch.empty(1)
    group["params"] = [torch.nn.Parameter(param.detach().clone()) for param in model]
    if cls is fusedopt.Adagrad:  # whose state was created for the parameters it had
        optimizer.state.clear()
    train(optimizer, range(3))
    assert_same_optimizers(optimizer, expected)


class Accelerated:
    """How Accelerate steps under mixed precision: through a closure around the bound step, to see if it was skipped."""

    def __init__(self, optimizer: Any, scaler: GradScaler):
        self.optimizer, self.scaler, self.called = optimizer, scaler, False
        self.original, self.patched = optimizer.step, self.patch(optimizer.step)

    def patch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def patched_step(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            return method(*args, **kwargs)

        return patched_step

    def step(self, closure: Callable[[], Any] | None = None) -> bool:
        """Whether the step was skipped."""
        self.called = False
        self.optimizer.step = self.patched
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.optimizer.step = self.original
        return not self.called


@on_every_backend
def test_accelerate_step(backend: str) -> None:
    expected = fusedopt.AdamW(parameters(), lr=0.125)
    optimizer = fusedopt.AdamW(parameters(), lr=0.125, backend=backend)
    scheduler = lr_scheduler.ConstantLR(optimizer, 1.0)
    accelerated = Accelerated(optimizer, scaler_of(1024.0))
    for step in range(4):
        params = parameters_of(optimizer)
        set_grads(params, step)
        for param in params:
            param.grad *= accelerated.scaler.get_scale()
        if step == 1:
            params[0].grad[0] = float("nan")
        assert accelerated.step() == (step == 1)
        if step != 1:
            train(expected, [step])
            scheduler.step()
    assert_same_optimizers(optimizer, expected)


class Fabric:
    """How Lightning Fabric wraps: its own class mixed into the optimizer's, sharing the optimizer's attributes."""

    def __init__(self, optimizer: Any):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step")}
        self.__class__ = type("Fabric" + type(optimizer).__name__, (Fabric, type(optimizer)), {})
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._optimizer.step(closure=closure or (lambda: None))


def test_lightning_fabric() -> None:
    """Always with a closure; `param_groups`, `defaults` and `state` are reached through the wrapper."""
    expected = fusedopt.AdamW(parameters(), lr=0.125)
    train(expected, range(3))
    optimizer = fusedopt.AdamW(parameters(), lr=0.125)
    wrapper: Any = Fabric(optimizer)
    scheduler = lr_scheduler.ConstantLR(optimizer, 1.0)
    for step in range(3):
        set_grads(parameters_of(wrapper), step)
        wrapper.step()
        scheduler.step()
        wrapper.zero_grad()
    assert isinstance(wrapper, fusedopt.AdamW) and wrapper.state is optimizer.state
    assert wrapper.state_dict()["state"][0]["step"] == 3
    assert_same_optimizers(optimizer, expected)


@on_every_backend
@pytest.mark.parametrize("cls", DROP_IN)
def test_trainer_groups(cls: Any, backend: str) -> None:
    """transformers' Trainer: groups with and without decay, a warm-up by LambdaLR, gradients zeroed by the model."""
    pair = []
    for kind, extra in ((cls, {"backend": backend}), (cls.torch_class, {})):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        matrices = [param for param in model.parameters() if param.dim() > 1]
        others = [param for param in model.parameters() if param.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.25}, {"params": others, "weight_decay": 0.0}]
        optimizer = kind(groups, **{"lr": 0.0625, **CONFIGS[cls.__name__][0]}, **extra)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
        for step in range(5):
            train(optimizer, [step])
            scheduler.step()
            model.zero_grad()
        pair.append(optimizer)
    assert_optimizers_near(*pair, steps=5)
