"""`fusedopt demo`: train one small model twice, before and after the swap, and show both side by side."""

from __future__ import annotations

import copy
import inspect
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import fusedopt
from fusedopt._routing import route
from fusedopt.backends import choose, requested_backend
from fusedopt.codecs import STATE_DTYPES
from fusedopt.optim import OPTIMIZERS

from .demo_report import draw, record, show, show_seeds
from .files import writable
from .model import SIZES, Llama, Run, english_bytes, warmup_cosine

FORMAT = "fusedopt-demo"
VERSION = 1

BATCH = 4  # sequences a step: a small batch, as on a laptop; larger ones give the optimizer a smaller share
BLOCK = 10  # consecutive steps of one run

# The hyperparameters one would train this model with. An optimizer without an entry runs with its own defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.1},
    "Adagrad": {"lr": 1e-2},
    "RMSprop": {"lr": 3e-4},
    "Adamax": {"lr": 2e-3},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    "Lion": {"lr": 2e-4, "weight_decay": 0.5},
    "AdEMAMix": {"lr": 1e-3, "weight_decay": 0.1},
    "Muon": {"lr": 0.02, "weight_decay": 0.01, "adamw_lr": 3e-3, "adamw_betas": (0.9, 0.95)},
}

# When are two training curves the same? The runs may differ in the last bit of a parameter, and training amplifies
# that without limit, so no bound holds at every step. Two do hold:
# - Over the first steps, before the amplification. One unit in the last place of a float32 loss between 4 and 8 is
#   4.8e-7, and rounding alone moves the first 20 losses by two of them at most. 1e-4 is 200 of them; in the default
#   run eps = 1e-6 in place of 1e-8 moves 2e-4, a learning rate off by 0.1 % 6e-4, a forgotten weight decay 8e-4.
#   A signed state in bfloat16 is off by up to 2^-9 of itself, hence a step, hence to first order the fall of the loss.
#   In 8 bits what lies in the upper decade of its block is off by up to half of 0.9 / 64 of the block's maximum, 7 % of
#   itself at 0.1 of it; what lies below is off by more of itself, and moves the loss less.
#   Muon's products are in bfloat16, by which an update is off by 1 to 2 % of itself, torch's as well as fusedopt's.
# - On the validation loss at the end, an average over 23 kB of text. Fewer bits make another training, which
#   ends lower as well as higher, by the noise of training; it must not end higher.
FIRST_STEPS = 20
FIRST_BOUND = 1e-4
STATE_ROUNDING = {"bfloat16": 2**-9, "int8": 0.07}
MUON_ROUNDING = 0.04
VALIDATION_BOUND = 0.01


def build_runs(
    name: str, state_dtype: str | None, size: str, steps: int, patch: bool = False
) -> tuple[list[Run], Run | None]:
    """Runs from the same weights, of which the last two are compared; and one of torch's fused optimizer to be timed.

    The usual optimizer, fusedopt's, and, where a `state_dtype` is asked for, fusedopt's with that. The models of
    fusedopt's are patched if `patch`. With Muon the usual ones are two, and fusedopt's is one.
    """
    cls: Any = fusedopt.Muon if name == "Muon" else OPTIMIZERS[name]
    torch_class = cls.torch_class
    settings = SETTINGS.get(name, {})
    initial = Llama(SIZES[size])

    def run(label: str, make: Callable[..., torch.optim.Optimizer], swap: bool = False, **options: Any) -> Run:
        model = copy.deepcopy(initial)
        if make is torch_class and name == "Muon":
            optimizers = torch_muon_and_adamw(model, settings)
        else:
            optimizers = [make(model if name == "Muon" else model.parameters(), **settings, **options)]
        schedulers = [LambdaLR(optimizer, lambda step: warmup_cosine(step, steps)) for optimizer in optimizers]
        if swap:
            optimizers = [fusedopt.swap(optimizer) for optimizer in optimizers]
        if not (patch and label.startswith("fusedopt")):
            return Run(label, model, optimizers, schedulers)
        return Run(f"{label} + patch", model, optimizers, schedulers, fusedopt.patch(model).report)

    if torch_class is not None and name == "Muon":
        runs = [run("torch Muon + AdamW", torch_class), run("fusedopt", cls)]
    elif torch_class is not None:
        runs = [run(f"torch {name}", torch_class), run("fusedopt", torch_class, swap=True)]
    elif state_dtype is None:  # nothing to swap: fusedopt's own reference against the backend it chooses
        runs = [run("eager", cls, backend="eager"), run("fusedopt", cls)]
    else:
        runs = [run("fusedopt", cls)]
    if state_dtype is not None:
        runs.append(run(f"fusedopt {state_dtype}", cls, state_dtype=state_dtype))
    timed = None
    if torch_class is not None and "fused" in inspect.signature(torch_class).parameters:
        timed = run("torch fused", torch_class, fused=True)
    return runs, timed


