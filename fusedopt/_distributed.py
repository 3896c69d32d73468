"""Matrices of which several processes have shards or copies: each is orthogonalized once, by one process, its owner.

They go in buckets: the shards of each matrix are sent to its owner, and of the result everyone is sent its part, while
other buckets are computed.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ._owners import Bucket, Layout, Matrix, Shards, box_of, is_other, others, part_of, plan
from ._state import local_shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Wholes = tuple[Tensor, Tensor | None]
"""Matrices of one unit, (matrices, *shape), and their averages, (matrices, rows, 1)."""

Orthogonalize = Callable[[dict[int, Wholes]], None]
"""Replaces matrices of the units of these numbers, and updates their averages, in place."""


class _Messages:
    """Tensors on their way to processes and from them, in the order in which the matrices are in their bucket.

    Args:
        outgoing: to each process; what is sent is what they are now.
        incoming: from each process, of the shapes that are sent there; `finish` writes them.
        like: of their dtype and device.
    """

    def __init__(self, outgoing: list[list[Tensor]], incoming: list[list[Tensor]], group: ProcessGroup, like: Tensor):
        self._targets = list(itertools.chain(*incoming))
        pieces = [piece.reshape(-1) for piece in itertools.chain(*outgoing)]
        self._sent = torch.cat(pieces) if pieces else like.new_empty(0)
        self._received = like.new_empty(sum(map(torch.numel, self._targets)))
        self._work = distributed.all_to_all_single(
            self._received,
            self._sent,
            [sum(map(torch.numel, each)) for each in incoming],
            [sum(map(torch.numel, each)) for each in outgoing],
            group=group,
            async_op=True,
        )

    def finish(self) -> None:
        self._work.wait()
        if self._targets:
            parts = self._received.split([target.numel() for target in self._targets])
            shaped = [part.view(target.shape) for part, target in zip(parts, self._targets, strict=True)]
            torch._foreach_copy_(self._targets, shaped)


def _run(units: Sequence[Shards], bucket: Bucket, orthogonalize: Orthogonalize) -> Iterator[None]:
    """The work on a bucket, in three stages: send the parts, orthogonalize and send the results, receive them."""
    group, like = units[0].layout.group, units[0].stack
    me, world = distributed.get_rank(group), distributed.get_world_size(group)
    owned: defaultdict[int, list[Matrix]] = defaultdict(list)
    for matrix in bucket.matrices:
        if matrix.owner == me:
            owned[matrix.unit].append(matrix)
    wholes = {number: _new_wholes(units[number], len(members)) for number, members in owned.items()}
    slots = {matrix: slot for members in owned.values() for slot, matrix in enumerate(members)}

    def parts(gathered: bool) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """For each process what this has of its matrices, and where what that has of this one's belongs."""
        mine: list[list[Tensor]] = [[] for _ in range(world)]
        theirs: list[list[Tensor]] = [[] for _ in range(world)]
        for matrix in bucket.matrices:
            unit = units[matrix.unit]
            if me == matrix.owner:
                for rank in others(unit.layout, me, gathered):
                    theirs[rank] += _parts_in_whole(unit, matrix, wholes[matrix.unit], slots[matrix], rank)
            elif is_other(unit.layout, matrix.owner, gathered, me):
                mine[matrix.owner] += _local_parts(unit, matrix, me)
        return mine, theirs

    gathering = _Messages(*parts(gathered=True), group, like) if bucket.gathers else None
    yield
    kept: list[tuple[Tensor, Tensor]] = []
    for matrix, slot in slots.items():
        unit = units[matrix.unit]
        kept += zip(
            _local_parts(unit, matrix, me), _parts_in_whole(unit, matrix, wholes[matrix.unit], slot, me), strict=True
        )
    for part, whole in kept:
        whole.copy_(part)
    if gathering:
        gathering.finish()
    if wholes:
        orthogonalize(wholes)
    mine, theirs = parts(gathered=False)
    scattering = _Messages(theirs, mine, group, like) if bucket.scatters else None
    for part, whole in kept:
        part.copy_(whole)
    yield
    if scattering:
        scattering.finish()


def _new_wholes(unit: Shards, count: int) -> Wholes:
    shape = unit.shape[unit.stacked :]
    averages = unit.averages[0].new_empty(count, shape[0], 1) if unit.averages else None
    return unit.stack.new_empty(count, *shape), averages


def _local_parts(unit: Shards, matrix: Matrix, rank: int) -> list[Tensor]:
    """What this process has of a matrix, and of its averages."""
    if part_of(unit.layout, matrix.at, rank) is None:
        return []
    at = tuple(index - begin for index, (begin, _) in zip(matrix.at, unit.layout.boxes[rank]))
    part = unit.stack[(matrix.param, *at)]
    return [part, unit.averages[matrix.param][at]] if unit.averages else [part]


def _parts_in_whole(unit: Shards, matrix: Matrix, whole: Wholes, slot: int, rank: int) -> list[Tensor]:
    """The same that process `rank` has, in the whole matrix and its averages."""
    box = part_of(unit.layout, matrix.at, rank)
    if box is None:
        return []
    stack, averages = whole
    part = stack[slot]
    for dim, (begin, end) in enumerate(box):
        part = part.narrow(dim, begin, end - begin)
    return [part] if averages is None else [part, averages[slot, slice(*box[0])]]


# --- what Muon calls ---


def check_process_group(group: Any) -> None:
    """Raises TypeError where it is none, or one without this process."""
    if group is not None and not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group={group!r}: give a group that has this process, such as torch.distributed.group.WORLD after "
            "init_process_group, or None"
        )


