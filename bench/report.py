"""The tables of a run, for a terminal and in Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .micro import host_costs
from .records import Row, Run
from .timing import MATMUL_SIZE

NONE = "–"
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


class Cell(NamedTuple):
    """The rows of one op, preset and precision in words."""

    title: str
    caption: str
    header: list[str]
    lines: list[tuple[Row, list[str]]]


def print_tables(run: Run, console: Console) -> None:
    """One table for each cell, under a header that says where it was measured."""
    for name, value in run.environment.items():
        console.print(f"[dim]{name:>9}[/]  {escape(value)}", highlight=False)
    for cell in cells(run.rows):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
        for name in cell.header:
            justify: Literal["left", "right"] = "left" if name in ("provider", "check") else "right"
            table.add_column(name, justify=justify, vertical="bottom", overflow="fold")
        for row, words in cell.lines:
            ours = "bold" if row.provider.startswith("fusedopt") else None
            style = {"wrong": "red", "absent": "dim"}.get(row.status, ours)
            table.add_row(*map(escape, words), style=style)
        console.print(f"\n[bold]{escape(cell.title)}[/]", highlight=False)
        console.print(table)
        console.print(cell.caption, style="dim", highlight=False)
    for line in host_cost_lines(run.rows):
        console.print(line, highlight=False)


def markdown(run: Run) -> str:
    """The same as text to paste into a README or a pull request."""
    lines = [f"- {name}: {value}" for name, value in run.environment.items()]
    for cell in cells(run.rows):
        rule = ["---", *["---:"] * (len(cell.header) - 2), "---"]
        lines += ["", f"**{cell.title}**", "", _line(cell.header), _line(rule)]
        lines += [_line(words) for _, words in cell.lines]
        lines += ["", cell.caption]
    return "\n".join([*lines, *("\n" + line for line in host_cost_lines(run.rows))])


def cells(rows: Sequence[Row]) -> Iterator[Cell]:
    for (op, preset, dtype), group in itertools.groupby(rows, key=lambda row: row.key[:3]):
        members = list(group)
        first = members[0]
        size = f" · {first.elements:,} elements" if first.elements else ""
        size += f" in {first.tensors:,} tensors" if first.tensors > 1 else ""
        scaled = f" ({first.scaled})" if first.scaled else ""
        against = list(dict.fromkeys(name for row in members for name in row.speedups))
        step_unit = _unit([row.seconds.median for row in members if row.seconds])
        host_unit = _unit([row.host_seconds.median for row in members if row.host_seconds])
        figures = list(dict.fromkeys(name for row in members for name in _figures(row)))
        header = ["provider", f"time {step_unit[0]}", "p20–p80", f"host {host_unit[0]}"]
        streams = not any(row.matmul for row in members)
        header += ["GB/s", "% of bw"] if streams else []
        header += [*figures, "extra MiB", *(f"× {name}" for name in against), "check"]
        lines = [(row, _words(row, step_unit[1], host_unit[1], streams, figures, against)) for row in members]
        yield Cell(f"{op} · {preset}{scaled} · {dtype}{size}", _caption(members), header, lines)


def duration(seconds: float) -> str:
    """Three digits and a unit: 1.23 ms."""
    unit, scale = _unit([seconds])
    return f"{_digits(seconds / scale)} {unit}"


def host_cost_lines(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.op} · {row.dtype} · {row.provider}: each tensor costs {duration(cost)}, the elements being the same"
        for row, cost in host_costs(rows)
    ]


def _figures(row: Row) -> dict[str, float]:
    """Of the columns that only some ops have."""
    state = row.state_bytes_per_param
    return row.figures if state is None else {"state B/param": state, **row.figures}


def _words(
    row: Row, step_scale: float, host_scale: float, streams: bool, figures: Sequence[str], against: Sequence[str]
) -> list[str]:
    bandwidth = [_optional(row.bytes_per_second, ".1f", 1e9), _optional(row.bandwidth_fraction, ".0%")]
    if not row.seconds or not row.host_seconds:
        return [row.provider, *[NONE] * (4 + 2 * streams + len(figures) + len(against)), f"{row.status}: {row.note}"]
    return [
        row.provider,
        _digits(row.seconds.median / step_scale),
        f"{_digits(row.seconds.p20 / step_scale)}–{_digits(row.seconds.p80 / step_scale)}",
        _digits(row.host_seconds.median / host_scale),
        *(bandwidth if streams else []),
        *[_figure(_figures(row).get(name)) for name in figures],
        _optional(row.peak_extra_bytes, ".1f", 2**20),
        *[_optional(row.speedups[name].median, ".2f") if name in row.speedups else NONE for name in against],
        f"right, {row.note}" if row.note else "right",
    ]


def _caption(rows: Sequence[Row]) -> str:
    products = next((row for row in rows if row.matmul), None)
    if products:
        best = max(products.matmul, key=products.matmul.__getitem__)
        measured = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in products.matmul.items())
        return (
            f"{products.rounds} rounds; naive GFLOP/s counts what the plain iteration would take, whoever takes less; "
            f"torch's matmul, {MATMUL_SIZE} square, measured beside, in GFLOP/s: {measured}; "
            f"% are of the time that {best} would take for all products, and for half of the symmetric ones"
        )
    timed = next((row for row in rows if row.bandwidth), None)
    if timed is None:
        return "nobody was timed"
    measured = ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in timed.bandwidth.items())
    used = next((row.bandwidth_used for row in rows if row.bandwidth_used), "")
    of = f"; % of bw is of {used}" if used else ""
    return f"{timed.rounds} rounds; measured memory bandwidth: {measured}{of}"


def _unit(seconds: Sequence[float]) -> tuple[str, float]:
    """The largest unit in which no time is below 1."""
    least = min((abs(value) for value in seconds), default=1.0)
    return next((unit for unit in UNITS if least >= unit[1]), UNITS[-1])


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{max(0, 3 - len(str(int(abs(value)))))}f}"


def _figure(value: float | None) -> str:
    """Two decimals; three of what is small, as errors are."""
    return _optional(value, ".3f" if value is not None and 0 < abs(value) < 1 else ".2f")


def _optional(value: float | None, form: str, scale: float = 1.0) -> str:
    return NONE if value is None else format(value / scale, form)


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"
