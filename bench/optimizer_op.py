"""A step of an optimizer: the contenders of one cell, held to a float64 reference."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import fusedopt.optim
from fusedopt.optimizer import GROUP_OPTIONS

from .op import Contender, Entries, Entry, Op, Work, failure
from .presets import PRECISIONS, PRESETS, Precision, Preset, Shape, elements
from .providers import PROVIDERS, OptimizerProvider, Params, Settings

STEPS = 6  # checked steps: RAdam's rectified branch begins at the sixth
CHECKED = 4_000_000  # elements held to the reference; of more, every k-th (k odd) and the last 16 of each tensor
LIMIT = 8  # units in the last place of the coarsest format; rounding once or twice a step comes to 3.2 at most
LOSSY_LIMIT = 0.05  # for states of 8 bits: root mean square of the error over that of the whole update
# Not neutral, so that a missing term shows, and with decay, so that parameters stay finite over millions of steps.
SETTINGS = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}


class OptimizerOp(Op):
    """A step of one class of `fusedopt.optim.OPTIMIZERS`."""

    providers = PROVIDERS
    presets = PRESETS
    precisions = PRECISIONS
    default_presets: ClassVar[Sequence[str]] = ("mlp", "many", "large")
    default_baselines: ClassVar[Sequence[str]] = ("torch-fused", "torch", "fusedopt-eager")
    bandwidth = {"cpu": "in-place", "cuda": "copy"}
    steps = STEPS
    tiny: Shape = (1,)  # of a tensor of next to no elements

    def __init__(self, optimizer: str) -> None:
        self.optimizer = optimizer
        self.name = self.title = optimizer.lower()

    def settings(self) -> Settings:
        """Every numeric hyperparameter by name, since peers have other defaults."""
        parameters = inspect.signature(fusedopt.optim.OPTIMIZERS[self.optimizer]).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        numbers = {k: v for k, v in defaults.items() if isinstance(v, (int, float, tuple)) and not isinstance(v, bool)}
        return {name: SETTINGS.get(name, value) for name, value in numbers.items() if name not in GROUP_OPTIONS}

    def reference(self, entry: Entry, data: Data) -> Any:
        """What has `step`, with the data's gradient, and `error` of parameters: how far they are off, and may be."""
        return _Reference(entry, data)

    def refuses(self, provider: OptimizerProvider, precision: Precision) -> str | None:
        return provider.lacks(self.optimizer, precision)

    def shapes(self, preset: Preset, max_elements: float, device: torch.device) -> tuple[list[Shape], str]:
        return preset.fit(max_elements)

    def held_bytes(self, entry: Entry) -> float:
        """Parameter, gradient and states."""
        reference = _Reference(entry, Data([(2,)], torch.device("cpu"), seed=0))
        reference.step()
        states = sum(tensor.numel() // 2 for tensor in _stored(reference.optimizer.state))
        return 2 * entry.precision.param.itemsize + states * entry.precision.state_bytes

    def contenders(
        self, entries: Entries, shapes: list[Shape], device: torch.device, seed: int
    ) -> dict[str, Contender]:
        """The contender of each entry, after `steps` checked steps from the same data."""
        data = Data(shapes, device, seed)
        references = {(entry.op, entry.precision): entry.op.reference(entry, data) for entry in entries.values()}
        runs = {label: _Run(entry, data) for label, entry in entries.items()}
        for _ in range(self.steps):
            data.draw_gradient()
            for reference in references.values():
                reference.step()
            for run in runs.values():
                run.step()
        return {label: run.contender(references[run.entry.op, run.entry.precision]) for label, run in runs.items()}


class Data:
    """Parameters and the gradients of one step after another, the same for every contender: float32, all in one.

    Gradients are ±0.5 or ±1.5. Squares of much smaller ones underflow in float16 state, in whatever library; and with
    few values no average of them comes so near to 0 that rounding decides its sign, which is all that Lion takes of it.
    """

    def __init__(self, shapes: list[Shape], device: torch.device, seed: int) -> None:
        self.shapes, self.device = shapes, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.total = elements(shapes)
        self.start = torch.randn(self.total, generator=self.generator, device=device).mul_(0.05)
        self.gradient = torch.empty_like(self.start)
        self.checked = self._checked()

    def draw_gradient(self) -> None:
        self.gradient.random_(0, 4, generator=self.generator).sub_(1.5)

    def tensors(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """`flat` as views of the shapes of the cell."""
        for part, shape in zip(flat.split([math.prod(shape) for shape in self.shapes]), self.shapes, strict=True):
            yield part.view(shape)

    def _checked(self) -> slice | torch.Tensor:
        if self.total <= CHECKED:
            return slice(None)
        stride = math.ceil(self.total / CHECKED) | 1
        ends = torch.tensor([math.prod(shape) for shape in self.shapes]).cumsum(0)
        tails = (ends[:, None] - torch.arange(1, 17)).clamp(min=0).flatten()
        return torch.cat([torch.arange(0, self.total, stride), tails]).to(self.device)


class _Reference:
    """The rule in float64 over the checked elements, all in one tensor, for every rule here works element by element.

    It is torch's own optimizer where torch has it, and the eager backend where not.
    """

    def __init__(self, entry: Entry, data: Data) -> None:
        self.precision, self.data, settings = entry.precision, data, entry.op.settings()
        self.start = self._exact(data.start)
        self.param = torch.nn.Parameter(self.start.clone())
        cls: Any = fusedopt.optim.OPTIMIZERS[entry.op.optimizer]
        if cls.torch_class is None:
            self.optimizer = cls([self.param], **settings, backend="eager")
        else:
            self.optimizer = cls.torch_class([self.param], **settings, foreach=False)

    def _exact(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.data.checked].to(self.precision.param).double()

    def step(self) -> None:
        self.param.grad = self._exact(self.data.gradient)
        self.optimizer.step()

    def error(self, flat: torch.Tensor) -> tuple[float, float]:
        """How far the parameters `flat` are from the reference, and how far they may be."""
        off = flat[self.data.checked].double().sub_(self.param.detach()).abs_()
        update = self.param.detach() - self.start
        if self.precision.lossy:
            return float(off.square().mean().sqrt() / update.square().mean().sqrt()), LOSSY_LIMIT
        coarsest = max(torch.finfo(self.precision.param).eps, torch.finfo(self.precision.state).eps)
        return float((off / (self.param.detach().abs() + update.abs().max())).max() / coarsest), LIMIT


class _Run:
    """A provider's optimizer with its own parameters and gradients, stepped along with the reference."""

    def __init__(self, entry: Entry, data: Data) -> None:
        self.entry, self.data = entry, data
        self.params, self.gradients = _with_gradients(data.tensors(data.start), entry.precision.param)
        self.optimizer: torch.optim.Optimizer | None = None
        self.failure = ""
        try:
            self.optimizer = self._make(self.params)
            self.host_step = self._host_step() if data.device.type == "cpu" else None
        except Exception as error:  # a peer's failure is a result, not ours
            self.failure = failure(error)

    def _make(self, params: Params) -> torch.optim.Optimizer:
        op, precision = self.entry.op, self.entry.precision
        made: torch.optim.Optimizer = self.entry.provider.make(op.optimizer, params, op.settings(), precision)
        return made

    def _host_step(self) -> Work:
        """A step over as many tensors of one element each, whose time is the host's work alone."""
        params, _ = _with_gradients([torch.ones(self.entry.op.tiny)] * len(self.params), self.entry.precision.param)
        host = self._make(params)
        host.step()
        return Work(host.step)

    def step(self) -> None:
        if self.optimizer is None or self.failure:
            return
        try:
            for gradient, given in zip(self.gradients, self.data.tensors(self.data.gradient), strict=True):
                gradient.copy_(given)
            self.optimizer.step()
        except Exception as error:
            self.failure = failure(error)

    def contender(self, reference: Any) -> Contender:
        if self.optimizer is None or self.failure:
            return Contender(wrong=self.failure)
        stored = list(_stored(self.optimizer.state))
        read_and_written = _nbytes(self.params) + _nbytes(tensor for tensor in stored if tensor.ndim)
        contender = Contender(
            step=Work(self.optimizer.step),
            host_step=self.host_step,
            moved_bytes=2 * read_and_written + _nbytes(self.gradients),
            state_bytes=_nbytes(stored),
        )
        contender.error, contender.limit = reference.error(_joined(self.params))
        contender.hold_to_limit()
        if not torch.equal(_joined(self.gradients), self.data.gradient.to(self.entry.precision.param)):
            contender.note = "overwrites the gradients"
        return contender


def _with_gradients(values: Iterable[torch.Tensor], dtype: torch.dtype) -> tuple[Params, list[torch.Tensor]]:
    """Parameters with these values, and their gradients, of ones."""
    params = [torch.nn.Parameter(value.to(dtype, copy=True)) for value in values]
    gradients = [torch.ones_like(param, requires_grad=False) for param in params]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient
    return params, gradients


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _stored(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an optimizer's state once, those inside tensor subclasses too."""
    seen: set[int] = set()
    rest = [state]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, (list, tuple)):
            rest.extend(value)
        elif is_traceable_wrapper_subclass(value):
            rest.extend(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor) and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield value
