"""Checkpoints and `swap` of master copies, and what of 8 bits and of masters is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    assert_same_bits,
    assert_same_results,
    make_parameters,
    results,
)
from narrow import every_low_half, joined, rounded
from steps import (
    assert_same_optimizers,
    assert_untouched,
    on_every_backend,
    parameters_of,
    snapshot,
    train,
)
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.codecs import encode_parameter

pytestmark = pytest.mark.usefixtures("one_thread")

INT8: dict[str, Any] = {"state_dtype": "int8", "min_quantized_size": 100}


def parameters() -> list[Parameter]:
    return make_parameters(((3, 5, 37), (300,), (7,), (), (0,)), torch.bfloat16)


def copies(optimizer: Any) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in parameters_of(optimizer)]


def assert_same_states(a: Any, b: Any) -> None:
    """As assert_same_optimizers, in any order of names."""
    one, other = results(a), results(b)
    assert_same_results(dict(sorted(one.items())), dict(sorted(other.items())))


# --- from one kind of master to another ---


def exact_value(optimizer: Any, param: Parameter) -> Tensor:
    """The float32 number that is kept for a parameter, in whatever parts."""
    master = optimizer.state.get(param, {}).get("master")
    if master is None:
        return param.detach().float()
    return master if master.dtype == torch.float32 else joined(param, master)


def with_master(x: Tensor, kind: str | None) -> Any:
    """An optimizer whose parameter and master copy keep `x` as well as they can; its steps change nothing."""
    param = Parameter(rounded(x, torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=0.0, master=kind)
    if kind:
        dtype = {"float32": torch.float32, "split16": torch.int16, "split8": torch.int8}[kind]
        master = torch.empty(x.shape, dtype=dtype)
        encode_parameter(x, param.data, master, None)
        optimizer.state[param]["master"] = master
    return optimizer


KINDS = (None, "float32", "split16", "split8")
CHANGES = [
    (before, after, way)
    for before in KINDS
    for after in KINDS
    for way in ("load", "swap")
    if after is not None or way == "load"  # of swap's options one that is None stays as it is
]


@on_every_backend
@pytest.mark.parametrize(("before", "after", "way"), CHANGES)
def test_from_one_master_to_another(before: str | None, after: str | None, way: str, backend: str) -> None:
    """Between float32 and split16 nothing is lost but, of ties, a unit of float32: the one rounds them to even, the
    other away from zero. split8 keeps 24 bits, to one unit of them. A step then changes no more."""
    x = every_low_half()
    x = x[x.abs() < torch.finfo(torch.bfloat16).max].flatten()
    source = with_master(x, before)
    (param,) = parameters_of(source)
    value, stored = exact_value(source, param).clone(), param.detach().clone()
    if before in ("float32", "split16"):
        assert_same_bits(value, x)
    if way == "load":
        target: Any = fusedopt.SGD(copies(source), lr=0.0, master=after, backend=backend)
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    else:
        target = fusedopt.swap(source, master=after, backend=backend)
    (param,) = parameters_of(target)
    assert ("master" in target.state.get(param, {})) == (None not in (before, after))
    for _ in range(2):
        assert_same_bits(param.detach(), stored)
        # In units of float32, as whole numbers.
        lost = value.view(torch.int32).long() - exact_value(target, param).view(torch.int32).long()
        if None in (before, after):
            assert_same_bits(exact_value(target, param), stored.float())
        elif after == "split8" and before != "split8":
            assert lost.abs().max() <= 256
        else:
            low = value.view(torch.int32) & 0xFFFF
            assert not lost[low != 0x8000].any() and lost.abs().max() <= 1
        target.param_groups[0]["lr"] = 0.0  # of the checkpoint
        param.grad = torch.zeros_like(param)
        target.step()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_master_loaded_before_the_model(kind: str) -> None:
    """The parameters' values come after: a whole copy is then right again, and so is what a split one lacks."""
    source = fusedopt.AdamW(parameters(), lr=0.01, master=kind)
    train(source, range(3))
    target = fusedopt.AdamW(parameters(), master=kind)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for param, other in zip(parameters_of(target), parameters_of(source)):
        param.data.copy_(other.data)
    train(target, range(3, 5))
    train(source, range(3, 5))
    assert_same_optimizers(target, source)


