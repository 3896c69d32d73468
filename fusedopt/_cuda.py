"""Runs a plan's launches by the native module's CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._gpu import Clipped, Launch, NormLaunch, Tables, set_keys
from .backends import native
from .binding import Rule


class CudaDriver:
    """`fusedopt._gpu.Driver`. Tables go by value where they fit in a kernel's arguments."""

    def __init__(self) -> None:
        self._tables = Tables()
        self._prepared: set[int] = set()

    def launch(
        self, place: int, launch: Launch, rule: Rule, control: Tensor, scalars: Tensor | None, keys: Tensor | None
    ) -> None:
        device = control.device
        if place not in self._prepared:
            native().cuda_prepare(launch)
            self._prepared.add(place)
        held = launch.table.nbytes + launch.scalars.nbytes
        addresses = [0, 0 if scalars is None else scalars.data_ptr()]
        if keys is not None or held > native().cuda_argument_limit(launch.device):
            table = self._on_device((place, "table"), launch.table, device, launch.new_table, launch.captured)
            addresses[0] = set_keys(table, keys).data_ptr()
            if scalars is None:
                scalars = self._on_device((place, "scalars"), launch.scalars, device, launch.new_scalars, False)
                addresses[1] = scalars.data_ptr()
        native().cuda_step(launch, _stream(device), control.data_ptr(), *addresses)

    def norm(self, launches: Sequence[NormLaunch], control: Tensor, max_norm: float, captured: bool) -> Clipped:
        device = control.device
        number = device.index or 0
        norm, out = torch.empty((), device=device), torch.empty_like(control)
        sums = torch.empty(native().cuda_norm_sums(sum(launch.trees for launch in launches)), device=device)
        words = [launch.table for launch in launches]
        table = 0
        if any(memory.nbytes > native().cuda_argument_limit(number) for memory in words):
            whole = memoryview(b"".join(words))
            changed = self._tables.changed("norm", whole)
            table = self._on_device((0, "norm"), whole, device, changed, captured).data_ptr()
        native().cuda_prepare_norm(number)
        native().cuda_norm(
            launches,
            number,
            _stream(device),
            control.data_ptr(),
            max_norm,
            sums.data_ptr(),
            table,
            out.data_ptr(),
            norm.data_ptr(),
        )
        return norm, out

    def _on_device(
        self, key: tuple[int, str], words: memoryview, device: torch.device, changed: bool, captured: bool
    ) -> Tensor:
        def host() -> Tensor:
            return torch.frombuffer(bytearray(words), dtype=torch.int64)

        return self._tables.on_device(key, host, device, changed, captured)


def _stream(device: torch.device) -> int:
    """The current stream's handle; on the CPU, where a driver's stand-in runs, none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
