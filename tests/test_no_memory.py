"""Tensors without memory of their own: of zeros alone, given back, or under a transform that must see the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, set_grads
from steps import (
    USABLE,
    assert_optimizers_near,
    assert_same_optimizers,
    on_every_backend,
    parameters,
    parameters_of,
    train,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fusedopt


@on_every_backend
def test_a_gradient_of_zeros_alone(backend: str) -> None:
    """torch's derivatives may be tensors that have no memory, for they stand for zeros."""
    ours = fusedopt.AdamW(parameters(), weight_decay=0.1, backend=backend)
    theirs = torch.optim.AdamW(parameters(), weight_decay=0.1)
    for step in range(4):
        for optimizer in (ours, theirs):
            params = parameters_of(optimizer)
            set_grads(params, step)
            if step != 2:
                params[1].grad = torch._efficientzerotensor(params[1].shape)
            optimizer.step()
    assert_optimizers_near(ours, theirs, steps=4)
    assert fusedopt.clip_grad_norm_(parameters_of(ours)[1:2], 1.0) == 0


@pytest.mark.parametrize("of", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("backend", [None, *USABLE])
def test_memory_that_was_given_back(of: str, backend: str | None) -> None:
    """As frameworks do that shard models; amid training, and found by a plan. Nothing else has changed."""
    optimizer = fusedopt.AdamW(parameters(), backend=backend)
    params = train(optimizer, range(2))
    tensor = {"parameter": params[1], "gradient": params[1].grad, "state": optimizer.state[params[1]]["exp_avg"]}[of]
    assert tensor is not None
    before = params[0].detach().clone()
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the storage of .*parameter 1 of group 0 has been resized to 0 bytes"):
        optimizer.step()
    assert_same_bits(params[0], before)
    if of == "gradient":
        with pytest.raises(RuntimeError, match="the storage of a gradient has been resized to 0 bytes"):
            fusedopt.clip_grad_norm_(params, 1.0)


def stepped(x: Tensor, cls: Any) -> Tensor:
    """What an optimizer, made and used under a transform, makes of `x`."""
    y = x * 1
    optimizer = cls([y], lr=0.1)
    for _ in range(2):
        y.grad = torch.ones_like(y)
        optimizer.step()
    return y


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]] = {
    "functionalize": torch.func.functionalize,
    "vmap": torch.func.vmap,
    "make_fx": lambda function: make_fx(function)(torch.ones(2, 3)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own step, under vmap
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_a_transform(transform: str) -> None:
    """It sees the step, as it sees torch's; what was asked to run natively says why it cannot."""
    x = torch.arange(6.0).reshape(2, 3)
    classes: Any = (fusedopt.SGD, torch.optim.SGD)
    ours, theirs = [TRANSFORMS[transform](functools.partial(stepped, cls=cls))(x) for cls in classes]
    torch.testing.assert_close(ours, theirs)
    assert not ours.equal(x)
    native = functools.partial(fusedopt.SGD, backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot step .*(no memory of its own|dispatch mode)"):
        TRANSFORMS[transform](functools.partial(stepped, cls=native))(x)


def test_a_mode_amid_training() -> None:
    """A plan does not go by it either."""
    optimizer, expected = [fusedopt.AdamW(parameters()) for _ in range(2)]
    train(expected, range(4))
    train(optimizer, range(2))
    with FlopCounterMode(display=False):
        train(optimizer, range(2, 3))
        assert optimizer._plan is None
    train(optimizer, range(3, 4))
    assert_same_optimizers(optimizer, expected)
