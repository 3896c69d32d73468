"""RMSNorm in Triton: how its kernels are launched. None is tuned or compiled for a value but the number of columns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fusedopt._gpu import on

from .codecs import FLOATS
from .rms_norm_backward import (
    fusedopt_rms_norm_backward,
    fusedopt_rms_norm_backward_of_long_rows,
    fusedopt_rms_norm_grad_weight,
    fusedopt_rms_norm_means,
)
from .rms_norm_forward import fusedopt_rms_norm
from .rows import WARP, are_aligned, row_strides

GROUPS = 256
"""Of rows, at most, whose gradients of the weight are summed apart: two for each multiprocessor of a large GPU."""


class Tile(NamedTuple):
    """How a program reads rows: how many at a time, in chunks of how many columns, in how many threads."""

    rows: int
    chunk: int
    threads: int

    def arguments(self, warp: int) -> dict[str, Any]:
        return {"tile_rows": self.rows, "chunk": self.chunk, "num_warps": self.threads // warp}


_OWN_SHARED = 2**14  # bytes for sums over a row and for layouts

THREADS = 512
"""Of a program, at most: each has 128 registers then."""


def _tile(columns: int, itemsize: int, most: int, least: int) -> Tile:
    """A thread reads 16 bytes of a chunk, and `most` chunks of a row, or more where there are no more threads.

    Where rows are short, it reads about `least` times, from several rows.
    """
    vector = 16 // itemsize
    # Below 128 bytes a chunk would be narrower than a line of the cache.
    chunk = max(triton.next_power_of_2(triton.cdiv(columns, most)), 8 * vector)
    chunk = min(chunk, THREADS * vector, triton.next_power_of_2(columns))
    threads = max(128, chunk // vector)
    at_once = threads * vector // chunk
    return Tile(at_once * max(_power_below(least // triton.cdiv(columns, chunk)), 1), chunk, threads)


def _power_below(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)


def _forward_tile(columns: int, itemsize: int) -> tuple[Tile, bool]:
    """And whether the rows fit in registers: 8 accesses of a thread."""
    tile = _tile(columns, itemsize, most=6, least=1)
    return tile, triton.cdiv(columns, tile.chunk) <= 8


def _backward_tile(columns: int, itemsize: int, double: bool, aligned: bool) -> Tile | None:
    """None where a row, its gradient, the weight and sums do not fit in registers: of each 24 words of a thread.

    16 where rows are not aligned: then every element takes an address besides.
    """
    most = max((24 if aligned else 16) * itemsize // (32 if double else 16), 1)
    tile = _tile(columns, itemsize, most, least=max(most * 2 // 3, 1))
    return tile if triton.cdiv(columns, tile.chunk) <= most else None


class Form(NamedTuple):
    """What one kernel is compiled for: dtypes, rounding, and how rows lie in memory.

    result: what y is rounded to before its own dtype. second: of the residual, or of the gradient of the sum; None
    without. nested: rows are strided along two dimensions. aligned: every row begins at a multiple of 16 bytes.
    summed: the gradient of the weight is wanted.
    """

    x: torch.dtype
    second: torch.dtype | None
    weight: torch.dtype | None
    y: torch.dtype
    casting: str
    columns: int
    nested: bool = False
    aligned: bool = True
    summed: bool = True

    @property
    def double(self) -> bool:
        return torch.float64 in (self.x, self.weight)

    @property
    def result(self) -> torch.dtype:
        if self.casting == "gemma" or self.weight is None:
            return self.x
        return torch.promote_types(self.x, self.weight)

    def forward(self, warp: int = WARP) -> dict[str, Any]:
        """Arguments of the kernel that choose it, and its options."""
        tile, kept = _forward_tile(self.columns, self.x.itemsize)
        own = {"residual_storage": _storage(self.second), "result": FLOATS[self.result]}
        return {**self._shared(), **own, **tile.arguments(warp), "kept": kept}

    def backward(self, shared: int, warp: int = WARP) -> dict[str, Any] | None:
        """None where rows are too long. `shared`: bytes of shared memory that a program may take, for rows to come."""
        tile = _backward_tile(self.columns, self.x.itemsize, self.double, self.aligned)
        if tile is None:
            return None
        elements = tile.rows * tile.chunk * triton.cdiv(self.columns, tile.chunk)
        read = sum(dtype.itemsize for dtype in (self.x, self.y, self.second) if dtype is not None)
        # With more than 16 elements a thread has no registers left for the addresses of two rows to come.
        most = 1 if elements > 16 * tile.threads else 2
        ahead = max(min((shared - _OWN_SHARED) // (elements * read), most), 0)
        own: dict[str, Any] = {**self._sums(), "stages": 1 + ahead}
        if warp == 32:
            # Left to itself, NVIDIA's assembler takes more registers than it needs, or too few. Triton knows the option
            # for it alone.
            own["maxnreg"] = 128 if self.aligned else min(255, 2**16 // tile.threads)
        return {**self._shared(), **own, **tile.arguments(warp)}

    def means(self, warp: int = WARP) -> dict[str, Any]:
        return {**self._shared(), "chunk": 16 // self.x.itemsize * THREADS, "num_warps": THREADS // warp}

    def backward_of_long_rows(self, warp: int = WARP) -> dict[str, Any]:
        chunk = {"chunk": 16 // self.x.itemsize * 128, "num_warps": 128 // warp}
        return {**self._shared(), **self._sums(), **chunk}

    def grad_weight(self) -> dict[str, Any]:
        return {"storage": _storage(self.weight), "double": self.double, "enable_fp_fusion": True}

    def _sums(self) -> dict[str, Any]:
        return {"total_storage": _storage(self.second), "summed": self.summed and self.weight is not None}

    def _shared(self) -> dict[str, Any]:
        return {
            "x_storage": FLOATS[self.x],
            "weight_storage": _storage(self.weight),
            "y_storage": FLOATS[self.y],
            "casting": self.casting,
            "double": self.double,
            "columns": self.columns,
            "nested": self.nested,
            "aligned": self.aligned,
            "enable_fp_fusion": True,
        }


def _storage(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else FLOATS[dtype]


class _Rows(NamedTuple):
    """Tensors of one shape whose columns lie side by side, and how their rows lie: `row_strides`."""

    tensors: list[Tensor | None]
    inner: int
    arguments: list[int]
    nested: bool


def _rows(tensors: Sequence[Tensor | None]) -> _Rows:
    """Copies those that lie otherwise. The arguments are of each the address and two strides; 0 of None."""
    given = [t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
    there = [tensor for tensor in given if tensor is not None]
    found = row_strides(there)
    if found is None:
        return _rows([None if tensor is None else tensor.contiguous() for tensor in given])
    inner, strides = found
    each = iter(strides)
    arguments = [n for t in given for n in ((0, 0, 0) if t is None else (t.data_ptr(), *next(each)))]
    return _Rows(given, inner, arguments, inner < there[0].shape[:-1].numel())


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may take."""
    if device.type == "cpu":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    casting: str,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """RMSNorm of x, or of the sum of x and the residual; the sum, in x's dtype; and 1 / RMS, of `x.shape[:-1]`.

    It computes in float32, with a float64 tensor in float64. The square root and quotients are IEEE's.

    Args:
        weight: of x's last dimension, or None.
        residual: of x's shape, or None; then the sum is None too.
        offset: added to the weight.
        casting: "llama" rounds the normalized row to x's dtype, then multiplies with the weight, which rounds to
            torch's promotion of both dtypes. "gemma" rounds once, to x's dtype. "none" rounds as "llama" and, to
            x's dtype, also each square, their mean, its sum with eps and 1 / RMS.
        out_dtype: y is then rounded to it, where it is not None.
    """
    rows = _rows([x, residual])
    form = Form(
        x.dtype,
        None if residual is None else residual.dtype,
        None if weight is None else weight.dtype,
        x.dtype,
        casting,
        x.shape[-1],
        rows.nested,
    )
    form = form._replace(y=out_dtype or form.result)
    y = torch.empty(x.shape, dtype=form.y, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float64 if form.double else torch.float32, device=x.device)
    if not x.numel():
        return y, total, rstd
    weight = None if weight is None else weight.contiguous()
    touched = [tensor for tensor in (*rows.tensors, weight, y, total) if tensor is not None]
    arguments = form._replace(aligned=are_aligned(touched)).forward()
    with on(x.device):
        fusedopt_rms_norm[(triton.cdiv(rstd.numel(), arguments["tile_rows"]),)](
            *rows.arguments,
            _address(weight),
            y.data_ptr(),
            _address(total),
            rstd.data_ptr(),
            rstd.numel(),
            rows.inner,
            eps,
            offset,
            **arguments,
        )
    return y, total, rstd


