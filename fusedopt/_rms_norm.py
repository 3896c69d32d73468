"""RMS normalization (Zhang and Sennrich, arXiv:1910.07467): the function, the module, and the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ._ops import CASTINGS, CpuOps, apply_of, arithmetic, as_tensor, choose_ops, needs_grad, norm_dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    casting: str = "llama",
    out_dtype: torch.dtype | None = None,
) -> Any:
    """`x / sqrt(mean(x ** 2) + eps) * (offset + weight)` along the last dimension, in one pass over memory.

    Twice differentiable; neither `x` nor a gradient is changed. Only the input and one number for each row are kept for
    the backward pass. Autocast changes nothing: as in the model families, dtypes are those of `x` and `weight`.

    Args:
        x: of shape (..., N), float32, float64, bfloat16 or float16, with any strides.
        weight: of shape (N,), of any of these dtypes; None for all ones.
        eps: added to the mean of squares.
        residual: of the shape of `x`. The sum of both is normalized, and returned too.
        offset: added to the weight, where there is one; 1.0 in Gemma.
        casting: where results are rounded to the dtype of `x`. In float32 all are the same.
            "llama": float32 inside, cast to that dtype, then times the weight, in torch's promotion of both dtypes.
            "gemma": all in float32, the weight too, and one cast at the end.
            "none": each operation's result, as torch has it: squares, their mean, eps added, the inverse root, the
            product with it; then as "llama".
        out_dtype: what the result is cast to at last.

    Returns:
        The normalized tensor; with `residual` also the sum, in torch's promotion of both dtypes.

    Raises:
        ValueError: shapes that do not fit, or an unknown `casting`.
        RuntimeError: the backend asked for cannot run this.
    """
    _check(x, weight, residual, casting)
    if residual is not None and residual.dtype is not x.dtype:
        x = x + residual
        return rms_norm(x, weight, eps, offset=offset, casting=casting, out_dtype=out_dtype), x
    if torch.compiler.is_compiling():
        # The operator chooses when it runs. Elsewhere the compiler fuses the reference itself.
        if x.device.type != "cpu":
            return reference(x, weight, eps, residual, offset, casting, out_dtype)
        # A number given to an operator, or to torch.full, is compiled for; one that is added is not.
        eps_ = torch.zeros((), dtype=torch.float64, device="cpu") + eps
        y, total, _ = torch.ops.fusedopt.rms_norm(x, weight, residual, eps_, offset, casting, out_dtype)
        return y if residual is None else (y, total)
    ops = choose_ops("rms_norm", x, weight, residual)
    if ops is None:
        return reference(x, weight, eps, residual, offset, casting, out_dtype)
    if needs_grad(x, weight, residual):
        return _apply(ops, x, weight, residual, eps, offset, casting, out_dtype)
    y, total, _ = ops.rms_norm_forward(x, weight, residual, eps, offset, casting, out_dtype, save=False)
    return y if residual is None else (y, total)


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None, casting: str) -> None:
    if x.ndim == 0:
        raise ValueError("x has no dimensions; the last one is normalized")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} wants ({x.shape[-1]},)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, and x {tuple(x.shape)}; they must be the same")
    if casting not in CASTINGS:
        raise ValueError(f"casting={casting!r}: choose one of {', '.join(CASTINGS)}")


def reference(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    offset: float,
    casting: str,
    out_dtype: torch.dtype | None,
) -> Any:
    """`rms_norm` in torch operations: its definition."""
    if residual is not None:
        x = x + residual
    wide = arithmetic(x)
    values = x if casting == "none" else x.to(wide)
    # On the CPU torch's mean and inverse root of 16 bits round twice, and its mean overflows in float16.
    mean = (values * values).mean(-1, keepdim=True, dtype=wide).to(values.dtype)
    y = values * torch.rsqrt((mean + eps).to(wide)).to(values.dtype)
    if casting == "llama":
        y = y.to(x.dtype)
    if weight is not None:
        factor = weight.to(y.dtype) if casting == "gemma" else weight
        y = y * (factor + offset if offset else factor)
    if casting == "gemma":
        y = y.to(x.dtype)
    y = y if out_dtype is None else y.to(out_dtype)
    return y if residual is None else (y, x)


def _inverse_root(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    values = x.to(arithmetic(x, weight))
    return torch.rsqrt((values * values).mean(-1) + eps)


def reference_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients, of the formula without its roundings, in torch operations."""
    normalized, grad = x.to(rstd.dtype) * rstd.unsqueeze(-1), grad_y.to(rstd.dtype)
    scaled = grad if weight is None else grad * (weight.to(rstd.dtype) + offset)
    grad_x = rstd.unsqueeze(-1) * (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True))
    if grad_total is not None:
        grad_x = grad_x + grad_total
    grad_weight = None
    if weight is not None and wants_weight:
        grad_weight = (grad * normalized).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: CpuOps,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        offset: float,
        casting: str,
        out_dtype: torch.dtype | None,
    ) -> Any:
        y, total, rstd = ops.rms_norm_forward(x, weight, residual, eps, offset, casting, out_dtype)
        ctx.save_for_backward(x if total is None else total, weight, rstd)
        ctx.settings = ops, eps, offset, casting
        if total is None:
            return y
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None = None) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        ops, eps, offset, casting = ctx.settings
        wants_weight = ctx.needs_input_grad[2]
        grad_weight = None
        if grad_y is None:
            grad_x = grad_total
        elif torch.is_grad_enabled() or ops.refuses((grad_y, grad_total)):
            # What is kept of the forward pass does not say how the root depends on x.
            rstd = _inverse_root(x, weight, eps)
            grad_x, grad_weight = reference_backward(grad_y, grad_total, x, weight, rstd, offset, wants_weight)
        else:
            grad_x, grad_weight = ops.rms_norm_backward(
                grad_y, grad_total, x, weight, rstd, offset, casting, wants_weight
            )
        wants_x, wants_residual = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        return None, grad_x if wants_x else None, grad_weight, grad_x if wants_residual else None, *[None] * 4


