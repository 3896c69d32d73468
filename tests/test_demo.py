"""`fusedopt demo` on its tiny model, that model itself, and the examples."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import needs_torchs_muon

import fusedopt
from fusedopt.bench.demo import FIRST_STEPS, SETTINGS, demo, torch_muon_and_adamw
from fusedopt.bench.model import SIZES, Llama, rotary_angles, rotate, warmup_cosine

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.py"))


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """`--threads` is the process's."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Result:
    """The command with what every test wants; a later argument of the same name overrules."""
    common = ["--model", "tiny", "--steps", "4", "--threads", "1", "--output", str(folder / "chart.png")]
    return CliRunner().invoke(demo, [*common, *arguments], env=env)


def results(folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "result.json"
    result = run(folder, "--json", str(path), *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


def test_prints_and_draws(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    for words in ("step 4 of 4", "torch AdamW", "fusedopt", "torch fused", "optimizer, ms a step", "The same training"):
        assert words in result.output
    assert max(map(len, result.output.splitlines()[:-2])) <= 80  # the tables fit a terminal
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_shows_bars_on_a_terminal(tmp_path: Path) -> None:
    result = run(tmp_path, env={"FORCE_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert "4/4" in result.output
    assert "step 4 of 4" not in result.output


def test_json(tmp_path: Path) -> None:
    result = results(tmp_path)
    assert (result["format"], result["version"]) == ("fusedopt-demo", 1)
    assert set(result) == {"format", "version", "environment", "config", "runs", "fused_optimizer_ms", "comparison"}
    assert result["config"]["settings"] == {"lr": 1e-3, "weight_decay": 0.1}
    first, second = result["runs"]
    parameters = result["config"]["parameters"]
    for side in (first, second):
        assert len(side["losses"]) == 4
        assert all(0 < loss < 10 for loss in (*side["losses"], side["validation_loss"]))
        assert set(side["median_ms"]) == {"forward", "backward", "optimizer", "step"}
        assert side["seconds"] >= 4e-3 * min(side["median_ms"].values())
        assert 8 * parameters <= side["state_bytes"] <= 8.1 * parameters
    assert first["losses"][0] == second["losses"][0]  # the same weights, the same batch
    assert result["comparison"]["same"]
    assert result["comparison"]["max_loss_difference"] == max(
        abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=True)
    )


def test_seed_decides(tmp_path: Path) -> None:
    one, again, other = (results(tmp_path, "--seed", seed) for seed in ("1", "1", "2"))
    losses = [[side["losses"] for side in result["runs"]] for result in (one, again, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("name", list(fusedopt.optim.OPTIMIZERS))
def test_every_optimizer(tmp_path: Path, name: str) -> None:
    first, second = results(tmp_path, "--optimizer", name)["runs"]
    assert first["label"] == ("eager" if fusedopt.optim.OPTIMIZERS[name].torch_class is None else f"torch {name}")
    assert second["label"] == "fusedopt"


# What rounding may change of a step: half a unit in the last of 8 bits, and of the 64 steps of a block's upper decade.
@pytest.mark.parametrize(("state_dtype", "rounding"), [("bfloat16", 2**-9), ("int8", 0.9 / 64 / 2 / 0.1)])
def test_state_dtype(tmp_path: Path, state_dtype: str, rounding: float) -> None:
    result = results(tmp_path, "--state-dtype", state_dtype)
    first, second, third = result["runs"]
    assert [run["label"] for run in result["runs"]] == ["torch AdamW", "fusedopt", f"fusedopt {state_dtype}"]
    assert second["state_bytes"] == first["state_bytes"]
    assert third["state_bytes"] < 0.8 * first["state_bytes"]
    losses = [run["validation_loss"] for run in (second, third)]
    assert result["comparison"]["validation_losses"] == losses
    assert result["comparison"]["validation_relative_difference"] == (losses[1] - losses[0]) / losses[0] != 0
    assert result["comparison"]["max_loss_difference"] == max(
        abs(a - b) for a, b in zip(second["losses"], third["losses"], strict=True)
    )
    fall = max(second["losses"]) - min(second["losses"])
    assert result["comparison"]["first_steps_bound"] == pytest.approx(1e-4 + rounding * fall, rel=0.01)


def test_state_bytes_of_int8(tmp_path: Path) -> None:
    result = results(tmp_path, "--state-dtype", "int8")
    run, parameters = result["runs"][-1], result["config"]["parameters"]
    quantized = 2 * 256 * 32  # the embedding and the head; nothing else has 4096 elements
    counters = 4 * len(list(Llama(SIZES["tiny"]).parameters()))
    assert run["state_bytes"] == 8 * (parameters - quantized) + 2 * quantized * (1 + 4 / 256) + counters
    assert run["state_bytes_per_parameter"] == run["state_bytes"] / parameters


def test_patch_swaps_the_model_too(tmp_path: Path) -> None:
    result = results(tmp_path, "--patch")
    first, second = result["runs"]
    assert [first["label"], second["label"]] == ["torch AdamW", "fusedopt + patch"]
    assert (first["patched"], second["patched"]) == ({}, {"rms_norm": 5, "swiglu": 2})  # two layers, and the last norm
    assert result["comparison"]["same"] and result["comparison"]["max_loss_difference"] < 1e-5
    milliseconds = [run["median_ms"]["forward"] + run["median_ms"]["backward"] for run in (first, second)]
    assert result["comparison"]["model_speedup"] == pytest.approx(milliseconds[0] / milliseconds[1])
    assert result["config"]["patch"] and not results(tmp_path)["config"]["patch"]


@needs_torchs_muon
def test_muon(tmp_path: Path) -> None:
    result = results(tmp_path, "--optimizer", "muon", "--seeds", "2")
    first, second = result["runs"]
    assert [first["label"], second["label"]] == ["torch Muon + AdamW", "fusedopt"]
    assert first["losses"][0] == second["losses"][0] and first["losses"] != second["losses"]
    # Within what bfloat16 products move a loss, of which each takes 1 to 2 % of a step.
    fall = max(first["losses"]) - min(first["losses"])
    assert result["comparison"]["max_loss_difference"] < 0.02 * fall
    assert result["comparison"]["first_steps_bound"] == pytest.approx(1e-4 + 0.04 * fall)
    (other,) = result["comparison"]["other_seeds"]
    assert len(result["comparison"]["validation_losses"]) == len(other["validation_losses"]) == 2
    config = SIZES["tiny"]
    others = 2 * config.vocabulary * config.dim + (2 * config.layers + 1) * config.dim
    matrices = result["config"]["parameters"] - others
    counters = 4 * (2 + 2 * config.layers + 1)
    for run in (first, second):
        assert run["state_bytes"] == 4 * matrices + 8 * others + counters
    assert result["config"]["settings"]["lr"] == 0.02 and result["fused_optimizer_ms"] is None


@needs_torchs_muon
def test_torchs_two_optimizers_are_set_as_the_one() -> None:
    model = Llama(SIZES["tiny"])
    ours = fusedopt.Muon(model, **SETTINGS["Muon"]).param_groups
    theirs = [group for each in torch_muon_and_adamw(model, SETTINGS["Muon"]) for group in each.param_groups]
    assert len(ours) == len(theirs) == 2
    for group, other in zip(ours, theirs, strict=True):
        assert list(map(id, group["params"])) == list(map(id, other["params"]))
        both = set(group) & set(other) - {"params"}
        assert {"lr", "weight_decay", "betas" if group["algorithm"] == "adamw" else "momentum"} <= both
        assert {name: group[name] for name in both} == {name: other[name] for name in both}


@needs_torchs_muon
def test_muon_with_all_options(tmp_path: Path) -> None:
    result = results(tmp_path, "--optimizer", "Muon", "--patch", "--state-dtype", "int8")
    labels = [run["label"] for run in result["runs"]]
    assert labels == ["torch Muon + AdamW", "fusedopt + patch", "fusedopt int8 + patch"]
    assert result["runs"][2]["state_bytes"] < 0.7 * result["runs"][1]["state_bytes"]


def test_muon_where_torch_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusedopt.Muon, "torch_class", None)
    labels = [run["label"] for run in results(tmp_path, "--optimizer", "muon")["runs"]]
    assert labels == ["eager", "fusedopt"]


@needs_torchs_muon
def test_notices_another_training_with_muon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(fusedopt.Muon):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "adamw_lr": 1e-3})

    monkeypatch.setattr(fusedopt, "Muon", Wrong)
    result = run(tmp_path, "--optimizer", "muon")
    assert result.exit_code == 1
    assert "not the same training" in result.output


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["--state-dtype", "int8"], ["torch AdamW", "fusedopt + patch", "fusedopt int8 + patch"]),
        (["--optimizer", "Lion"], ["eager", "fusedopt + patch"]),
    ],
)
def test_all_but_the_first_run_are_patched(tmp_path: Path, arguments: list[str], labels: list[str]) -> None:
    runs = results(tmp_path, "--patch", *arguments)["runs"]
    assert [run["label"] for run in runs] == labels
    assert [bool(run["patched"]) for run in runs] == [label != labels[0] for label in labels]


