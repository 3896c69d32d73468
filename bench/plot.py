"""The chart of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import Row
from .report import duration
from .timing import Spread

COLUMNS = 3
OURS, PEER = "#d1495b", "#8d99ae"


def write_chart(rows: Sequence[Row], path: Path) -> bool:
    """One panel a cell: a bar for each provider's median time, whiskers from p20 to p80. False if none has any."""
    timed = [(row, row.seconds) for row in rows if row.seconds]
    panels = [list(group) for _, group in itertools.groupby(timed, key=lambda pair: pair[0].key[:3])]
    if not panels:
        return False
    across = min(COLUMNS, len(panels))
    down = math.ceil(len(panels) / across)
    height = 1.1 + 0.34 * max(map(len, panels))
    figure = Figure(figsize=(5.2 * across, height * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            axis.remove()
            continue
        _draw(axis, panel)
    figure.savefig(path, dpi=150)
    return True


def _draw(axis: Axes, panel: Sequence[tuple[Row, Spread]]) -> None:
    row = panel[0][0]
    times = [1e3 * spread.median for _, spread in panel]
    whiskers = [
        [1e3 * (spread.median - spread.p20) for _, spread in panel],
        [1e3 * (spread.p80 - spread.median) for _, spread in panel],
    ]
    names = [member.provider for member, _ in panel]
    colors = [OURS if name.startswith("fusedopt") else PEER for name in names]
    axis.barh(names, times, xerr=whiskers, color=colors, ecolor="#333333", capsize=2)
    for index, (member, spread) in enumerate(panel):
        state = member.state_bytes_per_param
        words = f" {duration(spread.median)}" + ("" if state is None else f", {state:.2f} B")
        axis.annotate(words, (1e3 * spread.p80, index), va="center", fontsize=8)
    axis.margins(x=0.35)
    axis.invert_yaxis()
    axis.set_xlabel("ms" if row.state_bytes_per_param is None else "ms a step; bytes of state a parameter")
    axis.set_title(f"{row.op} · {row.preset} · {row.dtype}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
