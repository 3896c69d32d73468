"""The benchmark: what it measures, how it samples, what it calls wrong, and its commands."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fusedopt
from fusedopt._cli import main
from fusedopt.bench import timing
from fusedopt.bench.micro import Options, host_costs, run_cell
from fusedopt.bench.op import Entry
from fusedopt.bench.ops import OPS
from fusedopt.bench.optimizer_op import OptimizerOp
from fusedopt.bench.presets import HOST_SERIES, PRECISIONS, PRESETS, SERIES, Preset, elements
from fusedopt.bench.providers import PROVIDERS, OptimizerProvider, _peer
from fusedopt.bench.records import SCHEMA, Row, Run
from fusedopt.bench.report import duration
from fusedopt.bench.timing import Spread

TINY = Preset("tiny", "a few small tensors", 3, ((3, 5), (7,)), outer=((64,),))
CODES = Preset("codes", "tensors that have 8-bit state, among them one of ragged blocks", 2, ((5000,), (64, 128)))
FASTEST = next(f"fusedopt-{name}" for name, backend in fusedopt.backends.BACKENDS.items() if not backend.unavailable())
ONE_ROUND = Options(providers=(FASTEST, "fusedopt-eager"), rounds=1)


def measure(op: str = "adamw", dtype: str = "fp32", preset: Preset = TINY, **options: object) -> dict[str, Row]:
    rows = run_cell(OPS[op], preset, PRECISIONS[dtype], dataclasses.replace(ONE_ROUND, **options))
    return {row.provider: row for row in rows}


# --- what is measured ---


OPTIMIZERS = [name for name, op in OPS.items() if type(op) is OptimizerOp]  # Muon takes matrices


def test_every_optimizer_is_an_op() -> None:
    assert set(OPTIMIZERS) == {name.lower() for name in fusedopt.optim.OPTIMIZERS}


@pytest.mark.parametrize(
    ("preset", "tensors", "size"),
    [
        ("mlp", 6, 5_962),
        ("many", 2_000, 2_000_000),
        ("many5k", 2_000, 10_000_000),
        ("large", 16, 1 << 24),
        ("gpt2", 148, 124_439_808),
        ("llama1b", 146, 1_235_814_400),
    ],
)
def test_presets_have_the_sizes_they_are_known_by(preset: str, tensors: int, size: int) -> None:
    shapes = PRESETS[preset].shapes()
    assert (len(shapes), elements(shapes)) == (tensors, size)


def test_a_series_holds_the_same_elements_in_ever_more_tensors() -> None:
    assert len({elements(PRESETS[name].shapes()) for name in HOST_SERIES}) == 1
    counts = [len(PRESETS[name].shapes()) for name in HOST_SERIES]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("room", "kept", "said"),
    [
        (1000, 130, ""),
        (130, 130, ""),
        (129, 108, "2 of 3 layers"),
        (86, 86, "1 of 3 layers"),
        (85, 66, "3 of 3 layers, no embedding"),
        (1, 22, "1 of 3 layers, no embedding"),
    ],
)
def test_a_preset_is_scaled_to_memory_and_says_so(room: int, kept: int, said: str) -> None:
    shapes, scaled = TINY.fit(room)
    assert (elements(shapes), scaled) == (kept, said)


# --- one cell ---


@pytest.mark.parametrize("op", OPTIMIZERS)
def test_every_op_runs_and_is_right(op: str) -> None:
    rows = measure(op)
    for name in ONE_ROUND.providers:
        row = rows[name]
        assert row.status == "ok", row.note
        assert row.seconds and row.host_seconds and row.rounds == 1
        assert row.error is not None and row.error_limit is not None and row.error <= row.error_limit


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_precision_runs_and_is_right(dtype: str) -> None:
    for row in measure(dtype=dtype).values():
        assert row.status == "ok", f"{row.provider}: {row.note}"


@pytest.mark.parametrize(("dtype", "moved", "state"), [("fp32", 28, 8), ("mixed", 22, 8), ("bf16", 14, 4)])
def test_bytes_a_parameter_of_adamw(dtype: str, moved: int, state: int) -> None:
    """Read parameter, gradient, two states; write parameter, two states."""
    row = measure(dtype=dtype)[FASTEST]
    assert row.bytes_per_param == moved
    assert row.state_bytes_per_param == pytest.approx(state + 4 * row.tensors / row.elements)  # with the step counters
    assert row.seconds and row.bytes_per_second == pytest.approx(moved * row.elements / row.seconds.median)


@pytest.mark.parametrize("op", OPTIMIZERS)
def test_every_op_is_right_with_8_bit_state(op: str) -> None:
    rows = measure(op, "int8", CODES)
    for name in ONE_ROUND.providers:
        row = rows[name]
        assert row.status == "ok", row.note
        assert row.error is not None and row.error_limit is not None and 0 <= row.error <= row.error_limit
        assert row.state_bytes_per_param is not None
        # Beside the codes a scale for each of ceil(5000 / 256) and of 64 * 128 / 256 blocks, and up to two counters.
        states, rest = divmod(row.state_bytes_per_param * row.elements, row.elements)
        assert states >= 1 and 0 <= rest - states * 4 * 2 * (20 + 32) <= 8 * row.tensors


@pytest.mark.parametrize(("op", "states"), [("adamw", 2), ("lion", 1), ("sgd", 1), ("ademamix", 3)])
def test_bytes_a_parameter_with_8_bit_state(op: str, states: int) -> None:
    preset = Preset("even", "whole blocks", 1, ((4096,),))
    row = measure(op, "int8", preset)[FASTEST]
    state = states * (1 + 4 / 256)
    assert row.bytes_per_param == 12 + 2 * state
    assert row.state_bytes_per_param is not None
    assert 0 <= row.state_bytes_per_param - state <= 2 * 4 / 4096  # the step counters
    mixed = measure(op, "mixed-int8", preset)[FASTEST]
    assert mixed.bytes_per_param == 6 + 2 * state
    assert OPS[op].held_bytes(Entry(OPS[op], PROVIDERS[FASTEST], PRECISIONS["int8"])) == 8 + state


def test_small_tensors_are_said_to_have_float32_state() -> None:
    row = measure(dtype="int8")[FASTEST]
    assert row.bytes_per_param == 28
    assert row.state_bytes_per_param and row.state_bytes_per_param > 8


def test_8_bit_peers_contend_with_8_bit_state_alone() -> None:
    for name in ("bitsandbytes-8bit", "torchao-8bit"):
        for precision in PRECISIONS.values():
            assert (PROVIDERS[name].lacks("AdamW", precision) is None) == precision.lossy


def test_bitsandbytes_with_8_bit_state() -> None:
    pytest.importorskip("bitsandbytes")
    row = measure(dtype="int8", preset=CODES, providers=("bitsandbytes-8bit",))["bitsandbytes-8bit"]
    assert row.status == "ok", row.note
    assert row.state_bytes_per_param and 2 < row.state_bytes_per_param < 2.2  # with two maps of 1 kB for 26k elements


def test_what_a_peer_logs_while_it_loads_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    source = "import logging, warnings\nlogging.error('no GPU')\nwarnings.warn('no kernels')\n"
    (tmp_path / "noisy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert _peer("noisy", "noisy", "noisy", (), ()).unavailable(torch.device("cpu")) is None
    assert not caplog.records and not recwarn.list
    logging.error("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]


def test_the_baseline_is_torch_fused_where_torch_has_it() -> None:
    assert set(measure("adamw")[FASTEST].speedups) == {"torch-fused"}
    assert set(measure("nadam")[FASTEST].speedups) == {"torch"}
    assert set(measure("lion")[FASTEST].speedups) == {"fusedopt-eager"}
    assert set(measure("adamw", baselines=("torch", "torch-foreach"))[FASTEST].speedups) == {"torch", "torch-foreach"}


def test_a_baseline_without_the_precision_is_measured_in_float32() -> None:
    rows = measure(dtype="mixed")
    assert rows["torch-fused@fp32"].bytes_per_param == 28
    assert set(rows[FASTEST].speedups) == {"torch-fused@fp32"}


def test_a_baseline_may_be_of_another_op() -> None:
    rows = measure("lion", baselines=("adamw:torch-fused",))
    assert rows["adamw:torch-fused"].status == "ok" and rows["adamw:torch-fused"].bytes_per_param == 28
    assert rows[FASTEST].bytes_per_param == 20
    assert set(rows[FASTEST].speedups) == {"adamw:torch-fused"}
    rows = measure("lion", "int8", baselines=("adamw:torch-fused",))
    assert set(rows[FASTEST].speedups) == {"adamw:torch-fused@fp32"}
    assert measure("adamw", baselines=("lion:torch",))["lion:torch"].note == "torch.optim has no Lion"


def test_a_provider_asked_for_without_the_op_is_said_to_be_absent() -> None:
    row = measure("lion", providers=("torch", FASTEST))["torch"]
    assert (row.status, row.note) == ("absent", "torch.optim has no Lion")
    (only,) = measure("lion", providers=("torch",), baselines=("torch",)).values()
    assert only.status == "absent"


def test_measuring_inside_a_training_loop() -> None:
    row = measure(in_loop=True)[FASTEST]
    assert row.status == "ok" and row.seconds


# --- correctness first ---


class Halved(torch.optim.AdamW):
    """Half of the weight decay that was asked for."""

    def __init__(self, params: list, **settings: float) -> None:
        super().__init__(params, **{**settings, "weight_decay": settings["weight_decay"] / 2})


class Slowed(torch.optim.AdamW):
    """Nine tenths of the learning rate."""

    def __init__(self, params: list, **settings: float) -> None:
        super().__init__(params, **{**settings, "lr": 0.9 * settings["lr"]})


class LastLeftOut(torch.optim.AdamW):
    """The last element of the last tensor is never stepped."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        last = self.param_groups[0]["params"][-1].view(-1)[-1]
        kept = last.clone()
        super().step()
        last.copy_(kept)