@on_every_backend
def test_swapping_to_a_master_and_to_stochastic_rounding(backend: str) -> None:
    """Of torch's optimizer amid training: as one that is loaded from its checkpoint."""
    for options in ({"master": "split16"}, {"master": "split8", "rounding": "stochastic", "seed": 3}):
        theirs = torch.optim.AdamW(parameters(), lr=0.01)
        train(theirs, range(3))
        loaded = fusedopt.AdamW(copies(theirs), **INT8, **options, backend=backend)
        checkpoint = copy.deepcopy(theirs.state_dict())
        checkpoint["param_groups"][0]["seed"] = options.get("seed", 0)
        loaded.load_state_dict(checkpoint)
        swapped: Any = fusedopt.swap(theirs, **INT8, **options, backend=backend)
        for optimizer in (loaded, swapped):
            train(optimizer, range(3, 6))
            assert optimizer.param_groups[0].get("rounding_step") == (3 if "seed" in options else None)
        assert_same_states(swapped, loaded)
        assert {state["master"].dtype for state in swapped.state.values()} == {
            torch.int16 if options["master"] == "split16" else torch.int8
        }


# --- what is refused, with nothing changed ---


def spoiled(name: str, value: Any) -> Any:
    """Another entry in the state of the parameter 'b'; None for no entry."""

    def spoil(state: dict[str, Any]) -> None:
        if value is None:
            del state[name]
        else:
            state[name] = value(state[name]) if callable(value) else value

    return spoil


BAD: dict[str, tuple[Any, str]] = {
    "codes of another shape": (
        spoiled("exp_avg", torch.zeros(301, dtype=torch.uint8)),
        r"'exp_avg' of parameter 'b' has shape \(301,\), its parameter \(300,\)",
    ),
    "codes without scales": (
        spoiled("exp_avg_sq_scale", None),
        "'exp_avg_sq' of parameter 'b' is uint8 codes without their scales, 'exp_avg_sq_scale'",
    ),
    "scales that are no tensor": (spoiled("exp_avg_scale", "ones"), "of parameter 'b' is uint8 codes without their"),
    "scales of blocks of 64": (
        spoiled("exp_avg_scale", torch.ones(5)),
        r"'exp_avg_scale' of parameter 'b' has shape \(5,\), where blocks of 256 .* have \(2,\): codes of another",
    ),
    "scales in float64": (
        spoiled("exp_avg_scale", lambda scale: scale.double()),
        "'exp_avg_scale' of parameter 'b' must be contiguous float32; it is torch.float64",
    ),
    "scales in bfloat16": (
        spoiled("exp_avg_sq_scale", lambda scale: scale.bfloat16()),
        "'exp_avg_sq_scale' of parameter 'b' must be contiguous float32; it is torch.bfloat16",
    ),
    "signed codes": (
        spoiled("exp_avg", lambda codes: codes.to(torch.int8)),
        "'exp_avg' of parameter 'b' is torch.int8, its parameter torch.bfloat16",
    ),
    "a master of another shape": (
        spoiled("master", torch.zeros(3, dtype=torch.int16)),
        r"'master' of parameter 'b' has shape \(3,\), its parameter \(300,\)",
    ),
    "a master that is no tensor": (spoiled("master", "zeros"), "'master' of parameter 'b' is a str"),
    "a master in float64": (
        spoiled("master", lambda master: master.double()),
        "'master' of parameter 'b' is torch.float64",
    ),
}


def named_optimizer(**options: Any) -> Any:
    params = make_parameters(((5, 7), (300,), (600,)), torch.bfloat16)
    return fusedopt.AdamW(list(zip("abc", params)), **{**INT8, "master": "split16", **options})


