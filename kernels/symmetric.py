"""The matrix products of a Newton–Schulz iteration in Triton: how their kernel is launched.

One launch computes the products of matrices of many shapes. Nothing is tuned, and nothing compiled for a shape or a
number; what a kernel is compiled for is a `Form`.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt._gpu import NOT_WARMED_UP, is_capturing, on

from .codecs import FLOATS
from .rows import WARP
from .symmetric_kernel import fusedopt_product
from .symmetric_tiles import Tile, count_of_tiles, family, tile_of

Ways = tuple[bool, bool, bool, bool]
"""Of A, B, C and the result, whether elements of a row lie side by side, else those of a column."""


class Form(NamedTuple):
    """What one kernel is compiled for.

    symmetric: tiles on the diagonal and above it alone are computed. added: there is a C.
    aligned: every address, stride and size is a multiple of 16 bytes. whole: no tile is ragged.
    """

    dtype: torch.dtype
    symmetric: bool
    added: bool
    by_rows: Ways
    aligned: bool
    whole: bool
    tile: Tile

    def arguments(self, warp: int = WARP) -> dict[str, Any]:
        """Arguments of the kernel that choose it, and its options."""
        tile = self.tile
        names = "a_by_rows", "b_by_rows", "c_by_rows", "out_by_rows"
        found: dict[str, Any] = {
            "storage": FLOATS[self.dtype],
            "symmetric": self.symmetric,
            "added": self.added,
            **dict(zip(names, self.by_rows)),
            "tile_rows": tile.rows,
            "tile_columns": tile.columns,
            "tile_depth": tile.depth,
            "aligned": self.aligned,
            "whole": self.whole,
            "num_warps": tile.threads // warp,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
        }
        if tile.registers and self.aligned and self.whole:
            found["maxnreg"] = tile.registers
        return found


def symmetric(
    a: Sequence[Tensor],
    b: Sequence[Tensor] | None,
    c: Sequence[Tensor] | None,
    alpha: float,
    beta: float,
    out: Sequence[Tensor] | None = None,
    diagonal: float = 0.0,
    tile: Tile | None = None,
) -> list[Tensor]:
    """beta A B + alpha C + diagonal I of each batch of matrices, where it is known to be symmetric; half is computed.

    Sums are float32. The result is rounded once, and symmetric to the last bit. One launch serves all matrices that lie
    in the same way: A and B each by rows or by columns, and all with 16 bytes as a common divisor of addresses, strides
    and sizes or not. Without it they are read element by element, which takes several times as long.

    float32 is multiplied in IEEE arithmetic, as torch does by default: who asks for float32 asks for its 24 bits. TF32
    has 11; three products of parts in it come close to 24 on NVIDIA's GPUs, but AMD's have none.

    Args:
        a: each (batch, n, k), of one dtype, float16, bfloat16 or float32, and device. Elements of a row or of a column
            lie side by side, so a transposed view is as good; what lies otherwise is copied.
        b: each (batch, k, n); None for the transposes of `a`.
        c: each (batch, n, n), symmetric; None for nothing.
        out: each (batch, n, n), in memory of its own, where the results go; by default new memory.
        diagonal: added to each element of the diagonal.
        tile: by default from a table.

    Returns:
        The results, in the order of `a`.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or `out` is one of the others or lies otherwise.
        RuntimeError: captured in a CUDA graph before any product was computed.
    """
    second = [matrix.mT for matrix in a] if b is None else b
    shapes = [(matrix.shape[0], matrix.shape[1], matrix.shape[1]) for matrix in a]
    if out is None:
        out = [matrix.new_empty(shape) for matrix, shape in zip(a, shapes)]
    return _products(a, second, c, list(out), (alpha, beta, diagonal), tile, True)


def multiply(
    q: Sequence[Tensor],
    x: Sequence[Tensor],
    alpha: float,
    out: Sequence[Tensor] | None = None,
    tile: Tile | None = None,
) -> list[Tensor]:
    """Q X + alpha X of each batch of matrices; as `symmetric`, but all of it is computed.

    Args:
        q: each (batch, n, n).
        x: each (batch, n, m).
        out: each as its x; by default new memory, in which elements lie as in x.
    """
    if out is None:
        out = [torch.empty_like(matrix) for matrix in x]
    return _products(q, x, x, list(out), (alpha, 1.0, 0.0), tile, False)


def _products(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    c: Sequence[Tensor] | None,
    out: list[Tensor],
    numbers: tuple[float, float, float],
    tile: Tile | None,
    symmetric: bool,
) -> list[Tensor]:
    a, b = list(map(_side_by_side, a)), list(map(_side_by_side, b))
    c = None if c is None else list(map(_side_by_side, c))
    tensors = [*a, *b, *(c or ()), *out]
    where = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    key = (symmetric, tile, c is None, len(a), *where)
    launches = _plans.get(key)
    if launches is None:
        if len(_plans) == _MOST:
            del _plans[next(iter(_plans))]
        launches = _plans[key] = _plan(a, b, c, out, tile, symmetric)
    for launch in launches:
        with on(out[0].device):
            table = _tables.on_device(launch.table, out[0].device)
            fusedopt_product[(launch.programs,)](table.data_ptr(), launch.problems, *numbers, **launch.arguments)
    return out


class _Launch(NamedTuple):
    """`table`: the words that the kernel reads."""

    programs: int
    problems: int
    table: bytes
    arguments: dict[str, Any]


_MOST = 256
"""Plans, and tables on devices, that are remembered."""

# An iteration takes the same memory over and over, and finding out how it lies takes longer than looking it up.
_plans: dict[tuple[Any, ...], list[_Launch]] = {}


def _plan(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    c: Sequence[Tensor] | None,
    out: Sequence[Tensor],
    tile: Tile | None,
    symmetric: bool,
) -> list[_Launch]:
    given = [list(each) for each in zip(a, b, a if c is None else c, out, strict=True)]
    for matrices in given:
        _check(matrices, given[0][0], added=c is not None)
    groups: defaultdict[tuple[Ways, bool], list[list[Tensor]]] = defaultdict(list)
    for matrices in given:
        if matrices[3].numel():
            if c is None:
                matrices[2] = matrices[3]
            if symmetric:
                # Both ways are the same, so that is one way less.
                matrices[2:] = [matrix if _by_rows(matrix) else matrix.mT for matrix in matrices[2:]]
            first, second, third, last = map(_by_rows, matrices)
            groups[(first, second, third, last), _is_aligned(matrices)].append(matrices)
    return [
        _launch(members, ways, aligned, c is not None, tile, symmetric) for (ways, aligned), members in groups.items()
    ]


def _check(matrices: list[Tensor], first: Tensor, added: bool) -> None:
    a, b, c, out = matrices
    if a.ndim != 3 or b.ndim != 3:
        raise ValueError(f"a has {a.ndim} dimensions and b {b.ndim}; both must have 3: (batch, n, k)")
    n, m = a.shape[1], b.shape[2]
    expected = {"a": a.shape, "b": (len(a), a.shape[2], m), "c": (len(a), n, m), "out": (len(a), n, m)}
    for name, matrix in zip(expected, matrices):
        if name == "c" and not added:
            continue
        if (matrix.shape, matrix.dtype, matrix.device) != (expected[name], first.dtype, first.device):
            raise ValueError(
                f"{name} is {tuple(matrix.shape)} {matrix.dtype} on {matrix.device}; "
                f"with the others it must be {tuple(expected[name])} {first.dtype} on {first.device}"
            )
    if a.dtype not in FLOATS or a.dtype == torch.float64:
        raise ValueError(f"a is {a.dtype}; float16, bfloat16 and float32 are multiplied")
    if out.numel() and not _lies_side_by_side(out):
        raise ValueError(f"out has strides {out.stride()}; elements of a row or of a column must lie side by side")
    if out.numel() and any(out.data_ptr() == matrix.data_ptr() for matrix in matrices[: 3 if added else 2]):
        raise ValueError("out is a, b or c; other tiles would still have to be read from it")


def _by_rows(matrix: Tensor) -> bool:
    return matrix.stride(2) == 1 or matrix.shape[2] == 1


def _lies_side_by_side(matrix: Tensor) -> bool:
    return _by_rows(matrix) or matrix.stride(1) == 1 or matrix.shape[1] == 1


def _side_by_side(matrix: Tensor) -> Tensor:
    return matrix if matrix.ndim != 3 or _lies_side_by_side(matrix) else matrix.contiguous()


def _is_aligned(matrices: list[Tensor]) -> bool:
    vector = 16 // matrices[0].itemsize
    return not any(
        matrix.data_ptr() % 16 or any(size % vector for size in (*matrix.shape[1:], *_strides(matrix)))
        for matrix in matrices
    )


def _strides(matrix: Tensor) -> tuple[int, int]:
    """Of the batch, and of the dimension whose elements do not lie side by side."""
    return matrix.stride(0) if len(matrix) > 1 else 0, matrix.stride(1 if _by_rows(matrix) else 2)


def _launch(
    members: list[list[Tensor]],
    by_rows: Ways,
    aligned: bool,
    added: bool,
    tile: Tile | None,
    symmetric: bool,
) -> _Launch:
    first = members[0][0]
    # Programs start in order: those that take longest first, so that none of them is left for the end.
    members = sorted(members, key=lambda matrices: -matrices[0].shape[2])
    sizes = [(len(a), a.shape[1], b.shape[2], a.shape[2]) for a, b, _, _ in members]
    if tile is None:
        tile = tile_of([size[:3] for size in sizes], symmetric, first.dtype, *_gpu(first.device), aligned)
    whole = not any(
        rows % tile.rows or columns % tile.columns or depth % tile.depth for _, rows, columns, depth in sizes
    )
    form = Form(first.dtype, symmetric, added, by_rows, aligned, whole, tile)
    counts = [batch * count_of_tiles(rows, columns, tile, symmetric) for batch, rows, columns, _ in sizes]
    *firsts, count = itertools.accumulate(counts, initial=0)
    words = array("q", firsts)
    for (_, *size), matrices in zip(sizes, members):
        words.extend(size)
        for matrix in matrices:
            words.extend((matrix.data_ptr(), *_strides(matrix)))
    return _Launch(count, len(members), words.tobytes(), form.arguments())


@functools.cache
def _gpu(device: torch.device) -> tuple[str, int]:
    """Its family and number of multiprocessors."""
    if device.type == "cpu":
        return "ampere", 1
    cores = torch.cuda.get_device_properties(device).multi_processor_count
    return family(torch.cuda.get_device_capability(device), torch.version.hip is not None), cores


class _Tables:
    """Tables on devices by what is in them: products of the same memory send none again."""

    _SPARE = 2**16  # words, of several hundred products

    def __init__(self) -> None:
        self._sent: dict[tuple[bytes, torch.device], tuple[Any, Tensor]] = {}
        self._spare: Tensor | None = None
        # What replays of a graph read: its host memory too, for a graph copies it anew each time.
        self._captured: list[tuple[Tensor, Tensor]] = []

    def on_device(self, words: bytes, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return _host(words)
        if is_capturing():
            return self._captured_copy(_host(words), device)
        if self._spare is None or len(self._spare) < self._SPARE // 2:
            self._spare = torch.empty(self._SPARE, dtype=torch.int64, pin_memory=True)
        stream = torch.cuda.current_stream(device)
        sent = self._sent.pop((words, device), None)
        if sent is None or sent[0] != stream:
            # torch does not reuse pinned memory before the copy has been made.
            sent = stream, _host(words).pin_memory().to(device, non_blocking=True)
        # The one that was not asked for the longest lies first.
        self._sent[words, device] = sent
        if len(self._sent) > _MOST:
            del self._sent[next(iter(self._sent))]
        return sent[1]

    def _captured_copy(self, host: Tensor, device: torch.device) -> Tensor:
        """From pinned memory that was allocated before, as it cannot be now, and that nothing else is written to."""
        if self._spare is None or len(self._spare) < len(host):
            raise RuntimeError(NOT_WARMED_UP)
        pinned, self._spare = self._spare[: len(host)], self._spare[len(host) :]
        found = pinned.copy_(host).to(device, non_blocking=True)
        self._captured.append((pinned, found))
        return found


def _host(words: bytes) -> Tensor:
    return torch.frombuffer(bytearray(words), dtype=torch.int64)


_tables = _Tables()
