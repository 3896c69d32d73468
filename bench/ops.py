"""Every op that there is to measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fusedopt.optim

from .matrix_op import MatrixOp
from .muon_op import MuonOp
from .op import Op
from .optimizer_op import OptimizerOp
from .row_op import FUNCTIONS, RowOp

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        *map(OptimizerOp, fusedopt.optim.OPTIMIZERS),
        *map(RowOp, FUNCTIONS.values()),
        MuonOp(),
        MatrixOp(),
    )
}


def of_all(what: str) -> dict[str, Any]:
    """The `providers`, `presets` or `precisions` of all ops, by name: the first of each, the most general."""
    known: dict[str, Any] = {}
    for op in OPS.values():
        mapping: Mapping[str, Any] = getattr(op, what)
        for name, value in mapping.items():
            known.setdefault(name, value)
    return known
