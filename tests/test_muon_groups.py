"""`Muon` as an optimizer: routing, groups with AdamW, state formats, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, values
from steps import USABLE, assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn import Parameter

import fusedopt
from fusedopt import Muon, _muon, _muon_units
from fusedopt._muon import ADAMW_DEFAULTS, ROW_STATE

BACKENDS = [name for name in USABLE if name in ("cpu", "eager")]
on_both = pytest.mark.parametrize("backend", BACKENDS)


class Model(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 16)
        self.pos_embed = Parameter(torch.zeros(1, 8, 16))
        self.conv = nn.Conv1d(16, 16, 3)
        self.experts = Parameter(torch.zeros(2, 16, 24))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.RMSNorm(32), nn.Linear(32, 16, bias=False))
        self.lm_head = nn.Linear(16, 50, bias=False)
        self.out = nn.Linear(16, 50, bias=False)
        with torch.no_grad():
            for index, param in enumerate(self.parameters()):
                param.copy_(values(param.shape, 21, index))


def fill_gradients(params: Any, step: int) -> None:
    for index, param in enumerate(params):
        param.grad = values(param.shape, 22, step, index, dtype=param.dtype)


def two_groups(backend: str | None = None, **arguments: Any) -> tuple[list[Parameter], Muon]:
    """Two matrices alike and a wide one for Muon, a vector and a matrix for AdamW."""
    shapes = [(24, 24), (24, 24), (16, 40), (9,), (5, 6)]
    params = [Parameter(values(shape, 23, index)) for index, shape in enumerate(shapes)]
    groups = [
        {"params": params[:3], "algorithm": "muon"},
        {"params": params[3:], "algorithm": "adamw", "weight_decay": 0.2},
    ]
    return params, Muon(groups, **{"lr": 0.05, "weight_decay": 0.1, **arguments}, backend=backend)


# --- routing ---


def test_a_module_is_routed_by_the_rules() -> None:
    model = Model()
    optimizer = Muon(model, lr=0.02, adamw_lr=1e-3, adamw_betas=(0.8, 0.9), adamw_eps=1e-6, adamw_weight_decay=0.3)
    matrices, kernels, adamw = optimizer.param_groups
    assert matrices["param_names"] == ["experts", "mlp.0.weight", "mlp.2.weight"]
    assert kernels["param_names"] == ["conv.weight"]
    assert [matrices["algorithm"], kernels["algorithm"], adamw["algorithm"]] == ["muon", "muon", "adamw"]
    named = {*matrices["param_names"], *kernels["param_names"], *adamw["param_names"]}
    assert named == {name for name, _ in model.named_parameters()}
    assert (adamw["lr"], adamw["betas"], adamw["eps"], adamw["weight_decay"]) == (1e-3, (0.8, 0.9), 1e-6, 0.3)
    told = {name: (how, why) for name, how, why in optimizer.explain()}
    assert told["parameter 'wte.weight'"] == ("adamw", "(50, 16): it is an embedding")
    assert "'embed'" in told["parameter 'pos_embed'"][1] and "0 dimensions" not in str(told)
    assert "'lm_head' is an output layer" in told["parameter 'lm_head.weight'"][1]
    assert "an output for each row of an embedding" in told["parameter 'out.weight'"][1]
    assert "1 dimensions" in told["parameter 'mlp.0.bias'"][1]
    assert told["parameter 'mlp.0.weight'"][0].startswith("muon: 1 x 32x16 by ")
    assert told["parameter 'experts'"][0].startswith("muon: 2 x 16x24 by ")
    assert told["parameter 'conv.weight'"][0].startswith("muon: 1 x 16x48 by ")
    assert "mlp.0.weight" in str(optimizer.explain())


def test_tied_weights_are_embeddings() -> None:
    model = Model()
    model.mlp[2].weight = Parameter(torch.zeros(16, 32))
    model.out.weight = model.wte.weight
    muon = [group["params"] for group in Muon(model).param_groups if group["algorithm"] == "muon"]
    assert not any(param is model.wte.weight for params in muon for param in params)


# --- AdamW in the same object ---


@on_both
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"state_dtype": "int8", "min_quantized_size": 1}])
def test_adamw_groups_are_adamws(options: dict[str, Any], backend: str) -> None:
    """Bits and states; the norm of clipping is of all gradients."""
    params, optimizer = two_groups(backend, **options)
    alone = [Parameter(param.detach().clone()) for param in params[3:]]
    matrices = [Parameter(param.detach().clone()) for param in params[:3]]
    theirs = fusedopt.AdamW(
        [{"params": alone, "weight_decay": 0.2}, {"params": matrices, "lr": 0.0}],
        lr=ADAMW_DEFAULTS["lr"],
        betas=ADAMW_DEFAULTS["betas"],
        eps=ADAMW_DEFAULTS["eps"],
        backend=backend,
        **options,
    )
    for step in range(4):
        fill_gradients(params, step)
        for param, other in zip(params, [*matrices, *alone], strict=True):
            other.grad = param.grad
        optimizer.step()
        theirs.step()
        if options.get("max_grad_norm"):
            assert_same_bits(optimizer.grad_norm.cpu(), theirs.grad_norm.cpu()) if backend == "eager" else None
    for mine, other in zip(params[3:], alone, strict=True):
        assert list(optimizer.state[mine]) == list(theirs.state[other])
        if not options.get("max_grad_norm"):
            assert_same_bits(mine, other)
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    assert list(optimizer.state[params[0]])[0] == "momentum_buffer" and "step" not in optimizer.state[params[0]]


@on_both
def test_clipping_scales_what_momentum_takes(backend: str) -> None:
    a, clipped = two_groups(backend, max_grad_norm=0.5)
    b, other = two_groups(backend)
    fill_gradients(a, 0)
    norm = torch.cat([param.grad.flatten() for param in a]).norm()
    for param, source in zip(b, a, strict=True):
        param.grad = source.grad * (0.5 / norm)
    clipped.step()
    other.step()
    assert clipped.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for mine, theirs in zip(a[:3], b[:3], strict=True):
        torch.testing.assert_close(
            clipped.state[mine]["momentum_buffer"], other.state[theirs]["momentum_buffer"], rtol=1e-5, atol=1e-8
        )


@on_both
def test_gradients_that_come_and_go(backend: str) -> None:
    params, optimizer = two_groups(backend)
    fill_gradients(params, 0)
    params[1].grad = params[3].grad = None
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(params, before, strict=True)] == [False, True, False, True, False]
    assert params[1] not in optimizer.state and params[3] not in optimizer.state
    for param in params:
        param.grad = None
    optimizer.step()
    fill_gradients(params, 1)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all("update" not in state for state in optimizer.state.values())


# --- the passes around the iteration ---


def identity(xs: Any, *args: Any, scales: Any, **options: Any) -> list[Tensor]:
    return [x * scale for x, scale in zip(xs, scales, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "int8", "min_quantized_size": 1},
        {"state_dtype": "bfloat16", "rounding": "stochastic", "seed": 3},
        {"master": "float32", "cautious": True, "maximize": True},
        {"master": "split16", "nesterov": False},
    ],
    ids=["plain", "int8", "stochastic", "master", "split16"],
)
def test_same_bits_on_every_backend(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum and the update are rules, whatever the storage; with the iteration left out nothing else is computed."""
    if options.get("master") == "split16" and dtype is torch.float16:
        pytest.skip("float16 has no split")
    monkeypatch.setattr(_muon, "newton_schulz", identity)
    results = []
    for backend in BACKENDS:
        shapes = [(24, 24), (24, 24), (33, 40)]
        params = [Parameter(values(shape, 23, index, dtype=dtype)) for index, shape in enumerate(shapes)]
        optimizer = Muon(params, lr=0.05, weight_decay=0.3, **options, backend=backend)
        for step in range(3):
            fill_gradients(params, step)
            optimizer.step()
        results.append([*params, *(value for param in params for value in optimizer.state[param].values())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a.detach(), b.detach())


@on_both
def test_split16_is_float32(backend: str) -> None:
    """A bfloat16 parameter with its other bits beside it goes as one of float32 does."""
    runs = []
    for dtype, master in ((torch.float32, None), (torch.bfloat16, "split16")):
        param = Parameter(values((16, 24), 5).bfloat16().to(dtype))
        optimizer = Muon([param], lr=0.01, weight_decay=0.1, master=master, state_dtype="float32", backend=backend)
        for step in range(4):
            param.grad = values((16, 24), 6, step).bfloat16().to(dtype)
            optimizer.step()
        runs.append(param.detach())
    assert_same_bits(runs[1], runs[0].bfloat16())


def test_stochastic_rounding_draws_once_a_step() -> None:
    param = Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = Muon([param], rounding="stochastic")
    for step in range(3):
        param.grad = values((8, 8), step, dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.param_groups[0]["rounding_step"] == 3


# --- the contract ---


@on_both
@pytest.mark.parametrize("options", [{}, {"beta2": 0.9}, {"state_dtype": "int8", "min_quantized_size": 1}])
def test_checkpoints_copies_and_pickles_go_on(options: dict[str, Any], backend: str) -> None:
    params, optimizer = two_groups(backend, **options)
    for step in range(2):
        fill_gradients(params, step)
        optimizer.step()
    others, loaded = two_groups(backend, **options)
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.detach())
    saved = copy.deepcopy(optimizer.state_dict())
    assert not any("update" in state for state in saved["state"].values())
    loaded.load_state_dict(saved)
    copied, pickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    runs = []
    for each in (optimizer, loaded, copied, pickled):
        members = [param for group in each.param_groups for param in group["params"]]
        fill_gradients(members, 2)
        each.step()
        runs.append(members)
    for members in runs[1:]:
        for a, b in zip(runs[0], members, strict=True):
            assert_same_bits(a.detach(), b.detach())
    if "beta2" in options:
        assert optimizer.state[params[0]][ROW_STATE].shape == (24, 1)
        saved["state"][0][ROW_STATE] = torch.ones(3, 1)
        before = snapshot(loaded)
        with pytest.raises(ValueError, match=rf"the state '{ROW_STATE}' of parameter 0 of group 0 has shape \(3, 1\)"):
            loaded.load_state_dict(saved)
        assert_untouched(loaded, before)


def test_schedulers_hooks_and_closures() -> None:
    params, optimizer = two_groups()
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> str:
        fill_gradients(params, 0)
        return "loss"

    assert optimizer.step(closure) == "loss" and seen == ["post"]
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, ADAMW_DEFAULTS["lr"] / 2]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [param.detach().clone() for param in params]
    scaler.scale(torch.ones(()))
    params[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@on_both
def test_zero_grads_and_no_elements(backend: str) -> None:
    params, optimizer = two_groups(backend, zero_grads=True)
    optimizer.add_param_group({"params": [Parameter(torch.empty(0, 5))], "algorithm": "muon"})
    everything = [param for group in optimizer.param_groups for param in group["params"]]
    fill_gradients(everything, 0)
    optimizer.step()
    assert not any(param.grad.any() for param in everything)


@on_both
@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda o, p: o.param_groups[0].update(lr=float("nan")), ValueError, "nan"),
        (lambda o, p: o.param_groups[1].update(lr=float("nan")), ValueError, "nan"),
        (lambda o, p: o.param_groups[0].update(ns_steps=7, ns_coefficients="you"), ValueError, "steps=7"),
        (lambda o, p: setattr(p[1], "grad", p[1].grad.to_sparse()), RuntimeError, "not support sparse gradients"),
        (lambda o, p: o.state[p[1]].update(momentum_buffer=torch.ones(3)), ValueError, "momentum_buffer' of parameter"),
        (lambda o, p: o.state[p[4]].update(exp_avg=torch.ones(3)), ValueError, "'exp_avg' of parameter 1 of group 1"),
        (lambda o, p: o.param_groups[0]["params"].append(p[0]), ValueError, "among Muon's parameters twice"),
    ],
)
def test_bad_input_changes_nothing(break_it: Any, error: Any, message: str, backend: str) -> None:
    params, optimizer = two_groups(backend)
    fill_gradients(params, 0)
    optimizer.step()
    fill_gradients(params, 1)
    break_it(optimizer, params)
    before = [param.detach().clone() for param in params]
    states = {param: {name: value.clone() for name, value in state.items()} for param, state in optimizer.state.items()}
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for param, state in optimizer.state.items():
        assert list(state) == list(states[param])
        assert all(torch.equal(value, states[param][name]) for name, value in state.items())


