"""The benchmark of RMSNorm and gated units: what it counts, what it calls wrong, and its part of the commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn import functional as F

from fusedopt._cli import main
from fusedopt.bench.micro import Options, run_cell
from fusedopt.bench.op import Entry
from fusedopt.bench.ops import OPS
from fusedopt.bench.presets import CELL_ELEMENTS, ROWS, SERIES, Rows
from fusedopt.bench.providers import PROVIDERS as OPTIMIZERS
from fusedopt.bench.records import Row, Run
from fusedopt.bench.row_op import FUNCTIONS, LIMIT, PASSES, RowOp
from fusedopt.bench.row_providers import EAGER, EPS, PROVIDERS, RowProvider, add_rms_norm, rms_norm

CPU = torch.device("cpu")
RAGGED = Rows("ragged", "5 rows of 37", 37, 5)
HERE = [name for name, provider in PROVIDERS.items() if not provider.unavailable(CPU)]
QUICK = [name for name in HERE if name != "torch-compile"]
OURS = [name for name in HERE if name.startswith("fusedopt")]


def measure(op: str, part: str = "both", dtype: str = "fp32", preset: Rows = RAGGED, **options: Any) -> dict[str, Row]:
    settings = dataclasses.replace(Options(providers=QUICK, rounds=1), **options)
    rows = run_cell(OPS[op].alone(part), preset, OPS[op].precisions[dtype], settings)
    return {row.provider: row for row in rows}


def only(name: str, function: Callable[..., Any], op: str) -> RowProvider:
    """A provider of one op."""
    return RowProvider(name, lambda device: None, lambda asked: None if asked == op else "no", lambda *_: function)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any], str], str]:
    """Enters a function as the provider "other" of an op."""

    def enter(function: Callable[..., Any], op: str) -> str:
        monkeypatch.setitem(PROVIDERS, "other", only("other", function, op))
        return "other"

    return enter


# --- what is right ---


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_is_what_autograd_has_of_the_families_own_code(name: str) -> None:
    """In float64, where that has nothing of the same to be wrong about."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    function = FUNCTIONS[name]
    inputs = [draw(4, 9) for _ in range(function.rows)] + [draw(9)] * function.weighted
    grads = [draw(4, 9) for _ in range(function.outputs)]
    exact = function.exact(inputs, grads)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    eager = {
        "rms_norm": normed,
        "add_rms_norm": lambda x, residual, weight: (normed(x + residual, weight), x + residual),
        "swiglu": lambda gate, up: F.silu(gate) * up,
        "geglu": lambda gate, up: F.gelu(gate) * up,
    }
    for value in inputs:
        value.requires_grad_()
    outputs = eager[name](*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs]
    right = [*outputs, *torch.autograd.grad(outputs, inputs, grads)]
    assert len(right) == len(exact)
    for value, (found, scale) in zip(right, exact):
        torch.testing.assert_close(found.expand_as(value), value, rtol=1e-12, atol=1e-12)
        assert bool((scale >= found.abs() * (1 - 1e-12)).all())  # a sum of magnitudes is no less than the sum's


@pytest.mark.parametrize("dtype", RowOp.precisions)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_every_provider_here_is_right(op: str, dtype: str) -> None:
    rows = measure(op, dtype=dtype)
    assert set(OURS) <= {name for name, row in rows.items() if row.status == "ok"}
    for row in rows.values():
        if row.status == "absent":
            assert row.note == f"torch has no fused {op}" and row.provider == "F.rms_norm"
            continue
        assert (row.status, row.note) == ("ok", "")
        assert row.seconds and row.host_seconds and row.error is not None
        assert row.error <= row.error_limit


