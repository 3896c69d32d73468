"""How a tensor is stored: the reference form of every storage format. csrc/codecs.h gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

STATE_DTYPES = (None, "float32", "bfloat16")
"""What `state_dtype` may be; None is torch's own choice, the parameter's dtype."""

STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def state_dtype(option: str | None, kind: str, param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state of `kind` "signed" or "unsigned" under the optimizer's `state_dtype` option.

    An unsigned state (a second moment) stays float32 under "bfloat16": with eight bits of mantissa an average at
    beta = 0.999 never decays. Complex parameters keep complex state.
    """
    if param_dtype.is_complex:
        return torch.complex64 if option == "float32" else param_dtype
    if option is None:
        return param_dtype
    return torch.bfloat16 if option == "bfloat16" and kind == "signed" else torch.float32


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored values in the arithmetic dtype, float32 or float64; the parts of complex numbers in a last axis."""
    stored = stored.resolve_conj().resolve_neg()
    return (torch.view_as_real(stored) if stored.is_complex() else stored).to(dtype)


def encode(values: Tensor, stored: Tensor) -> None:
    """Write `values` in place as `stored` is stored, rounding to nearest, ties to even."""
    if stored.is_complex():
        stored.copy_(torch.view_as_complex(values.contiguous()))
    elif stored.dtype == torch.bfloat16:
        stored.copy_(_to_bfloat16(values.float()))
    else:
        stored.copy_(values)


def _to_bfloat16(values: Tensor) -> Tensor:
    # In integers: the processor's and Triton's own conversions flush subnormals or truncate.
    bits = values.view(torch.int32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    quiet_nan = bits | 0x400000
    return (torch.where(values.isnan(), quiet_nan, rounded) >> 16).to(torch.int16).view(torch.bfloat16)
