"""Steps on GPUs: tables brought to the device, and what a captured step computes there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .binding import Rule

NOT_WARMED_UP = (
    "a step is captured in a CUDA graph whose tables have not been made yet; run one step without capturing it first, "
    "on the same gradients' sizes, as torch.cuda.graphs asks for"
)


class Launch(Protocol):
    """`fusedopt._native.Launch`: one launch of a step. csrc/launch.h says more.

    form: the storage of parameter, gradient, states and master, and the flags, as the arguments of a kernel.
    table, scalars, tiles: int64, float64 and int32 memory; see kernels/step.py.
    parameters: numbers of the parameters in the plan.
    """

    form: tuple[Any, ...]
    group: int
    device: int
    captured: bool
    table: memoryview
    scalars: memoryview
    tiles: memoryview
    parameters: list[int]
    new_table: bool
    new_scalars: bool
    new_tiles: bool


class NormLaunch(Protocol):
    """`fusedopt._native.NormLaunch`: gradients of one storage whose norm is taken."""

    device: int
    grad: str
    aligned: bool
    table: memoryview
    trees: int


class Tables:
    """Memory on devices that holds what was last sent for each launch."""

    def __init__(self) -> None:
        self._sent: dict[tuple[int, str], tuple[Any, Tensor]] = {}
        self._spare: dict[tuple[int, str], Tensor] = {}
        # What replays of a graph read: its host memory too, for a graph copies it anew each time.
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._last: dict[Any, bytes] = {}

    def changed(self, key: Any, words: memoryview) -> bool:
        """Whether they are others than at the last call."""
        now = words.tobytes()
        last, self._last[key] = self._last.get(key), now
        return now != last

    def on_device(
        self, key: tuple[int, str], host: Callable[[], Tensor], device: torch.device, changed: bool, captured: bool
    ) -> Tensor:
        """What `host` returns, on the device: sent if it changed or the stream did, which another may still be reading.

        Args:
            captured: steps may be captured later, when no pinned memory can be allocated.

        Raises:
            RuntimeError: a step is captured before one was run.
        """
        if device.type != "cuda":
            return host()
        if is_capturing():
            return self._captured_copy(key, host(), device)
        stream = torch.cuda.current_stream(device)
        if changed or key not in self._sent or self._sent[key][0] != stream:
            # torch does not reuse pinned memory before the copy has been made.
            self._sent[key] = stream, host().pin_memory().to(device, non_blocking=True)
        found = self._sent[key][1]
        if captured and (key not in self._spare or self._spare[key].shape != found.shape):
            self._spare[key] = torch.empty_like(found, device="cpu", pin_memory=True)
        return found

    def _captured_copy(self, key: tuple[int, str], values: Tensor, device: torch.device) -> Tensor:
        self._sent.pop(key, None)  # what comes after the capture is not known to be the same
        if key not in self._spare or self._spare[key].shape != values.shape:
            raise RuntimeError(NOT_WARMED_UP)
        pinned = self._spare.pop(key).copy_(values)
        found = pinned.to(device, non_blocking=True)
        self._captured.append((pinned, found))
        return found


def set_keys(table: Tensor, keys: Tensor | None) -> Tensor:
    """The table on the device, with captured keys in it, if there are any."""
    if keys is not None:
        table.view(len(keys), -1)[:, 2].copy_(keys)
    return table


class Driver(Protocol):
    """What runs the kernels of one backend, for one plan."""

    def launch(
        self, place: int, launch: Launch, rule: Rule, control: Tensor, scalars: Tensor | None, keys: Tensor | None
    ) -> None:
        """Queue launch number `place` on the device of `control`.

        Args:
            scalars, keys: rows of the scalars and keys of stochastic rounding, int64, where they are captured.
        """

    def norm(self, launches: Sequence[NormLaunch], control: Tensor, max_norm: float, captured: bool) -> Clipped:
        """The norm of gradients, and `control` with clipping to `max_norm` in it."""
        ...


Clipped = tuple[Tensor, Tensor]
"""A norm, zero-dimensional float32, and a control."""


@functools.cache
def neutral_control(device: torch.device) -> Tensor:
    """A factor of 1, and nothing skipped."""
    return torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)


def control_of(scale: Tensor | None, found_inf: Tensor | None, device: torch.device) -> Tensor:
    """From what GradScaler sets: 1 / scale, and whether to skip; without a synchronization."""
    if scale is None and found_inf is None:
        return neutral_control(device)
    one, zero = neutral_control(device)
    factor = one if scale is None else 1 / scale.to(device, torch.float64, non_blocking=True)
    skip = zero if found_inf is None else found_inf.to(device, torch.float64, non_blocking=True)
    return torch.stack([factor.reshape(()), skip.reshape(())])


def is_capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    # Not asked before CUDA is in use: a build for CUDA on a machine without its driver raises.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Launches inside go to the device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


def scalar_rows(values: Sequence[Any], rows: int, control: Tensor) -> Tensor:
    """The values as columns, each a number, zero-dimensional or of a value for each row, in double on the device."""
    columns = []
    for value in values:
        if isinstance(value, Tensor):
            columns.append(value.to(control).expand(rows))
        else:
            columns.append(torch.full((rows,), value, dtype=control.dtype, device=control.device))
    return torch.stack(columns, 1)