@on_both
@pytest.mark.parametrize(
    ("index", "broken"), [(0, {"lr": float("inf"), "weight_decay": 0.0}), (1, {"eps": float("nan")})]
)
def test_a_first_step_that_fails_leaves_no_state(index: int, broken: dict[str, float], backend: str) -> None:
    params, optimizer = two_groups(backend)
    fill_gradients(params, 0)
    optimizer.param_groups[index].update(broken)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_what_is_computed_together_fits_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_muon_units, "LARGEST_WORKSPACE", 3 * 6 * 100)
    matrices: list[Any] = [(None, torch.empty(1, 10, 10), 1.0)] * 7 + [(None, torch.empty(1, 30, 30), 1.0)]
    assert [len(some) for some in _muon_units.in_workspace(matrices)] == [3, 3, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"momentum": -0.5}, "momentum should be >= 0 but is: -0.5"),
        ({"weight_decay": -0.5}, "weight decay should be >= 0 but is: -0.5"),
        ({"adjust_lr_fn": "rms"}, "Adjust learning rate function rms is not supported; choose one of original"),
        ({"norm": "max"}, "norm='max': choose one of"),
        ({"method": "qr"}, "method='qr': choose one of"),
        ({"beta2": 1.0}, "beta2=1.0: choose a number"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"ns_coefficients": (1.0, 2.0)}, "Coefficients must be a tuple of exactly 3 values"),
        ({"ns_coefficients": "you", "ns_steps": 6}, "steps=6"),
        ({"split": 5}, "split=5: parameter 0 of group 0 has 24 rows"),
        ({"split": (8, 8)}, r"split=\(8, 8\): parameter 0 of group 0 has 24 rows, which these must add up to"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_groups(**arguments)


def test_refused_parameters() -> None:
    for shape in ((3,), (), (2, 3, 4)):
        with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
            Muon([Parameter(torch.ones(shape))])
    optimizer = Muon([Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 has shape \(3,\): no matrix; .*algorithm='adamw'"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "algorithm": "muon"})
    with pytest.raises(ValueError, match="algorithm='sgd': choose one of muon, adamw"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "algorithm": "sgd"})
    with pytest.raises(ValueError, match="Invalid learning rate: -1.0"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "algorithm": "adamw", "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="unexpected"):
        Muon([Parameter(torch.ones(2, 2))], betas=(0.9, 0.99))  # type: ignore[call-arg]


@on_both
def test_parts_of_a_matrix_are_orthogonalized_alone(backend: str) -> None:
    """Query, key and value of different sizes, as three matrices would be."""
    whole = Parameter(values((40, 24), 31))
    rows = (24, 8, 8)
    parts = [Parameter(part.clone()) for part in whole.detach().split(rows)]
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "backend": backend}
    a, b = Muon([whole], split=rows, **options), Muon(parts, **options)
    for step in range(2):
        whole.grad = values(whole.shape, 32, step)
        for part, grad in zip(parts, whole.grad.split(rows), strict=True):
            part.grad = grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]), rtol=0, atol=1e-5)