class Exchange:
    """Plans that are remembered, and the process groups that they use."""

    def __init__(self) -> None:
        self._layouts: dict[Hashable, Layout | None] = {}
        self._groups: dict[Any, ProcessGroup] = {}
        self._plans: dict[Hashable, list[Bucket]] = {}
        self._known: dict[Hashable, list[int]] = {}

    def layout(self, param: Tensor, group: ProcessGroup | None, what: str) -> Layout | None:
        """None where one process has all there is.

        Args:
            group: of the processes that have copies, if the parameter is no DTensor.

        Raises:
            ValueError: a placement that is not known here.
        """
        placements = getattr(param, "placements", None)
        where = group if placements is None else param.device_mesh  # type: ignore[attr-defined]
        if where is None or where.size() == 1:
            return None
        key = (where, placements, param.shape)
        if key not in self._layouts:
            self._layouts[key] = _copied(where, param) if placements is None else self._sharded(param, what)
        return self._layouts[key]

    def _sharded(self, param: Any, what: str) -> Layout:
        mesh, placements = param.device_mesh, param.placements
        if mesh not in self._groups:
            self._groups[mesh] = _group_of(mesh)
        group = self._groups[mesh]
        coordinates = {int(mesh.mesh[c]): c for c in itertools.product(*map(range, mesh.mesh.shape))}
        ranks = distributed.get_process_group_ranks(group)
        boxes = tuple(box_of(param.shape, mesh.mesh.shape, coordinates[rank], placements) for rank in ranks)
        copied = [axis for axis, placement in enumerate(placements) if placement.is_replicate()]
        numbers: dict[tuple[int, ...], int] = {}
        copies = tuple(
            numbers.setdefault(tuple(coordinates[rank][axis] for axis in copied), len(numbers)) for rank in ranks
        )
        mine = boxes[distributed.get_rank(group)]
        if tuple(end - begin for begin, end in mine) != tuple(param._local_tensor.shape):
            raise ValueError(f"{what} is placed {placements}, which Muon cannot gather; shard whole dimensions of it")
        return Layout(group, boxes, copies)

    def check_same(self, numbers: Mapping[tuple[ProcessGroup, torch.device], list[int]]) -> None:
        """Every process of the groups must call it.

        Args:
            numbers: of the matrices with a gradient, for each group.

        Raises:
            RuntimeError: they are not the same in all processes.
        """
        for (group, device), members in numbers.items():
            # On a GPU the answer would be waited for, so it asks only as all processes come to others than before.
            if device.type != "cpu" and self._known.get((group, device)) == members:
                continue
            known = zlib.crc32(repr(members).encode())
            extremes = torch.tensor([known, -known], device=device)
            distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
            greatest, least = extremes.tolist()
            if greatest != -least:
                raise RuntimeError(
                    "the processes that share matrices have gradients of different ones; no parameter was changed. "
                    "Give a matrix a gradient in all processes or in none"
                )
            self._known[group, device] = members

    def orthogonalize(self, units: Sequence[Shards], orthogonalize: Orthogonalize) -> None:
        """Replace the updates of all units. Every process of their groups must call it with the same."""
        lines: defaultdict[Any, list[int]] = defaultdict(list)
        for number, unit in enumerate(units):
            lines[unit.layout.group, unit.stack.dtype, unit.stack.device].append(number)
        for numbers in lines.values():
            self._orthogonalize_line([units[number] for number in numbers], numbers, orthogonalize)

    def _orthogonalize_line(self, units: list[Shards], numbers: list[int], orthogonalize: Orthogonalize) -> None:
        key = tuple((unit.layout, unit.stacked, unit.split, len(unit.stack)) for unit in units)
        if key not in self._plans:
            self._plans[key] = plan(units)

        def numbered(wholes: dict[int, Wholes]) -> None:
            orthogonalize({numbers[index]: whole for index, whole in wholes.items()})

        # A bucket's shards are sent before the one before is computed, and its results received after the next.
        runs = [_run(units, bucket, numbered) for bucket in self._plans[key]]
        for turn in range(len(runs) + 2):
            for run in reversed(runs[max(0, turn - 2) : turn + 1]):
                next(run, None)


def _copied(group: ProcessGroup, param: Tensor) -> Layout:
    whole = tuple((0, size) for size in param.shape)
    return Layout(group, (whole,) * group.size(), tuple(range(group.size())))


def _group_of(mesh: Any) -> ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == distributed.get_world_size():
        assert distributed.group.WORLD is not None
        return distributed.group.WORLD
    ranks = sorted(mesh.mesh.flatten().tolist())
    return distributed.new_group(ranks, use_local_synchronization=True)


def placed_like(param: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """This process's parts of tensors of the parameter's shape, as DTensors where that is one, placed as that is."""
    if local_shard(param) is param or not parts:
        return parts
    from torch.distributed.tensor import DTensor

    make: Any = DTensor
    spec = _placed(param, parts[0], param.placements, param.shape)._spec  # type: ignore[attr-defined]
    # In a sixth of the time of `from_local`, which would be most of a step of small matrices.
    return [make(part, spec, requires_grad=False) for part in parts]


def rows_placed_like(param: Tensor, part: Tensor, dims: int) -> Tensor:
    """(..., rows, 1): a number for each row of a parameter, which its first `dims` dimensions are; placed as those."""
    if local_shard(param) is param:
        return part
    from torch.distributed.tensor import Replicate

    placements = [
        Replicate() if placement.is_replicate() or placement.dim >= dims else placement
        for placement in param.placements  # type: ignore[attr-defined]
    ]
    return _placed(param, part, placements, torch.Size((*param.shape[:dims], 1)))


def _placed(param: Any, part: Tensor, placements: Sequence[Any], shape: torch.Size) -> Any:
    from torch.distributed.tensor import DTensor

    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(part, param.device_mesh, placements, run_check=False, shape=shape, stride=strides)