class Clobbering(torch.optim.AdamW):
    """Right, but the gradients do not survive it."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        super().step()
        for param in self.param_groups[0]["params"]:
            param.grad.zero_()


class Raising(torch.optim.AdamW):
    def step(self) -> None:  # type: ignore[override]
        raise NotImplementedError("no kernel\nfor this")


@pytest.fixture
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A provider of the parametrised class."""
    provider = OptimizerProvider(
        "other",
        unavailable=lambda device: None,
        lacks=lambda op, precision: None,
        make=lambda op, params, settings, precision: request.param(params, **settings),
    )
    monkeypatch.setitem(PROVIDERS, "other", provider)
    return "other"


@pytest.mark.parametrize("other", [Halved, LastLeftOut], indirect=True)
def test_a_provider_with_other_results_is_wrong_and_not_timed(other: str) -> None:
    rows = measure(providers=(other, FASTEST), baselines=(other, "torch"))
    assert rows[other].status == "wrong" and rows[other].note.startswith("error ")
    assert rows[other].seconds is None and not rows[other].speedups
    assert rows[FASTEST].status == "ok" and set(rows[FASTEST].speedups) == {"torch"}


@pytest.mark.parametrize("other", [Slowed], indirect=True)
def test_8_bit_state_is_held_to_the_reference_too(other: str) -> None:
    rows = measure(dtype="int8", preset=CODES, providers=(other, FASTEST))
    assert (rows[other].status, rows[FASTEST].status) == ("wrong", "ok")
    assert rows[other].error == pytest.approx(0.1, abs=0.01)  # a tenth of the update is missing
    assert rows[other].error_limit == rows[FASTEST].error_limit


