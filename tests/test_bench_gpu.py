"""The benchmark on a GPU and `make gpu`, as far as they can be tested without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import needs_triton

import fusedopt
from fusedopt._cli import main
from fusedopt.bench import gpu, micro, records, timing
from fusedopt.bench.presets import PRESETS, Preset, elements
from fusedopt.bench.providers import PROVIDERS
from fusedopt.bench.records import Run
from fusedopt.bench.row_providers import PROVIDERS as ROW_PROVIDERS

ROOT = Path(__file__).parent.parent
TINY = Preset("tiny", "a few small tensors", 3, ((3, 5), (7,)), outer=((64,),))
CUDA = torch.device("cuda")


def call(*args: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="fusedopt")
    assert result.exit_code == code, result.output
    return result.output


# --- clocks ---


class FakeGpu:
    """What the samplers ask of torch.cuda. Its clock stands still but for `work`; `log` has all that was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.log = 0.0, list[str]()
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.log.append("record")
                self.at = fake.now

            def synchronize(self) -> None:
                fake.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Cache:
            def zero_(self) -> None:
                fake.now += 100.0
                fake.log.append("flush")

        def empty(size: int, **options: Any) -> Cache:
            assert size > properties.L2_cache_size and options["device"] == CUDA
            return Cache()

        properties = SimpleNamespace(
            name="NVIDIA H200", L2_cache_size=60 << 20, total_memory=140 << 30, multi_processor_count=132
        )
        monkeypatch.setattr(torch, "empty", empty)
        for name, value in {
            "Event": Event,
            "get_device_properties": lambda device: properties,
            "get_device_name": lambda device: properties.name,
            "synchronize": lambda device: fake.log.append("synchronize"),
            "mem_get_info": lambda device: (140 << 30, 141 << 30),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self) -> None:
        self.now += 0.25
        self.log.append("work")


def test_a_gpu_is_timed_by_events_around_one_call_with_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch)
    sample = timing.device_sampler(fake.work, CUDA, before=lambda: fake.log.append("before"))
    assert (sample(), sample()) == (0.25, 0.25)
    assert fake.log == ["before", "flush", "record", "work", "record", "wait"] * 2


def test_launching_is_timed_once_on_an_idle_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch)
    sample = timing.host_sampler(fake.work, CUDA)
    assert sample() < 0.1 and fake.log == ["synchronize", "work"]


def test_a_gpu_is_described_and_names_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    assert records.device_name(CUDA) == "nvidia-h200"
    said = records.environment(CUDA)["device"]
    assert said.startswith("NVIDIA H200, 132 multiprocessors, 140 GiB, 60 MiB of L2, ")


def test_bandwidth_of_a_gpu_is_measured_over_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    asked: list[int] = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(8) if asked.append(count) is None else None)
    samplers, moved = timing.bandwidth_samplers(1000, CUDA)
    assert 4 * asked[0] == timing.CUDA_COPY_BYTES > 100 * (60 << 20)
    assert set(samplers) == set(moved) == {"in-place", "copy"} and moved["copy"] == 2 * 4 * 4


# --- what is measured ---


def test_the_model_of_300_tensors() -> None:
    shapes = PRESETS["llama300"].shapes()
    assert (len(shapes), elements(shapes)) == (300, 125_797_888)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "mlp", TINY)


