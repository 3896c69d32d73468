"""The commands `fusedopt bench` and `fusedopt bench compare`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import compare as comparison
from . import records, report, timing
from .files import writable
from .matrix_op import MatrixOp
from .micro import Options, run_cell
from .muon_op import MuonOp
from .op import Op
from .ops import OPS, of_all
from .optimizer_op import OptimizerOp
from .plot import write_chart
from .presets import SERIES, Precision
from .row_op import PASSES, RowOp

ALL = "all"
CHARTS = (".png", ".svg", ".pdf")
MEMORY_SHARE = {"cpu": 0.75, "cuda": 0.9}  # of what is free; a GPU has no one else to serve


class BenchCommand(click.Command):
    """A command that takes names as arguments, and has one subcommand all the same: `compare`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] == compare.name:
            return compare.make_context(f"{info_name} {compare.name}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def _names(known: Iterable[str]) -> Callable[[click.Context, click.Parameter, Sequence[str]], list[str]]:
    """Check names given on the command line; each may hold several, joined by commas."""

    def callback(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[str]:
        names = [name for value in values for name in value.split(",")]
        for name in names:
            if name not in known:
                raise click.BadParameter(f"there is no {name!r}; there are {', '.join(known)}")
        return list(dict.fromkeys(names))

    return callback


def _baselines(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[str]:
    """Check names of providers, each of which may follow the name of an op and a colon."""
    names = [name for value in values for name in value.split(",")]
    _names(OPS)(ctx, param, [name.rpartition(":")[0] for name in names if ":" in name])
    _names(of_all("providers"))(ctx, param, [name.rpartition(":")[2] for name in names])
    return list(dict.fromkeys(names))


def _device(ctx: click.Context, param: click.Parameter, value: str) -> torch.device:
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise click.BadParameter(f"{value!r} is no device; give cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA device here; give cpu")
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"there are clocks for cpu and cuda, none for {device.type}")
    return device


def _percentage(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """`5%` as 0.05."""
    if value is None:
        return None
    try:
        number = float(value.removesuffix("%")) / 100
    except ValueError:
        number = -1.0
    if not value.endswith("%") or not 0 <= number < float("inf"):
        raise click.BadParameter(f"{value!r} is not a percentage such as 5%")
    return number


def _output(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Refuse before anything is measured what could not be written after."""
    if path and param.name == "plot_file" and path.suffix not in CHARTS:
        raise click.BadParameter(f"{path.name} ends in none of {', '.join(CHARTS)}")
    return writable(ctx, param, path)


_file = click.Path(dir_okay=False, writable=True, path_type=Path)


EXAMPLES = """\b
Examples:
  fusedopt bench adamw --preset large,many,mlp --baseline torch-fused,torch
  fusedopt bench adamw --preset large --dtype int8 --baseline torch-fused,bitsandbytes-8bit,torchao-8bit
  fusedopt bench lion --preset large --dtype int8 --baseline adamw:torch-fused
  fusedopt bench rms_norm,swiglu --preset 4096x2048 --dtype fp32,bf16 --pass forward,backward,both
  fusedopt bench rms_norm --preset hidden --baseline F.rms_norm,torch-compile
  fusedopt bench orthogonalize --preset square,1024x4096 --baseline torch,torch-compile
  fusedopt bench muon --preset 768x768,gpt2-matrices,64x128x128 --dtype fp32,int8

Two runs side by side: fusedopt bench compare --help
"""


@click.command(cls=BenchCommand, epilog=EXAMPLES)
@click.argument("ops", nargs=-1, callback=_names([*OPS, ALL]))
@click.option(
    "--preset",
    "presets",
    multiple=True,
    metavar="NAME",
    callback=_names([*of_all("presets"), *SERIES, ALL]),
    help=f"Shapes. Of an optimizer {', '.join(OptimizerOp.default_presets)} unless given, of norms and units "
    f"{', '.join(RowOp.default_presets)}, of muon {', '.join(MuonOp.default_presets)}, of orthogonalize "
    f"{', '.join(MatrixOp.default_presets)}.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="NAME",
    callback=_names([*of_all("precisions"), ALL]),
    help="Storage of tensors, and of an optimizer's state: fp32 unless given.",
)
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="NAME",
    callback=_names([*PASSES, ALL]),
    help=f"Of norms and units: {', '.join(PASSES)}; both unless given.",
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="NAME",
    callback=_names(of_all("providers")),
    help="Who contends: all that can run unless given. Baselines always do.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME",
    callback=_baselines,
    help="Whom to state speed-ups against, also another op's as in adamw:torch-fused: "
    f"first of {', '.join(OptimizerOp.default_baselines)} unless given, of norms and units of "
    f"{', '.join(RowOp.default_baselines)}, of matrices of {', '.join(MatrixOp.default_baselines)}.",
)
@click.option("--device", default="cpu", show_default=True, callback=_device, help="cpu, cuda, or cuda:1 and so on.")
@click.option("--threads", type=click.IntRange(1), help="torch.set_num_threads.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time to measure each cell.",
)
@click.option("--rounds", type=click.IntRange(1), help="Samples of each provider, instead of --seconds.")
@click.option("--in-loop", is_flag=True, help="Run a model forward and backward, untimed, before each step.")
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GIB",
    help="What a cell may use; three quarters of what is free, of a GPU's nine tenths, unless given. Presets drop "
    "layers to fit.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the data and of the order of samples.")
@click.option("--json", "json_file", type=_file, callback=_output, help="Write all results.")
@click.option("--csv", "csv_file", type=_file, callback=_output, help="Write one line a row.")
@click.option("--plot", "plot_file", type=_file, callback=_output, help=f"Write a chart: {', '.join(CHARTS)}.")
@click.option(
    "--save",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write DEVICE.json, its tables in DEVICE.md and a chart in DEVICE.svg into this directory, after each cell.",
)
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--list", "list_only", is_flag=True, help="Say what there is to measure, and do nothing.")
def bench(
    ops: list[str],
    presets: list[str],
    dtypes: list[str],
    passes: list[str],
    providers: list[str],
    baselines: list[str],
    device: torch.device,
    threads: int | None,
    seconds: float,
    rounds: int | None,
    in_loop: bool,
    memory: float | None,
    seed: int,
    json_file: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
    directory: Path | None,
    markdown: bool,
    list_only: bool,
) -> None:
    """Time OPS (adamw unless given; `all` for all) in every provider that has them, side by side.

    --list shows every name there is; several may be joined by commas.

    Each provider is first held to a float64 reference; one that is wrong is said to be, and is not timed. Those that
    are right are sampled in turn, once a round, in an order shuffled anew each round; speed-ups are medians of ratios
    within a round.

    On the CPU, host time is that of a step over as many tensors of one element each, of other ops over 8 elements: what
    does not depend on their size. On a GPU it is the time to launch a step; the step itself is timed by the GPU's
    events, with other data in its cache. GB/s counts what must be read and written at the least, as the provider
    stores it. Extra memory is what a step holds at its peak beyond what was held before. State bytes are all tensors
    that the optimizer keeps; 8-bit optimizers keep float32 state for tensors of fewer than 4096 elements. A baseline
    that cannot store things as the dtype says is measured in float32: NAME@fp32.

    RMSNorm and gated units run as in training, but for `inference`: the forward pass keeps what the backward pass
    needs, and the gradients are those of the inputs and of the weight. Saved bytes are all memory that is kept, each
    piece once, for an element; "of it own" is what is neither an input nor a result, which others keep as well.

    orthogonalize is 5 Jordan steps, and muon a step with them, on matrices. Naive GFLOP/s are those that the plain
    iteration would take, (20 a + 10) n^3 for n by a n, over the time: no rate of executed flops where an algorithm
    takes fewer. 100 % of dense is the time of so many in torch's fastest product of 2048 square, measured in the same
    rounds, and 100 % of symmetric that of (15 a + 5) n^3, where symmetric products take half. The polar error is the
    distance to U V^T in the root mean square of singular values, next to the least and the greatest of these.
    """
    console = _console()
    if list_only:
        _print_list(console, device)
        return
    if threads:
        torch.set_num_threads(threads)
    if device.index is not None:
        torch.cuda.set_device(device)
    options = Options(
        providers=providers,
        baselines=baselines,
        device=device,
        memory=int(memory * 2**30 if memory else timing.available_bytes(device) * MEMORY_SHARE[device.type]),
        rounds=rounds,
        seconds=seconds,
        seed=seed,
        in_loop=in_loop,
    )
    cells = [
        cell
        for name in _chosen(ops or ["adamw"], OPS)
        for cell in _cells(OPS[name], presets, dtypes or ["fp32"], passes or ["both"])
    ]
    run = records.Run(records.environment(device), {**dataclasses.asdict(options), "device": str(device)}, [])
    errors = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=len(cells))
        for done, (op, preset, precision) in enumerate(cells):
            progress.update(task, completed=done, description=f"{op.title} · {preset.name} · {precision.name}")
            show = functools.partial(_show, progress, task, done)
            run.rows += run_cell(op, preset, precision, options, show)
            if directory:
                _save(run, directory, records.device_name(device))
    if markdown:
        click.echo(report.markdown(run))
    else:
        report.print_tables(run, console)
    if json_file:
        run.write_json(json_file)
    if csv_file:
        run.write_csv(csv_file)
    if plot_file and not write_chart(run.rows, plot_file):
        raise click.ClickException(f"{plot_file} was not written: nobody was timed")


@click.command()
@click.argument("before", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--fail-above", metavar="PERCENT", callback=_percentage, help="Largest growth that passes, such as 5%.")
@click.option("--provider", "providers", multiple=True, metavar="NAME", help="Compare these alone; all unless given.")
def compare(before: Path, after: Path, fail_above: float | None, providers: tuple[str, ...]) -> None:
    """Compare two files of `fusedopt bench --json`, row by row.

    With --fail-above, exits 1 if any median step time grew by more than that, or if a provider that was right is no
    longer. A change whose ranges from p20 to p80 overlap is marked as within noise, and fails all the same. Exits 2
    if the files have no row in common.
    """
    try:
        found = list(comparison.changes(records.Run.read_json(before), records.Run.read_json(after), providers))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not found:
        raise click.UsageError(f"{before} and {after} have no row in common")
    comparison.print_changes(found, fail_above, _console())
    if fail_above is not None and any(change.fails(fail_above) for change in found):
        raise SystemExit(1)


def _save(run: records.Run, directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    run.write_json(directory / f"{name}.json")
    title, chart = f"# fusedopt bench: {name}\n\n", directory / f"{name}.svg"
    link = f"![step times]({chart.name})\n\n" if write_chart(run.rows, chart) else ""
    (directory / f"{name}.md").write_text(title + link + report.markdown(run) + "\n")


def _show(progress: Progress, task: TaskID, done: int, part: float) -> None:
    progress.update(task, completed=done + part)


def _console() -> Console:
    """Standard output; where that is no terminal, wide enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def _cells(
    op: Op, presets: Sequence[str], dtypes: Sequence[str], passes: Sequence[str]
) -> Iterator[tuple[Op, Any, Precision]]:
    """The op in each pass, preset and precision that it has.

    Raises:
        click.UsageError: of those asked for it has none.
    """
    chosen = {
        "preset": [name for name in _chosen(presets or op.default_presets, op.presets) if name in op.presets],
        "dtype": [name for name in _chosen(dtypes, op.precisions) if name in op.precisions],
    }
    for (what, found), asked, known in zip(chosen.items(), (presets, dtypes), (op.presets, op.precisions)):
        if not found:
            raise click.UsageError(f"{op.name} has no {what} {', '.join(asked)}; it has {', '.join(known)}")
    parts = [op.alone(part) for part in _chosen(passes, op.passes)] if op.passes else [op]
    for part, preset, dtype in itertools.product(parts, chosen["preset"], chosen["dtype"]):
        yield part, op.presets[preset], op.precisions[dtype]


def _chosen(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names with `all` and the names of series spelled out."""
    spelled = [SERIES.get(name, known if name == ALL else (name,)) for name in names]
    return list(dict.fromkeys(itertools.chain.from_iterable(spelled)))


def _print_list(console: Console, device: torch.device) -> None:
    """Ops, providers with why one does not run here, presets and precisions."""
    table = Table("op", "providers", title="ops", title_justify="left")
    for op in OPS.values():
        having = [
            name
            for name in op.providers
            if not all(op.lacks(name, precision, device) for precision in op.precisions.values())
        ]
        table.add_row(op.name, ", ".join(having))
    console.print(table)
    table = Table("provider", "here", title="providers", title_justify="left")
    for provider in of_all("providers").values():
        table.add_row(provider.name, provider.unavailable(device) or "runs")
    console.print(table)
    table = Table("preset", "shapes", title="presets", title_justify="left")
    for preset in of_all("presets").values():
        table.add_row(preset.name, preset.about)
    for name, members in SERIES.items():
        table.add_row(name, ", ".join(members))
    console.print(table)
    table = Table("dtype", "storage", title="dtypes", title_justify="left")
    for precision in of_all("precisions").values():
        table.add_row(precision.name, precision.about)
    console.print(table)
