"""Updates of every rule, storage format and kind of memory, for tests of GPU kernels that run without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from helpers import GRAD_LAYOUTS, LAYOUTS, surroundings, values
from steps import assert_near
from torch import Tensor

from fusedopt._muon import Muon
from fusedopt._state import NARROW, new_master, new_state, stored
from fusedopt.backends import Update
from fusedopt.binding import RULES
from fusedopt.codecs import (
    BLOCK,
    MASTERS,
    ROUNDINGS,
    STATE_DTYPES,
    Codes,
    DynamicMap,
    blocks,
    encode,
    magnitudes,
    rounding_key,
    state_dtype,
)
from fusedopt.optim import OPTIMIZERS

KINDS = {name: kind for optimizer in (*OPTIMIZERS.values(), Muon) for name, kind in optimizer.states.items()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
# One number, none, and two tiles: a whole one and a ragged one.
SHAPES = ((), (0,), (2, 3, 5, 83))


def updates(case: dict[str, Any]) -> list[Update]:
    """One of each shape, all stored as `case` says, the same at every call; without gradients, scalars and keys."""
    rule, dtype = RULES[case["rule"]], case["param"]
    made = []
    for index, shape in enumerate(SHAPES):
        param = LAYOUTS[case["layout"]](values(shape, 1, index, dtype=dtype, awkward=dtype in NARROW))
        state: dict[str, Tensor] = {}
        for number, name in enumerate(rule.states):
            state |= new_state(name, param, KINDS[name], state_dtype(case["state"], KINDS[name], dtype))
            first = values(shape, 3, index, number)
            first = first.abs() if KINDS[name] == "unsigned" else first
            if dtype.is_complex:
                state[name].copy_(torch.complex(first, first.flip(0) if first.ndim else first))
            else:
                encode(first, stored(state, name, KINDS[name]))
        made.append(
            Update(
                rule,
                param,
                param,
                [stored(state, name, KINDS[name]) for name in rule.states],
                (),
                master=master_of(param, case["master"], index),
            )
        )
    return made


def master_of(param: Tensor, name: str | None, seed: int) -> Tensor | None:
    """Bits that the parameter lacks; of float32 masters every third is out of date."""
    dtype = MASTERS[name] if param.dtype in NARROW else None
    if dtype is None or (param.dtype == torch.float16 and dtype != torch.float32):
        return None
    master = new_master(param, dtype)
    if dtype == torch.float32:
        outdated = values(param.shape, 4, seed) > 0.4
        return torch.where(outdated, master + 1, master * (1 + 2.0**-13)).to(dtype)
    low = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    return master.copy_(torch.randint(low.min, low.max + 1, param.shape, generator=generator))


def at_step(updates: Sequence[Update], step: int, case: dict[str, Any]) -> list[Update]:
    """With what a step brings: gradients, scalars that differ between tensors, and keys."""
    found = []
    for index, update in enumerate(updates):
        awkward = update.param.dtype not in (torch.float64, torch.complex128)
        dtype = update.param.dtype if update.param.is_complex() else case["grad"] or update.param.dtype
        grad = values(update.param.shape, 2, step, index, dtype=dtype, awkward=awkward)
        imaginary_complex = case["grad_layout"] == "imaginary" and dtype.is_complex
        scalars = tuple((0.1, 0.27, 0.06, 0.5)[(i + step + index // 2) % 4] for i in range(len(update.rule.scalars)))
        stochastic = case["rounding"] == "stochastic" and update.param.dtype in NARROW
        found.append(
            replace(
                update,
                grad=GRAD_LAYOUTS["conjugate" if imaginary_complex else case["grad_layout"]](grad),
                scalars=scalars,
                grad_scale=-0.7 if step else 1.0,
                key=rounding_key(3, step, index) if stochastic else None,
            )
        )
    return found


def parts(update: Update) -> dict[str, Tensor]:
    found = {"parameter": update.param, "beside the parameter": surroundings(update.param)}
    if update.master is not None:
        found["master"] = update.master
    for name, state in zip(update.rule.states, update.states):
        pieces = {"": state.codes, " scale": state.scale} if isinstance(state, Codes) else {"": state}
        found |= {name + piece: tensor for piece, tensor in pieces.items()}
    return found


def assert_near_codes(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Of float64 the last bit is free, which may decide how a code is rounded."""
    if ours.dtype == torch.uint8:
        assert not ((ours.int() - theirs.int()).abs() > 1).any(), what
    else:
        assert_near(ours, theirs, 2, what)


STORED: dict[str, Sequence[Any]] = {
    "rule": list(RULES),
    "param": DTYPES,
    "state": STATE_DTYPES,
    "narrow": [(master, rounding) for master in MASTERS for rounding in ROUNDINGS],
}
LAID: dict[str, Sequence[Any]] = {
    "grad": (None, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "layout": list(LAYOUTS),
    "grad_layout": list(GRAD_LAYOUTS),
}


def case_of(row: dict[str, Any]) -> dict[str, Any]:
    master, rounding = row["narrow"]
    case: dict[str, Any] = {"grad": None, "layout": "contiguous", "grad_layout": "contiguous"}
    return {**case, **row, "master": master, "rounding": rounding}


def name_of(row: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in row.values())


def buffered(x: Tensor, map: DynamicMap, codes: Tensor | None = None) -> Callable[[], Update]:
    """x quantized with `map`, or with `codes` what they mean added to the parameter: a momentum buffer of one step."""

    def make() -> Update:
        first = torch.full(x.shape, map.zero, dtype=torch.uint8) if codes is None else codes.clone()
        state = Codes(first, torch.full((blocks(x.numel()),), 0.7), map)
        # l2, momentum, gain, lr_grad, lr_buffer
        scalars = (0.0, 0.0, 1.0, 0.0, 0.0) if codes is None else (0.0, 1.0, 0.0, 0.0, -1.0)
        return Update(RULES["sgd_momentum"], torch.zeros_like(x), x, [state], scalars)

    return make


def hard_to_quantize(map: DynamicMap) -> Tensor:
    """At and beside every magnitude and every middle of two; in each block also 1, its scale."""
    exact = magnitudes(map)
    x = torch.cat([exact, (exact[1:] + exact[:-1]) / 2])
    x = torch.cat([x, *(torch.nextafter(x, torch.tensor(to)) for to in (0.0, 1.0)), x * (1 + 3e-6), x * (1 - 3e-6)])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).view(-1, BLOCK - 1)
    return torch.cat([torch.ones(len(x), 1), x], 1).flatten()
