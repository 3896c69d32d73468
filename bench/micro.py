"""One cell of the benchmark: an op, a preset and a precision, with every provider that has it."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Sequence

import torch

from . import timing
from .matrices import Flops
from .op import Contender, Entries, Entry, Op
from .ops import OPS
from .presets import HOST_SERIES, PRECISIONS, Precision, Preset, Rows, elements
from .records import Row
from .timing import Call, Spread

# A data set smaller than this lies in a core's own caches, where "% of bandwidth" says nothing.
MEMORY_BOUND_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure.

    providers: all that have the op if empty; those named get a row even where they do not.
    baselines: the first of the op's `default_baselines` that is right if empty; `adamw:torch-fused` is of another op.
    memory: bytes that a cell may use; presets drop layers to fit.
    rounds: exactly so many a cell; None: as many as fit `seconds`.
    """

    providers: Sequence[str] = ()
    baselines: Sequence[str] = ()
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    memory: int = 4 << 30
    rounds: int | None = None
    seconds: float = 10.0
    seed: int = 0
    in_loop: bool = False


Samples = dict[tuple[str, str], list[float]]


@dataclasses.dataclass
class Lineup:
    """Who contends in a cell, which of those are baselines, the preferred first, and why others named are absent."""

    entries: Entries
    baselines: list[str]
    absent: dict[str, str]


def lineup(op: Op, precision: Precision, options: Options) -> Lineup:
    """A baseline that cannot store things as `precision` says is measured in float32, and so labelled."""
    found = Lineup({}, [], {})
    for name in options.providers or op.providers:
        reason = op.lacks(name, precision, options.device)
        if not reason:
            found.entries[name] = Entry(op, op.providers[name], precision)
        elif options.providers:
            found.absent[name] = reason
    candidates: Entries = {}
    for name in options.baselines or op.default_baselines:
        of, _, provider = name.rpartition(":")
        try:
            other = OPS[of].like(op) if of else op
        except ValueError as error:
            found.absent[name] = str(error)
            continue
        for label, held in ((name, precision), (f"{name}@fp32", PRECISIONS["fp32"])):
            reason = other.lacks(provider, held, options.device)
            if not reason:
                candidates[label] = Entry(other, other.providers[provider], held)
                break
        else:
            if options.baselines and reason:
                found.absent[name] = reason
    if not options.baselines:
        # The first is brought in; the others stand by in case it is wrong, if they contend anyway.
        first = next(iter(candidates), None)
        candidates = {label: entry for label, entry in candidates.items() if label == first or label in found.entries}
    found.entries |= candidates
    found.baselines = list(candidates)
    return found