_apply = apply_of(_RmsNorm)


class RMSNorm(Module):
    """`rms_norm` along the last dimension; its weight makes no difference at first.

    Args:
        normalized_shape: elements of the last dimension.
        eps, offset, casting: as `rms_norm`.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight.
    """

    weight: Parameter | None

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
        casting: str = "llama",
    ) -> None:
        super().__init__()
        if casting not in CASTINGS:
            raise ValueError(f"casting={casting!r}: choose one of {', '.join(CASTINGS)}")
        self.normalized_shape, self.eps, self.elementwise_affine = normalized_shape, eps, elementwise_affine
        self.offset, self.casting = offset, casting
        weight = Parameter(torch.empty(normalized_shape, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to what changes nothing: with its offset, 1."""
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The normalized tensor; with a residual, the normalized sum and the sum."""
        return rms_norm(x, self.weight, self.eps, residual=residual, offset=self.offset, casting=self.casting)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"offset={self.offset}, casting={self.casting!r}"
        )


# --- torch.compile: operators that it does not look into ---


@torch.library.custom_op(
    "fusedopt::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? residual, Tensor eps, float offset, str casting, ScalarType? out_dtype) "
    "-> (Tensor, Tensor, Tensor)",
)
def _operator(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: Tensor,
    offset: float,
    casting: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ops = choose_ops("rms_norm", x, weight, residual)
    if ops is None:
        total = x if residual is None else x + residual
        y = reference(total, weight, eps.item(), None, offset, casting, out_dtype)
        return y, as_tensor(None if residual is None else total, x), _inverse_root(total, weight, eps.item())
    y, total_, rstd = ops.rms_norm_forward(x, weight, residual, eps.item(), offset, casting, out_dtype)
    assert rstd is not None
    return y, as_tensor(total_, x), rstd


@_operator.register_fake
def _(x, weight, residual, eps, offset, casting, out_dtype):  # type: ignore[no-untyped-def]
    y = torch.empty_like(x, dtype=out_dtype or norm_dtype(x, weight, casting))
    rstd = x.new_empty(x.shape[:-1], dtype=arithmetic(x, weight))
    return y, as_tensor(None if residual is None else torch.empty_like(x), x), rstd


@torch.library.custom_op(
    "fusedopt::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor? weight, Tensor rstd, float offset, str casting, "
    "bool wants_weight) -> (Tensor, Tensor)",
)
def _backward_operator(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    ops = choose_ops("rms_norm", grad_y, grad_total, x, weight)
    if ops is None:
        grad_x, grad_weight = reference_backward(grad_y, grad_total, x, weight, rstd, offset, wants_weight)
    else:
        grad_x, grad_weight = ops.rms_norm_backward(grad_y, grad_total, x, weight, rstd, offset, casting, wants_weight)
    return grad_x, as_tensor(grad_weight, x)


@_backward_operator.register_fake
def _(grad_y, grad_total, x, weight, rstd, offset, casting, wants_weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), as_tensor(torch.empty_like(weight) if weight is not None and wants_weight else None, x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, _, offset, casting, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.settings = residual is not None, offset, casting


def _backward(ctx: Any, grad_y: Tensor, grad_total: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    has_residual, offset, casting = ctx.settings
    wants_weight = weight is not None and ctx.needs_input_grad[1]
    grad_x, grad_weight = torch.ops.fusedopt.rms_norm_backward(
        grad_y, grad_total if has_residual else None, x, weight, rstd, offset, casting, wants_weight
    )
    return grad_x, grad_weight if wants_weight else None, grad_x if has_residual else None, *[None] * 4


_operator.register_autograd(_backward, setup_context=_setup_context)
