"""Gated linear units (Shazeer, arXiv:2002.05202): an activation of one tensor times another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._ops import CpuOps, apply_of, arithmetic, as_tensor, choose_ops, glu_dtype, needs_grad

LAYOUTS = ("halves", "interleaved")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded once, in one pass over memory; the backward pass keeps only `gate` and `up`.

    Twice differentiable; neither the inputs nor a gradient are changed.

    Args:
        gate, up: of one shape, float32, float64, bfloat16 or float16, with any strides. Arithmetic is in float32, of
            float64 in float64.

    Returns:
        A tensor of that shape, in torch's promotion of both dtypes.

    Raises:
        ValueError: the shapes differ.
        RuntimeError: the backend asked for cannot run this.
    """
    return glu(gate, up, "swiglu")


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """`gelu(gate, approximate) * up`; else as `swiglu`. `approximate` is "none" or "tanh", as torch has it."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r}: choose 'none' or 'tanh'")
    return glu(gate, up, "geglu" if approximate == "none" else "geglu_tanh")


def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """`relu(gate) * up`; else as `swiglu`."""
    return glu(gate, up, "reglu")


def relu2(x: Tensor) -> Tensor:
    """`relu(x) ** 2` (So et al., arXiv:2109.08668); else as `swiglu`."""
    return glu(x, None, "relu2")


def swiglu_oai(gate: Tensor, up: Tensor, limit: float = 7.0) -> Tensor:
    """gpt-oss's: `(up + 1) * gate * sigmoid(1.702 * gate)`, `gate` clamped to at most `limit` and `up` to between
    `-limit` and `limit`; else as `swiglu`."""
    return glu(gate, up, "swiglu_oai", limit)


def swiglu_packed(x: Tensor, layout: str = "halves") -> Tensor:
    """`swiglu` of a gate and an up that lie in one tensor; nothing is copied.

    Args:
        x: of shape (..., 2 N).
        layout: "halves", the gate before the up, or "interleaved", which takes them in turn.

    Returns:
        A tensor of shape (..., N).

    Raises:
        ValueError: the last dimension is odd or missing, or an unknown layout.
        RuntimeError: the backend asked for cannot run this.
    """
    return glu_packed(x, "swiglu", layout)


def glu(gate: Tensor, up: Tensor | None, kind: str, limit: float = 0.0) -> Tensor:
    """Any of the above; `limit` is that of "swiglu_oai"."""
    if up is not None and gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}, and up {tuple(up.shape)}; they must be the same")
    if torch.compiler.is_compiling():
        # The operator chooses when it runs. Elsewhere the compiler fuses the reference itself.
        if gate.device.type != "cpu":
            return reference(gate, up, kind, limit)
        return torch.ops.fusedopt.glu(gate, up, kind, limit)
    # A row of native code is a row of memory: a number by itself is one too.
    ops = choose_ops(kind, gate, up)
    if ops is None:
        return reference(gate, up, kind, limit)
    if gate.ndim == 0:
        return glu(gate[None], None if up is None else up[None], kind, limit)[0]
    return _apply(ops, gate, up, kind, limit) if needs_grad(gate, up) else ops.glu_forward(gate, up, kind, limit)


def glu_packed(x: Tensor, kind: str, layout: str, limit: float = 0.0) -> Tensor:
    """`glu` of a gate and an up that lie in one tensor."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be even, to hold a gate and an up")
    if torch.compiler.is_compiling():
        return glu(*unpacked(x, layout), kind, limit)
    ops = choose_ops(kind, x)
    if ops is None:
        return reference(*unpacked(x, layout), kind, limit)
    if needs_grad(x):
        return _apply_packed(ops, x, kind, layout, limit)
    return ops.glu_forward(*unpacked(x, layout), kind, limit)


