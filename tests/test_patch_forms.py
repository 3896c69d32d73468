"""What `patch` recognizes, and what it leaves for which reason."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, values
from patched import DTYPES, Mlp, Norm, Packed, assert_agrees, blocks, options_of, rows
from torch import Tensor, nn
from torch.nn import functional as F

import fusedopt
from fusedopt._forms import _composed

TORCH_NORMS = {"given eps": lambda: nn.RMSNorm(16, 0.5), "no eps": lambda: nn.RMSNorm(16)}


def rows_by_eps(dtype: torch.dtype) -> Tensor:
    """Rows whose root is exact with the eps, a power of 2, that this torch takes by itself."""
    x = torch.full((1,), 2.0**-20, dtype=torch.float64).to(dtype)
    exponent = round(math.log2(float(x / F.rms_norm(x, (1,))) ** 2 - 2.0**-40))
    # 8 + 1 times an even power, or 7 + 2 times half of an odd one.
    return rows(16, 56 if exponent % 2 else 64, dtype) * 2.0 ** (exponent // 2)


@pytest.mark.parametrize("name", TORCH_NORMS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_torch_norm(name: str, affine: bool, dtype: torch.dtype) -> None:
    """The same bits where the root is exact."""
    norm = TORCH_NORMS[name]()
    norm.weight = nn.Parameter(values((16,), 2)) if affine else None
    x = rows(16, 68, dtype) if norm.eps else rows_by_eps(dtype)
    norm = norm.to(dtype)
    expected = norm(x)
    kind, options = options_of(norm)
    assert kind == "rms_norm" and options["eps"] == norm.eps
    assert_same_bits(norm(x), expected)


ACTS = {
    "swiglu": [F.silu, nn.SiLU()],
    "geglu": [F.gelu, nn.GELU()],
    "geglu_tanh": [functools.partial(F.gelu, approximate="tanh"), nn.GELU("tanh")],
    "reglu": [F.relu, nn.ReLU(), torch.relu],
}


@pytest.mark.parametrize("kind, act", [(kind, act) for kind, acts in ACTS.items() for act in acts])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(kind: str, act: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert options_of(Mlp(8, act)) == (kind, {"layout": "separate"})
    assert options_of(Packed(act)) == (kind, {"layout": "halves"})
    for module in (Mlp(8, act), Packed(act).eval()):
        assert_agrees(module.to(dtype), 2 * values((5, 8), 1, dtype=dtype))


def test_dropout() -> None:
    module = Packed(F.silu)
    fusedopt.patch(module)
    module.drop.p = 1.0
    assert_same_bits(module(values((1, 8), 1)), module.down.bias[None])


class EpsOutsideNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y / (torch.sqrt(y.pow(2).mean(-1, keepdim=True)) + self.variance_epsilon)).to(x.dtype)


class NoCastNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class ScaledNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return 2 * (self.weight * y.to(x.dtype))


class OtherDimNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(0, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


class ShadowedNorm(Norm):
    """What is called float32 is not."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(OTHER)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


OTHER = torch.float64


class WhenTrainingNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x
        return super().forward(x)


