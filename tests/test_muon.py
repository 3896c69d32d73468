"""`Muon` against torch.optim.Muon, and against a float64 statement of it with everything torch's has not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, needs_torchs_muon, set_grads, values
from mutants import mutants
from steps import USABLE
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import Muon
from fusedopt._muon_units import lr_ratio
from fusedopt._schedules import coefficients_of, singular_value_after
from fusedopt.binding import RULES, Rule
from fusedopt.optimizer import GROUP_OPTIONS, OPTIONS

BACKENDS = [name for name in USABLE if name in ("cpu", "eager")]
on_both = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(24, 24), (24, 24), (16, 40), (40, 16), (3, 24, 8), (8, 3, 2, 3), (24, 1)]
STEPS = 5

# Every option differs from its default in some row, and every matrix decays in all.
ROWS: list[dict[str, Any]] = [
    {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.8},
    {
        "lr": 0.04,
        "weight_decay": 0.2,
        "nesterov": False,
        "adjust_lr_fn": "match_rms_adamw",
        "ns_coefficients": "you",
        "norm": "schatten4",
        "method": "gram",
    },
    {
        "lr": 0.05,
        "weight_decay": 0.5,
        "adjust_lr_fn": "spectral",
        "cautious": True,
        "maximize": True,
        "ns_coefficients": (3.0, -3.2, 1.2),
        "ns_steps": 3,
        "eps": 4.0,
    },
    {
        "lr": 0.05,
        "weight_decay": 0.1,
        "beta2": 0.7,
        "ns_coefficients": [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)],
        "ns_steps": 2,
    },
    {"lr": 0.05, "weight_decay": 0.1, "split": 8, "flatten": False, "method": "standard"},
]


def parameters(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(values(shape, 11, index, dtype=dtype)) for index, shape in enumerate(shapes)]


def shapes_of(config: dict[str, Any]) -> list[tuple[int, ...]]:
    """Those whose rows the split divides."""
    if config.get("split") is None:
        return SHAPES
    return [shape for shape in SHAPES if shape[-2] % config["split"] == 0]


def oracle(shapes: Any, config: dict[str, Any], steps: int = STEPS) -> list[Tensor]:
    """Muon in float64, by singular value decompositions, one matrix at a time."""
    c = {**DEFAULTS, **config}
    params = [param.detach().double() for param in parameters(shapes)]
    buffers = [torch.zeros_like(param) for param in params]
    averages: dict[tuple[int, int], Tensor] = {}
    given = c["ns_coefficients"]
    polynomial = coefficients_of(
        given if isinstance(given, str) or isinstance(given[0], tuple) else [given] * c["ns_steps"], c["ns_steps"]
    )
    for step in range(steps):
        for index, (param, buffer) in enumerate(zip(params, buffers, strict=True)):
            g = gradient(param.shape, step, index).double() * (-1 if c["maximize"] else 1)
            buffer.mul_(c["momentum"]).add_(g, alpha=1 - c["momentum"])
            update = (1 - c["momentum"]) * g + c["momentum"] * buffer if c["nesterov"] else buffer.clone()
            flat = c["flatten"] if c["flatten"] is not None else update.ndim > 3
            stack = update.flatten(1)[None] if flat else update.reshape(-1, *update.shape[-2:])
            pieces = stack.split(c["split"] or stack.shape[1], 1)
            done = torch.cat([orthogonal(piece, polynomial, c) for piece in pieces], 1)
            if c["beta2"] is not None:
                for number, each in enumerate(done):
                    mean = (each**2).mean(1, keepdim=True)
                    old = averages.get((index, number), torch.zeros_like(mean))
                    averages[index, number] = c["beta2"] * old + (1 - c["beta2"]) * mean
                    scaled = each / averages[index, number].sqrt()
                    done[number] = scaled * each.norm() / scaled.norm()
            done = done.reshape(param.shape)
            decays = done * param >= 0 if c["cautious"] else torch.ones_like(param, dtype=torch.bool)
            param.sub_(c["lr"] * (c["weight_decay"] * param * decays + done))
    return params


def orthogonal(stack: Tensor, polynomial: Any, c: dict[str, Any]) -> Tensor:
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    size = s.norm(dim=-1, keepdim=True) if c["norm"] == "frobenius" else (s**4).sum(-1, keepdim=True) ** 0.25
    s = singular_value_after(polynomial, s / size.clamp(min=c["eps"]))  # type: ignore[arg-type, assignment]
    rows, columns = stack.shape[1:]
    ratio = {
        None: max(1.0, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
    }[c["adjust_lr_fn"]]
    return ratio * u * s.unsqueeze(-2) @ v


def gradient(shape: Any, step: int, index: int) -> Tensor:
    return values(shape, 12, step, index)


def trained(config: dict[str, Any], dtype: torch.dtype, backend: str | None = None, **options: Any) -> list[Parameter]:
    params = parameters(shapes_of(config), dtype)
    optimizer = Muon([{"params": params, "algorithm": "muon", **config}], backend=backend, **options)
    for step in range(STEPS):
        for index, param in enumerate(params):
            param.grad = gradient(param.shape, step, index).to(dtype)
        optimizer.step()
    return params


DEFAULTS = Muon([Parameter(torch.ones(1, 1))]).defaults


def worst(config: dict[str, Any], params: list[Parameter], share: float = 1.0) -> float:
    """The largest difference of `share` of a parameter's elements."""
    wanted = oracle(shapes_of(config), config)
    differences = [(a.detach().double() - b).abs() for a, b in zip(params, wanted, strict=True)]
    return max(difference.flatten().quantile(share).item() for difference in differences)


