"""`python -m fusedopt.bench.aot`: the Triton kernels, compiled for GPUs that need not be here.

What it prints is read from the machine code.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import triton
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedopt._muon import Muon
from fusedopt.backends import triton_missing
from fusedopt.binding import RULES, Rule
from fusedopt.kernels.step import TILE, Form, fusedopt_step
from fusedopt.optim import OPTIMIZERS
from fusedopt.optimizer import Optimizer

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
HEADER = ("registers", "spilled", "shared", "loads", "stores", "instructions", "an element")
POINTERS = {"table": "*i64", "scalars": "*fp64", "control": "*fp64", "tiles": "*i32", "tables": "*fp32"}
CLASSES: tuple[type[Optimizer], ...] = (*OPTIMIZERS.values(), Muon)
KINDS = {name: kind for optimizer in CLASSES for name, kind in optimizer.states.items()}

# By name: the storage of parameter and gradient, of states, of a master copy, and whether rounding is stochastic.
FORMATS: dict[str, tuple[str, str, str | None, bool]] = {
    "float32": ("float32", "float32", None, False),
    "float32, int8": ("float32", "int8", None, False),
    "bfloat16": ("bfloat16", "bfloat16", None, False),
    "bfloat16, float32": ("bfloat16", "float32", None, False),
    "bfloat16, int8": ("bfloat16", "int8", None, False),
    "bfloat16 stochastic, int8": ("bfloat16", "int8", None, True),
    "bfloat16 split16, int8": ("bfloat16", "int8", "low16", False),
    "bfloat16 split8 stochastic, int8": ("bfloat16", "int8", "low8", True),
    "bfloat16 master, float32": ("bfloat16", "float32", "float32", False),
    "float16": ("float16", "float16", None, False),
    "float16 stochastic, int8": ("float16", "int8", None, True),
    "float64": ("float64", "float64", None, False),
}


def form(rule: Rule, format: str, aligned: bool = True, dims: int = 0) -> Form:
    """The kernel that steps tensors stored as `format`, a name of `FORMATS`."""
    param, state, master, stochastic = FORMATS[format]
    states = tuple(f"int8_{KINDS[name]}" if state == "int8" else state for name in rule.states)
    return Form(rule, param, param, states, master, stochastic, aligned, dims)


def target(arch: str) -> GPUTarget:
    """Of "sm_90" or "gfx942"."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compiled(form: Form, arch: str) -> Any:
    """The kernel; its `asm` holds "ptx" and "cubin", or "amdgcn"."""
    arguments, options = form.arguments(), form.options(amd=arch.startswith("gfx"))
    signature = {name: POINTERS.get(name, "constexpr") for name in fusedopt_step.arg_names}
    constants = {(index,): arguments[name] for index, name in enumerate(signature) if name in arguments}
    return triton.compile(ASTSource(fusedopt_step, signature, constants), target=target(arch), options=options)


@dataclass(frozen=True)
class Figures:
    """What the machine code of a kernel shows.

    registers: of a thread. spilled: bytes of memory a thread has of its own. shared: bytes of a block.
    loads, stores: by width in bits, the number of instructions that access the device's memory.
    instructions: in all. per_element: those that a thread issues for each element of a whole tile, where no root or
        quotient takes its slow path; of NVIDIA's GPUs, whose machine code says where it branches.
    """

    registers: int
    spilled: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]
    instructions: int
    per_element: float | None


def figures(kernel: Any) -> Figures:
    return _amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel)


def _nvidia(kernel: Any) -> Figures:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = max(used["STACK"], used["LOCAL"], 4 * len(re.findall(r"\b(?:LDL|STL)\b", code)))
    loads, stores = (
        Counter(int(width or 32) for width in re.findall(rf"\b{name}\.E(?:\.[US]?(8|16|64|128)\b|\.[A-Z]\w*)*", code))
        for name in ("LDG", "STG")
    )
    instructions = len(re.findall(r"^\s+/\*\w+\*/\s+(?!NOP)", code, re.M))
    issued = _issued(code) / (TILE / (32 * kernel.metadata.num_warps))
    return Figures(used["REG"], spilled, kernel.metadata.shared, loads, stores, instructions, issued)


def _issued(code: str) -> int:
    """How many instructions a thread issues from the kernel's start to its end, on the way of the widest accesses.

    The first branches tell whole tiles from ragged ones. Later ones skip what is rarely needed, if they are taken.
    """
    lines = re.findall(r"^(?:(\.L_x_\d+):|\s+/\*\w+\*/\s+(?!NOP)(.*))$", code, re.M)
    labels = {label: index for index, (label, _) in enumerate(lines) if label}

    def way(first: tuple[bool, ...]) -> list[str]:
        issued, at, choices = [], 0, iter(first)
        while at < len(lines):
            line = lines[at][1]
            issued += [line] if line else []
            if line.startswith("EXIT"):
                break
            jump = re.match(r"(@\S+ )?BRA (?:\S+ )?`\((\.L_x_\d+)\)", line)
            taken = jump is not None and (jump[1] is None or next(choices, True))
            at = labels[jump[2]] if jump and taken and labels[jump[2]] > at else at + 1
        return issued

    def rank(issued: list[str]) -> tuple[int, int]:
        return sum(bool(re.search(r"\b(?:LDG|STG)\.\S*\b128\b", line)) for line in issued), -len(issued)

    return len(max(map(way, itertools.product((True, False), repeat=3)), key=rank))


