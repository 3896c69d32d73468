"""One launch for many tensors: a rule over tiles of all tensors stored alike, which a table in device memory describes.

The table has a row of int64 for each tensor, `width(states, dims)` long:

    0  number of elements (of a complex tensor twice as many)
    1  its row of the scalars
    2  key of stochastic rounding: the first word below, the second above
    3  number of its first tile
    4  address of the parameter
    5  of the gradient
    6  of the master copy
    7  of the first state, and 8 of its scales; 9 and 10 of the second; ...
    then, where tensors are strided, the sizes of `dims` dimensions in walking order, and the strides in elements along
    them of the parameter, gradient, master and each state

Unused words are 0. Beside it lie, in float64, rows of the rule's scalars with the gradient scale last, and, in int32,
the tensor of each tile. Everything that differs from step to step is read from memory, so no value compiles anything.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import contextlib
import functools
import itertools
from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt.backends import Update
from fusedopt.binding import Rule
from fusedopt.codecs import BLOCK, SIGNED, UNSIGNED, Codes

from .codecs import (
    FLOATS,
    MASTERS,
    TABLES,
    decode,
    decode_int8,
    decode_parameter,
    encode,
    encode_int8,
    encode_parameter,
    pointer,
    random_words,
    split,
    tables,
)

TILE = 8 * BLOCK  # elements; 16 for each of 128 threads, so that 8-bit codes too are read 16 bytes at a time

_BLOCK, _ROWS = tl.constexpr(BLOCK), tl.constexpr(TILE // BLOCK)


def width(states: int, dims: int) -> int:
    return 7 + 2 * states + dims * (4 + states)


@triton.jit
def _place(at, sizes, strides, dims: tl.constexpr):
    """Where the elements at positions `at` of the walk lie, in elements."""
    if dims == 0:
        return at
    else:
        offset = tl.zeros(at.shape, tl.int64)
        for d in tl.static_range(dims - 1, 0, -1):
            size = tl.load(sizes + d)
            offset += (at % size) * tl.load(strides + d)
            at = at // size
        return offset + at * tl.load(strides)


@triton.jit
def _table(tables, storage: tl.constexpr):
    return tables + (0 if storage == "int8_signed" else TABLES)


@triton.jit
def _scales(row, index, start):
    """The scales of a tile's rows, and which of them there are."""
    blocks = start // _BLOCK + tl.arange(0, _ROWS)
    return pointer(tl.load(row + 8 + 2 * index), "float32", False) + blocks, blocks * _BLOCK < tl.load(row)


@triton.jit
def _read_state(row, tables, index, start, place, mask, storage: tl.constexpr, aligned: tl.constexpr):
    state = tl.load(pointer(tl.load(row + 7 + 2 * index), storage, aligned) + place, mask)
    if storage == "int8_signed" or storage == "int8_unsigned":
        scales, there = _scales(row, index, start)
        return decode_int8(state, tl.load(scales, there), _table(tables, storage))
    else:
        return decode(state, storage)


@triton.jit
def _write_state(values, row, tables, index, start, place, mask, storage: tl.constexpr, aligned: tl.constexpr):
    state = pointer(tl.load(row + 7 + 2 * index), storage, aligned) + place
    if storage == "int8_signed" or storage == "int8_unsigned":
        codes, scale = encode_int8(values, mask, _table(tables, storage), storage == "int8_signed")
        scales, there = _scales(row, index, start)
        tl.store(state, codes, mask)
        tl.store(scales, scale, there)
    else:
        tl.store(state, encode(values, storage), mask)


@triton.jit
def _update(
    row,
    scalars,
    tables,
    start,
    at,
    mask,
    rule: tl.constexpr,
    param: tl.constexpr,
    grad: tl.constexpr,
    states: tl.constexpr,
    master: tl.constexpr,
    stochastic: tl.constexpr,
    aligned: tl.constexpr,
    dims: tl.constexpr,
    scalar_count: tl.constexpr,
):
    """Update the elements at positions `at` of one tensor, which begin at `start`; those outside of `mask` stay."""
    count: tl.constexpr = len(states)
    real: tl.constexpr = tl.float64 if param == "float64" else tl.float32
    sizes = row + 7 + 2 * count
    strides = sizes + dims
    param_at = pointer(tl.load(row + 4), param, aligned) + _place(at, sizes, strides, dims)
    grad_at = pointer(tl.load(row + 5), grad, aligned) + _place(at, sizes, strides + dims, dims)
    stored_grad = tl.load(grad_at, mask)
    stored = tl.load(param_at, mask)
    old = stored
    if master is not None:
        master_at = pointer(tl.load(row + 6), master, aligned) + _place(at, sizes, strides + 2 * dims, dims)
        old = tl.load(master_at, mask)
    p = decode_parameter(stored, old, param, master)
    scalars += tl.load(row + 1) * (scalar_count + 1)
    g = decode(stored_grad, grad).to(real) * tl.load(scalars + scalar_count).to(real)
    given = ()
    for i in tl.static_range(scalar_count):
        given = given + (tl.load(scalars + i).to(real),)
    values = ()
    for i in tl.static_range(count):
        place = _place(at, sizes, strides + (3 + i) * dims, dims)
        values = values + (_read_state(row, tables, i, start, place, mask, tl.constexpr(states[i]), aligned).to(real),)

    result = rule(p, g, *values, *given)

    p = result[0]
    words = random_words(at, tl.load(row + 2)) if stochastic else at
    if master == "low16" or master == "low8":
        high, low = split(p, words, master, stochastic)
        tl.store(param_at, high, mask)
        tl.store(master_at, low, mask)
    else:
        tl.store(param_at, encode_parameter(p, words, param, stochastic), mask)
        if master is not None:
            tl.store(master_at, p, mask)
    for i in tl.static_range(count):
        place = _place(at, sizes, strides + (3 + i) * dims, dims)
        _write_state(result[i + 1], row, tables, i, start, place, mask, tl.constexpr(states[i]), aligned)


