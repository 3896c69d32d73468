"""Gated linear units in Triton: how the kernels are launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fusedopt._gpu import on

from .codecs import FLOATS
from .glu_kernels import fusedopt_glu, fusedopt_glu_backward
from .rows import WARP, row_strides

THREADS = 128
"""Of a program; each has two accesses of 16 bytes to every tensor."""


class Form(NamedTuple):
    """What one kernel is compiled for.

    steps: between the columns of each tensor, in elements; of gate and up, in the backward also of their gradients.
    pairs, grad_pairs: gate and up, or their gradients, lie beside each other in one tensor, element by element.
    width: of a tile, in columns. even: rows have a whole number of 16 bytes. aligned: so they begin.
    """

    dtype: torch.dtype
    kind: str
    steps: tuple[int, ...] = (1, 1, 1, 1)
    pairs: bool = False
    grad_pairs: bool = False
    width: int = 1024
    even: bool = True
    aligned: bool = True

    def forward(self, warp: int = WARP) -> dict[str, Any]:
        """Arguments of the kernel that choose it, and its options."""
        return {
            "storage": FLOATS[self.dtype],
            "kind": self.kind,
            "gate_step": self.steps[0],
            "up_step": self.steps[1],
            "pairs": self.pairs,
            "tile_rows": max(32 * THREADS // self.dtype.itemsize // self.width, 1),
            "tile_columns": self.width,
            "even": self.even,
            "aligned": self.aligned,
            "num_warps": THREADS // warp,
            "enable_fp_fusion": True,
        }

    def backward(self, warp: int = WARP) -> dict[str, Any]:
        steps = {"grad_gate_step": self.steps[2], "grad_up_step": self.steps[3], "grad_pairs": self.grad_pairs}
        return {**self.forward(warp), **steps}


def glu_forward(gate: Tensor, up: Tensor | None, kind: str, limit: float) -> Tensor:
    """`activation(gate) * up`, in torch's promotion of both dtypes and new memory.

    Columns may be one or two elements apart, and rows by one stride; what lies otherwise is copied first.

    Args:
        gate, up: of one shape, (..., columns).
        kind: "swiglu", "geglu" (exact), "geglu_tanh", "reglu", "relu2" (`relu(gate)^2`; up is None), "swiglu_oai"
            (gpt-oss: the gate at most `limit`, up at most `limit` from 0; `gate * sigmoid(1.702 gate) * (up + 1)`).
        limit: of "swiglu_oai".
    """
    y = torch.empty(gate.shape, dtype=_dtype(gate, up), device=gate.device)
    if y.numel():
        first, second = _rows(gate, y.dtype), None if up is None else _rows(up, y.dtype)
        tensors = [first, first if second is None else second, y.view(-1, y.shape[-1])]
        form, sizes = _form(tensors, kind, _are_pairs(first, second), False)
        _launch(fusedopt_glu, tensors, sizes, limit, form.forward())
    return y


def glu_backward(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    limit: float,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of gate and up, each in its dtype. No argument is written to but `out`.

    Args:
        grad_y, gate, up, kind, limit: as `glu_forward`.
        out: where the gradients go; by default new memory. For gradients of one tensor that holds both.
    """
    given = [gate] if up is None else [gate, up]
    if out is None:
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in given]
    else:
        grads = [tensor for tensor in out if tensor is not None]
    if gate.numel():
        dtype = _dtype(gate, up)
        # Of another dtype, or where no kernel writes, they are copied afterwards.
        direct = [
            t if t.dtype == dtype and _fits(t) else torch.empty(t.shape, dtype=dtype, device=t.device) for t in grads
        ]
        first, second = _rows(gate, dtype), None if up is None else _rows(up, dtype)
        flat = [t.view(-1, t.shape[-1]) for t in direct]
        # The place of the second is there for the kernel's sake; "relu2" does not touch it.
        tensors = [_rows(grad_y, dtype, 1), first, first if second is None else second, flat[0], flat[-1]]
        pairs = _are_pairs(first, second), len(flat) == 2 and _are_pairs(*flat)
        form, sizes = _form([*tensors[1:], tensors[0]], kind, *pairs)
        _launch(fusedopt_glu_backward, tensors, sizes, limit, form.backward())
        for grad, made in zip(grads, direct, strict=True):
            if grad is not made:
                grad.copy_(made)
    return grads[0], grads[1] if up is not None else None


def _dtype(gate: Tensor, up: Tensor | None) -> torch.dtype:
    return gate.dtype if up is None else torch.promote_types(gate.dtype, up.dtype)


def _fits(tensor: Tensor, most: int = 2) -> bool:
    """Whether its columns are at most so many elements apart, and its rows by one stride."""
    found = row_strides([tensor])
    one = found is not None and found[0] == tensor.shape[:-1].numel()
    return one and (tensor.shape[-1] == 1 or 1 <= tensor.stride(-1) <= most)


def _rows(tensor: Tensor, dtype: torch.dtype, most: int = 2) -> Tensor:
    """In two dimensions, copied where it must be."""
    tensor = tensor.to(dtype)
    return (tensor if _fits(tensor, most) else tensor.contiguous()).view(-1, tensor.shape[-1])


def _are_pairs(gate: Tensor, up: Tensor | None) -> bool:
    if up is None or gate.shape[1] == 1 or gate.stride(1) != 2:
        return False
    return gate.stride() == up.stride() and up.data_ptr() == gate.data_ptr() + gate.itemsize


def _form(tensors: list[Tensor], kind: str, pairs: bool, grad_pairs: bool) -> tuple[Form, tuple[int, int]]:
    """The kernel for gate, up, and what else there is; rows and columns, of tensors in one piece one row."""
    gate = tensors[0]
    (rows, columns), vector = gate.shape, 16 // gate.itemsize
    strides = [tensor.stride() for tensor in tensors]
    if all(stride == (columns, 1) for stride in strides):
        rows, columns = 1, rows * columns
    steps = tuple(1 if gate.shape[1] == 1 else step for _, step in strides[:4])
    seconds = {tensors[1].data_ptr()} if pairs else set()
    seconds |= {tensors[3].data_ptr()} if grad_pairs else set()
    starts = {tensor.data_ptr() for tensor in tensors} - seconds
    even = columns % vector == 0
    aligned = not any(start % 16 for start in starts) and (rows == 1 or not any(row % vector for row, _ in strides))
    width = min((2 if rows == 1 else 1) * THREADS * vector, triton.next_power_of_2(columns))
    return Form(gate.dtype, kind, steps, pairs, grad_pairs, width, even, aligned), (rows, columns)


def _launch(kernel: Any, tensors: list[Tensor], sizes: tuple[int, int], limit: float, form: dict[str, Any]) -> None:
    rows, columns = sizes
    across = triton.cdiv(columns, form["tile_columns"])
    places = [number for tensor in tensors for number in (tensor.data_ptr(), tensor.stride(0))]
    with on(tensors[0].device):
        kernel[(triton.cdiv(rows, form["tile_rows"]) * across,)](*places, rows, columns, across, limit, **form)
