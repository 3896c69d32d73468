"""The operations along rows that each backend has: on plain tensors, without autograd. And which backend runs them."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .backends import BACKENDS, native, requested_backend
from .codecs import STORAGE_DTYPES

CASTINGS = {"llama": 0, "gemma": 1, "none": 2}
"""The native module's numbers of `rms_norm`'s castings; csrc/ops.cpp."""
KINDS = {"swiglu": 0, "geglu": 1, "geglu_tanh": 2, "reglu": 3, "relu2": 4, "swiglu_oai": 5}
"""And of the gated linear units; csrc/glu.h."""


_TRANSFORMED = "torch.func, forward-mode AD or torch.jit.trace is at work, which sees torch operations only"
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # also after its torch.func call has ended


class CpuOps:
    """The native module's."""

    def refuses(self, tensors: tuple[Tensor | None, ...]) -> str | None:
        """None where it can read and write these tensors, else the reason."""
        if _transformed():
            return _TRANSFORMED
        for tensor in tensors:
            if tensor is None:
                continue
            if type(tensor) is not Tensor and type(tensor) is not Parameter:
                return f"a tensor is a {type(tensor).__name__}, whose memory only torch operations can reach"
            if _is_wrapped(tensor):
                return _TRANSFORMED
            if not tensor.is_cpu:
                return f"a tensor is on {tensor.device}, and the cpu backend works on the CPU"
            if tensor.dtype not in STORAGE_DTYPES:
                return f"a tensor is {tensor.dtype}; the cpu backend takes float32, float64, bfloat16 and float16"
        return BACKENDS["cpu"].unavailable()

    def rms_norm_forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        offset: float,
        casting: str,
        out_dtype: torch.dtype | None,
        save: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y, the sum where there is a residual, and where `save` is set what the backward pass needs."""
        dtype = out_dtype or norm_dtype(x, weight, casting)
        y = torch.empty_like(x) if dtype is x.dtype else torch.empty_like(x, dtype=dtype)
        total = None if residual is None else torch.empty_like(x)
        rstd = _row_statistics(x, weight) if save else None
        native().rms_norm_forward(
            *(_own(x), _own(weight), _own(residual), y, total, rstd),
            *(eps, offset, CASTINGS[casting], torch.get_num_threads()),
        )
        return y, total, rstd

    def rms_norm_backward(
        self,
        grad_y: Tensor,
        grad_total: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        rstd: Tensor,
        offset: float,
        casting: str,
        wants_weight: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of x (of the sum, and so of the residual) and of the weight, where it is wanted."""
        grad_x = torch.empty_like(x)
        grad_weight = None if weight is None or not wants_weight else torch.empty_like(weight)
        native().rms_norm_backward(
            *(_own(grad_y), _own(grad_total), _own(x), _own(weight), rstd, grad_x, grad_weight),
            *(offset, CASTINGS[casting], torch.get_num_threads()),
        )
        return grad_x, grad_weight

    def glu_forward(self, gate: Tensor, up: Tensor | None, kind: str, limit: float) -> Tensor:
        y = torch.empty_like(gate, dtype=glu_dtype(gate, up))
        native().glu_forward(_own(gate), _own(up), y, KINDS[kind], limit, torch.get_num_threads())
        return y

    def glu_backward(
        self,
        grad_y: Tensor,
        gate: Tensor,
        up: Tensor | None,
        kind: str,
        limit: float,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of gate and up, written to `out` where that is given."""
        grad_gate, grad_up = out or (torch.empty_like(gate), None if up is None else torch.empty_like(up))
        native().glu_backward(
            *(_own(grad_y), _own(gate), _own(up), grad_gate, grad_up),
            *(KINDS[kind], limit, torch.get_num_threads()),
        )
        return grad_gate, grad_up


class TritonOps(CpuOps):
    """Those of `fusedopt.kernels`, loaded on first use."""

    def refuses(self, tensors: tuple[Tensor | None, ...]) -> str | None:
        if reason := BACKENDS["triton"].unavailable():
            return reason
        if _transformed():
            return _TRANSFORMED
        for tensor in tensors:
            if tensor is None:
                continue
            if _is_wrapped(tensor):
                return _TRANSFORMED
            if tensor.dtype not in STORAGE_DTYPES:
                return f"a tensor is {tensor.dtype}; the triton backend takes float32, float64, bfloat16 and float16"
            if reason := BACKENDS["triton"].refuses(tensor.resolve_neg()):
                return reason
        return None

    def rms_norm_forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        offset: float,
        casting: str,
        out_dtype: torch.dtype | None,
        save: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        from .kernels.rms_norm import rms_norm_forward

        return rms_norm_forward(_own(x), _own(weight), _own(residual), eps, offset, casting, out_dtype)

    def rms_norm_backward(
        self,
        grad_y: Tensor,
        grad_total: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        rstd: Tensor,
        offset: float,
        casting: str,
        wants_weight: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        from .kernels.rms_norm import rms_norm_backward

        grad_total, weight = _own(grad_total), _own(weight)
        return rms_norm_backward(_own(grad_y), grad_total, _own(x), weight, rstd, offset, casting, wants_weight)

    def glu_forward(self, gate: Tensor, up: Tensor | None, kind: str, limit: float) -> Tensor:
        from .kernels.glu import glu_forward

        return glu_forward(_own(gate), _own(up), kind, limit)

    def glu_backward(
        self,
        grad_y: Tensor,
        gate: Tensor,
        up: Tensor | None,
        kind: str,
        limit: float,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        from .kernels.glu import glu_backward

        return glu_backward(_own(grad_y), _own(gate), _own(up), kind, limit, out)


OPS: dict[str, CpuOps] = {"cpu": CpuOps(), "triton": TritonOps()}
"""By the name of the backend. Where none serves, an operation runs its reference."""


def choose_ops(what: str, *tensors: Tensor | None) -> CpuOps | None:
    """The operations of the backend that is asked for, or of one that can; None to run the reference.

    Raises:
        RuntimeError: the backend that is asked for cannot run `what`.
    """
    requested = requested_backend()
    if requested is None:
        for ops in OPS.values():
            if ops.refuses(tensors) is None:
                return ops
        return None
    if requested == "eager":
        return None
    reason = OPS[requested].refuses(tensors) if requested in OPS else "it has no such operation"
    if reason:
        raise RuntimeError(f"backend={requested!r} cannot run {what}: {reason}; use_backend('eager') runs it anywhere")
    return OPS[requested]


def norm_dtype(x: Tensor, weight: Tensor | None, casting: str) -> torch.dtype:
    """The dtype of `rms_norm`'s result."""
    if weight is None or casting == "gemma" or weight.dtype is x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def glu_dtype(gate: Tensor, up: Tensor | None) -> torch.dtype:
    """The dtype of a gated linear unit's result."""
    return gate.dtype if up is None or up.dtype is gate.dtype else torch.promote_types(gate.dtype, up.dtype)


def arithmetic(x: Tensor, other: Tensor | None = None) -> torch.dtype:
    """The dtype that is computed in: float32, or float64 where one of both has it."""
    double = x.dtype is torch.float64 or (other is not None and other.dtype is torch.float64)
    return torch.float64 if double else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # any() takes twice as long
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """`function.apply` without what it does for torch.func, of which `choose_ops` has found nothing at work: in most of
    the time that an operation on a small tensor takes."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _row_statistics(x: Tensor, weight: Tensor | None) -> Tensor:
    """An empty tensor for a number of each row of x."""
    rows, dtype = x.shape[:-1], arithmetic(x, weight)
    return x.new_empty(*rows, dtype=dtype) if rows else x.new_empty((), dtype=dtype)  # a torch.Size takes twice as long


def as_tensor(value: Tensor | None, like: Tensor) -> Tensor:
    """For an operator of torch's, which cannot return None: an empty tensor in its place."""
    return like.new_empty(0) if value is None else value


@overload
def _own(tensor: Tensor) -> Tensor: ...
@overload
def _own(tensor: Tensor | None) -> Tensor | None: ...
def _own(tensor: Tensor | None) -> Tensor | None:
    """`tensor` with values of its own in memory, which a negative view has not."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


def _transformed() -> Any:
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )
