"""Who has RMSNorm and gated units: fusedopt's backends, the code of model families, torch's own, and peers."""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedopt
from fusedopt._ops import OPS as BACKENDS
from fusedopt._ops import choose_ops

from .op import Provider
from .providers import not_loaded

EPS = 0.5  # of every norm: not so small that a missing one would not show

Function = Callable[..., Any]  # of the op's tensors, to one tensor or several


@dataclasses.dataclass(frozen=True)
class RowProvider(Provider):
    """An implementation of ops along rows. `op` below is a name of `fusedopt.bench.row_op.FUNCTIONS`.

    lacks(op) -> why it has no such op, or None.
    make(op, tensors) -> the function, to be called on tensors like these.
    """

    lacks: Callable[[str], str | None]
    make: Callable[[str, list[Tensor]], Function]


# --- as the families of models write them ---


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's."""
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rms_norm(total, weight), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


EAGER: dict[str, Function] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "swiglu": swiglu,
    "geglu": geglu,
}

# --- torch's own ---


def functional_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def functional_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return functional_rms_norm(total, weight), total


# --- fusedopt's and peers', with their own arguments ---

OURS: dict[str, Function] = {
    "rms_norm": lambda x, weight: fusedopt.rms_norm(x, weight, EPS),
    "add_rms_norm": lambda x, residual, weight: fusedopt.rms_norm(x, weight, EPS, residual=residual),
    "swiglu": lambda gate, up: fusedopt.swiglu(gate, up),
    "geglu": lambda gate, up: fusedopt.geglu(gate, up),
}

# Of a module's function, named on the left, what calls it on the op's tensors.
LIGER: dict[str, tuple[str, Callable[[Function], Function]]] = {
    "rms_norm": ("liger_rms_norm", lambda peer: lambda x, weight: peer(x, weight, EPS)),
    "add_rms_norm": (
        "liger_fused_add_rms_norm",
        lambda peer: lambda x, residual, weight: peer(x, residual, weight, EPS),
    ),
    "swiglu": ("liger_swiglu", lambda peer: peer),
}
QUACK: dict[str, tuple[str, Callable[[Function], Function]]] = {
    "rms_norm": ("rmsnorm", lambda peer: lambda x, weight: peer(x, weight, eps=EPS)),
    "add_rms_norm": (
        "rmsnorm",
        lambda peer: lambda x, residual, weight: peer(x, weight, residual=residual, eps=EPS, prenorm=True),
    ),
}


def _fusedopt(name: str) -> RowProvider:
    def make(op: str, tensors: list[Tensor]) -> Function:
        function = OURS[op]
        if choose_ops(op, *tensors) is BACKENDS.get(name):
            return function  # chosen anyway; to ask for it takes the host a microsecond or two a call

        def asking(*tensors: Tensor) -> Any:
            with fusedopt.use_backend(name):
                return function(*tensors)

        return asking

    def unavailable(device: torch.device) -> str | None:
        return BACKENDS[name].refuses((torch.empty(1, device=device),)) if name in BACKENDS else None

    return RowProvider(f"fusedopt-{name}", unavailable, lambda op: None, make)


def _torch(name: str, functions: Mapping[str, Function], prepare: Callable[[Function], Function]) -> RowProvider:
    def lacks(op: str) -> str | None:
        return None if op in functions else f"torch has no fused {op}"

    return RowProvider(name, lambda device: None, lacks, lambda op, tensors: prepare(functions[op]))


def _compiled(function: Function) -> Function:
    """A copy, since torch keeps what it compiles with the code, and for a second shape compiles for any shape."""
    copy = types.FunctionType(function.__code__.replace(), function.__globals__)
    compiled: Function = torch.compile(copy, fullgraph=True, dynamic=False)
    return compiled


def _peer(
    name: str, module: str, package: str, functions: Mapping[str, tuple[str, Callable[[Function], Function]]]
) -> RowProvider:
    """A library of GPU kernels."""

    def unavailable(device: torch.device) -> str | None:
        return not_loaded(module, package) if device.type == "cuda" else f"{package} runs on a GPU alone"

    def lacks(op: str) -> str | None:
        return None if op in functions else f"{package} has no {op} of the same rule"

    def make(op: str, tensors: list[Tensor]) -> Function:
        attribute, adapt = functions[op]
        return adapt(getattr(importlib.import_module(module), attribute))

    return RowProvider(name, unavailable, lacks, make)


def _providers() -> Iterable[RowProvider]:
    yield from map(_fusedopt, (*BACKENDS, "eager"))
    yield _torch("torch", EAGER, lambda function: function)
    functional: dict[str, Function] = {"rms_norm": functional_rms_norm, "add_rms_norm": functional_add_rms_norm}
    yield _torch("F.rms_norm", functional, lambda function: function)
    yield _torch("torch-compile", EAGER, _compiled)
    # Its GeGLU is the tanh approximation.
    yield _peer("liger", "liger_kernel.transformers.functional", "liger-kernel", LIGER)
    yield _peer("quack", "quack", "quack-kernels", QUACK)


PROVIDERS = {provider.name: provider for provider in _providers()}
