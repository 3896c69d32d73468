"""What there is to measure: an op, who can do it, and one of them at work on a cell."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from .matrices import Flops
from .presets import Precision, Shape
from .timing import Call


@dataclasses.dataclass(frozen=True)
class Provider:
    """An implementation of ops. unavailable(device) -> why it cannot work there, or None."""

    name: str
    unavailable: Callable[[torch.device], str | None]


class Work(NamedTuple):
    """What is timed; `before`, if there is one, runs untimed ahead of each call."""

    call: Call
    before: Call | None = None


def warm(work: Work) -> Work:
    """`work`, done once."""
    if work.before:
        work.before()
    work.call()
    return work


@dataclasses.dataclass
class Contender:
    """One provider at work on one cell, warm.

    wrong: what is wrong with its results, or ""; then nothing else counts.
    step: the work on the cell's tensors. host_step: the same on tensors of next to no elements (on the CPU).
    moved_bytes: the least that must be read and written, stored as it is.
    flops: of matrix products, if its time is theirs: those that the plain algorithm takes, whichever it has.
    state_bytes: what it keeps from step to step, if it is an optimizer.
    figures: what else there is to say, by the name of the column.
    error: the distance to the reference, at most `limit` unless wrong.
    """

    wrong: str = ""
    note: str = ""
    step: Work = Work(lambda: None)
    host_step: Work | None = None
    moved_bytes: int = 0
    state_bytes: int | None = None
    flops: Flops | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    error: float = math.nan
    limit: float = math.nan

    def hold_to_limit(self) -> None:
        """Say that it is wrong where it is; also when its error is NaN."""
        if not self.error <= self.limit:
            self.wrong = f"error {self.error:.3g}, at most {self.limit:.3g} is right"


class Op(abc.ABC):
    """Something to measure.

    name: on the command line. title: in tables, where one name may have several.
    providers, presets, precisions: what it can be measured with, by name; presets give the shapes.
    default_presets, default_baselines: unless others are asked for; of the baselines the first that has the op.
    passes: the parts of the op that can be measured alone, if any.
    bandwidth: by type of device, the kind of `timing.bandwidth_samplers` that its own is a part of.
    multiplies: whether its time is that of matrix products, and their rate measured beside it, not the bandwidth.
    """

    name: str
    title: str
    providers: Mapping[str, Any]
    presets: Mapping[str, Any]
    precisions: Mapping[str, Precision]
    default_presets: ClassVar[Sequence[str]]
    default_baselines: ClassVar[Sequence[str]]
    passes: ClassVar[Sequence[str]] = ()
    bandwidth: ClassVar[Mapping[str, str]] = {}
    multiplies: ClassVar[bool] = False

    def lacks(self, provider: str, precision: Precision, device: torch.device) -> str | None:
        """Why the provider of this name cannot contend, or None."""
        if provider not in self.providers:
            return f"no provider of {self.name}"
        reason: str | None = self.providers[provider].unavailable(device)
        return reason or self.refuses(self.providers[provider], precision)

    def alone(self, part: str) -> Op:
        """The op, of one of its `passes`."""
        raise NotImplementedError

    def like(self, other: Op) -> Op:
        """The op, of the pass that `other` is of.

        Raises:
            ValueError: the two cannot be compared.
        """
        if type(self) is not type(other):
            raise ValueError(f"{self.name} has other data than {other.name}")
        return self

    @abc.abstractmethod
    def refuses(self, provider: Any, precision: Precision) -> str | None:
        """Why one of its providers, available here, has no such op, or None."""

    @abc.abstractmethod
    def shapes(self, preset: Any, max_elements: float, device: torch.device) -> tuple[list[Shape], str]:
        """Shapes of at most `max_elements` elements, and what was left out to get there ("" when nothing was)."""

    @abc.abstractmethod
    def held_bytes(self, entry: Entry) -> float:
        """Bytes that a contender holds for each element."""

    @abc.abstractmethod
    def contenders(
        self, entries: Entries, shapes: list[Shape], device: torch.device, seed: int
    ) -> dict[str, Contender]:
        """The contender of each entry, checked, from the same data."""


class Entry(NamedTuple):
    """Who contends: with which op, stored how."""

    op: Any  # an Op; each works on entries of its own class
    provider: Any
    precision: Precision


Entries = dict[str, Entry]  # by the label of their row


def failure(error: Exception) -> str:
    """The first line of what a peer raised."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