@pytest.mark.parametrize("other", [Raising], indirect=True)
def test_a_provider_that_raises_is_wrong_and_the_others_go_on(other: str) -> None:
    rows = measure(providers=(other, FASTEST))
    assert (rows[other].status, rows[other].note) == ("wrong", "NotImplementedError: no kernel")
    assert rows[FASTEST].status == "ok"


@pytest.mark.parametrize("other", [Clobbering], indirect=True)
def test_a_provider_that_overwrites_gradients_is_told_of(other: str) -> None:
    rows = measure(providers=(other, FASTEST))
    assert (rows[other].status, rows[other].note) == ("ok", "overwrites the gradients")
    assert rows[FASTEST].note == ""


# --- clocks ---


def test_each_round_samples_everyone_once_in_a_new_order() -> None:
    def order(seed: int) -> list[str]:
        called: list[str] = []
        samplers = {key: lambda key=key: called.append(key) or float(len(called)) for key in "abcd"}
        samples = timing.interleave(samplers, rounds=8, seconds=1.0, seed=seed)
        assert all(len(values) == 8 for values in samples.values())
        assert samples["a"] == [index + 1 for index, key in enumerate(called) if key == "a"]
        return called

    called = order(seed=0)
    rounds = [tuple(called[start : start + 4]) for start in range(0, len(called), 4)]
    assert all(set(one) == set("abcd") for one in rounds)
    assert len(set(rounds)) > 1
    assert order(seed=0) == called != order(seed=1)


