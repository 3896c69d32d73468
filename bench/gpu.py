"""`make gpu`: what a GPU is to show, offline and within ten minutes, with the packages that are installed there.

Each stage runs in a process of its own, for a limited time, and one that fails does not keep the next from running. The
package is installed into a directory of its own, so that the Python there stays as it is. This file needs no other.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
SECONDS = 570
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
PROVIDERS = (
    "fusedopt-cuda",
    "fusedopt-triton",
    "torch-foreach",
    "torch-fused",
    "bitsandbytes",
    "bitsandbytes-8bit",
    "torchao-8bit",
)
# Not torch-compile, which takes seconds to compile for each cell.
ROW_PROVIDERS = ("fusedopt-triton", "torch", "F.rms_norm", "liger", "quack")


@dataclass(frozen=True)
class Stage:
    """A command, with the seconds it may take and the environment variables it needs."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def architecture() -> str:
    """What the GPU here can run, like "90"; "" where torch sees none."""
    code = "import torch; torch.cuda.is_available() and print(*torch.cuda.get_device_capability(), sep='')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def installing(architecture: str) -> list[Stage]:
    """Ways to install the package, the best first."""
    build = [*PIP, "--no-build-isolation", "--upgrade", "--target", str(SITE), str(ROOT)]
    return [
        Stage("install", 180, build, {"FUSEDOPT_NATIVE": "1", "FUSEDOPT_CUDA_ARCHITECTURES": architecture}),
        Stage("install without the CUDA module", 120, build, {"FUSEDOPT_NATIVE": "1", "FUSEDOPT_CUDA": "0"}),
        Stage("install without the native module", 60, build, {"FUSEDOPT_NATIVE": "0"}),
    ]


def checking(results: Path, workers: int, sanitizer: str | None) -> Iterator[Stage]:
    """The tests and the benchmark. workers: processes that tests run in; 0 for this one."""
    python = [sys.executable, "-m"]
    # Not pyproject.toml's options, which refuse to run without every plugin they configure.
    pytest = [*python, "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short"]
    parallel = ["-n", str(workers)] if workers else []
    threads = {"OMP_NUM_THREADS": "2"} if workers else {}
    tests = str(ROOT / "tests")
    yield Stage("backends", 30, [*python, "fusedopt._cli", "explain"])
    yield Stage("tests on the GPU", 180, [*pytest, *parallel, "-m", "gpu and not slow", tests], threads)
    benchmark = [*python, "fusedopt._cli", "bench", "adamw", "--device", "cuda", "--seconds", "5"]
    benchmark += ["--preset", "llama1b,llama300,many,many5k", "--dtype", "fp32,mixed-int8"]
    benchmark += ["--provider", ",".join(PROVIDERS), "--baseline", "torch-fused", "--save", str(results)]
    yield Stage("benchmark", 180, benchmark)
    rows = [*python, "fusedopt._cli", "bench", "rms_norm,add_rms_norm,swiglu", "--device", "cuda", "--seconds", "0.5"]
    rows += ["--preset", "small,hidden256,4096x2048,hidden8192", "--dtype", "fp32,bf16", "--pass", "forward,backward"]
    rows += ["--provider", ",".join(ROW_PROVIDERS), "--save", str(results / "norms")]
    yield Stage("benchmark of norms", 100, rows)
    if sanitizer:
        small = [*pytest, f"{tests}/test_gpu.py", "-k", "sanitizer"]
        for tool, options in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", [])):
            check = [sanitizer, "--tool", tool, *options, "--error-exitcode", "9", *small]
            # Without its cache, torch allocates each tensor by itself, so that what lies beside it is out of bounds.
            yield Stage(tool, 60, check, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    # The interpreter takes minutes to say of the kernels what has been seen on the GPU.
    others = ["-m", "not gpu and not slow", "-k", "not interpreter", tests]
    yield Stage("tests on the CPU", 300, [*pytest, *parallel, *others], threads)


def run(stage: Stage, seconds: float) -> str:
    """What became of it, in a word or two; "passed" where it exited with 0."""
    path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
    # From SITE: Python puts the working directory before all else, and the checkout has half of the package.
    process = subprocess.Popen(stage.command, cwd=SITE, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return "passed" if code == 0 else f"failed, exit status {code}"


class Report:
    """Stages one after another, until the time is over; and what became of each."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.lines: list[tuple[str, str, float]] = []

    def stage(self, stage: Stage) -> bool:
        print(f"\n=== {stage.name}: {' '.join(stage.command)}", flush=True)
        start = time.monotonic()
        left = self.end - start
        outcome = run(stage, min(stage.seconds, left)) if left > 1 else "no time left"
        self.lines.append((stage.name, outcome, time.monotonic() - start))
        return outcome == "passed"

    def note(self, name: str, text: str) -> None:
        self.lines.append((name, text, 0.0))

    def __str__(self) -> str:
        return "\n".join(f"{name:<34} {seconds:6.1f} s  {outcome}" for name, outcome, seconds in self.lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where the benchmark writes")
    parser.add_argument("--wheels", type=Path, help="a directory of wheels to install first, such as peers")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    options = parser.parse_args(arguments)

    report = Report(options.seconds)
    gpu = architecture()
    if not gpu:
        print(f"torch sees no GPU here, or is not installed for {sys.executable}", file=sys.stderr)
        return 1
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    wheels = sorted(map(str, options.wheels.resolve().glob("*.whl"))) if options.wheels else []
    if wheels:
        report.stage(Stage("wheels", 60, [*PIP, "--upgrade", "--target", str(SITE), *wheels]))
    if any(report.stage(way) for way in installing(gpu)):
        workers = min(8, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 0
        search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
        sanitizer = shutil.which("compute-sanitizer", path=search)
        for stage in checking(options.results.resolve(), workers, sanitizer):
            report.stage(stage)
        if sanitizer is None:
            report.note("memcheck, racecheck", "left out: there is no compute-sanitizer")
    print(f"\n{report}", flush=True)
    return int(any(outcome.startswith(("failed", "stopped", "no time")) for _, outcome, _ in report.lines))


if __name__ == "__main__":
    sys.exit(main())
