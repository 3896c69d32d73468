"""Checkpoints: of torch's optimizers and for them, of every storage of state, and bad ones."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS
from helpers import same_bits
from steps import (
    CONFIGURED,
    DROP_IN_CONFIGURED,
    another_order,
    as_in_torch,
    assert_near,
    assert_optimizers_near,
    assert_same_optimizers,
    assert_untouched,
    on_every_backend,
    parameters,
    parameters_of,
    snapshot,
    train,
)
from torch.distributed.checkpoint import state_dict as distributed
from torch.testing._internal.common_utils import set_default_dtype

import fusedopt
from fusedopt.codecs import STATE_DTYPES
from fusedopt.optim import OPTIMIZERS
from fusedopt.optimizer import GROUP_OPTIONS


def copies(optimizer: Any) -> list[torch.nn.Parameter]:
    """Its parameters' values in fresh parameters, as a model's own checkpoint restores them."""
    return [torch.nn.Parameter(param.detach().clone()) for param in parameters_of(optimizer)]


def saved(optimizer: Any) -> Any:
    """The state_dict through a file, by the loader that runs no code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_torch_to_fusedopt_and_back(cls: Any, config: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Three steps by torch, three by fusedopt, three by torch: as nine by torch. Hyperparameters come along."""
    # Counters have the default dtype, in torch too; NAdam's product, as float32, would cost float64 its digits.
    with set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32):
        check_exchange(cls, config, dtype, backend)


def check_exchange(cls: Any, config: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    theirs = cls.torch_class(parameters(dtype), **config)
    train(theirs, range(3))
    ours = cls(copies(theirs), lr=99.0, backend=backend)
    ours.load_state_dict(saved(theirs))
    assert_optimizers_near(ours, theirs, steps=1)
    train(ours, range(3, 6))
    back = cls.torch_class(copies(ours), lr=99.0)
    back.load_state_dict(saved(ours))
    train(back, range(6, 9))
    train(theirs, range(3, 9))
    assert_optimizers_near(back, theirs, steps=9)


@on_every_backend
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_resuming_changes_no_bit(
    cls: Any, config: dict[str, Any], dtype: torch.dtype, state_dtype: str | None, backend: str
) -> None:
    """Training goes on as if nothing had happened, whatever the optimizer was constructed with but storage."""
    expected = cls(parameters(dtype), **config, state_dtype=state_dtype, backend=backend)
    train(expected, range(3))
    actual = cls(copies(expected), lr=99.0, state_dtype=state_dtype, backend=backend)
    actual.load_state_dict(saved(expected))
    assert [{**group, "params": 0} for group in actual.param_groups] == [
        {**group, "params": 0} for group in expected.param_groups
    ]
    assert_same_optimizers(actual, expected)
    train(actual, range(3, 6))
    train(expected, range(3, 6))
    assert_same_optimizers(actual, expected)


@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_both_save_the_same_keys(cls: Any, config: dict[str, Any]) -> None:
    """So that tools which read torch's checkpoints read fusedopt's; the group has a few options more."""
    ours, theirs = cls(parameters(), **config), cls.torch_class(parameters(), **config)
    train(ours, range(2))
    train(theirs, range(2))
    mine, other = ours.state_dict(), theirs.state_dict()
    # fusedopt's SGD without momentum and torch's have no state, but torch's holds an empty dict for a parameter.
    assert {key: list(state) for key, state in mine["state"].items() if state} == {
        key: list(state) for key, state in other["state"].items() if state
    }
    groups = [as_in_torch(cls, group) for group in mine["param_groups"]]
    assert groups == [{**group, **GROUP_OPTIONS} for group in other["param_groups"]]
    order = [[*(key for key in group if key != "params"), *GROUP_OPTIONS, "params"] for group in other["param_groups"]]
    assert [list(group) for group in groups] == order or another_order(cls)


# --- storage of state ---


def state_dtypes(optimizer: Any) -> set[tuple[str, torch.dtype]]:
    """The dtype of every state that is not a counter."""
    return {
        (name, value.dtype)
        for state in optimizer.state.values()
        for name, value in state.items()
        if name not in optimizer.counters
    }


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_state_dtype(cls: Any, config: dict[str, Any], dtype: torch.dtype, state_dtype: str | None) -> None:
    """Torch's choice, float32, or bfloat16 for signed states only: those that the class declares so."""
    optimizer = cls(parameters(dtype), **config, state_dtype=state_dtype)
    train(optimizer, [0])
    kinds = {"signed": torch.bfloat16, "unsigned": torch.float32}
    expected = {
        # Those of these sizes are too small for int8.
        name: {None: dtype, "bfloat16": kinds[cls.states[name]]}.get(state_dtype, torch.float32)
        for name, _ in state_dtypes(optimizer)
    }
    assert state_dtypes(optimizer) == set(expected.items())
    assert expected or cls is fusedopt.SGD


def test_second_moments_stay_float32_under_bfloat16() -> None:
    """In bfloat16 one would never decay: 0.1 % of a value is less than half its last bit."""
    param = torch.nn.Parameter(torch.zeros(8))
    optimizer = fusedopt.AdamW([param], state_dtype="bfloat16", weight_decay=0.0)
    for step in range(300):
        param.grad = torch.full((8,), 1.0 if step == 0 else 0.0)
        optimizer.step()
    state = optimizer.state[param]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)
    # 0.001 * 0.999**299, each step rounded twice at float32.
    expected = 0.001 * 0.999**299
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((8,), expected), rtol=600 * 2**-24, atol=0)
    frozen = torch.tensor(expected, dtype=torch.bfloat16)
    assert torch.equal(frozen + 0.001 * (0 - frozen), frozen)