def test_rounds_end_with_the_time_but_not_before_a_few() -> None:
    fractions: list[float] = []
    samples = timing.interleave({"a": lambda: 1.0}, rounds=None, seconds=1e-9, seed=0, progress=fractions.append)
    assert len(samples["a"]) == timing.MIN_ROUNDS
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_spread() -> None:
    assert Spread.of([float(value) for value in range(11)]) == Spread(2.0, 5.0, 8.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_extra_memory_is_what_a_call_holds() -> None:
    device = torch.device("cpu")
    none = timing.peak_extra_bytes(lambda: None, device=device)
    some = timing.peak_extra_bytes(lambda: torch.ones(1 << 22), device=device)  # 16 MiB
    if none is None or some is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert none < 1 << 20
    assert 15 << 20 < some < 20 << 20
    held: list[torch.Tensor] = []
    after = timing.peak_extra_bytes(held.clear, lambda: held.append(torch.ones(1 << 22)), device=device)
    assert after is not None and after < 1 << 20  # what is there before is not the call's


def test_host_cost_is_the_slope_over_tensors() -> None:
    first, *_, last = HOST_SERIES
    rows = [
        Row("adamw", first, "fp32", "torch", tensors=100, seconds=Spread(0.9, 1.0, 1.1)),
        Row("adamw", last, "fp32", "torch", tensors=1100, seconds=Spread(2.9, 3.0, 3.1)),
        Row("adamw", last, "fp32", "torch-fused", status="wrong"),
    ]
    ((row, cost),) = host_costs(rows)
    assert (row.provider, cost) == ("torch", 0.002)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(12.34, "12.3 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.50 µs"), (123e-9, "123 ns"), (0, "0.00 ns")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# --- the commands ---


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(PRESETS, "mlp", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(*args: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="fusedopt")
    assert result.exit_code == code, result.output
    return result.output


def test_bench_prints_tables_and_writes_files(tiny: None, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("run.json", "run.csv", "run.png")]
    options = ["--preset", "mlp", "--rounds", "2", "--threads", "1", "--provider", f"{FASTEST},torch"]
    output = call("bench", "adamw", "lion", *options, "--json", files[0], "--csv", files[1], "--plot", files[2])
    for word in ("adamw · tiny · fp32", FASTEST, "× torch-fused", "absent: torch.optim has no Lion", torch.__version__):
        assert word in output

    document = json.loads(files[0].read_text())
    assert document["schema"] == SCHEMA and document["settings"]["rounds"] == 2
    run = Run.read_json(files[0])
    assert [dataclasses.asdict(row) for row in run.rows] == document["rows"]
    with files[1].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [row.provider for row in run.rows]
    assert float(lines[0]["seconds.median"]) == document["rows"][0]["seconds"]["median"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_bench_prints_markdown(tiny: None) -> None:
    output = call("bench", "--preset", "mlp", "--rounds", "1", "--provider", FASTEST, "--markdown")
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert table[2].startswith(f"| {FASTEST} |")


def test_a_table_has_room_for_every_name(tiny: None) -> None:
    baselines = ["--baseline", "torch-fused,torch-foreach,adamw:torch-fused"]
    options = ["--preset", "mlp", "--dtype", "int8", "--rounds", "1", "--provider", FASTEST]
    lines = call("bench", "adam", *options, *baselines).splitlines()
    for name in ("torch-fused@fp32", "torch-foreach@fp32", "adamw:torch-fused@fp32"):
        assert any(line.startswith(f" {name} ") for line in lines)
        assert any(f"× {name}" in line for line in lines)


def test_nothing_to_draw_is_said(tiny: None, tmp_path: Path) -> None:
    chart = tmp_path / "run.png"
    options = ["--preset", "mlp", "--provider", "torch", "--baseline", "torch", "--plot", chart]
    assert "was not written: nobody was timed" in call("bench", "lion", *options, code=1)
    assert not chart.exists()


def test_list_names_everything() -> None:
    output = call("bench", "--list")
    for name in (*OPS, *PROVIDERS, *PRESETS, *SERIES, *PRECISIONS):
        assert name in output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nonsense"], "there is no 'nonsense'; there are sgd"),
        (["--preset", "huge"], "there is no 'huge'; there are mlp"),
        (["--provider", "apex"], "there is no 'apex'"),
        (["--baseline", "apex"], "there is no 'apex'"),
        (["--baseline", "torch,adamw:apex"], "there is no 'apex'"),
        (["--baseline", "nonsense:torch"], "there is no 'nonsense'; there are sgd"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--json", "missing/run.json"], "missing/run.json cannot be written (No such file or directory)"),
        (["--plot", "run.txt"], "run.txt ends in none of .png, .svg, .pdf"),
        (["compare", "missing.json", "missing.json"], "does not exist"),
    ],
)
def test_bad_options_are_explained(args: list[str], words: str) -> None:
    assert words in call("bench", *args, code=2)


def written(path: Path, **medians: float | None) -> Path:
    """A file with one row a provider; None for one that was wrong."""
    rows = [
        Row("adamw", "mlp", "fp32", name, 6, 5962, seconds=Spread(0.99 * median, median, 1.01 * median))
        if median
        else Row("adamw", "mlp", "fp32", name, 6, 5962, status="wrong", note="error 9")
        for name, median in medians.items()
    ]
    Run({}, {}, rows).write_json(path)
    return path


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ({"a": 1.0}, {"a": 1.0}, 0),
        ({"a": 1.0}, {"a": 1.04}, 0),
        ({"a": 1.0}, {"a": 1.06}, 1),
        ({"a": 1.0}, {"a": 0.5}, 0),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.06}, 1),
        ({"a": 1.0}, {"a": 1.0, "new": 9.0}, 0),
        ({"a": 1.0}, {"a": None}, 1),
        ({"a": None}, {"a": 1.0}, 0),
        ({"a": 1.0}, {"b": 1.0}, 2),
    ],
)
def test_compare_fails_above_the_threshold(tmp_path: Path, before: dict, after: dict, code: int) -> None:
    files = written(tmp_path / "before.json", **before), written(tmp_path / "after.json", **after)
    call("bench", "compare", *files, "--fail-above", "5%", code=code)


