"""Orthogonalization of matrices: the contenders of one cell, held to singular values known beforehand."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .matrices import LIMIT, STEPS, flops, newton_schulz, rounded_to
from .matrix_providers import PROVIDERS, MatrixProvider
from .op import Contender, Entries, Entry, Op, Work, failure, warm
from .presets import MATRICES, PRECISIONS, Precision, Preset, Shape

SPREAD = 100.0  # the largest singular value over the least
TINY = (2, 2)  # the shape whose time is the host's work alone


class MatrixOp(Op):
    """5 Jordan steps of Newton-Schulz on batches of matrices, one for each shape."""

    name = title = "orthogonalize"
    providers = PROVIDERS
    presets = MATRICES
    precisions = {name: PRECISIONS[name] for name in ("fp32", "bf16")}
    default_presets = ("768x768", "1024x4096")
    default_baselines = ("torch", "fusedopt-eager")
    multiplies = True

    def refuses(self, provider: MatrixProvider, precision: Precision) -> str | None:
        return None

    def shapes(self, preset: Preset, max_elements: float, device: torch.device) -> tuple[list[Shape], str]:
        return preset.fit(max_elements)

    def held_bytes(self, entry: Entry) -> float:
        """Of a square: the matrix, its result, and six intermediate results in float32."""
        return 2 * entry.precision.param.itemsize + 24

    def contenders(
        self, entries: Entries, shapes: list[Shape], device: torch.device, seed: int
    ) -> dict[str, Contender]:
        data = [_Data(shape, shapes.count(shape), device, seed) for shape in dict.fromkeys(shapes)]
        return {label: _contender(entry, data) for label, entry in entries.items()}


class _Data:
    """Matrices of one shape: U S V^T and the same with U's rows rotated, so that the decomposition of all is known."""

    def __init__(self, shape: Shape, count: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.shape, short = shape, min(shape)

        def basis(rows: int) -> Tensor:
            drawn = torch.randn(rows, short, generator=generator, device=device, dtype=torch.float64)
            return torch.linalg.qr(drawn).Q

        self.u, self.v = basis(shape[0]), basis(shape[1])
        self.values = torch.logspace(0, -math.log10(SPREAD), short, device=device, dtype=torch.float64)
        matrix = self.composed(self.values)
        self.matrix = matrix.float()
        self.batch = torch.stack([self.matrix.roll(index, 0) for index in range(count)])
        self.checked = sorted({0, count - 1})

    def composed(self, values: Tensor) -> Tensor:
        return (self.u * values) @ self.v.mT

    def exact(self, norm: int) -> Tensor:
        """Of the first matrix, what the polynomials make of it once it is divided by this norm."""
        values = self.values / torch.linalg.vector_norm(self.values, norm)
        for a, b, c in STEPS:
            values = a * values + b * values**3 + c * values**5
        return self.composed(values)

    @functools.cached_property
    def unit(self) -> float:
        """How far rounding X alone to bfloat16, before each step and at last, takes a result."""
        rounded = newton_schulz(self.matrix, rounded_to(torch.bfloat16))
        return self.distance(rounded.double(), self.exact(2))

    def distance(self, one: Tensor, other: Tensor) -> float:
        """In the root mean square of singular values."""
        return float(torch.linalg.matrix_norm(one - other)) / math.sqrt(min(self.shape))

    def limit(self, dtype: torch.dtype, gram: bool) -> float:
        """Of the distance to the exact result, with factors in `dtype`.

        Of n terms a sum in float32 is off by n / 2 units of its own at most. The Gram form rounds squares of singular
        values, and the least of those is off by `SPREAD` / 2 times as much as if rounded itself; but where the Gram
        form is in use, it is no worse than the other with bfloat16.
        """
        coarse, fine = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps
        units = (LIMIT * torch.finfo(dtype).eps + max(self.shape) / 2 * fine) / coarse
        return self.unit * (min(LIMIT, units * SPREAD / 2) if gram else units)


def _contender(entry: Entry, data: list[_Data]) -> Contender:
    param, device = entry.precision.param, data[0].batch.device
    batches = [each.batch.to(param, copy=True) for each in data]
    try:
        function = entry.provider.make()
        results = function(batches)
        contender = Contender(
            step=Work(lambda: function(batches)),
            host_step=None if device.type == "cuda" else _host(entry, batches),
            moved_bytes=2 * sum(batch.nbytes for batch in batches),
            flops=flops(itertools.chain.from_iterable([each.shape] * len(each.batch) for each in data)),
        )
        _judge(contender, entry, data, results)
    except Exception as raised:  # a peer's failure is a result, not ours
        return Contender(wrong=failure(raised))
    if not all(torch.equal(batch, each.batch.to(param)) for batch, each in zip(batches, data, strict=True)):
        contender.note = "overwrites its inputs"
    return contender


def _host(entry: Entry, batches: Sequence[Tensor]) -> Work:
    function = entry.provider.make()
    tiny = [torch.eye(*TINY, dtype=batch.dtype).repeat(len(batch), 1, 1) for batch in batches]
    return warm(Work(lambda: function(tiny)))


def _judge(contender: Contender, entry: Entry, data: list[_Data], results: Sequence[Any]) -> None:
    """Hold the results to the exact ones, the worst of them to its limit; say how good those are that are right."""
    polar, values, worst = [], [], -1.0
    for each, found in zip(data, results, strict=True):
        dtype, gram = entry.provider.factors(each.shape, each.batch.device)
        dtype = max(dtype, entry.precision.param, key=lambda dtype: torch.finfo(dtype).eps)
        limit, exact = each.limit(dtype, gram), each.exact(entry.provider.norm)
        orthogonal = each.composed(torch.ones_like(each.values))
        for index in each.checked:
            matrix = found[index].double().roll(-index, 0)  # turned back, it is the first
            error = each.distance(matrix, exact)
            if not error / limit <= worst:  # also where it is NaN
                worst, contender.error, contender.limit = error / limit, error, limit
            contender.hold_to_limit()
            if contender.wrong:
                return
            polar.append(each.distance(matrix, orthogonal))
            short = matrix if each.shape[0] <= each.shape[1] else matrix.mT
            values.append(torch.linalg.eigvalsh(short @ short.mT).clamp(min=0).sqrt())
    contender.figures = {
        "polar error": max(polar),
        "least σ": min(float(each[0]) for each in values),
        "greatest σ": max(float(each[-1]) for each in values),
    }