def rms_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    wants_weight: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x, in its dtype, and of the weight, in its own; None without one, or where it is not wanted.

    It computes as the forward does; roundings count as the identity. No argument is written to.

    Args:
        grad_total: the gradient of the sum of x and the residual, which is added; or None.
        x: what was normalized, so the sum where there was a residual. Its gradient is the residual's too.
        rstd: 1 / RMS, as `rms_norm_forward` gives it.
        weight, offset, casting: those of the forward.
    """
    rows = _rows([grad_y, grad_total, x])
    form = Form(
        x.dtype,
        None if grad_total is None else grad_total.dtype,
        None if weight is None else weight.dtype,
        grad_y.dtype,
        casting,
        x.shape[-1],
        rows.nested,
    )
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return grad_x, torch.zeros_like(weight) if weight is not None and wants_weight else None
    weight = None if weight is None else weight.contiguous()
    touched = [tensor for tensor in (*rows.tensors, weight, grad_x) if tensor is not None]
    form = form._replace(aligned=are_aligned(touched), summed=wants_weight)
    rstd = rstd.contiguous()
    count, real = rstd.numel(), torch.float64 if form.double else torch.float32
    arguments = form.backward(_shared_memory(x.device))
    if arguments is None:
        groups = min(count, max(1, 2**19 // form.columns))
    else:
        groups = min(triton.cdiv(count, arguments["tile_rows"]), GROUPS)
    partial = None
    if weight is not None and wants_weight:
        partial = torch.empty((groups, form.columns), dtype=real, device=x.device)
    with on(x.device):
        if arguments is not None:
            fusedopt_rms_norm_backward[(groups,)](
                *rows.arguments,
                _address(weight),
                rstd.data_ptr(),
                grad_x.data_ptr(),
                _address(partial),
                count,
                rows.inner,
                offset,
                **arguments,
            )
        else:
            _backward_of_long_rows(form, rows, weight, rstd, grad_x, partial, offset, groups)
        if weight is None or partial is None:
            return grad_x, None
        grad_weight = torch.empty_like(weight)
        fusedopt_rms_norm_grad_weight[(triton.cdiv(form.columns, 32),)](
            partial.data_ptr(),
            groups,
            form.columns,
            grad_weight.data_ptr(),
            **form.grad_weight(),
        )
    return grad_x, grad_weight


def _backward_of_long_rows(
    form: Form,
    rows: _Rows,
    weight: Tensor | None,
    rstd: Tensor,
    grad_x: Tensor,
    partial: Tensor | None,
    offset: float,
    groups: int,
) -> None:
    means = torch.empty_like(rstd)
    grad_y, x = rows.arguments[:3], rows.arguments[6:]
    addresses = _address(weight), rstd.data_ptr(), means.data_ptr()
    fusedopt_rms_norm_means[(rstd.numel(),)](*grad_y, *x, *addresses, rows.inner, offset, **form.means())
    arguments = form.backward_of_long_rows()
    fusedopt_rms_norm_backward_of_long_rows[(triton.cdiv(form.columns, arguments["chunk"]), groups)](
        *rows.arguments,
        *addresses,
        grad_x.data_ptr(),
        _address(partial),
        rstd.numel(),
        rows.inner,
        offset,
        **arguments,
    )
