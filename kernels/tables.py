"""The tables of launches, made in Python where there is no native module: the same words as csrc/launch.cpp's."""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedopt.backends import Update
from fusedopt.binding import Rule
from fusedopt.codecs import Codes

from .codecs import FLOATS, MASTERS
from .step import TILE, Form

Words = tuple[int, int, tuple[int, ...]]
"""Of one tensor: number of elements, key of stochastic rounding, and the words of its row from the parameter's on."""


@dataclass
class Launch:
    """As `fusedopt._gpu.Launch`."""

    form: tuple[Any, ...]
    device: int
    table: memoryview
    scalars: memoryview
    tiles: memoryview
    parameters: list[int]
    group: int = 0
    captured: bool = False
    new_table: bool = True
    new_scalars: bool = True
    new_tiles: bool = True


def launches_of(updates: Sequence[Update]) -> list[tuple[Launch, Rule]]:
    """A launch for each form of these updates' tensors, which lie on one device."""
    groups: defaultdict[Form, list[tuple[int, Words]]] = defaultdict(list)
    for index, update in enumerate(updates):
        if update.param.numel():
            form, words = describe(update)
            groups[form].append((index, words))
    return [(_launch(form, members, updates), form.rule) for form, members in groups.items()]


def _launch(form: Form, members: Sequence[tuple[int, Words]], updates: Sequence[Update]) -> Launch:
    tiles = [-(-numel // TILE) for _, (numel, _, _) in members]
    firsts = itertools.accumulate(tiles, initial=0)
    first = updates[members[0][0]]
    given = [(*updates[index].scalars, updates[index].grad_scale) for index, _ in members]
    rows = {scalars: row for row, scalars in enumerate(dict.fromkeys(given))}
    words = array("q")
    for (_, (numel, key, addresses)), at, scalars in zip(members, firsts, given):
        words.extend((numel, rows[scalars], key, at, *addresses))
    owners = array("i", itertools.chain.from_iterable([index] * count for index, count in enumerate(tiles)))
    device = first.param.device
    values = array("d", itertools.chain(*rows))
    table, memory, owned = (memoryview(each).cast("B") for each in (words, values, owners))
    number = -1 if device.type == "cpu" else device.index
    return Launch(form[1:], number, table, memory, owned, [index for index, _ in members])


def describe(update: Update) -> tuple[Form, Words]:
    """The form of an update's tensors, none of which is empty, and their words."""
    param, master, key = update.param, update.master, update.key
    codes = [isinstance(state, Codes) for state in update.states]
    states = [state.codes if isinstance(state, Codes) else state for state in update.states]
    scales = [state.scale.data_ptr() if isinstance(state, Codes) else 0 for state in update.states]
    kinds = tuple(storage(state) for state in update.states)
    tensors = [param, update.grad, master, *states]
    if param.is_complex():
        tensors = [None if tensor is None else torch.view_as_real(tensor) for tensor in tensors]
    present = [tensor for tensor in tensors if tensor is not None]
    low = None if master is None else MASTERS[master.dtype]
    stochastic = key is not None and param.dtype in (torch.bfloat16, torch.float16) and low != "low16"
    walk: tuple[int, ...] = ()
    dims = 0
    if not all(tensor.is_contiguous() for tensor in present):
        strides = [tensor.stride() if tensor is not None else None for tensor in tensors]
        sizes, walked = _walk(present[0].shape, strides, in_order=key is not None or any(codes))
        dims = len(sizes)
        walk = (*sizes, *itertools.chain.from_iterable(walked))
    aligned = not dims and all(tensor.data_ptr() % 16 == 0 for tensor in present)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    words = (*addresses[:3], *itertools.chain(*zip(addresses[3:], scales)), *walk)
    word = key.first | (key.second - (key.second >> 31 << 32)) << 32 if key is not None and stochastic else 0
    form = Form(update.rule, storage(param), storage(update.grad), kinds, low, stochastic, aligned, dims)
    return form, (present[0].numel(), word, words)


def storage(stored: Tensor | Codes) -> str:
    """Its name in csrc/codecs.h."""
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
