"""The norm of gradients in Triton: the sums of csrc/norm.h, in its order, so the same bits."""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt._clip import TREE
from fusedopt._gpu import Clipped, NormLaunch, Tables, on

from .codecs import decode, pointer

ROWS = 4
"""Trees that a program sums."""

_TREE, _ROWS = tl.constexpr(TREE), tl.constexpr(ROWS)


@triton.jit
def _halves(values, rows: tl.constexpr, size: tl.constexpr):
    """(rows, size) as (rows, size / 2): element i added to element i + size / 2. A sum of two has one order."""
    return tl.sum(tl.reshape(values, (rows, 2, size // 2)), 1)


@triton.jit
def _tree_sums(values):
    values = _halves(values, _ROWS, 1024)
    values = _halves(values, _ROWS, 512)
    values = _halves(values, _ROWS, 256)
    values = _halves(values, _ROWS, 128)
    values = _halves(values, _ROWS, 64)
    values = _halves(values, _ROWS, 32)
    values = _halves(values, _ROWS, 16)
    values = _halves(values, _ROWS, 8)
    values = _halves(values, _ROWS, 4)
    return tl.reshape(_halves(values, _ROWS, 2), (_ROWS,))


@triton.jit(do_not_specialize=["table", "tiles", "control", "sums"])
def fusedopt_square_sums(table, tiles, control, sums, grad: tl.constexpr, aligned: tl.constexpr):
    """The sums of some trees of one gradient. Rows of the table are NormLaunch's in csrc/launch.h, but in programs."""
    program = tl.program_id(0)
    row = table + tl.load(tiles + program).to(tl.int64) * 4
    numel = tl.load(row)
    tree = (program - tl.load(row + 1)) * _ROWS + tl.arange(0, _ROWS)
    at = tree[:, None] * _TREE + tl.arange(0, _TREE)[None, :]
    stored = tl.load(pointer(tl.load(row + 2), grad, aligned) + at, at < numel, 0)
    values = decode(stored, grad).to(tl.float32) * tl.load(control).to(tl.float32)
    values = tl.where(at < numel, values, 0)
    tl.store(sums + tl.load(row + 3) + tree, _tree_sums(values * values), tree * _TREE < numel)


@triton.jit(do_not_specialize=["sums", "count", "next"])
def fusedopt_sums(sums, count, next):
    """Trees over sums."""
    tree = tl.program_id(0).to(tl.int64) * _ROWS + tl.arange(0, _ROWS)
    at = tree[:, None] * _TREE + tl.arange(0, _TREE)[None, :]
    tl.store(next + tree, _tree_sums(tl.load(sums + at, at < count, 0)), tree * _TREE < count)


@triton.jit(do_not_specialize=["sum", "limit", "control", "norm", "clipped"])
def fusedopt_clip(sum, limit, control, norm, clipped):
    """The norm, and the control with the coefficient in it, as `fusedopt._clip.clip_coefficient`."""
    root = tl.sqrt_rn(tl.load(sum))
    tl.store(norm, root)
    coefficient = tl.load(limit) / (root.to(tl.float64) + tl.full([], 1e-6, tl.float64))
    one = tl.full([], 1, tl.float64)
    tl.store(clipped, tl.load(control) * tl.where(coefficient >= one, one, coefficient))
    tl.store(clipped + 1, tl.load(control + 1))


def norm(tables: Tables, launches: Sequence[NormLaunch], control: Tensor, max_norm: float, captured: bool) -> Clipped:
    """The norm of the gradients of `launches`, float32, and `control` with clipping to `max_norm` in it."""
    device = control.device
    result = torch.empty((), dtype=torch.float32, device=device)
    clipped = torch.empty(2, dtype=torch.float64, device=device)
    limit = torch.full((), max_norm, dtype=torch.float64, device=device)
    count = sum(launch.trees for launch in launches)
    sums = torch.zeros(max(count, 1), dtype=torch.float32, device=device)
    with on(device):
        for place, launch in enumerate(launches):
            table, tiles = _on_device(tables, place, launch, device, captured)
            fusedopt_square_sums[(len(tiles),)](table, tiles, control, sums, grad=launch.grad, aligned=launch.aligned)
        while count > 1:
            trees = -(-count // TREE)
            above = torch.empty(trees, dtype=torch.float32, device=device)
            fusedopt_sums[(-(-trees // ROWS),)](sums, count, above)
            sums, count = above, trees
        fusedopt_clip[(1,)](sums, limit, control, result, clipped)
    return result, clipped


def _on_device(
    tables: Tables, place: int, launch: NormLaunch, device: torch.device, captured: bool
) -> tuple[Tensor, Tensor]:
    """The table with each row's first program in place of its first tree, and the row of each program."""
    rows = torch.frombuffer(launch.table, dtype=torch.int64).view(-1, 4)
    programs = (rows[:, 0] + ROWS * TREE - 1) // (ROWS * TREE)

    def table() -> Tensor:
        return torch.stack([rows[:, 0], programs.cumsum(0) - programs, rows[:, 2], rows[:, 3]], 1).flatten()

    def tiles() -> Tensor:
        return torch.arange(len(rows), dtype=torch.int32).repeat_interleave(programs)

    changed = tables.changed(("norm", place), launch.table)
    found = [
        tables.on_device((place, f"norm {host.__name__}"), host, device, changed, captured) for host in (table, tiles)
    ]
    return found[0], found[1]