def test_save_writes_json_markdown_and_a_chart(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_cpu_model", lambda: "Some CPU (R) 9000")
    results = tmp_path / "new" / "results"
    options = ["--preset", "mlp", "--rounds", "1", "--provider", "fusedopt-eager", "--baseline", "torch"]
    call("bench", "sgd", "lion", "adamw", *options, "--save", results)
    assert sorted(file.name for file in results.iterdir()) == [f"some-cpu-r-9000.{x}" for x in ("json", "md", "svg")]
    run = Run.read_json(results / "some-cpu-r-9000.json")
    assert [row.op for row in run.rows if row.provider == "fusedopt-eager"] == ["sgd", "lion", "adamw"]
    text = (results / "some-cpu-r-9000.md").read_text()
    assert "![step times](some-cpu-r-9000.svg)" in text and "| fusedopt-eager |" in text
    assert "<svg" in (results / "some-cpu-r-9000.svg").read_text()


def test_what_was_measured_is_saved_before_the_rest(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(op: Any, *rest: Any) -> Any:
        if op.name == "lion":
            raise torch.OutOfMemoryError("no more")
        return micro.run_cell(op, *rest)

    monkeypatch.setattr("fusedopt.bench.cli.run_cell", failing)
    options = ["--preset", "mlp", "--rounds", "1", "--provider", "fusedopt-eager", "--save", tmp_path]
    call("bench", "sgd", "lion", *options, code=1)
    (file,) = tmp_path.glob("*.json")
    assert {row.op for row in Run.read_json(file).rows} == {"sgd"}


# --- explain --compile ---


def test_explain_compiles_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fusedopt.bench.aot", None)
    assert call("explain").strip() == str(fusedopt.explain())


def test_explain_compiles_for_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_triton()
    aot, cuda_aot = (pytest.importorskip(f"fusedopt.bench.{name}") for name in ("aot", "cuda_aot"))
    monkeypatch.setattr(cuda_aot, "KERNELS", ())
    monkeypatch.setattr(aot, "RULES", {"sgd": aot.RULES["sgd"]})
    monkeypatch.setattr(aot, "ARCHITECTURES", ("sm_80",))
    lines = call("explain", "--compile").splitlines()
    assert lines[0].startswith("cpu")
    stateless = [name for name in aot.FORMATS if "int8" not in name]
    assert sum(line.strip().startswith("sm_80") for line in lines) == len(stateless)
    # The same on a GPU, of whichever architecture it has.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(aot, "FORMATS", {"float32": aot.FORMATS["float32"]})
    assert aot.here() == ("sm_90",)
    assert any(line.strip().startswith("sm_90") for line in call("explain", "--compile").splitlines())
    file = tmp_path / "figures.md"
    result = CliRunner().invoke(aot.aot, ["--arch", *aot.here(), "gfx942", "--save", str(file)])
    assert result.exit_code == 0, result.output
    text = file.read_text()
    assert f"Triton {aot.triton.__version__}" in text
    assert re.search(r"## sm_90\n\n.*\n.*\n\| sgd \| float32 \|.*\| \d+ \| \d+ \|\n\n## gfx942", text)


def test_explain_reads_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    aot, cuda_aot = (pytest.importorskip(f"fusedopt.bench.{name}") for name in ("aot", "cuda_aot"))
    monkeypatch.setattr(aot, "RULES", {})
    monkeypatch.setattr(aot, "triton_missing", lambda: None)  # an older one, with nothing to compile
    monkeypatch.setattr(cuda_aot, "KERNELS", ("sgd",))
    said = call("explain", "--compile")
    if not cuda_aot.has_kernels():
        assert "The native module has no CUDA kernels." in said
        return
    for name in ("sgd_float", "sgd_double"):
        lines = [line.split() for line in said.splitlines() if name in line]
        # Registers, and nothing spilled.
        assert [line[0] for line in lines] == cuda_aot.architectures()
        assert all(int(line[2]) > 32 and line[3] == "0" for line in lines)


def test_explain_compile_without_triton_says_what_to_install() -> None:
    code = "import sys; sys.modules['triton'] = None; from fusedopt._cli import main; main(['explain', '--compile'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "eager" in done.stdout
    assert done.stderr == "Error: fusedopt explain --compile needs triton: pip install triton\n"


def test_explain_compile_with_an_older_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("fusedopt.bench.cuda_aot"), "KERNELS", ())
    monkeypatch.setattr("fusedopt.backends._triton_version", lambda: "3.2.0")
    assert "Triton is 3.2.0, and it takes 3.6" in call("explain", "--compile", code=1)


def test_instructions_are_counted_on_the_way_of_whole_tiles() -> None:
    """Not on the ragged one, nor on the slow path of a root."""
    aot = pytest.importorskip("fusedopt.bench.aot")
    code = """
        /*0000*/                   S2R R1, SR_TID.X ;
        /*0008*/              @P6 BRA `(.L_x_4) ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0030*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0040*/                   EXIT ;
.L_x_0:
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   CALL.REL.NOINC `(slow) ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0090*/                   FFMA R1, R1, R1, R1 ;
.L_x_2:
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3) ;
        /*00d0*/                   NOP ;
.L_x_4:
        /*00e0*/                   EXIT ;
"""
    assert aot._issued(code) == 8  # S2R, BRA, BRA, LDG, BRA, FFMA, STG, EXIT


# --- make gpu ---


def stages() -> list[gpu.Stage]:
    return [*gpu.installing("90"), *gpu.checking(Path("/results"), 4, "/bin/compute-sanitizer")]


def test_make_gpu_passes_its_variables_on() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    variables = ["PYTHON=py", "GPU_RESULTS=out", "GPU_WHEELS=wheels", "GPU_ARGS=--seconds 9"]
    command = [make, "--no-print-directory", "-n", "gpu", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == "py bench/gpu.py --results out --wheels wheels --seconds 9".split(), done.stderr


def test_it_needs_nothing_but_python_and_a_gpu() -> None:
    """Before the package and its dependencies are there; without a GPU it stops at once."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-S", ROOT / "bench" / "gpu.py", "--help"]
    assert "--wheels" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_without_a_gpu_it_stops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu, "run", None)
    assert gpu.main([]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_every_command_of_it_is_one_there_is() -> None:
    """Options, names of presets and providers, and test files: what it runs has no other rehearsal."""
    for stage in stages():
        words = list(stage.command)
        if "fusedopt._cli" in words and "bench" in words:
            words = [{"cuda": "cpu"}.get(word, word) for word in words[words.index("bench") :]]
            call(*words, "--list")
        for word in words:
            if word.startswith(str(gpu.ROOT / "tests")):
                assert (ROOT / Path(word).relative_to(gpu.ROOT)).exists()
    tests = (ROOT / "tests" / "test_gpu.py").read_text()
    assert tests.count("sanitizer(") == 1 and "pytestmark = pytest.mark.gpu" in tests


def test_every_gpu_backend_contends() -> None:
    backends = {f"fusedopt-{name}" for name in fusedopt.backends.BACKENDS} - {"fusedopt-cpu", "fusedopt-eager"}
    assert backends <= set(gpu.PROVIDERS) <= set(PROVIDERS)
    assert set(gpu.ROW_PROVIDERS) == set(ROW_PROVIDERS) - {"fusedopt-cpu", "fusedopt-eager", "torch-compile"}


def test_all_of_it_takes_less_than_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage gets more than is left of the whole, and none starts where nothing is."""
    assert gpu.SECONDS < 600
    given: list[float] = []
    monkeypatch.setattr(gpu, "run", lambda stage, seconds: given.append(seconds) or "passed")
    report = gpu.Report(100)
    for limit in (60, 300):
        report.stage(gpu.Stage("", limit, []))
    report.end -= 99.5
    report.stage(gpu.Stage("", 60, []))
    assert given[0] == 60 and 99 < given[1] <= 100 and len(given) == 2
    assert report.lines[-1][1] == "no time left"


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """What `main` runs, given how stages end; all others pass."""

    def run(*arguments: str, **ends: str) -> list[str]:
        ran: list[str] = []

        def fake(stage: gpu.Stage, seconds: float) -> str:
            ran.append(stage.name)
            return ends.get(stage.name, "passed")

        monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
        monkeypatch.setattr(gpu, "architecture", lambda: "90")
        monkeypatch.setattr(gpu, "run", fake)
        ran.append(str(gpu.main(arguments)))
        return ran

    return run


def test_stages_go_on_after_a_failure(outcomes: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert outcomes()[-1] == "0"
    ran = outcomes(benchmark="failed, exit status 1")
    assert ran[-1] == "1" and ran[-2] == "tests on the CPU" and "benchmark" in ran
    assert re.search(r"benchmark +\S+ s  failed, exit status 1\n", capsys.readouterr().out)
    # Without the CUDA module, or all native code, the rest is still tested.
    ran = outcomes(install="failed, exit status 1")
    assert ran[:2] == ["install", "install without the CUDA module"] and "benchmark" in ran and ran[-1] == "1"
    (tmp_path / "peer.whl").touch()
    assert outcomes("--wheels", str(tmp_path))[0] == "wheels"
    assert outcomes("--seconds", "0") == ["1"]


def test_a_stage_that_hangs_is_stopped_with_all_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    python = sys.executable
    assert gpu.run(gpu.Stage("", 60, [python, "-c", "pass"]), 60) == "passed"
    assert gpu.run(gpu.Stage("", 60, [python, "-c", "raise SystemExit(3)"]), 60) == "failed, exit status 3"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(1000)'])"
    assert gpu.run(gpu.Stage("", 60, [python, "-c", child]), 0.5) == "stopped after 0 s"


def test_a_stage_sees_the_package_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    shown = tmp_path / "shown"
    code = f"import os; open({str(shown)!r}, 'w').write(os.environ['PYTHONPATH'] + os.environ['A'] + os.getcwd())"
    assert gpu.run(gpu.Stage("", 60, [sys.executable, "-c", code], {"A": "B"}), 60) == "passed"
    assert shown.read_text() == f"{tmp_path}{os.pathsep}elsewhereB{tmp_path}"
