"""Fused-kernel optimizers for PyTorch: each update rule stated once, the same bits on every backend."""

from . import optim
from ._clip import clip_grad_norm_
from ._embedding import StableEmbedding
from ._gated_norm import gated_rms_norm
from ._glu import geglu, reglu, relu2, swiglu, swiglu_oai, swiglu_packed
from ._muon import Muon
from ._orthogonalize import orthogonalize
from ._patch import patch
from ._rms_norm import RMSNorm, rms_norm
from ._swap import swap
from ._version import __version__
from .backends import explain, use_backend
from .binding import rule_of
from .optim import (
    SGD,
    Adagrad,
    Adagrad8bit,
    Adam,
    Adam8bit,
    Adamax,
    AdamW,
    AdamW8bit,
    AdEMAMix,
    AdEMAMix8bit,
    Lion,
    Lion8bit,
    NAdam,
    RAdam,
    RMSprop,
    RMSprop8bit,
    SGD8bit,
)
from .optimizer import Optimizer

__all__ = [
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "Adamax",
    "Lion",
    "Lion8bit",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSNorm",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
    "StableEmbedding",
    "__version__",
    "clip_grad_norm_",
    "explain",
    "gated_rms_norm",
    "geglu",
    "optim",
    "orthogonalize",
    "patch",
    "reglu",
    "relu2",
    "rms_norm",
    "rule_of",
    "swap",
    "swiglu",
    "swiglu_oai",
    "swiglu_packed",
    "use_backend",
]