def _amd(kernel: Any) -> Figures:
    code = kernel.asm["amdgcn"]
    used = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.M)}
    widths = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads, stores = (
        Counter(widths[width] for width in re.findall(rf"{name}_[us]?(byte|short|dword(?:x\d)?)", code))
        for name in (r"\b(?:global|buffer|flat)_load", r"\b(?:global|buffer|flat)_store")
    )
    spilled = used["private_segment_fixed_size"] + 4 * used["vgpr_spill_count"]
    instructions = len(re.findall(r"^\t[vsbgdf]\w+", code, re.M))
    return Figures(used["vgpr_count"], spilled, used["group_segment_fixed_size"], loads, stores, instructions, None)


def vector_accesses(form: Form) -> tuple[int, int]:
    """How many loads and stores of 16 bytes the whole tiles of tensors take, on a GPU with warps of 32 threads."""
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "low16": 2, "int8_signed": 1, "int8_unsigned": 1}
    sizes["low8"] = 1
    written = [form.param, *form.states, *([form.master] if form.master else [])]
    # A thread has 16 elements: an access for each of their bytes.
    stores = sum(sizes[storage] for storage in written)
    return stores + sizes[form.grad], stores


def here() -> tuple[str, ...]:
    """The architecture of the GPU here; where there is none, all of `ARCHITECTURES`."""
    if not torch.cuda.is_available():
        return ARCHITECTURES
    if torch.version.hip is not None:
        return (torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0],)
    return ("sm_{}{}".format(*torch.cuda.get_device_capability()),)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--arch", "first", multiple=True, metavar="ARCH...", help=f"By default {' '.join(ARCHITECTURES)}.")
@click.option("--rule", "rules", multiple=True, type=click.Choice(list(RULES)), help="These rules alone.")
@click.option("--save", "file", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write Markdown.")
@click.argument("others", nargs=-1, metavar="")
def aot(first: tuple[str, ...], rules: tuple[str, ...], file: Path | None, others: tuple[str, ...]) -> None:
    """Compile the kernels of every rule and format, and say what is in them. Exits 1 if one spills."""
    if missing := triton_missing():
        raise click.ClickException(missing)
    cells = [
        (arch, rule, name)
        for arch in (first + others or ARCHITECTURES)
        for rule in rules or RULES
        for name in FORMATS
        if RULES[rule].states or "int8" not in name
    ]
    errors = Console(stderr=True)
    shown = track(cells, "compiling", console=errors, disable=not errors.is_terminal, transient=True)
    found = {cell: figures(compiled(form(RULES[cell[1]], cell[2]), cell[0])) for cell in shown}

    table = Table("arch", "rule", "parameter, state", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    for name in HEADER:
        table.add_column(name, justify="right")
    for cell, kernel in found.items():
        table.add_row(*cell, *_words(kernel), style="red" if kernel.spilled else None)
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)
    if file:
        file.write_text(markdown(found))
    raise SystemExit(int(any(kernel.spilled for kernel in found.values())))


def markdown(found: dict[tuple[str, str, str], Figures]) -> str:
    """A table for each architecture; `found` goes by architecture, rule and format."""
    lines = [
        "# The Triton kernels in machine code",
        "",
        f"Compiled ahead of time by Triton {triton.__version__}, with `python -m fusedopt.bench.aot --save FILE`. "
        "Registers of a thread; bytes of its own memory (spilled) and of a block's shared memory; loads and stores of "
        "the device's memory, number × width in bits; instructions in all; and those issued for an element of a whole "
        "tile.",
    ]
    for arch in dict.fromkeys(arch for arch, _, _ in found):
        lines += ["", f"## {arch}", "", "| rule | parameter, state | " + " | ".join(HEADER) + " |"]
        lines += ["|---|---|" + "---:|" * len(HEADER)]
        of_arch = [(rule, name, kernel) for (target, rule, name), kernel in found.items() if target == arch]
        lines += [f"| {rule} | {name} | " + " | ".join(_words(kernel)) + " |" for rule, name, kernel in of_arch]
    return "\n".join(lines) + "\n"


def _words(kernel: Figures) -> list[str]:
    sizes = kernel.registers, kernel.spilled, kernel.shared
    each = "–" if kernel.per_element is None else f"{kernel.per_element:.0f}"
    return [*map(str, sizes), _widths(kernel.loads), _widths(kernel.stores), str(kernel.instructions), each]


def _widths(accesses: Counter[int]) -> str:
    """Like `16×128 30×64`, the widest first."""
    return " ".join(f"{accesses[width]}×{width}" for width in sorted(accesses, reverse=True))


if __name__ == "__main__":
    aot(prog_name="python -m fusedopt.bench.aot")
