"""Runs a plan's launches by Triton."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusedopt._gpu import Clipped, Launch, NormLaunch, Tables, neutral_control, on, set_keys
from fusedopt.backends import Update
from fusedopt.binding import Rule
from fusedopt.codecs import SIGNED, UNSIGNED

from .codecs import tables
from .norm import norm
from .step import Form, fusedopt_step
from .tables import launches_of


class TritonDriver:
    """`fusedopt._gpu.Driver`, in one kernel for each form."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._arguments: dict[int, dict[str, object]] = {}

    def launch(
        self, place: int, launch: Launch, rule: Rule, control: Tensor, scalars: Tensor | None, keys: Tensor | None
    ) -> None:
        if place not in self._arguments:
            form = Form(rule, *launch.form)
            self._arguments[place] = {**form.arguments(), **form.options(amd=torch.version.hip is not None)}
        device = control.device

        def sent(name: str, dtype: torch.dtype) -> Tensor:
            def host() -> Tensor:
                return torch.frombuffer(getattr(launch, name), dtype=dtype)

            return self._tables.on_device(
                (place, name), host, device, getattr(launch, f"new_{name}"), captured=launch.captured
            )

        tiles = sent("tiles", torch.int32)
        with on(device):
            fusedopt_step[(len(tiles),)](
                set_keys(sent("table", torch.int64), keys),
                sent("scalars", torch.float64) if scalars is None else scalars,
                tiles,
                _codec_tables(device),
                control,
                **self._arguments[place],
            )

    def norm(self, launches: Sequence[NormLaunch], control: Tensor, max_norm: float, captured: bool) -> Clipped:
        return norm(self._tables, launches, control, max_norm, captured)


@torch.no_grad()
def step_updates(updates: Sequence[Update]) -> None:
    """Steps tensors on one device where there is no native module to plan it."""
    # Gradients in memory of their own, if they are conjugate or negative views, last until the launch.
    updates = [replace(update, grad=update.grad.resolve_conj().resolve_neg()) for update in updates]
    driver = TritonDriver()
    for place, (launch, rule) in enumerate(launches_of(updates)):
        driver.launch(place, launch, rule, neutral_control(updates[0].param.device), None, None)


@functools.cache
def _codec_tables(device: torch.device) -> Tensor:
    return torch.cat([tables(SIGNED), tables(UNSIGNED)]).to(device)
