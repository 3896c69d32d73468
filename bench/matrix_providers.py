"""Who orthogonalizes matrices, and who has Muon: fusedopt's backends, torch, and peers where they are installed."""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt._orthogonalize import plan
from fusedopt.backends import BACKENDS

from .matrices import EPS, STEPS, newton_schulz
from .op import Provider
from .presets import Precision, Shape
from .providers import OptimizerProvider, Params, Settings, not_loaded

Batches = Sequence[Tensor]  # (count, n, m) each
Function = Callable[[Batches], Sequence[Any]]  # to the same number of batches, or of lists of matrices

TORCH_MUON: Any = getattr(torch.optim, "Muon", None)


@dataclasses.dataclass(frozen=True)
class MatrixProvider(Provider):
    """An implementation of 5 Jordan steps.

    make() -> the function.
    norm: that divides each matrix at first, of order 2 (Frobenius) or 4 (Schatten) of its singular values.
    factors(shape, device) -> what factors of products are rounded to, and whether by the Gram form.
    """

    make: Callable[[], Function]
    norm: int
    factors: Callable[[Shape, torch.device], tuple[torch.dtype, bool]]


def _fusedopt(name: str) -> MatrixProvider:
    def make() -> Function:
        def function(batches: Batches) -> list[Tensor]:
            with fusedopt.use_backend(name):
                return [fusedopt.orthogonalize(batch) for batch in batches]

        return function

    def unavailable(device: torch.device) -> str | None:
        try:
            plan(1, 1, device, STEPS, backend=name)
        except RuntimeError as error:
            return str(error)
        return None

    def factors(shape: Shape, device: torch.device) -> tuple[torch.dtype, bool]:
        rows, columns = shape
        chosen = plan(rows, columns, device, STEPS, backend=name)
        return chosen.dtype, chosen.method == "gram"

    return MatrixProvider(f"fusedopt-{name}", unavailable, make, 4, factors)


def _one_by_one(
    name: str,
    make: Callable[[], Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
    unavailable: Callable[[torch.device], str | None] = lambda device: None,
    gram: bool = False,
) -> MatrixProvider:
    """What takes one matrix at a time."""

    def make_all() -> Function:
        function = make()
        return lambda batches: [[function(matrix) for matrix in batch] for batch in batches]

    return MatrixProvider(name, unavailable, make_all, 2, lambda shape, device: (dtype, gram))


def naive(matrix: Tensor) -> Tensor:
    """torch.optim.Muon's, for a torch without, and to be compiled."""
    return newton_schulz(matrix.bfloat16())


def _torch() -> Callable[[Tensor], Tensor]:
    """The very function of torch.optim.Muon where there is one."""
    if TORCH_MUON is None:
        return naive
    function = importlib.import_module("torch.optim._muon")._zeropower_via_newtonschulz
    return lambda matrix: function(matrix, STEPS[0], len(STEPS), EPS)


def _compiled() -> Callable[[Tensor], Tensor]:
    """A copy, since torch keeps what it compiles with the code, and for a second shape compiles for any shape."""
    copy = types.FunctionType(naive.__code__.replace(), naive.__globals__)
    compiled: Callable[[Tensor], Tensor] = torch.compile(copy, fullgraph=True)
    return compiled


def _flash_muon() -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = importlib.import_module("flash_muon.muon").fast_newtonschulz
    return function


def _gram_newton_schulz() -> Callable[[Tensor], Tensor]:
    cls = importlib.import_module("gram_newton_schulz").GramNewtonSchulz
    # Where their own tool has it return to X for these coefficients.
    function: Callable[[Tensor], Tensor] = cls(
        ns_coefficients=[list(step) for step in STEPS], gram_newton_schulz_reset_iterations=[3]
    )
    return function


def _on_gpu(module: str, package: str) -> Callable[[torch.device], str | None]:
    return lambda device: not_loaded(module, package) if device.type == "cuda" else f"{package} runs on a GPU alone"


def _providers() -> Iterable[MatrixProvider]:
    yield from map(_fusedopt, ("cpu", "triton", "eager"))
    yield _one_by_one("torch", _torch, torch.bfloat16)
    yield _one_by_one("torch-float32", lambda: lambda matrix: newton_schulz(matrix.float()), torch.float32)
    yield _one_by_one("torch-compile", _compiled, torch.bfloat16)
    flash = _on_gpu("flash_muon.muon", "git+https://github.com/nil0x9/flash-muon")
    yield _one_by_one("flash-muon", _flash_muon, torch.bfloat16, flash)
    gram = _on_gpu("gram_newton_schulz", "gram-newton-schulz")
    yield _one_by_one("gram-newton-schulz", _gram_newton_schulz, torch.float16, gram, gram=True)


PROVIDERS = {provider.name: provider for provider in _providers()}

# --- optimizers ---


def _fusedopt_muon(name: str) -> OptimizerProvider:
    def make(op: str, params: Params, settings: Settings, precision: Precision) -> torch.optim.Optimizer:
        state = "int8" if precision.lossy else None
        return fusedopt.Muon(params, **settings, state_dtype=state, backend=name)

    def unavailable(device: torch.device) -> str | None:
        return BACKENDS[name].unavailable() or BACKENDS[name].refuses(torch.empty(1, device=device))

    return OptimizerProvider(f"fusedopt-{name}", unavailable, lambda op, precision: None, make)


def _float32_state(op: str, precision: Precision) -> str | None:
    return "it keeps momentum in the parameters' dtype" if precision.lossy else None


def _torch_muon(op: str, params: Params, settings: Settings, precision: Precision) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = TORCH_MUON(params, **settings)
    return optimizer


def _jordans(op: str, params: Params, settings: Settings, precision: Precision) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = importlib.import_module("muon").SingleDeviceMuon(params, **settings)
    return optimizer


def _muon_providers() -> Iterable[OptimizerProvider]:
    yield from map(_fusedopt_muon, BACKENDS)
    missing = None if TORCH_MUON else f"torch {torch.__version__} has no Muon; 2.9 and later have"
    yield OptimizerProvider("torch", lambda device: missing, _float32_state, _torch_muon)
    package = "git+https://github.com/KellerJordan/Muon"
    yield OptimizerProvider("jordan-muon", lambda device: not_loaded("muon", package), _float32_state, _jordans)


MUON_PROVIDERS = {provider.name: provider for provider in _muon_providers()}
