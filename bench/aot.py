"""`python -m fusedopt.bench.aot`: the Triton kernels, compiled for GPUs that need not be here.

What it prints is read from the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import triton
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedopt.binding import RULES, Rule
from fusedopt.kernels.step import Form, fusedopt_step
from fusedopt.optim import OPTIMIZERS

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
KINDS = {name: kind for optimizer in OPTIMIZERS.values() for name, kind in optimizer.states.items()}

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
    pointers = {"table": "*i64", "scalars": "*fp64", "tiles": "*i32", "tables": "*fp32"}
    signature = {**pointers, **dict.fromkeys(arguments, "constexpr")}
    constants = {(index,): arguments[name] for index, name in enumerate(signature) if name in arguments}
    return triton.compile(ASTSource(fusedopt_step, signature, constants), target=target(arch), options=options)


@dataclass(frozen=True)
class Figures:
    """What the machine code of a kernel shows.

    registers: of a thread. spilled: bytes of memory a thread has of its own. shared: bytes of a block.
    loads, stores: by width in bits, the number of instructions that access the device's memory.
    """

    registers: int
    spilled: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]
    instructions: int


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
    return Figures(used["REG"], spilled, kernel.metadata.shared, loads, stores, instructions)


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
    return Figures(used["vgpr_count"], spilled, used["group_segment_fixed_size"], loads, stores, instructions)


def vector_accesses(form: Form) -> tuple[int, int]:
    """How many loads and stores of 16 bytes the whole tiles of tensors take, on a GPU with warps of 32 threads."""
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "low16": 2, "int8_signed": 1, "int8_unsigned": 1}
    sizes["low8"] = 1
    written = [form.param, *form.states, *([form.master] if form.master else [])]
    # A thread has 16 elements: an access for each of their bytes.
    stores = sum(sizes[storage] for storage in written)
    return stores + sizes[form.grad], stores


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--arch", "first", multiple=True, metavar="ARCH...", help=f"By default {' '.join(ARCHITECTURES)}.")
@click.option("--rule", "rules", multiple=True, type=click.Choice(list(RULES)), help="These rules alone.")
@click.argument("others", nargs=-1, metavar="")
def aot(first: tuple[str, ...], rules: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Compile the kernels of every rule and format, and say what is in them. Exits 1 if one spills."""
    table = Table("arch", "rule", "parameter, state", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("registers", "spilled", "shared", "loads", "stores", "instructions"):
        table.add_column(name, justify="right")
    cells = [
        (arch, rule, name)
        for arch in (first + others or ARCHITECTURES)
        for rule in rules or RULES
        for name in FORMATS
        if RULES[rule].states or "int8" not in name
    ]
    errors = Console(stderr=True)
    spills = False
    for arch, rule, name in track(cells, "compiling", console=errors, disable=not errors.is_terminal, transient=True):
        found = figures(compiled(form(RULES[rule], name), arch))
        spills |= found.spilled > 0
        sizes = map(str, (found.registers, found.spilled, found.shared))
        accesses = _widths(found.loads), _widths(found.stores)
        style = "red" if found.spilled else None
        table.add_row(arch, rule, name, *sizes, *accesses, str(found.instructions), style=style)
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)
    raise SystemExit(int(spills))


def _widths(accesses: Counter[int]) -> str:
    """Like `16×128 30×64`, the widest first."""
    return " ".join(f"{accesses[width]}×{width}" for width in sorted(accesses, reverse=True))


if __name__ == "__main__":
    aot(prog_name="python -m fusedopt.bench.aot")
