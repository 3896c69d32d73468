"""RMSNorm and gated units, forward and backward: the contenders of one cell, held to a float64 reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .op import Contender, Entries, Entry, Op, Work, failure, warm
from .presets import PRECISIONS, ROWS, Precision, Rows, Shape
from .row_providers import EPS, PROVIDERS, RowProvider

PASSES = ("inference", "forward", "backward", "both")  # inference: forward, with nothing to differentiate
# Units in the last place of what is added up. To 16 bits no way of computing this rounds more than five times, by half
# a unit each. In float32 it does so some ten times, beside exp and erf, which are off by units, and sums.
LIMIT = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
TINY = (1, 8)  # the shape whose time is the host's work alone


class Exact(NamedTuple):
    """A result in float64, and the sum of the magnitudes of its terms, of which rounding errors are a part."""

    value: Tensor
    scale: Tensor


@dataclasses.dataclass(frozen=True)
class Function:
    """An op along rows.

    rows: how many of its inputs have the shape of the cell; a weight of one row follows them if `weighted`.
    outputs: how many results there are.
    moved: tensors of that shape that its forward pass must read and write, and its backward pass.
    exact(inputs, gradients of the results) -> the results, then the gradients of the inputs; all in float64.
    """

    name: str
    rows: int
    weighted: bool
    outputs: int
    moved: tuple[int, int]
    exact: Callable[[list[Tensor], list[Tensor]], list[Exact]]


def _rms_norm(inputs: list[Tensor], grads: list[Tensor]) -> list[Exact]:
    (x, weight), (grad,) = inputs, grads
    rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normalized, scaled = x * rstd, grad * weight
    product = scaled * normalized
    grad_x = rstd * (scaled - normalized * product.mean(-1, keepdim=True))
    terms_x = rstd * (scaled.abs() + normalized.abs() * product.abs().mean(-1, keepdim=True))
    terms_weight = grad * normalized
    y = normalized * weight
    return [Exact(y, y.abs()), Exact(grad_x, terms_x), Exact(terms_weight.sum(0), terms_weight.abs().sum(0))]


def _add_rms_norm(inputs: list[Tensor], grads: list[Tensor]) -> list[Exact]:
    (x, residual, weight), (grad, grad_total) = inputs, grads
    total = x + residual
    y, through_norm, grad_weight = _rms_norm([total, weight], [grad])
    grad_x = Exact(through_norm.value + grad_total, through_norm.scale + grad_total.abs())
    return [y, Exact(total, total.abs()), grad_x, grad_x, grad_weight]


def _swiglu(inputs: list[Tensor], grads: list[Tensor]) -> list[Exact]:
    (gate, up), (grad,) = inputs, grads
    sigmoid = torch.sigmoid(gate)
    y, grad_up, slope = gate * sigmoid * up, grad * gate * sigmoid, gate * sigmoid * (1 - sigmoid)
    return [
        Exact(y, y.abs()),
        Exact(grad * up * (sigmoid + slope), (grad * up).abs() * (sigmoid + slope.abs())),
        Exact(grad_up, grad_up.abs()),
    ]


def _geglu(inputs: list[Tensor], grads: list[Tensor]) -> list[Exact]:
    (gate, up), (grad,) = inputs, grads
    erf, density = torch.erf(gate / math.sqrt(2)), torch.exp(-gate.square() / 2) / math.sqrt(2 * math.pi)
    share, terms = (1 + erf) / 2, (1 + erf.abs()) / 2
    return [
        Exact(gate * share * up, (gate * up).abs() * terms),
        Exact(grad * up * (share + gate * density), (grad * up).abs() * (terms + gate.abs() * density)),
        Exact(grad * gate * share, (grad * gate).abs() * terms),
    ]


# A pass that has to read x, and its gradient's, once more for the sums along a row finds them in a cache.
FUNCTIONS = {
    function.name: function
    for function in (
        Function("rms_norm", 1, True, 1, (2, 3), _rms_norm),
        Function("add_rms_norm", 2, True, 2, (4, 4), _add_rms_norm),
        Function("swiglu", 2, False, 1, (3, 5), _swiglu),
        Function("geglu", 2, False, 1, (3, 5), _geglu),
    )
}


class RowOp(Op):
    """One of `FUNCTIONS`, of one of `PASSES`."""

    providers = PROVIDERS
    presets = ROWS
    precisions = {name: PRECISIONS[name] for name in ("fp32", "bf16", "fp16")}
    default_presets = ("small", "4096x2048")
    default_baselines = ("F.rms_norm", "torch", "fusedopt-eager")
    passes = PASSES
    bandwidth = {"cpu": "copy", "cuda": "copy"}

    def __init__(self, function: Function, part: str = "both") -> None:
        self.function, self.part = function, part
        self.name, self.title = function.name, f"{function.name} {part}"

    def alone(self, part: str) -> RowOp:
        return RowOp(self.function, part)

    def like(self, other: Op) -> Op:
        super().like(other)
        assert isinstance(other, RowOp)
        return self.alone(other.part)

    def refuses(self, provider: RowProvider, precision: Precision) -> str | None:
        return provider.lacks(self.name)

    def shapes(self, preset: Rows, max_elements: float, device: torch.device) -> tuple[list[Shape], str]:
        return preset.fit(max_elements, device.type)

    def held_bytes(self, entry: Entry) -> float:
        """Inputs, results and the gradients of both."""
        function: Function = entry.op.function
        return 2 * (function.rows + function.outputs) * entry.precision.param.itemsize

    def moved_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """What must be read and written, a weight's row apart."""
        forward, backward = self.function.moved
        tensors = {"backward": backward, "both": forward + backward}.get(self.part, forward)
        return tensors * math.prod(shape) * dtype.itemsize

    def limit(self, shape: Shape, dtype: torch.dtype) -> float:
        """Of the error. A sum of n terms in float32, one after another as in compiled code, is off by 0.17 √n units in
        the mean, and of thousands of sums none by six times that."""
        sums = math.sqrt(max(shape)) if self.function.weighted else 0.0
        return LIMIT[dtype] + sums * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps

    def contenders(
        self, entries: Entries, shapes: list[Shape], device: torch.device, seed: int
    ) -> dict[str, Contender]:
        (shape,) = shapes
        functions = {(entry.op.function, entry.precision.param) for entry in entries.values()}
        data = {key: _Data(*key, shape, device, seed) for key in functions}
        return {
            label: _contender(entry, data[entry.op.function, entry.precision.param]) for label, entry in entries.items()
        }