@on_every_backend
@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_or_state_is_refused_and_changes_nothing(case: str, backend: str) -> None:
    """By load_state_dict, by swap, and by the step of an optimizer in whose state it is."""
    spoil, message = BAD[case]
    source, target = named_optimizer(), named_optimizer(backend=backend)
    train(source, range(3))
    train(target, range(2))
    checkpoint = copy.deepcopy(source.state_dict())
    spoil(checkpoint["state"][1])
    before = snapshot(target)
    with pytest.raises((ValueError, TypeError), match=message):
        target.load_state_dict(checkpoint)
    assert_untouched(target, before)
    train(target, [2])
    assert_same_optimizers(target, source)

    if "no tensor" in case:
        return  # of which `snapshot` could not tell that it is as it was
    spoil(target.state[parameters_of(target)[1]])
    before = snapshot(target)
    with pytest.raises((ValueError, TypeError), match=message):
        train(target, [3])
    assert_untouched(target, before)
    with pytest.raises((ValueError, TypeError), match=message):
        fusedopt.swap(target, state_dtype="float32", master="float32")
    assert_untouched(target, before)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"state_dtype": "int8-linear"}, r"group 0 of .* has state_dtype='int8-linear', .* it reads None, 'float32'"),
        ({"seed": -1}, "seed=-1 must be an integer"),
    ],
)
def test_a_checkpoints_option_is_refused_by_name(option: dict[str, Any], message: str) -> None:
    """A later version's map may have other codes in uint8, which must not be read as these. Seeds come along."""
    source, target = named_optimizer(), named_optimizer(seed=4)
    train(source, range(2))
    checkpoint = copy.deepcopy(source.state_dict())
    checkpoint["param_groups"][0].update(option)
    before = snapshot(target)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(checkpoint)
    assert_untouched(target, before)


def test_codes_of_a_complex_parameter_are_refused() -> None:
    """There are none: a complex parameter has complex state, whatever the option."""
    optimizer = fusedopt.AdamW([("z", Parameter(torch.zeros(300, dtype=torch.complex64)))], **INT8)
    train(optimizer, range(2))
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == torch.complex64
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][0]["exp_avg"] = torch.zeros(300, dtype=torch.uint8)
    checkpoint["state"][0]["exp_avg_scale"] = torch.ones(2)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="'exp_avg' of parameter 'z' is torch.uint8, its parameter torch.complex64"):
        optimizer.load_state_dict(checkpoint)
    assert_untouched(optimizer, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master": "float32", "rounding": "stochastic"}, "rounding='stochastic' with master='float32'"),
        ({"master": "split8"}, "master='split8' .* parameter 3 of group 0 is float16; use master='float32'"),
        ({"state_dtype": "int4"}, "state_dtype='int4' is not supported"),
        ({"min_quantized_size": -1}, "min_quantized_size=-1 must be an integer"),
        ({"master": "whole"}, "master='whole' is not supported"),
    ],
)
def test_swap_changes_nothing_on_an_error(options: dict[str, Any], message: str) -> None:
    params = [*parameters()[:3], Parameter(torch.ones(3, dtype=torch.float16))]
    for make in (torch.optim.AdamW, fusedopt.AdamW):
        optimizer: Any = make(params, lr=0.01)
        train(optimizer, range(2))
        before = snapshot(optimizer)
        defaults = dict(optimizer.defaults)
        with pytest.raises(ValueError, match=message):
            fusedopt.swap(optimizer, **{**INT8, **options})
        assert_untouched(optimizer, before)
        assert optimizer.defaults == defaults


def test_how_things_are_stored_does_not_come_along() -> None:
    """But the seed does, and the step, from which stochastic rounding can be taken up again."""
    source = fusedopt.AdamW(parameters(), **INT8, master="split8", rounding="stochastic", seed=3)
    train(source, range(2))
    target = fusedopt.AdamW(copies(source))
    target.load_state_dict(source.state_dict())
    group = target.param_groups[0]
    stored = [group[name] for name in ("state_dtype", "min_quantized_size", "master", "rounding")]
    assert stored == [None, 4096, None, "nearest"] and (group["seed"], group["rounding_step"]) == (3, 2)
    assert {name for state in target.state.values() for name in state} == {"step", "exp_avg", "exp_avg_sq"}
