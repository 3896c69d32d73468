"""A step of Muon: the contenders of one cell, held to a float64 reference as closely as bfloat16 products allow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matrices import LIMIT, flops, newton_schulz, rounded_to
from .matrix_providers import MUON_PROVIDERS
from .op import Contender, Entries, Entry
from .optimizer_op import Data, OptimizerOp
from .presets import MATRICES, PRECISIONS, Shape
from .providers import Settings

# What lies in the upper decade of its block is off by up to half of 0.9 / 64 of the block's maximum in 8 bits.
LOSSY = 0.07


class MuonOp(OptimizerOp):
    """A step of `fusedopt.Muon` on matrices."""

    providers = MUON_PROVIDERS
    presets = MATRICES
    precisions = {name: PRECISIONS[name] for name in ("fp32", "int8")}
    default_presets = ("768x768", "64x128x128")
    default_baselines = ("torch", "fusedopt-eager")
    multiplies = True
    steps = 2  # the second has momentum
    tiny = (1, 1)

    def __init__(self) -> None:
        super().__init__("Muon")

    def settings(self) -> Settings:
        return {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}

    def reference(self, entry: Entry, data: Data) -> MuonReference:
        return MuonReference(entry, data)

    def held_bytes(self, entry: Entry) -> float:
        """Parameter, gradient, momentum, update, and of a square six intermediate results in float32."""
        return 2 * entry.precision.param.itemsize + entry.precision.state_bytes + 28

    def contenders(
        self, entries: Entries, shapes: list[Shape], device: torch.device, seed: int
    ) -> dict[str, Contender]:
        contenders = super().contenders(entries, shapes, device, seed)
        for contender in contenders.values():
            contender.flops = flops(shapes)
        return contenders


class _Steps:
    """Muon on one matrix, in the dtype of `param`.

    rounded: X is rounded to bfloat16, as `newton_schulz` says. lossy: momentum is, as if to 8 bits.
    """

    def __init__(self, param: Tensor, settings: Settings, rounded: bool, lossy: bool) -> None:
        self.start, self.param, self.momentum = param, param.clone(), torch.zeros_like(param)
        self.settings, self.rounded, self.lossy = settings, rounded, lossy
        self.generator = torch.Generator(param.device).manual_seed(0)

    def step(self, gradient: Tensor) -> None:
        momentum = self.settings["momentum"]
        self.momentum.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(self.momentum, momentum)
        update = newton_schulz(update, rounded_to(torch.bfloat16)) if self.rounded else newton_schulz(update)
        rows, columns = self.param.shape
        self.param.mul_(1 - self.settings["lr"] * self.settings["weight_decay"])
        self.param.sub_(update, alpha=self.settings["lr"] * math.sqrt(max(1, rows / columns)))
        if self.lossy:
            noise = torch.empty_like(self.momentum).uniform_(-LOSSY, LOSSY, generator=self.generator)
            self.momentum.mul_(1 + noise)


class MuonReference:
    """The first matrix of each shape and the last of all, in float64; and once more, rounded."""

    def __init__(self, entry: Entry, data: Data) -> None:
        self.data = data
        firsts = {data.shapes.index(shape) for shape in data.shapes}
        self.checked = sorted(firsts | {len(data.shapes) - 1})
        settings, lossy = entry.op.settings(), entry.precision.lossy
        params = self._chosen(data.start)
        self.exact = [_Steps(param.double(), settings, rounded=False, lossy=False) for param in params]
        self.rough = [_Steps(param.clone(), settings, rounded=True, lossy=lossy) for param in params]

    def _chosen(self, flat: Tensor) -> list[Tensor]:
        tensors = list(self.data.tensors(flat))
        return [tensors[index] for index in self.checked]

    def step(self) -> None:
        for gradient, exact, rough in zip(self._chosen(self.data.gradient), self.exact, self.rough, strict=True):
            exact.step(gradient.double())
            rough.step(gradient)

    def error(self, flat: Tensor) -> tuple[float, float]:
        """Of the matrix that is worst for its limit, the size of the error over that of the update."""
        found = []
        for param, exact, rough in zip(self._chosen(flat), self.exact, self.rough, strict=True):
            size = _size(exact.param - exact.start)
            error = _size(param.double() - exact.param) / size
            limit = LIMIT * _size(rough.param.double() - exact.param) / size
            found.append((error, limit))
        return max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
