"""The matrix products that a Newton-Schulz iteration is made of, on each backend.

All take and return lists of batches, (batch, n, m) each, since a GPU computes many in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import native

Batches = Sequence[Tensor]

_HALVED = 512
"""Symmetric products of this many rows are computed by halves: below, torch's products are too small to gain by it."""


class TorchProducts:
    """In torch operations: anywhere, in the tensors' own dtype."""

    def gram(self, xs: Batches, out: Batches) -> None:
        """X X^T."""
        for x, o in zip(xs, out, strict=True):
            self._symmetric(x, x.mT, None, 0.0, 1.0, o)

    def symmetric(self, a: Batches, b: Batches, c: Batches, alpha: float, beta: float, out: Batches) -> None:
        """alpha C + beta A B, where that is symmetric. None of `out` may be an A or B."""
        for each in zip(a, b, c, out, strict=True):
            self._symmetric(*each[:3], alpha, beta, each[3])

    def multiply(self, qs: Batches, xs: Batches, out: Batches) -> None:
        """Q X."""
        for q, x, o in zip(qs, xs, out, strict=True):
            torch.bmm(q, x, out=o)

    def _symmetric(self, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
        n = out.shape[-1]
        if n < _HALVED or not out.is_cpu:
            torch.baddbmm(out if c is None else c, a, b, beta=alpha if c is not None else 0, alpha=beta, out=out)
            return
        half = n // 2
        upper, lower = slice(half), slice(half, n)
        for rows, columns in ((upper, upper), (lower, lower)):
            part = None if c is None else c[:, rows, columns]
            self._symmetric(a[:, rows], b[:, :, columns], part, alpha, beta, out[:, rows, columns])
        for index in range(len(out)):
            block = torch.mm(a[index, upper], b[index, :, lower]).mul_(beta)
            if c is not None:
                block.add_(c[index, upper, lower], alpha=alpha)
            out[index, upper, lower] = block
            out[index, lower, upper] = block.T


class NativeProducts(TorchProducts):
    """The native module's, of float32 on the CPU.

    Args:
        bfloat16: whether factors are rounded to bfloat16, which is twice as fast where the CPU multiplies those. Sums
            and what is stored are float32.
    """

    def __init__(self, bfloat16: bool) -> None:
        self._bfloat16 = bfloat16

    def gram(self, xs: Batches, out: Batches) -> None:
        for x, o in zip(xs, out, strict=True):
            native().matmul(x, x.mT, None, o, 0.0, 1.0, True, self._bfloat16, torch.get_num_threads())

    def symmetric(self, a: Batches, b: Batches, c: Batches, alpha: float, beta: float, out: Batches) -> None:
        for each in zip(a, b, c, out, strict=True):
            native().matmul(*each, alpha, beta, True, self._bfloat16, torch.get_num_threads())

    def multiply(self, qs: Batches, xs: Batches, out: Batches) -> None:
        for q, x, o in zip(qs, xs, out, strict=True):
            native().matmul(q, x, None, o, 0.0, 1.0, False, self._bfloat16, torch.get_num_threads())


class TritonProducts(TorchProducts):
    """The symmetric products by Triton, one launch for all of them; the others are dense, and the vendor's fastest."""

    def gram(self, xs: Batches, out: Batches) -> None:
        from .kernels.symmetric import symmetric

        symmetric(list(xs), None, None, 0.0, 1.0, out=list(out))

    def symmetric(self, a: Batches, b: Batches, c: Batches, alpha: float, beta: float, out: Batches) -> None:
        from .kernels.symmetric import symmetric

        symmetric(list(a), list(b), list(c), alpha, beta, out=list(out))


class Workspace:
    """Memory that is used again from call to call, each piece by its name."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What is in it is what the last user left."""
        size = torch.Size(shape).numel()
        piece = self._pieces.get((name, dtype, device))
        if piece is None or piece.numel() < size:
            piece = self._pieces[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return piece[:size].view(*shape)