def unpacked(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Views of a gate and an up in one tensor."""
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "reglu": F.relu,
    "relu2": lambda x: F.relu(x) * F.relu(x),
    "swiglu_oai": lambda x: x * torch.sigmoid(1.702 * x),
}


def _derivative_of_swish(grad: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    s = torch.sigmoid(alpha * x)
    return grad * s * (1 + alpha * x * (1 - s))


DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": _derivative_of_swish,
    "geglu": torch.ops.aten.gelu_backward,
    "geglu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "reglu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "relu2": lambda grad, x: grad * (2 * F.relu(x)),
    "swiglu_oai": functools.partial(_derivative_of_swish, alpha=1.702),
}
"""Of a gradient and what the activation was taken of: their product with its derivative there."""


def reference(gate: Tensor, up: Tensor | None, kind: str, limit: float) -> Tensor:
    """A gated linear unit in torch operations: its definition."""
    dtype = glu_dtype(gate, up)
    wide = arithmetic(gate, up)
    g, u = gate.to(wide), None if up is None else up.to(wide)
    if kind == "swiglu_oai":
        assert u is not None
        g, u = g.clamp(max=limit), u.clamp(-limit, limit) + 1
    y = ACTIVATIONS[kind](g)
    return (y if u is None else y * u).to(dtype)


def reference_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor | None, kind: str, limit: float
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `reference` in torch operations, differentiable in turn."""
    wide = arithmetic(gate, up)
    grad, g = grad_y.to(wide), gate.to(wide)
    if up is None:
        return DERIVATIVES[kind](grad, g).to(gate.dtype), None
    u, grad_g, grad_u = up.to(wide), grad, grad
    if kind == "swiglu_oai":
        grad_g, grad_u = grad * (g <= limit), grad * ((u >= -limit) & (u <= limit))
        g, u = g.clamp(max=limit), u.clamp(-limit, limit) + 1
    return DERIVATIVES[kind](grad_g * u, g).to(gate.dtype), (grad_u * ACTIVATIONS[kind](g)).to(up.dtype)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: CpuOps, gate: Tensor, up: Tensor | None, kind: str, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.settings = ops, kind, limit
        return ops.glu_forward(gate, up, kind, limit)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        ops, kind, limit = ctx.settings
        if torch.is_grad_enabled() or ops.refuses((grad_y,)):
            grads = reference_backward(grad_y, gate, up, kind, limit)
        else:
            grads = ops.glu_backward(grad_y, gate, up, kind, limit)
        return None, *[grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[1:3])], None, None


class _PackedGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: CpuOps, x: Tensor, kind: str, layout: str, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = ops, kind, layout, limit
        return ops.glu_forward(*unpacked(x, layout), kind, limit)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        ops, kind, layout, limit = ctx.settings
        gate, up = unpacked(x, layout)
        if torch.is_grad_enabled() or ops.refuses((grad_y,)):
            grad_gate, grad_up = reference_backward(grad_y, gate, up, kind, limit)
            assert grad_up is not None
            together = torch.stack if layout == "interleaved" else torch.cat
            return None, together((grad_gate, grad_up), -1).reshape(x.shape), None, None, None
        grad_x = torch.empty_like(x)
        ops.glu_backward(grad_y, gate, up, kind, limit, out=unpacked(grad_x, layout))
        return None, grad_x, None, None, None


_apply, _apply_packed = apply_of(_Glu), apply_of(_PackedGlu)


# --- torch.compile: operators that it does not look into ---


@torch.library.custom_op(
    "fusedopt::glu", mutates_args=(), schema="(Tensor gate, Tensor? up, str kind, float limit) -> Tensor"
)
def _operator(gate: Tensor, up: Tensor | None, kind: str, limit: float) -> Tensor:
    return glu(gate, up, kind, limit)


@_operator.register_fake
def _(gate, up, kind, limit):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate, dtype=glu_dtype(gate, up))


@torch.library.custom_op(
    "fusedopt::glu_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor gate, Tensor? up, str kind, float limit) -> (Tensor, Tensor)",
)
def _backward_operator(
    grad_y: Tensor, gate: Tensor, up: Tensor | None, kind: str, limit: float
) -> tuple[Tensor, Tensor]:
    ops = None if gate.ndim == 0 else choose_ops(kind, grad_y, gate, up)
    if ops is None:
        grad_gate, grad_up = reference_backward(grad_y, gate, up, kind, limit)
    else:
        grad_gate, grad_up = ops.glu_backward(grad_y, gate, up, kind, limit)
    return grad_gate, as_tensor(grad_up, gate)


@_backward_operator.register_fake
def _(grad_y, gate, up, kind, limit):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate), as_tensor(None if up is None else torch.empty_like(up), gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.settings = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = torch.ops.fusedopt.glu_backward(grad_y, gate, up, *ctx.settings)
    return grad_gate, None if up is None else grad_up, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)
