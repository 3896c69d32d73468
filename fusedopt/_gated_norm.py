"""RMS normalization with a gate, as in models with linear attention or a state space."""

from __future__ import annotations

import torch
from torch import Tensor

from ._glu import glu
from ._ops import arithmetic
from ._rms_norm import rms_norm


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gate_first: bool = False,
    group_size: int | None = None,
) -> Tensor:
    """`rms_norm(x, weight) * silu(gate)`, or with `gate_first` `rms_norm(x * silu(gate), weight)`.

    Two passes over memory, of `rms_norm` and of `swiglu`, forward and backward; with `gate_first` what lies between is
    in float32. Twice differentiable; neither the inputs nor a gradient are changed.

    Args:
        x: of shape (..., N), float32, float64, bfloat16 or float16, with any strides.
        gate: of the shape of `x`, of any of these dtypes.
        weight: of shape (N,), of any of these dtypes; None for all ones.
        eps: added to the mean of squares.
        gate_first: roundings fall where they fall in the families of models.
            False, as in Qwen3-Next: `rms_norm` with its casting "llama"; times `silu(gate)` in float32; cast to the
            dtype of `x`.
            True, as in Mamba-2: the product and its norm in float32; cast to the dtype of `x`; times the weight, in
            torch's promotion of both dtypes.
        group_size: each so many elements of a row are normalized by themselves; None for whole rows.

    Returns:
        A tensor of the shape of `x`.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: the backend asked for cannot run this.
    """
    if x.ndim == 0 or gate.shape != x.shape:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}, and x {tuple(x.shape)}; they must be the same, of 1 dimension or more"
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} wants ({x.shape[-1]},)")
    if group_size is not None and (group_size < 1 or x.shape[-1] % group_size):
        raise ValueError(f"group_size={group_size} does not divide the {x.shape[-1]} elements of a row of x")
    if gate_first:
        product = glu(gate.to(arithmetic(x, gate)), x, "swiglu")
        return _norm(product, weight, eps, group_size, x.dtype)
    return glu(gate, _norm(x, weight, eps, group_size, x.dtype), "swiglu").to(x.dtype)


def _norm(x: Tensor, weight: Tensor | None, eps: float, group_size: int | None, dtype: torch.dtype) -> Tensor:
    """`rms_norm` of groups, cast to `dtype` before it is multiplied by the weight."""
    if group_size is None and x.dtype is dtype:
        return rms_norm(x, weight, eps)
    columns = x.shape[-1]
    groups = x if group_size is None else x.unflatten(-1, (columns // group_size, group_size))
    y = rms_norm(groups, None, eps, out_dtype=dtype).reshape(x.shape)
    return y if weight is None else weight * y