def run_cell(
    op: Op,
    preset: Preset | Rows,
    precision: Precision,
    options: Options,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[Row]:
    """Check everyone who has `op` in `precision`, then time those who are right. A row for each, and for the absent."""
    who = lineup(op, precision, options)
    cell = op.title, preset.name, precision.name
    absent = [Row(*cell, name, status="absent", note=reason) for name, reason in who.absent.items()]
    if not who.entries:
        return absent
    if options.device.type == "cuda":
        gc.collect()  # the last cell's tensors, which may be most of the GPU's memory
    # Beside the contenders: the data they start from, the bandwidth buffer, and what a step allocates.
    held = max(map(op.held_bytes, who.entries.values()))
    shapes, scaled = op.shapes(preset, options.memory / (held * (len(who.entries) + 2)), options.device)
    total = elements(shapes)
    contenders = op.contenders(who.entries, shapes, options.device, options.seed)
    right = {label: contender for label, contender in contenders.items() if not contender.wrong}
    baselines = [label for label in who.baselines if label in right]
    if not options.baselines:
        del baselines[1:]
    samples, amounts = _sample(op, right, round(total * held), options, progress) if right else ({}, {})

    rows = []
    for label, contender in contenders.items():
        row = Row(*cell, label, len(shapes), total, scaled=scaled, note=contender.wrong or contender.note)
        row.error, row.error_limit = _finite(contender.error), _finite(contender.limit)
        if contender.wrong:
            row.status = "wrong"
        else:
            _fill(row, contender, samples, options.device)
            if contender.flops:
                _fill_rates(row, contender.flops, samples, amounts)
            else:
                _fill_bandwidth(row, contender, samples, amounts, op.bandwidth[options.device.type])
            row.speedups = {name: _ratios(samples["step", name], samples["step", label]) for name in baselines}
        rows.append(row)
    return rows + absent


def _fill(row: Row, contender: Contender, samples: Samples, device: torch.device) -> None:
    """Put the measurements of `contender` in its row."""
    times = samples["step", row.provider]
    row.rounds = len(times)
    row.seconds = Spread.of(times)
    row.host_seconds = Spread.of(samples["host", row.provider])
    row.bytes_per_param = contender.moved_bytes / row.elements
    row.bytes_per_second = contender.moved_bytes / row.seconds.median
    if contender.state_bytes is not None:
        row.state_bytes_per_param = contender.state_bytes / row.elements
    row.figures = contender.figures
    row.peak_extra_bytes = timing.peak_extra_bytes(*contender.step, device=device)


def _fill_bandwidth(row: Row, contender: Contender, samples: Samples, moved: dict[str, float], bandwidth: str) -> None:
    """What part of the memory's bandwidth it has. bandwidth: the kind that its own is a part of."""
    times = samples["step", row.provider]
    row.bandwidth = {name: moved[name] / Spread.of(samples["bandwidth", name]).median for name in moved}
    if contender.moved_bytes >= MEMORY_BOUND_BYTES:
        row.bandwidth_used = bandwidth
        of = _ratios(samples["bandwidth", bandwidth], times).median
        row.bandwidth_fraction = of * contender.moved_bytes / moved[bandwidth]


def _fill_rates(row: Row, flops: Flops, samples: Samples, amounts: dict[str, float]) -> None:
    """How fast it is next to torch's matrix products, in the dtype in which those are fastest."""
    times = samples["step", row.provider]
    row.matmul = {name: amounts[name] / Spread.of(samples["matmul", name]).median for name in amounts}
    best = max(row.matmul, key=row.matmul.__getitem__)
    part = 100 * _ratios(samples["matmul", best], times).median / amounts[best]
    rates = {
        "naive GFLOP/s": flops.dense / Spread.of(times).median / 1e9,
        "% of dense": part * flops.dense,
        "% of symmetric": part * flops.symmetric,
    }
    row.figures = rates | row.figures


def _sample(
    op: Op, contenders: dict[str, Contender], nbytes: int, options: Options, progress: Callable[[float], None]
) -> tuple[Samples, dict[str, float]]:
    """Samples of ("step", label), ("host", label), and of ("bandwidth", kind), with what each of these moves; or, of an
    op that multiplies, of ("matmul", dtype), with their flops.
    """
    before = timing.training_interlude(options.device, options.seed) if options.in_loop else None
    amounts: dict[str, float]
    if op.multiplies:
        matmuls, flops = timing.matmul_samplers(options.device)
        samplers = {("matmul", name): sampler for name, sampler in matmuls.items()}
        amounts = dict.fromkeys(matmuls, flops)
    else:
        bandwidth, moved = timing.bandwidth_samplers(nbytes, options.device)
        samplers = {("bandwidth", name): sampler for name, sampler in bandwidth.items()}
        amounts = {**moved}
    for label, contender in contenders.items():
        host, step = contender.host_step or contender.step, contender.step
        samplers["step", label] = timing.device_sampler(step.call, options.device, _both(before, step.before))
        samplers["host", label] = timing.host_sampler(host.call, options.device, host.before)
    samples = timing.interleave(
        samplers, rounds=options.rounds, seconds=options.seconds, seed=options.seed, progress=progress
    )
    return samples, amounts


def _both(first: Call | None, second: Call | None) -> Call | None:
    if first is None or second is None:
        return first or second
    return lambda: (first(), second())


def host_costs(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Seconds that one more tensor costs, elements being equal: from the first and the last preset of `HOST_SERIES`.

    Each comes with the row of the last preset.
    """
    timed = {row.key: row for row in rows if row.seconds}
    costs = []
    for row in timed.values():
        first = timed.get((row.op, HOST_SERIES[0], row.dtype, row.provider))
        if row.preset == HOST_SERIES[-1] and first and row.seconds and first.seconds:
            more = row.tensors - first.tensors
            costs.append((row, (row.seconds.median - first.seconds.median) / more))
    return costs


def _ratios(numerators: list[float], denominators: list[float]) -> Spread:
    """The spread of the ratios round by round, which what disturbs a whole round does not change."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
