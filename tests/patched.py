"""Small models that can be patched, and what the tests of `patch` share."""

from __future__ import annotations

from typing import Any

import torch
from helpers import assert_same_bits, values
from torch import Tensor, nn
from torch.nn import functional as F

import fusedopt

DTYPES = [torch.float32, torch.bfloat16]


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + values((size,), 3) / 8)
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Mlp(nn.Module):
    def __init__(self, size: int, act: Any = F.silu) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(size, 2 * size), nn.Linear(size, 2 * size, bias=False)
        self.w2 = nn.Linear(2 * size, size)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        gated = self.act(self.w1(x))
        return self.w2(gated * self.w3(x))


class Block(nn.Module):
    def __init__(self, size: int = 24) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(size), Mlp(size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Packed(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.both, self.down, self.act, self.drop = nn.Linear(8, 24), nn.Linear(12, 8), act, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(self.drop(up * self.act(gate)))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.RMSNorm(24))


def results(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """The output and every gradient; the loss weighs all elements differently."""
    model.zero_grad()
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    y = model(x, **options)
    y = y if isinstance(y, Tensor) else y.last_hidden_state
    y.backward(values(y.shape, 9).to(y.dtype))
    grads = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    return {"output": y.detach(), **grads, **({"input": x.grad.clone()} if x.is_floating_point() else {})}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, name)


def disturbed(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The output, as much off as the order of a sum can make it, or in 16 bits three roundings."""
    roundings = output.shape[-1] + 10 if output.dtype is torch.float32 else 3
    sign = torch.randint(0, 2, output.shape) * 2 - 1
    return output * (1 + roundings * torch.finfo(output.dtype).eps / 2 * sign).to(output.dtype)


def assert_agrees(model: nn.Module, x: Tensor, **options: Any) -> None:
    """Patched, the model's output and gradients differ by no more than its own do under the noise of rounding.

    A sum of N squares in another order differs by at most (N - 1) units of rounding, its root by half of that; the rest
    of a norm or gated unit has fewer than 10 operations. In 16 bits eager operations round results in between, at most
    three on any path. So its modules' outputs are multiplied by numbers that far from 1, of either sign, thrice.
    """
    expected = results(model, x, **options)
    with fusedopt.patch(model) as handle:
        names = [entry.name for entry in handle.report.patched]
        found = results(model, x, **options)
    assert found.keys() == expected.keys()
    bounds = dict.fromkeys(expected, 0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        hooks = [model.get_submodule(name).register_forward_hook(disturbed) for name in names]
        for name, value in results(model, x, **options).items():
            bounds[name] = max(bounds[name], float((value.double() - expected[name].double()).norm()))
        for hook in hooks:
            hook.remove()
    for name, value in found.items():
        difference = float((value.double() - expected[name].double()).norm())
        assert difference <= bounds[name], f"{name}: {difference} > {bounds[name]}"


def options_of(module: nn.Module) -> Any:
    """How it was patched, or why it was left."""
    report = fusedopt.patch(module).report
    own = [entry for entry in [*report.patched, *report.left] if entry.name == ""]
    return (own[0].kind, own[0].options) if report.patched else own[0].reason if own else None


def rows(size: int, squares: int, dtype: torch.dtype) -> Tensor:
    """Rows whose squares sum to `squares` for each 8 elements, in any order of summation."""
    block = {56: [4, 4, 3, 3, 2, 1, 1, 0], 64: [4, 4, 4, 3, 2, 1, 1, 1], 68: [4, 4, 4, 3, 3, 1, 1, 0]}[squares]
    signs = torch.where(values((5, size), 7) < 0, -1, 1)
    order = values((5, size), 8).argsort(-1)
    return (torch.tensor(block * (size // 8)) * signs).gather(-1, order).to(dtype)
