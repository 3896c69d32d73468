"""What is kept of a run: its rows and where it ran, as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.backends import _triton_version

from .timing import Spread

SCHEMA = 1  # of the JSON file; raised whenever a field changes its name or meaning


@dataclasses.dataclass
class Row:
    """One provider in one cell. Times are seconds a step, or a call; what was not measured is None.

    op: its title, as "rms_norm backward" where a pass is measured alone.
    provider: its name; of a baseline that is measured in float32 in a cell of another dtype NAME@fp32, and of one of
        another op OP:NAME.
    status: "ok"; "wrong": its results are not the reference's, or it fails; "absent": asked for, but it has no such op.
        `note` says more; only those that are "ok" are timed.
    scaled: what was left out of the preset for want of memory, or "".
    host_seconds: on the CPU a step over as many tensors of one element, on a GPU the time to launch a step.
    bytes_per_param: for each of `elements`, the least that must be read and written.
    bandwidth_used: the one of `bandwidth` (bytes/s, measured in the same rounds) that `bandwidth_fraction` is of.
    matmul: flop/s of torch's dense products by dtype, measured in the same rounds, where they are what takes the time.
    speedups: for each baseline, how many times its time this one's goes into it: medians of ratios round by round.
    figures: what else there is to say, by the name of the column in the table.
    error, error_limit: distance to the float64 reference, in units in the last place (8-bit state: of the whole step).
    """

    op: str
    preset: str
    dtype: str
    provider: str
    tensors: int = 0
    elements: int = 0
    status: str = "ok"
    note: str = ""
    scaled: str = ""
    rounds: int = 0
    seconds: Spread | None = None
    host_seconds: Spread | None = None
    bytes_per_param: float | None = None
    bytes_per_second: float | None = None
    bandwidth: dict[str, float] = dataclasses.field(default_factory=dict)
    bandwidth_used: str = ""
    bandwidth_fraction: float | None = None
    matmul: dict[str, float] = dataclasses.field(default_factory=dict)
    state_bytes_per_param: float | None = None
    peak_extra_bytes: int | None = None
    speedups: dict[str, Spread] = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    error: float | None = None
    error_limit: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.preset, self.dtype, self.provider

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Row:
        row = cls(**fields)
        row.seconds = Spread(**fields["seconds"]) if fields["seconds"] else None
        row.host_seconds = Spread(**fields["host_seconds"]) if fields["host_seconds"] else None
        row.speedups = {name: Spread(**spread) for name, spread in fields["speedups"].items()}
        return row


@dataclasses.dataclass
class Run:
    """All rows of one call of `fusedopt bench`, with its settings and environment."""

    environment: dict[str, str]
    settings: dict[str, Any]
    rows: list[Row]

    def write_json(self, path: Path) -> None:
        """Write the file that `read_json` and `fusedopt bench compare` read."""
        document = {"schema": SCHEMA, "environment": self.environment, "settings": self.settings}
        rows = [dataclasses.asdict(row) for row in self.rows]
        path.write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n")

    @classmethod
    def read_json(cls, path: Path) -> Run:
        """Raises ValueError for a file that is not one of ours, or of another schema."""
        foreign = f"{path} was not written by `fusedopt bench --json`"
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(foreign) from error
        if not isinstance(document, dict) or "schema" not in document:
            raise ValueError(foreign)
        if document["schema"] != SCHEMA:
            raise ValueError(
                f"{path} has schema {document['schema']}, this version reads schema {SCHEMA}: measure again"
            )
        try:
            return cls(document["environment"], document["settings"], [Row.from_json(row) for row in document["rows"]])
        except (KeyError, TypeError) as error:
            raise ValueError(foreign) from error

    def write_csv(self, path: Path) -> None:
        """One line a row; nested fields are joined by dots: `seconds.median`."""
        lines = [dict(_flat(dataclasses.asdict(row))) for row in self.rows]
        names = list(dict.fromkeys(name for line in lines for name in line))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(lines)


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def environment(device: torch.device) -> dict[str, str]:
    """Where a run takes place, as printed above its tables."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tuning = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))]
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds"),
        "cpu": _cpu_model(),
        "cores": f"{os.cpu_count()}, {affinity} usable by this process",
        "threads": " ".join([str(torch.get_num_threads()), *tuning]),
        "versions": f"fusedopt {fusedopt.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "backends": "; ".join(f"{name} {status}" for name, status, _ in fusedopt.explain()),
        "system": platform.platform(),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()) + " over 1, 5, 15 minutes before the run",
    }
    if device.type == "cuda":
        facts["device"] = _gpu(device)
    return facts


def device_name(device: torch.device) -> str:
    """The processor's or GPU's name, for a file: nvidia-h200."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or device.type


def _gpu(device: torch.device) -> str:
    gpu = torch.cuda.get_device_properties(device)
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    sizes = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.L2_cache_size / 2**20:.0f} MiB of L2"
    return f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {sizes}, {toolkit}, Triton {_triton_version()}"


def _cpu_model() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
