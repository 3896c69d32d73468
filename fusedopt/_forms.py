"""The forms in which families of models write RMSNorm and gated MLPs, and what computes the same by fused kernels."""

from __future__ import annotations

import abc
import ast
import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._expression import Unknown, expression, own, unify, written
from ._glu import glu, glu_packed
from ._rms_norm import rms_norm

# --- what takes the place of a forward ---


@dataclasses.dataclass(eq=False)
class Fused(abc.ABC):
    """A callable that takes the place of a method of one module.

    An attribute of the module, so that it is copied and pickled with it. It holds the names of the attributes that it
    needs, not their values, which may be replaced at any time.
    """

    module: nn.Module
    token: str  # of the handle
    kind: str
    replaced: ClassVar[str] = "forward"

    @abc.abstractmethod
    def options(self) -> dict[str, Any]:
        """What to say of it."""


@dataclasses.dataclass(eq=False)
class FusedNorm(Fused):
    weight: str | None
    eps: str
    casting: str
    offset: float
    widest_eps: float  # where eps is None, the largest that a dtype has

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        [x] = (*args, *kwargs.values())
        weight = getattr(self.module, self.weight) if self.weight else None
        eps = getattr(self.module, self.eps)
        if eps is None:
            eps = min(torch.finfo(x.dtype).eps, self.widest_eps)
        return rms_norm(x, weight, eps, offset=self.offset, casting=self.casting)

    def options(self) -> dict[str, Any]:
        return {"casting": self.casting, "offset": self.offset, "eps": getattr(self.module, self.eps)}


@dataclasses.dataclass(eq=False)
class FusedGatedNorm(FusedNorm):
    """A norm times an activation of another input: a gated unit whose `up` is the norm."""

    inputs: list[str]
    gated: str

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        x, gate = (*args, *(kwargs[name] for name in self.inputs[len(args) :]))
        return glu(gate, super().__call__(x), self.gated).to(x.dtype)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "gated": self.gated}


@dataclasses.dataclass(eq=False)
class FusedMLP(Fused):
    """`down(act(gate(x)) * up(x))`, the projections called as the modules they are."""

    gate: str
    up: str | None  # None where `gate` gives both
    down: str
    dropout: str | None

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        [x] = (*args, *kwargs.values())
        module = self.module
        h = getattr(module, self.gate)(x)
        h = glu(h, getattr(module, self.up)(x), self.kind) if self.up else glu_packed(h, self.kind, "halves")
        if self.dropout:
            h = getattr(module, self.dropout)(h)
        return getattr(module, self.down)(h)

    def options(self) -> dict[str, Any]:
        return {"layout": "separate" if self.up else "halves"}


@dataclasses.dataclass(eq=False)
class FusedGate(Fused):
    """The gate of experts, whose projections are multiplied elsewhere. It may have a limit."""

    layout: str
    limit: str | None
    replaced: ClassVar[str] = "_apply_gate"

    def __call__(self, x: Tensor) -> Tensor:
        return glu_packed(x, self.kind, self.layout, **self.clamped())

    def clamped(self) -> dict[str, float]:
        return {"limit": getattr(self.module, self.limit)} if self.limit else {}

    def options(self) -> dict[str, Any]:
        return {"layout": self.layout, **self.clamped()}


# --- the forms of forward that are known, as the families of models write them ---


def _llama(self: Any, x: Tensor) -> Tensor:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3 and most others."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * y.to(x.dtype)


def _olmo2(self: Any, x: Tensor) -> Tensor:
    """OLMo-2, gpt-oss."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.weight * y).to(x.dtype)


def _helium(self: Any, x: Tensor) -> Tensor:
    """Helium, Moshi, Nemotron-H."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    return (self.weight.float() * y).to(x.dtype)