class OneAfterAnother(torch.autograd.Function):
    """A weight's gradient, summed row by row in its own dtype."""

    @staticmethod
    def forward(ctx: Any, normalized: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(normalized, weight)
        return normalized * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        normalized, weight = ctx.saved_tensors
        total = torch.zeros_like(weight)
        for row in grad * normalized:
            total += row
        return grad * weight, total


def summing_rows(x: Tensor, weight: Tensor) -> Tensor:
    return OneAfterAnother.apply(F.rms_norm(x, weight.shape, None, EPS), weight)


def test_the_limit_has_room_for_sums_in_float32(other: Callable[..., str]) -> None:
    name, high = other(summing_rows, "rms_norm"), Rows("high", "", 64, 4000)
    row = measure("rms_norm", preset=high, providers=(name,))[name]
    assert row.error and row.error_limit == LIMIT[torch.float32] + 4000**0.5
    assert (row.status, row.error > LIMIT[torch.float32]) == ("ok", True)
    assert measure("rms_norm", dtype="bf16", preset=high, providers=(name,))[name].status == "wrong"
    assert RowOp(FUNCTIONS["swiglu"]).limit((4000, 64), torch.float32) == LIMIT[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("op", FUNCTIONS)
def test_compiled_code_is_right(op: str) -> None:
    row = measure(op, providers=["torch-compile"])["torch-compile"]
    assert (row.status, row.note) == ("ok", "")


def test_each_contender_compiles_code_of_its_own() -> None:
    """What torch compiles stays with the code, and of one function it does so for eight shapes before it gives up."""
    first, second = (PROVIDERS["torch-compile"].make("swiglu", []) for _ in range(2))
    codes = {id(function._torchdynamo_orig_callable.__code__) for function in (first, second)}
    assert len(codes | {id(EAGER["swiglu"].__code__)}) == 3


def without_eps(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 0.0)


def without_sum(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(x + residual, weight), x.clone()


def without_weight_gradient(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight.detach()) + 0 * weight


def without_the_roots_gradient(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + EPS).to(x.dtype) * weight


def tanh_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def last_left_out(gate: Tensor, up: Tensor) -> Tensor:
    y = F.silu(gate) * up
    return torch.cat([y[..., :-1], 0 * y[..., -1:]], -1)


@pytest.mark.parametrize("part", PASSES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("function", "op"),
    [
        (without_eps, "rms_norm"),
        (without_weight_gradient, "rms_norm"),
        (without_the_roots_gradient, "rms_norm"),
        (without_sum, "add_rms_norm"),
        (last_left_out, "swiglu"),
    ],
)
def test_a_provider_with_other_results_or_gradients_is_wrong_and_not_timed(
    other: Callable[..., str], function: Callable[..., Any], op: str, dtype: str, part: str
) -> None:
    name = other(function, op)
    rows = measure(op, part, dtype, providers=(name, OURS[0]), baselines=(name, "torch"))
    assert rows[name].status == "wrong" and rows[name].note.startswith("error ")
    assert rows[name].seconds is None and not rows[name].speedups
    assert rows[OURS[0]].status == "ok" and set(rows[OURS[0]].speedups) == {"torch"}


def test_no_term_averages_out_along_a_row(other: Callable[..., str]) -> None:
    wide = Rows("wide", "", 32_768, 2)
    row = measure("rms_norm", dtype="bf16", preset=wide, providers=(other(without_the_roots_gradient, "rms_norm"),))
    assert row["other"].status == "wrong"


def test_an_approximation_is_another_function(other: Callable[..., str]) -> None:
    assert measure("geglu", providers=(other(tanh_geglu, "geglu"),))["other"].status == "wrong"


def test_nan_is_wrong(other: Callable[..., str]) -> None:
    name = other(lambda gate, up: F.silu(gate) * up * torch.nan, "swiglu")
    assert measure("swiglu", providers=(name,))[name].status == "wrong"


def test_a_provider_that_raises_is_wrong_and_the_others_go_on(other: Callable[..., str]) -> None:
    def raising(x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError("no kernel\nfor this")

    rows = measure("rms_norm", providers=(other(raising, "rms_norm"), OURS[0]))
    assert (rows["other"].status, rows["other"].note) == ("wrong", "NotImplementedError: no kernel")
    assert rows[OURS[0]].status == "ok"


class Clobbering(torch.autograd.Function):
    """Right, but what it is given to read it writes to."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, which: str) -> Tensor:
        ctx.save_for_backward(gate.clone(), up.clone())
        ctx.which = which
        y = F.silu(gate) * up
        if which == "inputs":
            gate.data.zero_()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            inputs = gate.requires_grad_(), up.requires_grad_()
            grads = torch.autograd.grad(F.silu(gate) * up, inputs, grad.clone())
        if ctx.which == "gradients":
            grad.zero_()
        return *grads, None


@pytest.mark.parametrize("which", ["inputs", "gradients"])
def test_a_provider_that_overwrites_what_it_reads_is_told_of(other: Callable[..., str], which: str) -> None:
    name = other(lambda gate, up: Clobbering.apply(gate, up, which), "swiglu")
    rows = measure("swiglu", providers=(name, OURS[0]))
    assert (rows[name].status, rows[name].note) == ("ok", f"overwrites {'its' if which == 'inputs' else 'the'} {which}")
    assert (rows[OURS[0]].status, rows[OURS[0]].note) == ("ok", "")


# --- what is counted ---


@pytest.mark.parametrize(
    ("op", "forward", "backward"), [("rms_norm", 2, 3), ("add_rms_norm", 4, 4), ("swiglu", 3, 5), ("geglu", 3, 5)]
)
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_bytes_an_element(op: str, forward: int, backward: int, dtype: str, size: int) -> None:
    tensors = {"inference": forward, "forward": forward, "backward": backward, "both": forward + backward}
    assert set(tensors) == set(PASSES)
    for part, count in tensors.items():
        row = measure(op, part, dtype, providers=OURS[:1])[OURS[0]]
        assert row.bytes_per_param == count * size
        assert (row.op, row.elements, row.tensors) == (f"{op} {part}", 5 * 37, 1)
        assert row.seconds and row.bytes_per_second == pytest.approx(count * size * 5 * 37 / row.seconds.median)


@pytest.mark.parametrize("part", PASSES)
def test_the_percentage_is_of_the_copy_bandwidth(part: str) -> None:
    row = measure("swiglu", part, preset=Rows("large", "", 1024, 1024), providers=OURS[:1])[OURS[0]]
    assert row.bandwidth_used == "copy" and row.bytes_per_second and row.bandwidth_fraction
    assert row.bandwidth_fraction == pytest.approx(row.bytes_per_second / row.bandwidth["copy"])


@pytest.mark.parametrize(
    ("op", "provider", "saved", "own"),
    [
        ("swiglu", "torch", 12, 4),  # both inputs, and the activation
        ("swiglu", "fusedopt-cpu", 8, 0),
        ("rms_norm", "fusedopt-cpu", 4 + 4 / 5 + 4 / 64, 4 / 64),  # the input, the weight, a root for each row
        ("add_rms_norm", "fusedopt-cpu", 4 + 4 / 5 + 4 / 64, 4 / 64),  # the sum, which is a result
        ("rms_norm", "torch", 8 + 4 / 5 + 4 / 64, 4 + 4 / 64),  # beside these what the weight is multiplied by
    ],
)
def test_bytes_saved_for_the_backward_pass(op: str, provider: str, saved: float, own: float) -> None:
    if provider not in HERE:
        pytest.skip(str(PROVIDERS[provider].unavailable(CPU)))
    figures = measure(op, preset=Rows("rows", "", 64, 5), providers=(provider,))[provider].figures
    assert figures == {"saved B/elem": pytest.approx(saved), "of it own": pytest.approx(own)}


def test_a_pass_is_that_pass(other: Callable[..., str]) -> None:
    """What runs in a sample, and what ahead of it."""
    log: list[str] = []

    class Logging(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            log.append("forward" if ctx.needs_input_grad[0] else "inference")
            return F.silu(gate) * up

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            log.append("backward")
            inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(F.silu(inputs[0]) * inputs[1], inputs, grad)

    provider = only("logging", Logging.apply, "swiglu")
    for part in PASSES:
        op = RowOp(FUNCTIONS["swiglu"], part)
        entries = {"logging": Entry(op, provider, op.precisions["fp32"])}
        step = op.contenders(entries, [(5, 37)], CPU, 0)["logging"].step
        log.clear()
        if step.before:
            step.before()
        ahead, log[:] = tuple(log), []
        step.call()
        expected = {"backward": (("forward",), ["backward"]), "both": ((), ["forward", "backward"])}
        assert (ahead, log) == expected.get(part, ((), [part]))


def test_everyone_has_the_same_data_and_tensors_of_their_own(other: Callable[..., str]) -> None:
    seen: list[list[Tensor]] = []

    def spy(gate: Tensor, up: Tensor) -> Tensor:
        if gate.shape == (5, 37) and len(seen) < 2 and not any(gate is known for known, _ in seen):
            seen.append([gate, up])
        return F.silu(gate) * up

    op = OPS["swiglu"]
    provider = only("spy", spy, "swiglu")
    entries = {label: Entry(op, provider, op.precisions["fp32"]) for label in "ab"}
    op.contenders(entries, [(5, 37)], CPU, 0)
    (a, b) = seen
    for one, two in zip(a, b):
        assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()


# --- shapes ---


def test_presets_hold_the_same_elements_whatever_the_size() -> None:
    for name in SERIES["hidden"]:
        for device, total in CELL_ELEMENTS.items():
            ((rows, hidden),), scaled = ROWS[name].fit(1e12, device)
            assert name == f"hidden{hidden}" and scaled == "" and 0 <= total - rows * hidden < hidden
    assert ROWS["small"].fit(1e9, "cpu") == ([(8, 256)], "") == ROWS["small"].fit(1e9, "cuda")
    assert ROWS["4096x2048"].fit(1e9, "cuda") == ([(4096, 2048)], "")


@pytest.mark.parametrize(("room", "rows", "said"), [(185, 5, ""), (184, 4, "4 of 5 rows"), (1, 1, "1 of 5 rows")])
def test_a_preset_is_scaled_to_memory_and_says_so(room: int, rows: int, said: str) -> None:
    assert RAGGED.fit(room, "cpu") == ([(rows, 37)], said)


# --- who contends ---


def test_who_is_absent_says_why() -> None:
    rows = measure("rms_norm", providers=("liger", "quack", "torch-fused", OURS[0]), baselines=("adamw:torch-fused",))
    assert {name: row.note for name, row in rows.items() if row.status == "absent"} == {
        "liger": "liger-kernel runs on a GPU alone",
        "quack": "quack-kernels runs on a GPU alone",
        "torch-fused": "no provider of rms_norm",
        "adamw:torch-fused": "adamw has other data than rms_norm",
    }
    assert measure("geglu", providers=("F.rms_norm",))["F.rms_norm"].note == "torch has no fused geglu"
    assert PROVIDERS["liger"].lacks("geglu") == "liger-kernel has no geglu of the same rule"  # but the approximation


def test_peers_are_looked_for_where_they_could_run() -> None:
    reasons = {name: PROVIDERS[name].unavailable(torch.device("cuda")) for name in ("liger", "quack")}
    for name, module, package in (
        ("liger", "liger_kernel", "liger-kernel"),
        ("quack", "quack", "quack-kernels"),
    ):
        try:
            __import__(module)
        except ModuleNotFoundError:
            assert reasons[name] == f"pip install {package}"


@pytest.mark.parametrize(
    ("op", "names"), [("rms_norm", "F.rms_norm"), ("add_rms_norm", "F.rms_norm"), ("swiglu", "torch")]
)
def test_the_baseline_is_torchs_own(op: str, names: str) -> None:
    assert set(measure(op, providers=OURS[:1])[OURS[0]].speedups) == {names}


def test_a_baseline_may_be_of_another_op_of_the_kind() -> None:
    rows = measure("geglu", "forward", providers=OURS[:1], baselines=("swiglu:torch",))
    assert rows["swiglu:torch"].status == "ok" and set(rows[OURS[0]].speedups) == {"swiglu:torch"}
    assert rows["swiglu:torch"].bytes_per_param == 12  # of the same pass


def test_the_families_code_takes_its_residual() -> None:
    x, residual, weight = torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)
    y, total = add_rms_norm(x, residual, weight)
    assert torch.equal(total, 2 * x) and torch.equal(y, rms_norm(2 * x, weight))


# --- the commands ---


def call(*args: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="fusedopt")
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "small", RAGGED)


OPTIONS = ["--preset", "small", "--rounds", "1", "--provider", f"{OURS[0]},liger"]


def test_bench_measures_passes_side_by_side_and_writes_files(tiny: None, tmp_path: Path) -> None:
    files = [tmp_path / f"run.{end}" for end in ("json", "csv", "svg")]
    outputs = ["--json", files[0], "--csv", files[1], "--plot", files[2], "--save", tmp_path]
    said = call("bench", "rms_norm,swiglu", *OPTIONS, "--dtype", "fp32,bf16", "--pass", "forward,backward", *outputs)
    for words in (
        "rms_norm forward · ragged · fp32 · 185 elements\n",
        "swiglu backward · ragged · bf16",
        "× F.rms_norm",
        "saved B/elem",
        "absent: liger-kernel runs on a GPU alone",
    ):
        assert words in said
    assert "state B/param" not in said
    run = Run.read_json(files[0])
    assert list(dict.fromkeys((row.op, row.dtype) for row in run.rows)) == [
        (f"{op} {part}", dtype)
        for op in ("rms_norm", "swiglu")
        for part in ("forward", "backward")
        for dtype in ("fp32", "bf16")
    ]
    assert all(row.figures for row in run.rows if row.status == "ok")
    assert "figures.saved B/elem" in files[1].read_text().splitlines()[0]
    assert "<svg" in files[2].read_text()
    compared = call("bench", "compare", files[0], files[0], "--fail-above", "0%")
    assert compared.count("1.000") == len([row for row in run.rows if row.status == "ok"])


def test_both_passes_are_measured_unless_asked(tiny: None) -> None:
    said = call("bench", "swiglu", *OPTIONS, "--markdown")
    titles = [line for line in said.splitlines() if line.startswith("**")]
    assert titles == ["**swiglu both · ragged · fp32 · 185 elements**"]
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_optimizers_and_other_ops_have_their_own_presets_and_dtypes(tiny: None) -> None:
    options = ["--rounds", "1", "--provider", OURS[-1], "--baseline", "torch"]
    said = call("bench", "adamw,swiglu", "--preset", "mlp,small", "--dtype", "mixed,bf16", *options)
    titles = [line.strip() for line in said.splitlines() if " · " in line]
    assert [title.split(" · ")[:3] for title in titles] == [
        ["adamw", "mlp", "mixed"],
        ["adamw", "mlp", "bf16"],
        ["swiglu both", "ragged", "bf16"],
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rms_norm", "--preset", "mlp"], "rms_norm has no preset mlp; it has small, 4096x2048"),
        (["rms_norm", "--dtype", "int8"], "rms_norm has no dtype int8; it has fp32, bf16, fp16"),
        (["adamw", "--preset", "hidden"], "adamw has no preset hidden; it has mlp"),
        (["rms_norm", "--pass", "sideways"], "there is no 'sideways'; there are inference, forward"),
        (["rms_norm", "--baseline", "layer_norm:torch"], "there is no 'layer_norm'"),
    ],
)
def test_bad_options_are_explained(args: list[str], words: str) -> None:
    assert words in " ".join(call("bench", *args, code=2).split())


def test_list_names_providers_and_presets_of_rows() -> None:
    said = call("bench", "--list")
    for name in (*FUNCTIONS, *PROVIDERS, *OPTIMIZERS, *ROWS, *SERIES):
        assert name in said
    assert "liger-kernel runs on a GPU alone" in said