@pytest.mark.parametrize("cls", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_unsigned_states_are_never_negative(cls: Any) -> None:
    """The declared kinds are right: a storage format may drop the sign of an unsigned state."""
    for config in CONFIGS[cls.__name__]:
        optimizer = cls(parameters(), **config)
        train(optimizer, range(6))
        signs: dict[str, bool] = {}
        for state in optimizer.state.values():
            for name, value in state.items():
                if name in cls.states:
                    signs[name] = signs.get(name, False) or bool((value < 0).any())
        assert signs == {name: cls.states[name] == "signed" for name in signs}


@pytest.mark.parametrize("option", ["int9", "float16", torch.float32, 8])
def test_an_unknown_state_dtype_is_refused(option: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dtype=.* is not supported; use one of None, 'float32', 'bfloat16'"):
        fusedopt.AdamW(parameters(), state_dtype=option)
    optimizer = fusedopt.AdamW(parameters())
    with pytest.raises(ValueError, match="state_dtype="):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "state_dtype": option})
    assert len(optimizer.param_groups) == 1


@on_every_backend
def test_a_loaded_state_keeps_its_dtype(backend: str) -> None:
    """torch casts it to the parameter's, and with bfloat16 parameters loses the second moment."""
    source = fusedopt.AdamW(parameters(torch.bfloat16), state_dtype="float32", lr=0.125)
    train(source, range(3))
    expected = state_dtypes(source)
    assert {dtype for _, dtype in expected} == {torch.float32}
    target = fusedopt.AdamW(copies(source), backend=backend)
    target.load_state_dict(saved(source))
    assert state_dtypes(target) == expected and target.param_groups[0]["state_dtype"] is None
    assert_same_optimizers(target, source)
    train(source, range(3, 6))
    train(target, range(3, 6))
    assert_same_optimizers(target, source)
    assert state_dtypes(target) == expected


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_state_dtype_converts_what_is_loaded(cls: Any, config: dict[str, Any], state_dtype: str) -> None:
    """How state is stored is the optimizer's own choice, not the checkpoint's."""
    source = cls(parameters(), **config, state_dtype="float32" if state_dtype == "bfloat16" else "bfloat16")
    train(source, range(3))
    target = cls(copies(source), state_dtype=state_dtype)
    target.load_state_dict(saved(source))
    assert target.param_groups[0]["state_dtype"] == state_dtype
    native = cls(parameters(), **config, state_dtype=state_dtype)
    train(native, range(3))
    assert state_dtypes(target) == state_dtypes(native)
    for mine, other in zip(parameters_of(target), parameters_of(source), strict=True):
        for name, value in source.state.get(other, {}).items():
            assert same_bits(target.state[mine][name], value.to(target.state[mine][name].dtype))


