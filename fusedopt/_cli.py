"""The command `fusedopt`: demo, bench and explain."""

from __future__ import annotations

import importlib
from types import ModuleType
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
        return getattr(_imported(entry.module, cmd_name), entry.name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fusedopt")
def main() -> None:
    """Faster, smaller training steps for PyTorch, with torch's results."""


def _imported(module: str, command: str) -> ModuleType:
    """The module, or what to install for `command` to have it."""
    packages = {"matplotlib": EXTRA, "rich": EXTRA, "triton": "pip install triton"}
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in packages:
            raise
        raise click.ClickException(f"fusedopt {command} needs {missing}: {packages[missing]}") from None


@click.command(help=COMMANDS["explain"].help)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Also compile the Triton kernels for the GPU here, without one for several, and show what is in them and in "
    "the CUDA kernels of the native module.",
)
@click.pass_context
def explain(ctx: click.Context, compiles: bool) -> None:
    import fusedopt

    click.echo(fusedopt.explain())
    if compiles:
        aot, cuda_aot = (_imported(f"fusedopt.bench.{name}", "explain --compile") for name in ("aot", "cuda_aot"))
        failed = False
        for command, options in ((cuda_aot.cuda_aot, {}), (aot.aot, {"first": aot.here()})):
            try:
                ctx.invoke(command, **options)
            except SystemExit as end:
                failed |= bool(end.code)
        raise SystemExit(int(failed))


if __name__ == "__main__":
    main(prog_name="fusedopt")