def _gemma(self: Any, x: Tensor) -> Tensor:
    """Gemma to Gemma 3, Qwen3-Next."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    return (y * (1.0 + self.weight.float())).to(x.dtype)


def _gemma4(self: Any, x: Tensor) -> Tensor:
    """Gemma 3n, Gemma 4."""
    y = x.float()
    y = y * torch.pow(y.pow(2).mean(-1, keepdim=True) + self.eps, -0.5)
    return (y * self.weight.float()).to(x.dtype)


def _gemma4_weightless(self: Any, x: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.pow(y.pow(2).mean(-1, keepdim=True) + self.eps, -0.5)).to(x.dtype)


def _weightless(self: Any, x: Tensor) -> Tensor:
    """Llama 4's L2 norm, nanochat."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _torch(self: Any, x: Tensor) -> Tensor:
    """torch.nn.RMSNorm."""
    return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _llama_gated(self: Any, x: Tensor, gate: Tensor) -> Tensor:
    """The linear attention of Qwen3-Next."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
    y = self.weight * y.to(x.dtype)
    return (y * self.act(gate.float())).to(x.dtype)


# Each with its casting and what it adds to the weight.
_NORMS = {
    _llama: ("llama", 0.0),
    _olmo2: ("gemma", 0.0),
    _helium: ("gemma", 0.0),
    _gemma: ("gemma", 1.0),
    _gemma4: ("gemma", 0.0),
    _gemma4_weightless: ("gemma", 0.0),
    _weightless: ("gemma", 0.0),
    _torch: ("gemma", 0.0),
    _llama_gated: ("llama", 0.0),
}


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down(self.act(self.gate(x)) * self.up(x))


def _mlp_dropout(self: Any, x: Tensor) -> Tensor:
    """T5Gemma."""
    return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))


def _mlp_packed(self: Any, x: Tensor) -> Tensor:
    """Phi-3, GLM."""
    gate, up = self.gate(x).chunk(2, dim=-1)
    return self.down(self.act(gate) * up)


def _mlp_packed_dropout(self: Any, x: Tensor) -> Tensor:
    """ModernBERT."""
    gate, up = self.gate(x).chunk(2, dim=-1)
    return self.down(self.dropout(self.act(gate) * up))


_MLPS = (_mlp, _mlp_dropout, _mlp_packed, _mlp_packed_dropout)


def _gate_halves(self: Any, x: Tensor) -> Tensor:
    """The experts of Mixtral, Qwen-MoE and others."""
    gate, up = x.chunk(2, dim=-1)
    return self.act(gate) * up


def _gate_clamped(self: Any, x: Tensor) -> Tensor:
    """The experts of gpt-oss."""
    gate, up = x[..., ::2], x[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def _gelu_new(self: Any, x: Tensor) -> Tensor:
    """The tanh approximation of GELU, written out."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


# --- recognition ---


@functools.cache
def _form(function: Callable[..., Tensor]) -> ast.expr:
    return expression(function)


def recognized(module: nn.Module, token: str) -> Fused:
    """What computes the same as a method of the module; `Unknown` says why nothing does."""
    attribute = "_apply_gate" if hasattr(type(module), "_apply_gate") else "forward"
    if attribute in vars(module):
        other = vars(module)[attribute]
        if isinstance(other, Fused):
            raise Unknown("already patched")
        raise Unknown(f"its {attribute} was replaced on the instance, by {_name_of(other)}")
    value = expression(getattr(type(module), attribute), module)
    if attribute == "_apply_gate":
        return _gate_of(module, token, value)
    for norm, (casting, offset) in _NORMS.items():
        names = unify(_form(norm), value, {})
        if names is not None:
            return _norm_of(module, token, names, casting, offset)
    for mlp in _MLPS:
        names = unify(_form(mlp), value, {})
        if names is not None:
            return _mlp_of(module, token, names)
    raise Unknown(f"its forward is no known form: {written(value)}")


def _norm_of(module: nn.Module, token: str, names: dict[str, Any], casting: str, offset: float) -> Fused:
    weight = getattr(module, names["weight"]) if "weight" in names else None
    if len(getattr(module, names.get("normalized_shape", ""), [0])) != 1:
        raise Unknown("it normalizes several dimensions")
    if weight is not None and (not isinstance(weight, Tensor) or weight.ndim != 1):
        raise Unknown(f"its {names['weight']} is not of one dimension")
    if not isinstance(getattr(module, names["eps"]), (float, types.NoneType)):
        raise Unknown(f"its {names['eps']} is no float")
    widest_eps = torch.finfo(torch.float32).eps
    if "normalized_shape" in names and _composed():
        casting, widest_eps = "llama", 1.0
    form = module, token, "rms_norm", names.get("weight"), names["eps"], casting, offset, widest_eps
    if "act" not in names:
        return FusedNorm(*form)
    return FusedGatedNorm(*form, list(inspect.signature(module.forward).parameters), _kind_of(module, names["act"]))


