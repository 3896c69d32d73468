"""Two runs side by side: did anything get slower?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .records import Row, Run
from .report import duration


@dataclasses.dataclass(frozen=True)
class Change:
    """One row in both runs. growth: the part by which the median time grew, 0.05 for 5 %; None where it has no time."""

    before: Row
    after: Row

    @property
    def growth(self) -> float | None:
        if self.before.seconds and self.after.seconds and self.before.elements == self.after.elements:
            return self.after.seconds.median / self.before.seconds.median - 1
        return None

    @property
    def within_noise(self) -> bool:
        """Whether the ranges p20..p80 overlap."""
        before, after = self.before.seconds, self.after.seconds
        return bool(before and after and before.p20 <= after.p80 and after.p20 <= before.p80)

    def fails(self, threshold: float) -> bool:
        """A median that grew by more than `threshold`, whatever the noise; or a row that was right and is no more."""
        broke = self.before.status == "ok" and self.after.status != "ok"
        return broke or (self.growth is not None and self.growth > threshold)


def changes(before: Run, after: Run, providers: Sequence[str] = ()) -> Iterator[Change]:
    """The rows that both runs have, in the order of the second, of all `providers` or only of those given."""
    known = {row.key: row for row in before.rows}
    for row in after.rows:
        if row.key in known and (not providers or row.provider in providers):
            yield Change(known[row.key], row)


def print_changes(found: Sequence[Change], threshold: float | None, console: Console) -> None:
    """The table of ratios; changes within the noise are dimmed, those that fail are red."""
    table = Table("op", "preset", "dtype", "provider", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    for change in found:
        fails = threshold is not None and change.fails(threshold)
        style = "red" if fails else "dim" if change.within_noise else None
        table.add_row(*change.after.key, *map(escape, _words(change)), style=style)
    console.print(table)


def _words(change: Change) -> list[str]:
    times = [duration(row.seconds.median) if row.seconds else row.status for row in (change.before, change.after)]
    if change.growth is None:
        sizes = change.before.elements, change.after.elements
        return [*times, "–", "" if sizes[0] == sizes[1] else f"{sizes[0]:,} elements, then {sizes[1]:,}"]
    return [*times, f"{1 + change.growth:.3f}", "within noise" if change.within_noise else ""]