class _Data:
    """Inputs and gradients of the results, the same for every contender; and what is right."""

    def __init__(self, function: Function, dtype: torch.dtype, shape: Shape, device: torch.device, seed: int) -> None:
        self.function = function
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        rows = [draw(*shape) for _ in range(function.rows)]
        # Along the inputs in part, so that the backward pass of a norm has no term that averages out; and small, so
        # that a weight's gradient, a sum over all rows, is no overflow in float16.
        self.grads = [((draw(*shape) + rows[0]) / 64).to(dtype) for _ in range(function.outputs)]
        self.inputs = [row.to(dtype) for row in rows]
        if function.weighted:
            self.inputs.append((1 + draw(shape[-1]) / 2).to(dtype))
        self.exact = function.exact(_wide(self.inputs), _wide(self.grads))

    def error(self, results: list[Tensor]) -> float:
        """How far from `exact`, in units in the last place of what is added up to get there."""
        return max(_distance(result, exact) for result, exact in zip(results, self.exact, strict=True))


def _distance(result: Tensor, exact: Exact) -> float:
    if not result.numel():
        return 0.0
    format = torch.finfo(result.dtype)
    unit = exact.scale.add(format.tiny).mul_(format.eps)  # below `tiny` units are no smaller
    return float((result.detach().double() - exact.value).abs_().div_(unit).max())


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


class _Run:
    """A provider's function with its own tensors."""

    def __init__(self, entry: Entry, inputs: list[Tensor], grads: list[Tensor]) -> None:
        self.inputs = [value.clone().requires_grad_() for value in inputs]
        self.grads = [grad.clone() for grad in grads]
        self.function = entry.provider.make(entry.op.name, self.inputs)
        self.results: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        results = self.function(*self.inputs)
        return [results] if isinstance(results, Tensor) else list(results)

    def backward(self, results: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, self.inputs, self.grads)

    def keep(self) -> None:
        self.results = self.forward()

    def backward_of_kept(self) -> None:
        # Once for each: what was saved goes with the results, and a peer may have written to it.
        self.backward(self.results)
        self.results = []

    def work(self, part: str) -> Work:
        if part == "inference":
            detached = [value.detach() for value in self.inputs]
            return Work(lambda: self.function(*detached))
        if part == "forward":
            return Work(self.forward)
        if part == "backward":
            return Work(self.backward_of_kept, before=self.keep)
        return Work(lambda: self.backward(self.forward()))

    def saved_bytes(self) -> tuple[int, int]:
        """Of all that is kept for the backward pass; and of what neither goes in nor comes out."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = self.forward()
        others = {tensor.untyped_storage().data_ptr() for tensor in (*self.inputs, *results)}
        return sum(kept.values()), sum(size for address, size in kept.items() if address not in others)


def _contender(entry: Entry, data: _Data) -> Contender:
    op: RowOp = entry.op
    shape, dtype = data.inputs[0].shape, data.inputs[0].dtype
    try:
        run = _Run(entry, data.inputs, data.grads)
        results = run.forward()
        error = data.error([*results, *run.backward(results)])
        saved, own = run.saved_bytes()
        step = warm(run.work(op.part))
        host = None if data.inputs[0].is_cuda else _host(entry, dtype)
    except Exception as raised:  # a peer's failure is a result, not ours
        return Contender(wrong=failure(raised))
    contender = Contender(
        step=step,
        host_step=host,
        moved_bytes=op.moved_bytes(tuple(shape), dtype),
        figures={"saved B/elem": saved / shape.numel(), "of it own": own / shape.numel()},
        error=error,
        limit=op.limit(tuple(shape), dtype),
    )
    contender.hold_to_limit()
    if not all(map(torch.equal, run.inputs, data.inputs)):
        contender.note = "overwrites its inputs"
    elif not all(map(torch.equal, run.grads, data.grads)):
        contender.note = "overwrites the gradients"
    return contender


def _host(entry: Entry, dtype: torch.dtype) -> Work:
    data = _Data(entry.op.function, dtype, TINY, torch.device("cpu"), seed=0)
    return warm(_Run(entry, data.inputs, data.grads).work(entry.op.part))
