"""What kernels over rows of elements share: where rows lie, and rounding."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt.backends import interpreted

from .codecs import decode, encode

WARP = 64 if torch.version.hip else 32

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def narrow(values, storage: tl.constexpr):
    """As `encode`, in one instruction for two elements. The interpreter's own conversion to bfloat16 truncates."""
    if storage == "bfloat16":
        if INTERPRETED:
            return encode(values, storage)
        else:
            return values.to(tl.float32).to(tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        return encode(values, storage)


@triton.jit
def rounded(values, storage: tl.constexpr):
    """Values as they are read after they were stored."""
    return decode(narrow(values, storage), storage).to(values.dtype)


@triton.jit
def load(at, mask):
    """0 outside of `mask`, which may be None."""
    if mask is None:
        return tl.load(at)
    else:
        return tl.load(at, mask, 0)


@triton.jit
def row_offset(
    row, inner, outer_stride, inner_stride, storage: tl.constexpr, nested: tl.constexpr, aligned: tl.constexpr
):
    """How many elements into its tensor a row begins; `aligned` says that each is a multiple of 16 bytes."""
    if aligned:
        vector: tl.constexpr = 2 if storage == "float64" else (4 if storage == "float32" else 8)
        # `tl.multiple_of` has no effect on an argument; what is multiplied is known to be a multiple.
        outer_stride = outer_stride // vector * vector
        inner_stride = inner_stride // vector * vector
    if nested:
        return row // inner * outer_stride + row % inner * inner_stride
    else:
        return row * inner_stride


def row_strides(tensors: Sequence[Tensor]) -> tuple[int, list[tuple[int, int]]] | None:
    """Rows (all dimensions but the last) of tensors of one shape as two dimensions: the size of the inner one, and of
    each tensor the strides along the outer and the inner one. None if it takes more than two.
    """
    merged: list[tuple[int, tuple[int, ...]]] = []
    for dim in range(tensors[0].ndim - 1):
        size, strides = tensors[0].shape[dim], tuple(tensor.stride(dim) for tensor in tensors)
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(size * stride for stride in strides):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if len(merged) > 2:
        return None
    none = (1, (0,) * len(tensors))
    (_, outer), (inner, strides) = ([none, none] + merged)[-2:]
    return inner, list(zip(outer, strides, strict=True))


def are_aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    return not any(
        tensor.data_ptr() % 16 or any(stride * tensor.itemsize % 16 for stride in _row_strides_of(tensor))
        for tensor in tensors
    )


def _row_strides_of(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size != 1]