def torch_muon_and_adamw(model: Llama, settings: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """What one `fusedopt.Muon` of the model with these settings is, in torch's optimizers."""
    groups, _ = route(model)
    of_adamw = {name.removeprefix("adamw_"): value for name, value in settings.items() if name.startswith("adamw_")}
    of_muon = {name: value for name, value in settings.items() if not name.startswith("adamw_")}
    matrices = [param for group in groups if group["algorithm"] == "muon" for _, param in group["params"]]
    others = [param for group in groups if group["algorithm"] == "adamw" for _, param in group["params"]]
    return [torch.optim.Muon(matrices, **of_muon), torch.optim.AdamW(others, weight_decay=0.0, **of_adamw)]


@contextmanager
def progress(console: Console, runs: list[Run], steps: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each block of steps: moves a bar per run, or prints a line a tenth in a plain log."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bars:
            tasks = [bars.add_task(run.label, total=steps, loss="") for run in runs]

            def update() -> None:
                for task, run in zip(tasks, runs, strict=True):
                    if run.losses:
                        bars.update(task, completed=len(run.losses), loss=f"loss {run.losses[-1]:.3f}")

            yield update
        return

    printed = 0

    def report() -> None:
        nonlocal printed
        done = min(len(run.losses) for run in runs)
        if done * 10 // steps > printed * 10 // steps:
            printed = done
            losses = ", ".join(f"{run.label} {run.losses[done - 1]:.3f}" for run in runs)
            console.print(f"step {done} of {steps}: loss {losses}")

    yield report


def train(console: Console, runs: list[Run], timed: Run | None, text: Tensor, starts: Tensor) -> None:
    """Train every run on the sequences at starts (steps, BATCH).

    The runs take turns, ten steps each, and every other round in the opposite order, so that a machine
    that slows down or speeds up meanwhile favours neither. torch's fused optimizer is there to be timed only: half a
    block every fifth round.
    """
    steps = len(starts)
    # An untimed pass, lest the first run alone pay for what torch sets up on first use.
    model = copy.deepcopy(runs[0].model)
    model(torch.zeros(BATCH, model.context, dtype=torch.long)).sum().backward()
    with progress(console, runs, steps) as update:
        for number, begin in enumerate(range(0, steps, BLOCK)):
            block = starts[begin : begin + BLOCK]
            for run in runs if number % 2 == 0 else runs[::-1]:
                for row in block:
                    run.step(text, row)
                update()
            if timed is not None and number % 5 == 0:
                for row in block[: BLOCK // 2]:
                    timed.step(text, row)


def rounding(name: str, state_dtype: str | None) -> float:
    """What part of a step two runs may round differently, other than in the last bits."""
    return STATE_ROUNDING.get(state_dtype or "float32", 0.0) + MUON_ROUNDING * (name == "Muon")


def compare(seed: int, runs: list[Run], validation: list[float], rounding: float) -> dict[str, Any]:
    """How far the curves of the last two runs are apart, whether they count as the same; the first run's time over
    the last's.
    """
    before, after = runs[-2:]
    differences = (torch.tensor(before.losses).double() - torch.tensor(after.losses).double()).abs()
    early = differences[:FIRST_STEPS].max().item()
    fall = max(before.losses[:FIRST_STEPS]) - min(before.losses[:FIRST_STEPS])
    bound = FIRST_BOUND + rounding * fall
    late = (validation[-1] - validation[-2]) / validation[-2]
    return {
        "seed": seed,
        "max_loss_difference": differences.max().item(),
        "first_steps": min(FIRST_STEPS, len(differences)),
        "first_steps_difference": early,
        "first_steps_bound": bound,
        "validation_losses": validation[-2:],
        "validation_relative_difference": late,
        "validation_bound": VALIDATION_BOUND,
        # Written so that a NaN, which compares false, is no agreement.
        "same": early <= bound and (late if rounding else abs(late)) <= VALIDATION_BOUND,
        "model_speedup": runs[0].model_milliseconds() / after.model_milliseconds(),
        "optimizer_speedup": runs[0].milliseconds("optimizer") / after.milliseconds("optimizer"),
        "end_to_end_speedup": sum(runs[0].seconds["step"]) / sum(after.seconds["step"]),
    }


def distance(comparison: dict[str, Any]) -> str:
    """What `compare` found, in words."""
    return (
        f"the training losses differ by at most {comparison['max_loss_difference']:.1e}, "
        f"in the first {comparison['first_steps']} steps by {comparison['first_steps_difference']:.1e} "
        f"(allowed: {comparison['first_steps_bound']:.1e}); "
        f"the validation losses by {comparison['validation_relative_difference']:+.3%} "
        f"(allowed: {comparison['validation_bound']:.1%})"
    )


NAME = click.Choice([*OPTIMIZERS, "Muon"], case_sensitive=False)
STORAGE = click.Choice([name for name in STATE_DTYPES if name is not None])
FILE = click.Path(dir_okay=False, path_type=Path)


EXAMPLES = """\b
Examples:
  fusedopt demo --patch
  fusedopt demo --optimizer Lion
  fusedopt demo --optimizer muon
  fusedopt demo --state-dtype int8
  fusedopt demo --state-dtype int8 --optimizer SGD --seeds 3
"""


@click.command(epilog=EXAMPLES)
@click.option("--steps", type=click.IntRange(min=2), default=450, show_default=True, help="Of each run.")
@click.option("--optimizer", type=NAME, default="AdamW", show_default=True)
@click.option("--state-dtype", type=STORAGE, help="Train a run with this storage of state too, and compare that.")
@click.option("--patch", is_flag=True, help="Patch RMSNorm and MLP of fusedopt's runs too, and compare with torch's.")
@click.option("--model", "size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights and batches.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many, from --seed on; after the first, only the two runs that are compared.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's own choice]")
@click.option("--json", "json_path", type=FILE, callback=writable, help="Also write the results to this file.")
@click.option("--output", type=FILE, callback=writable, default="fusedopt-demo.png", show_default=True, help="Chart.")
def demo(
    steps: int,
    optimizer: str,
    state_dtype: str | None,
    patch: bool,
    size: str,
    seed: int,
    seeds: int,
    threads: int | None,
    json_path: Path | None,
    output: Path,
) -> None:
    """Train a small language model twice, with torch's optimizer and with fusedopt's, and compare.

    All runs start from the same weights and see the same batches, on the CPU. Prints the loss curves and what
    each run cost, and draws a chart. Fails if the curves are not the same up to rounding; with --state-dtype, those
    of fusedopt with torch's storage of state and with this one. With --patch, fusedopt's runs have RMSNorm and the
    gated MLP of its kernels too: all is swapped that can be. With --optimizer muon, torch has two optimizers, Muon for
    the matrices and AdamW for the rest, and fusedopt one for all; theirs is another training by what bfloat16 rounds,
    and fails if the validation loss is worse by more than 1 %. The text is the language reference that comes with
    every CPython, so nothing is downloaded.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    text = english_bytes()
    held_out = len(text) // 20
    length = SIZES[size].context

    def prepare(seed: int) -> tuple[list[Run], Run | None, Tensor]:
        """The runs, and where in the text their batches begin."""
        torch.manual_seed(seed)
        starts = torch.randint(len(text) - held_out - length, (steps, BATCH))
        return *build_runs(optimizer, state_dtype, size, steps, patch), starts

    def trained(seed: int, runs: list[Run], timed: Run | None, starts: Tensor) -> tuple[list[float], dict[str, Any]]:
        """The validation losses, and how the runs compare."""
        train(console, runs, timed, text[:-held_out], starts)
        validation = [run.validation_loss(text[-held_out:]) for run in runs]
        return validation, compare(seed, runs, validation, rounding(optimizer, state_dtype))

    try:
        runs, timed, starts = prepare(seed)
        backend = choose(runs[0].model.head.weight, requested_backend(), "the model").name
    except (ValueError, RuntimeError) as error:  # the environment asks for a backend that cannot run
        raise click.ClickException(str(error)) from error
    count = runs[0].parameter_count()
    console.print(
        f"{count:,} parameters in {len(list(runs[0].model.parameters()))} tensors, {BATCH} x {length} bytes a step\n"
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}\n"
        f"fusedopt {fusedopt.__version__}, backend: {backend}"
        + (" (`fusedopt explain` says why)" if backend == "eager" else ""),
        soft_wrap=True,
    )
    if runs[-1].patched:
        console.print(str(runs[-1].patched), soft_wrap=True)

    validation, comparison = trained(seed, runs, timed, starts)
    show(console, runs, timed, validation)
    draw(output, runs)
    comparisons = [comparison]
    for other in range(seed + 1, seed + seeds):
        console.print(f"seed {other}")
        candidates, _, starts = prepare(other)
        comparisons.append(trained(other, candidates[-2:], None, starts)[1])
    if seeds > 1:
        show_seeds(console, [run.label for run in runs[-2:]], comparisons)

    if json_path is not None:
        result = {
            "format": FORMAT,
            "version": VERSION,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "fusedopt": fusedopt.__version__,
                "machine": platform.machine(),
                "backend": backend,
                "threads": torch.get_num_threads(),
            },
            "config": {
                "steps": steps,
                "optimizer": optimizer,
                "settings": SETTINGS.get(optimizer, {}),
                "state_dtype": state_dtype,
                "patch": patch,
                "model": size,
                "seed": seed,
                "seeds": seeds,
                "batch": BATCH,
                "context": length,
                "parameters": count,
            },
            "runs": [record(run, loss) for run, loss in zip(runs, validation, strict=True)],
            "fused_optimizer_ms": None if timed is None else timed.milliseconds("optimizer"),
            "comparison": {**comparison, "other_seeds": comparisons[1:]},
        }
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for each in comparisons:
        if not each["same"]:
            raise click.ClickException(f"this is not the same training: seed {each['seed']}: {distance(each)}")
    for each in comparisons:
        console.print(f"The same training: {distance(each)}.", soft_wrap=True)
    console.print(
        f"The optimizer is {comparison['optimizer_speedup']:.1f} times as fast, "
        + (f"forward and backward {comparison['model_speedup']:.2f} times, " if patch else "")
        + f"training as a whole {comparison['end_to_end_speedup']:.2f} times. Chart: {output}",
        soft_wrap=True,
    )