def test_compare_without_a_threshold_only_shows(tmp_path: Path) -> None:
    files = written(tmp_path / "before.json", a=1.0, b=1.0), written(tmp_path / "after.json", a=2.0, b=1.005)
    lines = call("bench", "compare", *files).splitlines()
    (slower,) = [line for line in lines if "2.000" in line]
    (same,) = [line for line in lines if "1.005" in line]
    assert "within noise" in same and "within noise" not in slower
    call("bench", "compare", *files, "--fail-above", "5%", code=1)
    call("bench", "compare", *files, "--fail-above", "5%", "--provider", "b")


@pytest.mark.parametrize("threshold", ["5", "-5%", "much", "nan%"])
def test_compare_takes_percentages_only(tmp_path: Path, threshold: str) -> None:
    file = written(tmp_path / "run.json", a=1.0)
    assert "is not a percentage such as 5%" in call("bench", "compare", file, file, "--fail-above", threshold, code=2)


def test_compare_refuses_files_it_does_not_know(tmp_path: Path) -> None:
    file = written(tmp_path / "run.json", a=1.0)
    other = tmp_path / "other.json"
    for text, words in (
        ("[]", "was not written by"),
        ("{", "was not written by"),
        (json.dumps({"schema": SCHEMA, "rows": [{}]}), "was not written by"),
        ('{"schema": 0}', f"has schema 0, this version reads schema {SCHEMA}"),
    ):
        other.write_text(text)
        assert words in " ".join(call("bench", "compare", file, other, code=2).split())


def test_help_of_both_commands() -> None:
    assert "Usage: fusedopt bench [OPTIONS] [OPS]..." in call("bench", "--help")
    assert "Usage: fusedopt bench compare [OPTIONS] BEFORE AFTER" in call("bench", "compare", "--help")


def test_explain_is_a_command() -> None:
    assert call("explain").strip() == str(fusedopt.explain())


def without(module: str, calls: str) -> subprocess.CompletedProcess[str]:
    """Calls of `main` in a process where `module` is not installed."""
    code = f"import sys; sys.modules[{module!r}] = None; from fusedopt._cli import main; {calls}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_command_without_click_says_what_to_install() -> None:
    done = without("click", "main()")
    assert done.returncode == 1
    assert done.stderr == "The command fusedopt needs click: pip install 'fusedopt[bench]'\n"


def test_explain_needs_no_matplotlib_and_bench_says_so() -> None:
    done = without("matplotlib", "main(['explain'], standalone_mode=False); main(['bench', '--list'])")
    assert done.returncode == 1 and "eager" in done.stdout
    assert done.stderr == "Error: fusedopt bench needs matplotlib: pip install 'fusedopt[bench]'\n"
