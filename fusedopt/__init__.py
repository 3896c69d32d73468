"""Fused-kernel optimizers for PyTorch: each update rule stated once, the same bits on every backend."""

from . import optim
from ._swap import swap
from ._version import __version__
from .backends import explain, use_backend
from .optim import SGD, Adagrad, Adam, Adamax, AdamW, AdEMAMix, Lion, NAdam, RAdam, RMSprop
from .optimizer import Optimizer

__all__ = [
    "SGD",
    "AdEMAMix",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "__version__",
    "explain",
    "optim",
    "swap",
    "use_backend",
]
