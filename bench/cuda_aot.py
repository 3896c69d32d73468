"""`python -m fusedopt.bench.cuda_aot`: what the machine code of the CUDA kernels in the native module shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import click
import triton
from rich import box
from rich.console import Console
from rich.table import Table

from fusedopt.backends import BACKENDS, native
from fusedopt.binding import RULES

from .aot import Figures

KERNELS = (*RULES, "norm")


def architectures() -> list[str]:
    """Those that the module's kernels were compiled for, like "sm_90"; none where it was built without them."""
    return [f"sm_{number}" for number in native().cuda_architectures().split()]


def has_kernels() -> bool:
    return BACKENDS["cpu"].unavailable() is None and bool(architectures())


def figures(image: str) -> dict[tuple[str, str], Figures]:
    """Of every kernel of an image, a name of `KERNELS`, by architecture and name.

    Copies into shared memory count as loads.
    """
    found: dict[tuple[str, str], Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{image}.fatbin")
        path.write_bytes(native().cuda_image(image))
        subprocess.run([_tool("cuobjdump"), "-xelf", "all", path.name], cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            matched = re.search(r"sm_\d+", cubin.name)
            assert matched is not None, cubin
            found |= {(matched[0], name): kernel for name, kernel in _kernels(cubin).items()}
    return found


def _kernels(cubin: Path) -> dict[str, Figures]:
    usage = _output("cuobjdump", "-res-usage", cubin)
    codes = re.split(r"^\.text\.(\w+):$", _output("nvdisasm", "-c", cubin), flags=re.M)
    found = {}
    for name, code in zip(codes[1::2], codes[2::2]):
        (line,) = re.findall(rf"Function {name}:\n(.*)", usage)
        used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        spilled = max(used["STACK"], used["LOCAL"], 4 * len(re.findall(r"\b(?:LDL|STL)\b", code)))
        loads, stores = (
            Counter(
                int(width or 32) for width in re.findall(rf"\b{names}\.E(?:\.[US]?(8|16|64|128)\b|\.[A-Z]\w*)*", code)
            )
            for names in ("(?:LDG|LDGSTS)", "STG")
        )
        instructions = len(re.findall(r"^\s+/\*\w+\*/\s+(?!NOP)", code, re.M))
        # Storage is chosen at run time: the code does not say which way a thread goes.
        found[name] = Figures(used["REG"], spilled, used["SHARED"], loads, stores, instructions, None)
    return found


def _output(tool: str, option: str, file: Path) -> str:
    return subprocess.run([_tool(tool), option, file], capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> str:
    """Of the CUDA toolkit, or of Triton, which brings its own."""
    return shutil.which(name) or str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rule", "rules", multiple=True, type=click.Choice(KERNELS), help="These alone.")
def cuda_aot(rules: tuple[str, ...]) -> None:
    """Say what is in the CUDA kernels. Exits 1 if one spills."""
    table = Table("arch", "kernel", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("registers", "spilled", "shared", "16-byte loads", "16-byte stores", "instructions"):
        table.add_column(name, justify="right")
    spills = False
    if not has_kernels():
        click.echo("The native module has no CUDA kernels.")
        raise SystemExit(0)
    for rule in rules or KERNELS:
        for (architecture, name), kernel in figures(rule).items():
            spills |= kernel.spilled > 0
            counts = (kernel.registers, kernel.spilled, kernel.shared, kernel.loads[128], kernel.stores[128])
            table.add_row(architecture, name, *map(str, counts), str(kernel.instructions))
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)
    raise SystemExit(int(spills))


if __name__ == "__main__":
    cuda_aot(prog_name="python -m fusedopt.bench.cuda_aot")
