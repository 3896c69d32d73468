"""What `fusedopt demo` shows of its runs: tables, the chart, and what the JSON file says of each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .model import PHASES, Run


def show(console: Console, runs: list[Run], timed: Run | None, validation: list[float]) -> None:
    """Print the loss curves at ten steps, then what each run cost.

    A difference is that of the last two runs, a ratio the first run's over the last's.
    """
    steps = len(runs[0].losses)
    curves = Table(title="Training loss", title_justify="left")
    for title in ("step", *(run.label for run in runs), "difference"):
        curves.add_column(title, justify="right")
    for step in sorted({round(i * (steps - 1) / 9) for i in range(10)}):
        losses = [run.losses[step] for run in runs]
        curves.add_row(str(step + 1), *(f"{loss:.6f}" for loss in losses), f"{abs(losses[-2] - losses[-1]):.1e}")
    console.print(curves)

    costs = Table(title="Cost", title_justify="left")
    costs.add_column("", no_wrap=True)
    for title in (*(run.label for run in runs), "ratio", *([timed.label] if timed else [])):
        costs.add_column(title, justify="right")

    def row(name: str, values: list[float], form: str, other: float | None = None) -> None:
        others = [] if timed is None else ["" if other is None else format(other, form)]
        costs.add_row(name, *(format(x, form) for x in values), f"{values[0] / values[-1]:.2f}", *others)

    for name in PHASES:
        other = timed.milliseconds(name) if timed and name == "optimizer" else None
        row(f"{name}, ms a step", [run.milliseconds(name) for run in runs], ".2f", other)
    row("whole step, ms", [run.milliseconds("step") for run in runs], ".2f")
    row("end to end, s", [sum(run.seconds["step"]) for run in runs], ".1f")
    row("optimizer state, MB", [run.state_bytes() / 1e6 for run in runs], ".1f")
    row("state, B/param", [run.state_bytes() / run.parameter_count() for run in runs], ".3f")
    row("validation loss", validation, ".5f")
    console.print(costs)


def show_seeds(console: Console, labels: list[str], comparisons: list[dict[str, Any]]) -> None:
    """Print the validation losses of the two runs that are compared, seed by seed."""
    table = Table(title="Validation loss", title_justify="left")
    for title in ("seed", *labels, "difference"):
        table.add_column(title, justify="right")
    for comparison in comparisons:
        losses = [f"{loss:.5f}" for loss in comparison["validation_losses"]]
        table.add_row(str(comparison["seed"]), *losses, f"{comparison['validation_relative_difference']:+.3%}")
    console.print(table)


def record(run: Run, validation: float) -> dict[str, Any]:
    """What the JSON file says of one run."""
    return {
        "label": run.label,
        "losses": run.losses,
        "validation_loss": validation,
        "median_ms": {name: run.milliseconds(name) for name in run.seconds},
        "seconds": sum(run.seconds["step"]),
        "state_bytes": run.state_bytes(),
        "state_bytes_per_parameter": run.state_bytes() / run.parameter_count(),
        "patched": Counter(entry.kind for entry in run.patched.patched) if run.patched else {},
    }


def draw(path: Path, runs: list[Run]) -> None:
    """Write the chart as PNG: the loss curves over each other, and the median step of each run by phase."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = range(1, len(runs[0].losses) + 1)
    for run, width, color in zip(runs, (3.5, 0.9, 0.9), ("#f4a582", "#053061", "#1a9850")):
        curves.plot(steps, run.losses, label=run.label, linewidth=width, color=color)
    curves.set(xlabel="step", ylabel="nats a byte", title="Training loss")
    curves.legend()
    bottoms = [0.0 for _ in runs]
    for name, color in zip(PHASES, ("#d1d5db", "#9ca3af", "#d6604d"), strict=True):
        heights = [run.milliseconds(name) for run in runs]
        drawn = bars.barh([run.label for run in runs], heights, left=bottoms, label=name, color=color)
        if name == "optimizer":
            bars.bar_label(drawn, labels=[f" {height:.1f} ms" for height in heights])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    bars.invert_yaxis()  # the first run on top, as in the tables
    bars.margins(x=0.2)
    bars.set(xlabel="median ms a step", title="Where a step goes")
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    figure.savefig(path, format="png", dpi=150)