def test_says_what_is_patched(tmp_path: Path) -> None:
    output = run(tmp_path, "--patch").output
    for words in ("patched: 7", "2 x blocks.*.mlp_norm", "swiglu, layout separate", "left: 0", "forward and backward"):
        assert words in output
    assert "patched:" not in run(tmp_path).output


def test_notices_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(model: torch.nn.Module) -> Any:
        for module in model.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.eps = 1e-3
        return original(model)

    original = fusedopt.patch
    monkeypatch.setattr(fusedopt, "patch", patch)
    result = run(tmp_path, "--patch", "--steps", str(FIRST_STEPS))
    assert result.exit_code == 1
    assert "not the same training" in result.output


def test_state_dtype_where_torch_has_no_such_optimizer(tmp_path: Path) -> None:
    result = results(tmp_path, "--optimizer", "Lion", "--state-dtype", "int8")
    assert [run["label"] for run in result["runs"]] == ["fusedopt", "fusedopt int8"]


def test_seeds(tmp_path: Path) -> None:
    several = results(tmp_path, "--state-dtype", "int8", "--seeds", "3")["comparison"]
    assert [comparison["seed"] for comparison in (several, *several["other_seeds"])] == [0, 1, 2]
    alone = results(tmp_path, "--state-dtype", "int8", "--seed", "1")["comparison"]
    assert several["other_seeds"][0]["validation_losses"] == alone["validation_losses"]
    output = run(tmp_path, "--state-dtype", "int8", "--seed", "5", "--seeds", "2").output
    table = output[output.index("Validation loss") :]
    assert [line.split()[1] for line in table.splitlines() if line.startswith("│")] == ["5", "6"]


