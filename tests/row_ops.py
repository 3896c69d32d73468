"""What the tests of rms_norm and of the gated linear units share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from helpers import instruction_set, threads
from torch import Tensor

from fusedopt.backends import BACKENDS, native
from fusedopt.codecs import STORAGE_DTYPES

ROW_BACKENDS = [name for name in ("cpu", "eager") if BACKENDS[name].unavailable() is None]
HAS_NATIVE = "cpu" in ROW_BACKENDS
DTYPES = list(STORAGE_DTYPES)
SIZES = (1, 2, 7, 64, 255, 257, 2048, 5000, 65537)


def error(found: Tensor, exact: Tensor) -> float:
    """The largest, in epsilons of the dtype of `found`, of its largest element."""
    scale = float(exact.abs().max()) or 1.0
    return float((found.double() - exact).abs().max()) / scale / torch.finfo(found.dtype).eps


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return list(torch.autograd.grad(outputs, list(inputs), list(grads)))


def on_every_machine(run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Results for each instruction set and several numbers of threads."""
    found = []
    for name in native().instruction_sets():
        for count in (1, 3):
            with instruction_set(name), threads(count):
                found.append(run())
    return found
