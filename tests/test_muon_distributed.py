"""Muon on matrices in shards and copies: plans, and four gloo processes that step as one does."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import fusedopt
from fusedopt._muon import Muon
from fusedopt._owners import Layout, Shards, assign, box_of, cost_of, in_buckets, plan

WORLD = 4
SECONDS = {"quick": 150, "all": 500}  # a guard against a hang: importing torch takes most of the time


def ranges(*sizes: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_boxes_are_the_chunks_that_torch_makes(rows: int, shards: int) -> None:
    sizes = [len(chunk) for chunk in torch.zeros(rows).chunk(shards)] if rows else []
    expected = ranges(*sizes, *[0] * (shards - len(sizes)))
    for coordinate in range(shards):
        assert box_of((rows, 5), [shards], [coordinate], [Shard(0)]) == (expected[coordinate], (0, 5))
        box = box_of((5, rows), [3, shards], [2, coordinate], [Replicate(), Shard(1)])
        assert box == ((0, 5), expected[coordinate])


def test_boxes_of_two_mesh_dimensions() -> None:
    """The first shards first, but where it shards what the second has sharded."""
    coordinates = [*itertools.product(range(2), range(2))]
    plain = [box_of((10,), [2, 2], each, [Shard(0), Shard(0)])[0] for each in coordinates]
    assert plain == [(0, 3), (3, 5), (5, 8), (8, 10)]
    strided = [box_of((10,), [2, 2], each, [_StridedShard(0, split_factor=2), Shard(0)])[0] for each in coordinates]
    assert strided == [(0, 3), (5, 8), (3, 5), (8, 10)]
    both = [box_of((4, 3), [2, 2], each, [Shard(1), Shard(0)]) for each in coordinates]
    assert both == [((0, 2), (0, 2)), ((2, 4), (0, 2)), ((0, 2), (2, 3)), ((2, 4), (2, 3))]


@pytest.mark.parametrize("world", [1, 3, 8])
def test_work_is_balanced(world: int) -> None:
    """Graham (1969): the longest first is at most 4/3 - 1/(3 world) of the best, which is at least these two."""
    costs = [float(3 + 7 * index % 11) ** 3 for index in range(40)]
    owners = assign(costs, [range(world)] * len(costs), world)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(world)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= (4 / 3 - 1 / (3 * world)) * max(sum(costs) / world, max(costs))


def test_work_goes_where_it_may() -> None:
    """What has no choice is counted first: the others make up for it, however small it is."""
    owners = assign([4.0, 4.0, 3.0, 3.0, 2.0], [range(3), range(3), [2], [2], [2]], 3)
    assert sorted(owners[:2]) == [0, 1] and owners[2:] == [2, 2, 2]


@pytest.mark.parametrize("sizes", [[], [5], [1] * 10, [10**9, 1, 1], [3 << 20] * 50, [3 << 24] * 9])
def test_buckets(sizes: list[int]) -> None:
    """Every one in its order, and none that could go along with those before it waits for the next."""
    buckets = in_buckets(sizes, 2)
    assert [*itertools.chain(*buckets)] == [*range(len(sizes))]
    limit = min(max(sum(sizes) / 4, 2 << 18), 2 << 24)
    for bucket, following in itertools.pairwise([*buckets, range(0)]):
        filled = sum(sizes[index] for index in bucket)
        assert len(bucket) == 1 or filled <= limit
        assert not following or filled + sizes[following[0]] > limit


def test_every_bucket_is_balanced() -> None:
    """The costliest matrices are in the first, and in none has a process much more to do than others."""
    group: Any = None
    rows = [64, 512, 128, 256, 512]
    layouts = [Layout(group, (((0, n), (0, n)),) * 4, (0, 1, 2, 3)) for n in rows]
    units = [
        Shards(layout, torch.Size([n, n]), 0, (n,), torch.empty(16, n, n, device="meta"), ())
        for n, layout in zip(rows, layouts, strict=True)
    ]
    buckets = plan(units)
    assert len(buckets) >= 4 and all(bucket.scatters and not bucket.gathers for bucket in buckets)
    costs = [[cost_of(*units[matrix.unit].shape) for matrix in bucket.matrices] for bucket in buckets]
    assert [*itertools.chain(*costs)] == sorted(itertools.chain(*costs), reverse=True)
    assert len({*itertools.chain(*[bucket.matrices for bucket in buckets])}) == 16 * len(rows)
    for bucket, each in zip(buckets, costs, strict=True):
        loads = [0] * 4
        for matrix, cost in zip(bucket.matrices, each, strict=True):
            loads[matrix.owner] += cost
        assert max(loads) <= sum(each) / 4 + max(each)


def test_no_process_group_is_refused() -> None:
    with pytest.raises(TypeError, match="process_group='world': .*torch.distributed.group.WORLD"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], process_group="world")


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("amount", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_four_processes(tmp_path: Path, amount: str) -> None:
    path = [str(Path(fusedopt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    program = str(Path(__file__).with_name("muon_ranks.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(WORLD), str(tmp_path), amount],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        printed = [process.communicate(timeout=SECONDS[amount])[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, text in enumerate(printed):
        assert processes[rank].returncode == 0, f"process {rank}:\n{text}"