@pytest.mark.parametrize("wrong_seed", [0, 1])
def test_notices_another_training_with_8_bit_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_seed: int
) -> None:
    def make(params: Any, state_dtype: str | None = None, **settings: Any) -> torch.optim.Optimizer:
        if state_dtype and torch.initial_seed() == wrong_seed:
            settings["lr"] *= 1.5
        return fusedopt.Lion(params, state_dtype=state_dtype, **settings)

    make.torch_class = None  # type: ignore[attr-defined]
    monkeypatch.setitem(fusedopt.optim.OPTIMIZERS, "Lion", make)
    arguments = ("--optimizer", "Lion", "--state-dtype", "int8", "--seeds", "2", "--steps", str(FIRST_STEPS))
    result = run(tmp_path, *arguments)
    assert result.exit_code == 1
    assert f"this is not the same training: seed {wrong_seed}:" in " ".join(result.output.split())


def test_notices_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for weight_decay in (0.0, math.nan):

        def swap(optimizer: torch.optim.Optimizer, weight_decay: float = weight_decay) -> torch.optim.Optimizer:
            optimizer.param_groups[0]["weight_decay"] = weight_decay
            return optimizer

        monkeypatch.setattr(fusedopt, "swap", swap)
        result = run(tmp_path, "--steps", str(FIRST_STEPS))
        assert result.exit_code == 1
        assert "not the same training" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer", "Adan"], "adamw"),
        (["--state-dtype", "int3"], "int3"),
        (["--steps", "1"], "--steps"),
        (["--seeds", "0"], "--seeds"),
        (["--threads", "0"], "--threads"),
        (["--output", "no/such/folder/chart.png"], "no/such/folder/chart.png cannot be written"),
        (["--json", "no/such/folder/result.json"], "no/such/folder/result.json cannot be written"),
    ],
)
def test_refuses_before_training(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not list(tmp_path.iterdir())


def test_backend_that_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("FUSEDOPT_BACKEND: the backend 'cpu' cannot run here: no compiler")

    monkeypatch.setattr("fusedopt.bench.demo.requested_backend", refuse)
    result = run(tmp_path)
    assert (result.exit_code, "no compiler" in result.output) == (1, True)


def test_checking_a_path_keeps_the_file(tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    chart.write_bytes(b"old")
    assert run(tmp_path, "--json", "no/such/folder/result.json").exit_code == 2
    assert chart.read_bytes() == b"old"


def test_model_sees_no_later_byte() -> None:
    config = SIZES["tiny"]
    torch.manual_seed(0)
    model = Llama(config)
    ids = torch.randint(config.vocabulary, (2, config.context))
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % config.vocabulary
    before, after = model(ids), model(changed)
    assert before.shape == (2, config.context, config.vocabulary)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-6)
    for position in range(20, config.context):  # and every earlier one
        assert not torch.allclose(after[:, position], before[:, position], rtol=0, atol=1e-6)


def test_rotation_keeps_length_and_tells_distance() -> None:
    cos, sin = rotary_angles(32, 16)
    generator = torch.Generator().manual_seed(0)
    q, k = (rotate(torch.randn(16, generator=generator).expand(32, 16), cos, sin) for _ in range(2))
    torch.testing.assert_close(q.norm(dim=1), q[:1].norm(dim=1).expand(32))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])  # a score depends on the distance alone
    assert scores[0].std() > 0.1  # and does depend on it


def test_schedule() -> None:
    factors = [warmup_cosine(step, 100) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert "loss" in capsys.readouterr().out
