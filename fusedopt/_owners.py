"""Which process orthogonalizes a matrix that several have shards or copies of: plans, from shapes and placements alone.

Every process plans alike, so nothing is sent for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Box = tuple[tuple[int, int], ...]
"""Where a part of a tensor begins and ends in each dimension."""

# Elements that a process sends of a bucket: enough to be worth a message, and not so many that buffers matter.
_LEAST, _MOST = 1 << 18, 1 << 24
# So that all but the first and the last are sent while others are computed.
_BUCKETS = 4


@dataclass(frozen=True, eq=False)
class Layout:
    """What each process of a group has of a tensor.

    boxes: its part, which may be empty.
    copies: which copy of the tensor that is a part of.
    """

    group: ProcessGroup
    boxes: tuple[Box, ...]
    copies: tuple[int, ...]


@dataclass
class Shards:
    """This process's parts of parameters of one layout.

    shape: of the whole of each.
    stacked: how many of its first dimensions count matrices; the next is that of rows.
    split: rows of each part of a matrix that is orthogonalized by itself.
    stack: (parameters, *shape of the part), the updates; they are replaced.
    averages: for each parameter its part of a number for each row, or nothing. They are updated.
    """

    layout: Layout
    shape: torch.Size
    stacked: int
    split: tuple[int, ...]
    stack: Tensor
    averages: Sequence[Tensor]


class Matrix(NamedTuple):
    """One that an owner orthogonalizes: of parameter number `param` of a unit, in its stack at `at`."""

    owner: int
    unit: int
    param: int
    at: tuple[int, ...]


class Bucket(NamedTuple):
    """Matrices that go together, and whether anything is sent to owners and from them."""

    matrices: list[Matrix]
    gathers: bool
    scatters: bool


def box_of(shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]) -> Box:
    """What the process at `coordinate` of a mesh of that shape has of a tensor placed so."""
    begins, sizes = [0] * len(shape), list(shape)
    # A strided shard is one of what the mesh's later dimensions have sharded already.
    strided = [hasattr(placement, "split_factor") for placement in placements]
    plain = [axis for axis in range(len(mesh)) if not strided[axis]]
    for axis in (*plain, *[axis for axis in reversed(range(len(mesh))) if strided[axis]]):
        if placements[axis].is_replicate():
            continue
        dim = placements[axis].dim
        chunk = -(-sizes[dim] // mesh[axis])
        skipped = min(coordinate[axis] * chunk, sizes[dim])
        begins[dim] += skipped
        sizes[dim] = min(chunk, sizes[dim] - skipped)
    return tuple((begin, begin + size) for begin, size in zip(begins, sizes))


def cost_of(rows: int, columns: int) -> int:
    """About the flops of five steps, in the Gram form."""
    short, long = sorted((rows, columns))
    return short * short * (3 * long + 17 * short)


def assign(costs: Sequence[float], choices: Sequence[Sequence[int]], world: int) -> list[int]:
    """An owner for each, of its choices, so that none has much more than others: the costliest first."""
    loads, owners = [0.0] * world, [0] * len(costs)
    # Those without a choice before all others, which can make up for them.
    for index in sorted(range(len(costs)), key=lambda index: (len(choices[index]) > 1, -costs[index])):
        owners[index] = min(choices[index], key=loads.__getitem__)
        loads[owners[index]] += costs[index]
    return owners


def in_buckets(sizes: Sequence[int], world: int) -> list[range]:
    """Runs of consecutive ones of about equal size, neither small nor large for `world` processes."""
    limit = min(max(sum(sizes) / _BUCKETS, world * _LEAST), world * _MOST)
    buckets, begin, filled = [], 0, 0
    for index, size in enumerate(sizes):
        if index > begin and filled + size > limit:
            buckets.append(range(begin, index))
            begin, filled = index, 0
        filled += size
    return [*buckets, range(begin, len(sizes))] if sizes else []


def part_of(layout: Layout, at: tuple[int, ...], rank: int) -> Box | None:
    """Of one matrix of a stack; None where the process has no rows of it."""
    box = layout.boxes[rank]
    has_rows = box[len(at)][0] < box[len(at)][1]
    return box[len(at) :] if has_rows and all(begin <= index < end for index, (begin, end) in zip(at, box)) else None


def _numel(box: Box | None) -> int:
    return 0 if box is None else math.prod(end - begin for begin, end in box)


def plan(units: Sequence[Shards]) -> list[Bucket]:
    """All matrices of units of one group."""
    world = len(units[0].layout.boxes)
    costs: list[float] = []
    choices: list[Sequence[int]] = []
    sent: list[int] = []
    places: list[tuple[int, int, tuple[int, ...]]] = []
    for number, unit in enumerate(units):
        shape = unit.shape[unit.stacked :]
        rows, columns = shape[0], math.prod(shape[1:])
        for at in itertools.product(*map(range, unit.shape[: unit.stacked])):
            parts = [_numel(part_of(unit.layout, at, rank)) for rank in range(world)]
            holders = [rank for rank in range(world) if parts[rank] == rows * columns]
            for param in range(len(unit.stack)):
                costs.append(sum(cost_of(part, columns) for part in unit.split))
                # One that is somewhere whole need not be gathered.
                choices.append(holders or range(world))
                sent.append(sum(parts))
                places.append((number, param, at))
    owners = assign(costs, choices, world)
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    matrices = [Matrix(owners[index], *places[index]) for index in order]
    buckets = [[matrices[index] for index in bucket] for bucket in in_buckets([sent[index] for index in order], world)]
    return [
        Bucket(members, _is_sent(units, members, gathered=True), _is_sent(units, members, gathered=False))
        for members in buckets
    ]


def _is_sent(units: Sequence[Shards], matrices: Sequence[Matrix], gathered: bool) -> bool:
    return any(
        part_of(units[matrix.unit].layout, matrix.at, rank)
        for matrix in matrices
        for rank in others(units[matrix.unit].layout, matrix.owner, gathered)
    )


def others(layout: Layout, owner: int, gathered: bool) -> list[int]:
    """The processes that send to an owner, which are those that have parts of its copy, or all that it sends to."""
    return [rank for rank in range(len(layout.boxes)) if is_other(layout, owner, gathered, rank)]


def is_other(layout: Layout, owner: int, gathered: bool, rank: int) -> bool:
    return rank != owner and not (gathered and layout.copies[rank] != layout.copies[owner])
