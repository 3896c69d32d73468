"""The command `fusedopt`: demo, bench and explain."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from ._version import __version__

EXTRA = "pip install 'fusedopt[bench]'"

try:
    import click
except ModuleNotFoundError:
    raise SystemExit(f"The command fusedopt needs click: {EXTRA}") from None


class Entry(NamedTuple):
    """Where a command is, and its line of help."""

    module: str
    name: str
    help: str


COMMANDS = {
    "demo": Entry("fusedopt.bench.demo", "demo", "Train a small model before and after the swap, side by side."),
    "bench": Entry("fusedopt.bench.cli", "bench", "Time every optimizer against torch and other libraries."),
    "explain": Entry(__name__, "explain", "Say which backend serves what here, and why the others do not."),
}


class Commands(click.Group):
    """Imports a command when it is called, so that `explain` and `--help` do not need what the others need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        try:
            return getattr(importlib.import_module(entry.module), entry.name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in ("matplotlib", "rich"):
                raise
            raise click.ClickException(f"fusedopt {cmd_name} needs {missing}: {EXTRA}") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fusedopt")
def main() -> None:
    """Faster, smaller training steps for PyTorch, with torch's results."""


@click.command(help=COMMANDS["explain"].help)
def explain() -> None:
    import fusedopt

    click.echo(fusedopt.explain())


if __name__ == "__main__":
    main(prog_name="fusedopt")
