"""What Muon makes of a group: its options checked, its parameters as matrices, and those that are computed together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ._distributed import placed_like, rows_placed_like
from ._orthogonalize import LARGEST_WORKSPACE, METHODS, NORMS, workspace_size
from ._owners import Layout, Shards
from ._schedules import Coefficients, coefficients_of
from ._state import Group, local_shard
from ._stepper import Entry

ALGORITHMS = ("muon", "adamw")
ADJUSTMENTS = ("original", "match_rms_adamw", "spectral")


def lr_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """What an update of `rows` by `columns` is multiplied by, beside lr; rows are outputs."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjust_lr_fn == "spectral":
        return math.sqrt(rows / columns)
    return math.sqrt(max(1, rows / columns))


def is_adamw(group: Group) -> bool:
    return group["algorithm"] == "adamw"


def as_rows(tensor: Tensor, group: Group, batch: int = 0) -> Tensor:
    """(..., rows, columns): a kernel with a row for each output channel, others as they are.

    Args:
        batch: leading dimensions that are not the parameter's.
    """
    return tensor.flatten(batch + 1) if _is_flattened(tensor.ndim - batch, group) else tensor


def _is_flattened(ndim: int, group: Group) -> bool:
    """Whether a parameter is one matrix, of a row for each output channel."""
    return ndim > 3 if group["flatten"] is None else bool(group["flatten"])


def stacked(param: Tensor, group: Group) -> int:
    """How many of the first dimensions of a parameter count matrices."""
    return 0 if _is_flattened(param.ndim, group) else param.ndim - 2


def new_averages(update: Tensor, param: Tensor, group: Group) -> Tensor:
    """NorMuon's state of a parameter of which `update` is this process's part."""
    rows = stacked(param, group) + 1
    return rows_placed_like(param, update.new_zeros(*update.shape[:rows], 1), rows)


def check_group(group: Group) -> None:
    """Raises ValueError where an option of Muon's is not valid, in torch's words where torch has it."""
    if group["algorithm"] not in (None, *ALGORITHMS):
        raise ValueError(f"algorithm={group['algorithm']!r}: choose one of {', '.join(ALGORITHMS)}")
    if is_adamw(group):
        return
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, what in (("lr", "Learning rate"), ("momentum", "momentum"), ("weight_decay", "weight decay")):
        if not group[name] >= 0.0:
            raise ValueError(f"{what} should be >= 0 but is: {group[name]}")
    if group["adjust_lr_fn"] not in (None, *ADJUSTMENTS):
        raise ValueError(
            f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; "
            f"choose one of {', '.join(ADJUSTMENTS)}"
        )
    if group["norm"] not in NORMS:
        raise ValueError(f"norm={group['norm']!r}: choose one of {', '.join(NORMS)}")
    if group["method"] not in METHODS:
        raise ValueError(f"method={group['method']!r}: choose one of {', '.join(METHODS)}")
    if group["beta2"] is not None and not 0.0 <= group["beta2"] < 1.0:
        raise ValueError(f"beta2={group['beta2']}: choose a number from 0 up to 1, or None")
    if not group["eps"] > 0:
        raise ValueError(f"eps={group['eps']}: it must be greater than 0, or a matrix of zeros would give NaN")
    steps_of(group)


def check_matrix(param: Tensor, group: Group, what: str) -> None:
    """Raises ValueError where a parameter cannot be orthogonalized as its group says."""
    if is_adamw(group):
        return
    if group["algorithm"] is None and param.ndim != 2:
        raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {param.size()}")
    if param.ndim < 2:
        raise ValueError(f"{what} has shape {tuple(param.shape)}: no matrix; put it in a group of algorithm='adamw'")
    rows, split = param.shape[stacked(param, group)], group["split"]
    if isinstance(split, int) and not (split > 0 and rows % split == 0):
        raise ValueError(f"split={split}: {what} has {rows} rows, which are not a multiple of it")
    if isinstance(split, Sequence) and (min(split, default=0) <= 0 or sum(split) != rows):
        raise ValueError(f"split={tuple(split)}: {what} has {rows} rows, which these must add up to")


def steps_of(group: Group) -> tuple[Coefficients, ...]:
    given = group["ns_coefficients"]
    if not isinstance(given, str) and all(isinstance(value, int | float) for value in given):
        # torch's: one triple for every step.
        if len(given) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        given = [given] * group["ns_steps"]
    return coefficients_of(given, group["ns_steps"])


def in_workspace(members: list[tuple[Unit, Tensor, float]]) -> Iterator[list[tuple[Unit, Tensor, float]]]:
    """Runs of members whose intermediate results fit the workspace together."""
    some: list[tuple[Unit, Tensor, float]] = []
    room = LARGEST_WORKSPACE
    for member in members:
        size = workspace_size(member[1])
        if some and size > room:
            yield some
            some, room = [], LARGEST_WORKSPACE
        some.append(member)
        room -= size
    if some:
        yield some


def wide_dtype(param: Tensor) -> torch.dtype:
    """What an update is computed in."""
    return torch.promote_types(param.dtype, torch.float32)


def matrices_of(stack: Tensor, group: Group) -> Iterable[Tensor]:
    """Views of the updates of parameters of one shape, (batch, rows, columns) each."""
    rows, split = as_rows(stack, group, batch=1), group["split"]
    if split is None:
        return (rows.flatten(0, -3),)
    if isinstance(split, int):
        return (rows.unflatten(-2, (-1, split)).flatten(0, -3),)
    return (part.flatten(0, -3) for part in rows.split(list(split), dim=-2))


class Unit:
    """Parameters of one group and shape, whose updates lie in one tensor."""

    averages: Sequence[Tensor] = ()

    def __init__(
        self, group: Group, entries: list[Entry], layout: Layout | None = None, stack: Tensor | None = None
    ) -> None:
        self.group, self.entries, self.layout = group, entries, layout
        if stack is None:
            local = local_shard(entries[0].param)
            stack = torch.empty((len(entries), *local.shape), dtype=wide_dtype(local), device=local.device)
        self.stack = stack

    @property
    def updates(self) -> tuple[Tensor, ...]:
        return self.stack.unbind()

    def placed_updates(self) -> Sequence[Tensor]:
        """The updates, as DTensors where their parameters are."""
        return placed_like(self.entries[0].param, self.updates)

    def shards(self) -> Shards:
        assert self.layout is not None
        param = self.entries[0].param
        dims, split = stacked(param, self.group), self.group["split"]
        rows = param.shape[dims]
        if split is None:
            split = rows
        parts = (split,) * (rows // max(split, 1)) if isinstance(split, int) else tuple(split)
        return Shards(self.layout, param.shape, dims, parts, self.stack, self.averages)
