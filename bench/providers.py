"""Who has optimizers: fusedopt's backends, torch's own implementations, and peers where they are installed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import fusedopt.backends
import fusedopt.optim

from .op import Provider, failure
from .presets import Precision

Params = list[torch.nn.Parameter]
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerProvider(Provider):
    """An implementation of optimizers. `op` below is a class name of `fusedopt.optim.OPTIMIZERS`.

    lacks(op, precision) -> why it has no such optimizer in this precision, or None.
    make(op, params, settings, precision) -> the optimizer.
    """

    lacks: Callable[[str, Precision], str | None]
    make: Callable[[str, Params, Settings, Precision], torch.optim.Optimizer]


def _fusedopt(backend: str) -> OptimizerProvider:
    def make(op: str, params: Params, settings: Settings, precision: Precision) -> torch.optim.Optimizer:
        state = None if precision.state == precision.param else str(precision.state).removeprefix("torch.")
        state = "int8" if precision.lossy else state
        return fusedopt.optim.OPTIMIZERS[op](params, **settings, state_dtype=state, backend=backend)

    def unavailable(device: torch.device) -> str | None:
        chosen = fusedopt.backends.BACKENDS[backend]
        return chosen.unavailable() or chosen.refuses(torch.empty(1, device=device))

    return OptimizerProvider(f"fusedopt-{backend}", unavailable, lambda op, precision: None, make)


def _torch(name: str, **flags: bool) -> OptimizerProvider:
    def lacks(op: str, precision: Precision) -> str | None:
        cls = fusedopt.optim.OPTIMIZERS[op].torch_class
        if cls is None:
            return f"torch.optim has no {op}"
        if precision.state != precision.param:
            return "torch keeps state in the parameters' dtype"
        missing = [flag for flag in flags if flag not in inspect.signature(cls).parameters]
        return f"torch.optim.{op} has no {missing[0]}=" if missing else None

    def make(op: str, params: Params, settings: Settings, precision: Precision) -> torch.optim.Optimizer:
        cls: Any = fusedopt.optim.OPTIMIZERS[op].torch_class
        return cls(params, **settings, **flags)

    return OptimizerProvider(name, lambda device: None, lacks, make)


def _peer(
    name: str, module: str, package: str, ops: Iterable[str], precisions: Iterable[str], suffix: str = "", **extra: Any
) -> OptimizerProvider:
    """A library whose `module` has a class `op + suffix` for each of `ops`; `extra` is given to each."""

    def lacks(op: str, precision: Precision) -> str | None:
        if op not in ops:
            return f"{package} has no {op}{suffix} of the same rule"
        return None if precision.name in precisions else f"{package} does not keep state this way"

    def make(op: str, params: Params, settings: Settings, precision: Precision) -> torch.optim.Optimizer:
        cls = getattr(importlib.import_module(module), op + suffix)
        known = inspect.signature(cls).parameters
        return cls(params, **{key: value for key, value in settings.items() if key in known}, **extra)

    return OptimizerProvider(name, lambda device: not_loaded(module, package), lacks, make)


def not_loaded(module: str, package: str) -> str | None:
    """Why `module` cannot be imported, and what to install for it; or None."""
    try:
        with _quiet():
            importlib.import_module(module)
    except ModuleNotFoundError:
        return f"pip install {package}"
    except Exception as error:  # a peer that does not load is no reason for the others not to run
        return failure(error)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Peers log while they load what else they could have on another machine."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _providers() -> Iterable[OptimizerProvider]:
    yield from map(_fusedopt, fusedopt.backends.BACKENDS)
    yield _torch("torch")
    yield _torch("torch-foreach", foreach=True)
    yield _torch("torch-fused", fused=True)
    # Left out of bitsandbytes: its Adam decays decoupled and its RMSprop keeps other momentum than torch's.
    same = ("AdamW", "Lion", "AdEMAMix", "SGD", "Adagrad")
    eight = ("int8", "mixed-int8")
    yield _peer("bitsandbytes", "bitsandbytes.optim", "bitsandbytes", same, ("fp32", "mixed"), "32bit")
    yield _peer("bitsandbytes-8bit", "bitsandbytes.optim", "bitsandbytes", same, eight, "8bit")
    yield _peer("torchao-8bit", "torchao.optim", "torchao", ("Adam", "AdamW"), eight, "8bit")
    same = ("SGD", "Adam", "AdamW", "RAdam", "Lion")
    yield _peer("optimi", "optimi", "torch-optimi", same, ("fp32", "bf16", "fp16"), kahan_sum=False)


PROVIDERS = {provider.name: provider for provider in _providers()}