# Not specialized on alignment either: they may lie anywhere.
@triton.jit(do_not_specialize=["table", "scalars", "tiles", "tables"])
def fusedopt_step(
    table,
    scalars,
    tiles,
    tables,
    rule: tl.constexpr,
    param: tl.constexpr,
    grad: tl.constexpr,
    states: tl.constexpr,
    master: tl.constexpr,
    stochastic: tl.constexpr,
    aligned: tl.constexpr,
    dims: tl.constexpr,
    scalar_count: tl.constexpr,
):
    """One tile of one tensor. Whole tiles of tensors that lie in one piece are read and written without a mask."""
    tile = tl.program_id(0)
    words: tl.constexpr = 7 + 2 * len(states) + dims * (4 + len(states))
    row = table + tl.load(tiles + tile).to(tl.int64) * words
    numel = tl.load(row)
    start = (tile - tl.load(row + 3)) * (_ROWS * _BLOCK)
    at = start + tl.arange(0, _ROWS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    if dims == 0:
        if start + _ROWS * _BLOCK <= numel:
            _update(
                row, scalars, tables, start, at, None,
                rule, param, grad, states, master, stochastic, aligned, dims, scalar_count,
            )  # fmt: skip
        else:
            _update(
                row, scalars, tables, start, at, at < numel,
                rule, param, grad, states, master, stochastic, aligned, dims, scalar_count,
            )  # fmt: skip
    else:
        _update(
            row, scalars, tables, start, at, at < numel,
            rule, param, grad, states, master, stochastic, aligned, dims, scalar_count,
        )  # fmt: skip


# --- the host ------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What one launch's tensors share, and one kernel is compiled for. Storage is by the names of csrc/codecs.h.

    aligned: every address is a multiple of 16 bytes. dims: of strided tensors, else 0.
    """

    rule: Rule
    param: str
    grad: str
    states: tuple[str, ...]
    master: str | None
    stochastic: bool
    aligned: bool
    dims: int

    def arguments(self) -> dict[str, object]:
        """The kernel's arguments from `rule` on."""
        return {**self._asdict(), "rule": self.rule.triton, "scalar_count": len(self.rule.scalars)}

    def options(self, amd: bool) -> dict[str, object]:
        """How it is compiled. Strided tensors need 64-bit divisions, and the registers of more threads for them."""
        options: dict[str, object] = {"num_warps": 8 if self.dims else 4, "enable_fp_fusion": False}
        # Left to itself, NVIDIA's assembler may spill to fit more threads in; Triton knows the option for it alone.
        return options if amd else {**options, "maxnreg": 255}


class _Member(NamedTuple):
    """One tensor of a launch: its words of the table but 1 and 3, and its row of the scalars."""

    numel: int
    key: int
    addresses: tuple[int, ...]
    walk: tuple[int, ...]
    scalars: tuple[float, ...]


class TableStep:
    """Steps an optimizer's tensors on one device, in one launch for each `Form`.

    Tables stay on the device from step to step, one for each form, and are sent again when a word of them or the
    stream changed.
    """

    def __init__(self) -> None:
        self._tables: dict[Form, _Table] = {}

    @torch.no_grad()
    def __call__(self, updates: Sequence[Update]) -> None:
        # Gradients in memory of their own, if they are conjugate or negative views, last until the launch.
        grads = [update.grad.resolve_conj().resolve_neg() for update in updates]
        groups: defaultdict[Form, list[_Member]] = defaultdict(list)
        for update, grad in zip(updates, grads):
            if update.param.numel():
                form, member = _describe(update, grad)
                groups[form].append(member)
        for form, members in groups.items():
            self._tables.setdefault(form, _Table()).launch(form, members, updates[0].param.device)
        self._tables = {form: table for form, table in self._tables.items() if form in groups}


class _Table:
    """What was last sent for one form, and where it lies on the device."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[bytes, object]] = {}
        self._tensors: dict[str, Tensor] = {}

    def launch(self, form: Form, members: Sequence[_Member], device: torch.device) -> None:
        tiles = [-(-member.numel // TILE) for member in members]
        firsts = itertools.accumulate(tiles, initial=0)
        rows = {scalars: row for row, scalars in enumerate(dict.fromkeys(member.scalars for member in members))}
        words = array("q")
        for member, first in zip(members, firsts):
            words.extend((member.numel, rows[member.scalars], member.key, first, *member.addresses, *member.walk))
        owners = array("i", itertools.chain.from_iterable([index] * count for index, count in enumerate(tiles)))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            fusedopt_step[(len(owners),)](
                self._on_device("table", words, torch.int64, device),
                self._on_device("scalars", array("d", itertools.chain(*rows)), torch.float64, device),
                self._on_device("tiles", owners, torch.int32, device),
                _tables_on(device),
                **form.arguments(),
                **form.options(amd=torch.version.hip is not None),
            )

    def _on_device(self, name: str, values: array[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """`values` on the device; what another stream may still be reading is not overwritten."""
        state = (values.tobytes(), torch.cuda.current_stream() if device.type == "cuda" else None)
        if self._sent.get(name) != state:
            host = torch.frombuffer(values, dtype=dtype)
            # torch does not reuse pinned memory before the copy has been made.
            self._tensors[name] = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
            self._sent[name] = state
        return self._tensors[name]


@functools.cache
def _tables_on(device: torch.device) -> Tensor:
    return torch.cat([tables(SIGNED), tables(UNSIGNED)]).to(device)


def _describe(update: Update, grad: Tensor) -> tuple[Form, _Member]:
    param, master, key = update.param, update.master, update.key
    codes = [isinstance(state, Codes) for state in update.states]
    states = [state.codes if isinstance(state, Codes) else state for state in update.states]
    scales = [state.scale.data_ptr() if isinstance(state, Codes) else 0 for state in update.states]
    kinds = tuple(_storage(state) for state in update.states)
    tensors = [param, grad, master, *states]
    if param.is_complex():
        tensors = [None if tensor is None else torch.view_as_real(tensor) for tensor in tensors]
    present = [tensor for tensor in tensors if tensor is not None]
    low = None if master is None else MASTERS[master.dtype]
    stochastic = key is not None and param.dtype in (torch.bfloat16, torch.float16) and low != "low16"
    walk: tuple[int, ...] = ()
    dims = 0
    if not all(tensor.is_contiguous() for tensor in present):
        strides = [tensor.stride() if tensor is not None else None for tensor in tensors]
        sizes, walked = _walk(present[0].shape, strides, in_order=stochastic or any(codes))
        dims = len(sizes)
        walk = (*sizes, *itertools.chain.from_iterable(walked))
    aligned = not dims and all(tensor.data_ptr() % 16 == 0 for tensor in present)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    members = (*addresses[:3], *itertools.chain(*zip(addresses[3:], scales)))
    word = 0 if key is None else key.first | (key.second - (key.second >> 31 << 32)) << 32
    form = Form(update.rule, _storage(param), _storage(grad), kinds, low, stochastic, aligned, dims)
    return form, _Member(present[0].numel(), word, members, walk, (*update.scalars, update.grad_scale))


def _storage(stored: Tensor | Codes) -> str:
    if isinstance(stored, Codes):
        return "int8_signed" if stored.map.zero else "int8_unsigned"
    return FLOATS[stored.dtype.to_real()]


def _walk(
    shape: Sequence[int], strides: Sequence[Sequence[int] | None], in_order: bool
) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions in which every tensor can be walked: their sizes, and the strides of each tensor.

    None of them where all tensors then lie in one piece. `in_order` keeps the row-major order, which blocks of codes
    and random numbers go by; otherwise the parameter's order in memory is taken. A missing tensor has stride 0.
    """
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if not in_order:
        axes.sort(key=lambda axis: -(strides[0] or shape)[axis])
    sizes: list[int] = []
    walked: list[list[int]] = [[] for _ in strides]
    for axis in axes:
        steps = [stride[axis] if stride else 0 for stride in strides]
        if sizes and all(outer[-1] == step * shape[axis] for outer, step in zip(walked, steps)):
            sizes[-1] *= shape[axis]
            for outer, step in zip(walked, steps):
                outer[-1] = step
        else:
            sizes.append(shape[axis])
            for outer, step in zip(walked, steps):
                outer.append(step)
    if all(outer == [1] for outer, stride in zip(walked, strides) if stride):
        return [], []
    return sizes, walked