@on_every_backend
def test_mixed_state_dtypes_by_group(backend: str) -> None:
    a, b = parameters()[:2]
    optimizer = fusedopt.AdamW([{"params": a}, {"params": b, "state_dtype": "bfloat16"}], backend=backend)
    train(optimizer, range(2))
    assert [optimizer.state[param]["exp_avg"].dtype for param in (a, b)] == [torch.float32, torch.bfloat16]
    target = fusedopt.AdamW([{"params": p} for p in copies(optimizer)], state_dtype="float32")
    target.load_state_dict(saved(optimizer))
    assert {dtype for _, dtype in state_dtypes(target)} == {torch.float32}


# --- what loading must not do ---


@on_every_backend
def test_loading_copies(backend: str) -> None:
    """Training on from a checkpoint leaves it as it was, counters included, so that it can be loaded again."""
    source = fusedopt.AdamW(parameters(), lr=0.125, amsgrad=True)
    train(source, range(3))
    checkpoint = source.state_dict()
    kept = copy.deepcopy(checkpoint)
    targets = [fusedopt.AdamW(copies(source), backend=backend) for _ in range(2)]
    for target in targets:
        target.load_state_dict(checkpoint)
        train(target, range(3, 6))
        assert all(
            same_bits(value, kept["state"][key][name])
            for key, state in checkpoint["state"].items()
            for name, value in state.items()
        )
        assert checkpoint["param_groups"] == kept["param_groups"]
    assert_same_optimizers(*targets)
    targets[0].param_groups[0]["lr"] = 1.0
    assert checkpoint["param_groups"][0]["lr"] == 0.125


def bad_shape(checkpoint: Any) -> None:
    checkpoint["state"][1]["exp_avg"] = torch.zeros(34)


def bad_complex(checkpoint: Any) -> None:
    checkpoint["state"][1]["exp_avg_sq"] = torch.zeros(33, dtype=torch.complex64)


def bad_integer(checkpoint: Any) -> None:
    checkpoint["state"][1]["exp_avg"] = torch.zeros(33, dtype=torch.int64)


def bad_type(checkpoint: Any) -> None:
    checkpoint["state"][1]["exp_avg"] = "zeros"


def bad_counter(checkpoint: Any) -> None:
    checkpoint["state"][1]["step"] = torch.zeros(2)


def fewer_groups(checkpoint: Any) -> None:
    checkpoint["param_groups"].pop()


def smaller_group(checkpoint: Any) -> None:
    checkpoint["param_groups"][0]["params"].pop()