@functools.cache
def _composed() -> bool:
    """Whether this torch is an older release, whose `F.rms_norm` is made of other operations: in 16 bits it rounds
    before it multiplies by the weight, and an eps that is None is that of 16 bits.
    """
    x = torch.full((1,), 2**-12, dtype=torch.bfloat16, device="cpu")
    return F.rms_norm(x, (1,)).item() < 0.1  # x / sqrt(x ** 2 + eps)


def _mlp_of(module: nn.Module, token: str, names: dict[str, Any]) -> Fused:
    parts: list[Any] = [names.get(role) for role in ("gate", "up", "down", "dropout")]
    for name in parts:
        if name and not isinstance(getattr(module, name, None), nn.Module):
            raise Unknown(f"its {name} is no module")
    return FusedMLP(module, token, _kind_of(module, names["act"]), *parts)


def _gate_of(module: nn.Module, token: str, value: ast.expr) -> Fused:
    forward = inspect.unwrap(type(module).forward)
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation in (None, "eager") and "_apply_gate" not in forward.__code__.co_names:
        raise Unknown("its eager experts do not call _apply_gate; the grouped_mm and batched_mm ones do")
    names = unify(_form(_gate_halves), value, {})
    if names is not None:
        return FusedGate(module, token, _kind_of(module, names["act"]), "halves", None)
    names = unify(_form(_gate_clamped), value, {})
    if names is None:
        raise Unknown(f"its _apply_gate is no known form: {written(value)}")
    if getattr(module, names["alpha"]) != 1.702:
        raise Unknown(f"its {names['alpha']} is {getattr(module, names['alpha'])}; the kernel has 1.702")
    return FusedGate(module, token, "swiglu_oai", "interleaved", names["limit"])


def _kind_of(module: nn.Module, act: Any) -> str:
    """The gated unit of an activation: a function, or the name of an attribute."""
    return _kind(getattr(module, act) if isinstance(act, str) else act)


def _kind(act: Any) -> str:
    """The gated unit of an activation, by what it computes."""
    if isinstance(act, nn.Module):
        return _kind_of_module(act)
    options = {}
    if isinstance(act, functools.partial) and not act.args:
        act, options = act.func, act.keywords
    return _kind_of_call(act, options)


def _kind_of_call(function: Any, options: dict[str, Any]) -> str:
    if function is F.gelu and options in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
        return "geglu_tanh" if options.get("approximate") == "tanh" else "geglu"
    if function in (F.silu, F.relu, torch.relu) and not (options.get("inplace") or options.keys() - {"inplace"}):
        return "swiglu" if function is F.silu else "reglu"
    raise Unknown(f"its activation {_name_of(function)} has no fused kernel")


def _kind_of_module(act: nn.Module) -> str:
    name = type(act).__name__
    hooks = (act._forward_hooks, act._forward_pre_hooks, act._backward_hooks, act._backward_pre_hooks)
    if "forward" in vars(act) or any(hooks):
        raise Unknown(f"its activation {name} has hooks or a forward of its own, which would not be called")
    try:
        value = expression(type(act).forward, act)
    except Unknown as error:
        raise Unknown(f"its activation {name} has no fused kernel: {error}") from error
    if unify(_form(_gelu_new), value, {}) is not None:
        return "geglu_tanh"
    match value:
        case ast.Call(func=function, args=[ast.Name(id="x")], keywords=keywords):
            options = {keyword.arg or "**": _value(act, keyword.value) for keyword in keywords}
            called = _value(act, function)
            if not options:
                return _kind(called)
            return _kind_of_call(called, options)
    raise Unknown(f"its activation {name} has no fused kernel")


def _value(module: nn.Module, node: ast.expr) -> Any:
    if name := own(node):
        return getattr(module, name, None)
    return node.value if isinstance(node, ast.Constant) else getattr(node, "means", None)


def _name_of(value: Any) -> str:
    return getattr(value, "__name__", None) or type(value).__name__