every_row = pytest.mark.parametrize("config", ROWS, ids=[str(index) for index in range(len(ROWS))])


def test_every_option_is_tried() -> None:
    tried = {name for row in ROWS for name, value in row.items() if value != DEFAULTS[name]}
    assert tried == set(DEFAULTS) - {"algorithm", *GROUP_OPTIONS}
    assert all(row["weight_decay"] > 0 for row in ROWS)


@every_row
def test_float64(config: dict[str, Any]) -> None:
    """1e6 is what rounding is amplified by at most, see tests/test_orthogonalize.py; the update counts lr times."""
    assert worst(config, trained(config, torch.float64)) < STEPS * config["lr"] * 1e6 * 1e-15


@on_both
@every_row
def test_float32(config: dict[str, Any], backend: str) -> None:
    """With factors of 8 bits singular values are off by some hundredths; and so are updates near 0, by whose sign
    cautious weight decay goes.
    """
    share = 0.9 if config.get("cautious") else 1.0
    assert worst(config, trained(config, torch.float32, backend), share) < STEPS * config["lr"] * 0.1


@pytest.mark.parametrize("name", ["muon_momentum", "muon", "muon_cautious"])
def test_every_operation_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with any one operation wrong or missing fails against the oracle in one of the rows."""
    rule: Rule = RULES[name]
    users = [row for row in ROWS if name == "muon_momentum" or row.get("cautious", False) == (name == "muon_cautious")]
    found = list(mutants(rule))
    assert len(found) >= 6
    unseen = []
    for what, mutant in found:
        monkeypatch.setitem(RULES, name, mutant)
        if all(worst(row, trained(row, torch.float64, "eager")) < 1e-5 for row in users):
            unseen.append(what)
    # The sign of a quotient is that of the product.
    assert [what for what in unseen if what != "update * p -> update / p"] == []


# --- torch.optim.Muon ---


@needs_torchs_muon
@on_both
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"nesterov": False, "weight_decay": 0.4},
        {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
        {"lr": torch.tensor(0.03), "ns_coefficients": (3.0, -3.2, 1.2), "ns_steps": 3, "eps": 0.5},
    ],
    ids=["default", "heavy-ball", "match", "others"],
)
def test_is_torchs(config: dict[str, Any], backend: str) -> None:
    """Same states, names and groups; parameters apart by what bfloat16 puts torch's update off."""
    shapes = [shape for shape in SHAPES if len(shape) == 2]
    ours, theirs = parameters(shapes), parameters(shapes)
    config = {"lr": 0.05, **config}
    a, b = Muon(ours, **config, backend=backend), torch.optim.Muon(theirs, **config)
    for step in range(STEPS):
        for params in (ours, theirs):
            for index, param in enumerate(params):
                param.grad = gradient(param.shape, step, index)
        a.step()
        b.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert list(a.state[mine]) == list(b.state[other]) == ["momentum_buffer"]
        buffers = a.state[mine]["momentum_buffer"], b.state[other]["momentum_buffer"]
        torch.testing.assert_close(*buffers, atol=1e-6, rtol=0)
        size = float(config["lr"]) * lr_ratio(config.get("adjust_lr_fn"), *mine.shape)
        assert torch.linalg.matrix_norm((mine - other).detach(), 2) < STEPS * size * 0.1
    assert {*b.param_groups[0]} <= {*a.param_groups[0]}
    # Either goes on from the other's checkpoint.
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    for name, value in torch.optim.Muon(theirs, **config).defaults.items():
        assert a.param_groups[0][name] == value
    fresh = parameters(shapes)
    swapped = fusedopt.swap(torch.optim.Muon(fresh, **config))
    assert type(swapped) is Muon
    for param in fresh:
        param.grad = torch.ones_like(param)
    swapped.step()


@needs_torchs_muon
def test_signature_and_momentum_buffer() -> None:
    import inspect

    theirs = inspect.signature(torch.optim.Muon).parameters
    mine = list(inspect.signature(Muon).parameters.values())
    assert [(p.name, p.default) for p in mine[: len(theirs)]] == [(p.name, p.default) for p in theirs.values()]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])
    assert {*OPTIONS} <= {p.name for p in mine}
    # torch normalizes a bfloat16 momentum buffer in place where nesterov is False.
    param = Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 2.0)
    optimizer = Muon([param], nesterov=False, momentum=0.5)
    optimizer.step()
    assert_same_bits(optimizer.state[param]["momentum_buffer"], torch.full((4, 4), 1.0, dtype=torch.bfloat16))


@needs_torchs_muon
def test_torchs_own_inputs() -> None:
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

    (info,) = [info for info in optim_db if info.optim_cls is torch.optim.Muon]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for given in info.optim_inputs_func("cpu", dtype):
            params = parameters([(24, 24), (16, 40)], dtype)
            optimizer = Muon(params, **copy.deepcopy(given.kwargs))
            before = [param.detach().clone() for param in params]
            set_grads(params, 0)
            optimizer.step()
            changed = given.kwargs.get("lr", 1e-3) != 0
            assert all(torch.equal(a, b) != changed and a.isfinite().all() for a, b in zip(before, params, strict=True))
    for error in info.optim_error_inputs_func("cpu", torch.float32):
        given = error.optimizer_error_input
        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer = Muon(given.params, **given.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                optimizer.step()
        elif issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                Muon(given.params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                Muon(given.params, **given.kwargs)