BAD: dict[str, tuple[Any, str]] = {
    "a state of another shape": (bad_shape, r"'exp_avg' of parameter 'bias' has shape \(34,\), its parameter \(33,\)"),
    "a complex state": (
        bad_complex,
        "'exp_avg_sq' of parameter 'bias' is torch.complex64, its parameter torch.float32",
    ),
    "an integer state": (bad_integer, "'exp_avg' of parameter 'bias' is torch.int64, its parameter torch.float32"),
    "a state that is no tensor": (bad_type, "'exp_avg' of parameter 'bias' is a str; it must be a tensor"),
    "a counter of two": (bad_counter, "'step' of parameter 'bias' must have one element"),
    "fewer groups": (fewer_groups, "loaded state dict has a different number of parameter groups"),
    "a smaller group": (smaller_group, "parameter group that doesn't match the size of optimizer's group"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_and_changes_nothing(case: str) -> None:
    spoil, message = BAD[case]
    names = ("weight", "bias", "scale", "empty")

    def make() -> Any:
        named = list(zip(names, parameters(), strict=True))
        return fusedopt.AdamW([{"params": named[:2]}, {"params": named[2:]}], lr=0.125)

    source, target = make(), make()
    train(source, range(3))
    train(target, range(2))
    checkpoint = copy.deepcopy(source.state_dict())
    spoil(checkpoint)
    before = snapshot(target)
    with pytest.raises((ValueError, TypeError), match=message):
        target.load_state_dict(checkpoint)
    assert_untouched(target, before)
    train(target, [2])
    assert_same_optimizers(target, source)


@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_an_old_checkpoint(cls: Any, config: dict[str, Any]) -> None:
    """Counters as plain numbers, a momentum buffer of None, options of later versions missing."""
    source = cls.torch_class(parameters(), **config)
    train(source, range(3))
    checkpoint = copy.deepcopy(source.state_dict())
    later = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "maximize")
    for group in checkpoint["param_groups"]:
        for option in later:
            if option in group and not group[option]:
                del group[option]
    for state in checkpoint["state"].values():
        state.update({name: state[name].item() for name in cls.counters})
        if "momentum_buffer" not in state and cls is fusedopt.SGD:
            state["momentum_buffer"] = None
    # An optimizer built with other options takes the checkpoint's meaning of them, AdamW's decay excepted.
    target = cls(copies(source), **({"maximize": True} if not config.get("maximize") else {}))
    target.load_state_dict(checkpoint)
    train(source, range(3, 6))
    train(target, range(3, 6))
    assert_optimizers_near(target, source, steps=6)


@on_every_backend
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_distributed_checkpoint(cls: Any, config: dict[str, Any], flatten: bool, backend: str) -> None:
    """`get_optimizer_state_dict` and `set_optimizer_state_dict`, which name parameters and create state by a step."""
    options = distributed.StateDictOptions(flatten_optimizer_state_dict=flatten)

    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        return model, cls(model.parameters(), **config, backend=backend)

    model, source = make()
    train(source, range(3))
    state = distributed.get_optimizer_state_dict(model, source, options=options)
    other, target = make()
    other.load_state_dict(model.state_dict())
    before = snapshot(target)
    distributed.set_optimizer_state_dict(other, target, state, options=options)
    assert all(same_bits(param.detach(), value) for param, value in before[2])
    assert_same_optimizers(target, source)
    train(source, range(3, 6))
    train(target, range(3, 6))
    assert_same_optimizers(target, source)


def test_checkpoint_file_on_disk(tmp_path: Path) -> None:
    """Memory-mapped, as large checkpoints are read: training does not write through to the file."""
    source = fusedopt.AdamW(parameters(), lr=0.125)
    train(source, range(3))
    torch.save(source.state_dict(), tmp_path / "optimizer.pt")
    content = (tmp_path / "optimizer.pt").read_bytes()
    target = fusedopt.AdamW(copies(source))
    target.load_state_dict(torch.load(tmp_path / "optimizer.pt", mmap=True, weights_only=True))
    train(target, range(3, 6))
    train(source, range(3, 6))
    assert_same_optimizers(target, source)
    assert (tmp_path / "optimizer.pt").read_bytes() == content


def test_torch_reads_compact_state() -> None:
    """torch casts loaded state to the parameter's dtype, so a bfloat16 checkpoint trains on there."""
    source = fusedopt.AdamW(parameters(), lr=0.125, state_dtype="bfloat16")
    train(source, range(3))
    theirs = torch.optim.AdamW(copies(source))
    theirs.load_state_dict(saved(source))
    train(theirs, range(3, 4))
    train(source, range(3, 4))
    for mine, other in zip(parameters_of(source), parameters_of(theirs), strict=True):
        assert_near(mine, other, steps=1)