class TwoInputsNorm(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(gate.dtype)


class DecoratedNorm(Norm):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


class InnerNorm(Mlp):
    """As BitNet's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.rms_norm(self.act(self.w1(x)) * self.w3(x), (48,)))


def with_act(change: Callable[[nn.Module], Any]) -> nn.Module:
    act = nn.SiLU()
    change(act)
    return Mlp(8, act)


def with_forward() -> nn.Module:
    norm = Norm(8)
    norm.forward = functools.partial(norm.forward)
    return norm


def from_no_file() -> nn.Module:
    scope: dict[str, Any] = {"Norm": Norm}
    exec("class MadeNorm(Norm):\n    def forward(self, x):\n        return x", scope)
    return scope["MadeNorm"](8)


def with_weight_of_two() -> nn.Module:
    norm = Norm(8)
    norm.weight = nn.Parameter(torch.ones(2, 8))
    return norm


class LaterNorm(Norm):
    """Its forward needs what is not there yet."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.later * y.to(x.dtype)


class TwoPackedMlp(Mlp):
    """The halves are not of one projection."""

    def forward(self, x: Tensor) -> Tensor:
        gate, _ = self.w1(x).chunk(2, dim=-1)
        _, up = self.w3(x).chunk(2, dim=-1)
        return self.w2(self.act(gate) * up)


class LongMlp(Mlp):
    """Each line doubles it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.w1(x) * self.w3(x) + x + self.w1(x)
        x = x + self.w1(x) * self.w3(x) + x + self.w1(x)
        x = x + self.w1(x) * self.w3(x) + x + self.w1(x)
        x = x + self.w1(x) * self.w3(x) + x + self.w1(x)
        x = x + self.w1(x) * self.w3(x) + x + self.w1(x)
        x = x + self.w1(x) * self.w3(x) + x + self.w1(x)
        return x


class RecursiveMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward(self.w1(x))


LEFT = {
    "its forward is long": lambda: LongMlp(8),
    "its forward calls methods too deeply": lambda: RecursiveMlp(8),
    "its forward is no known form: self.weight * (x.to(dtype=torch.float32) / ": lambda: EpsOutsideNorm(8),
    "its forward is no known form: self.weight * (x * ": lambda: NoCastNorm(8),
    "its forward is no known form: 2 * (self.weight": lambda: ScaledNorm(8),
    "its forward is no known form: self.weight * (x.to": lambda: OtherDimNorm(8),
    "its forward is no known form: self.weight * (x.to(dtype=OTHER)": lambda: ShadowedNorm(8),
    "its forward depends on self.training": lambda: WhenTrainingNorm(8),
    "its forward is no known form: self.weight": lambda: TwoInputsNorm(8),
    "its forward is decorated": lambda: DecoratedNorm(8),
    "its forward is no known form: self.w2(self.act(self.w1(x).chunk(": lambda: TwoPackedMlp(8),
    "its forward is no known form: self.w2(F.rms_norm(": lambda: InnerNorm(24),
    "its forward is no known form: F.layer_norm(": lambda: nn.LayerNorm(8),
    "its activation tanh has no fused kernel": lambda: Mlp(8, torch.tanh),
    "its activation silu has no fused kernel": lambda: Mlp(8, nn.SiLU(inplace=True)),
    "its activation Softplus has no fused kernel": lambda: Mlp(8, nn.Softplus()),
    "its activation SiLU has hooks": lambda: with_act(lambda act: act.register_forward_hook(lambda *_: None)),
    "its activation SiLU has hooks or a forward": lambda: with_act(lambda act: setattr(act, "forward", torch.tanh)),
    "its forward was replaced on the instance, by partial": with_forward,
    "'LaterNorm' object has no attribute 'later'": lambda: LaterNorm(8),
    "the source of its forward cannot be had": from_no_file,
    "its weight is not of one dimension": with_weight_of_two,
    "it normalizes several dimensions": lambda: nn.RMSNorm((4, 8)),
}


@pytest.mark.parametrize("reason", LEFT)
def test_left(reason: str) -> None:
    module = LEFT[reason]()
    assert options_of(module).startswith(reason)


def test_report() -> None:
    model = blocks()
    model.append(nn.LayerNorm(24))
    assert str(fusedopt.patch(model).report).splitlines() == [
        "patched: 5",
        "     2 x *.norm  Norm     rms_norm, casting llama, offset 0, eps 1e-05",
        "     2 x *.mlp   Mlp      swiglu, layout separate",
        f"     1 x *       RMSNorm  rms_norm, casting {'llama' if _composed() else 'gemma'}, offset 0, eps None",
        "left: 1",
        "     1 x *  LayerNorm  its forward is no known form: "
        "F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)",
    ]


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="patch takes a torch.nn.Module, not list"):
        fusedopt.patch([])
