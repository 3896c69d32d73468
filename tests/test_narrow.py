"""Parameters of 16 bits: master copies, the split of float32 in two, and the options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from configs import row_id, rows
from helpers import (
    assert_same_bits,
    assert_same_results,
    make_parameters,
    pairwise,
    results,
    same_bits,
    set_grad,
    set_grads,
    values,
)
from narrow import NARROW, PLACES, SHAPES, at, every_low_half, joined, rounded, rounded_to_24_bits, step, stored
from steps import assert_untouched, on_every_backend, scaler_of, snapshot
from torch.nn import Parameter

import fusedopt
from fusedopt.codecs import decode_parameter, encode_parameter
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

everywhere = pytest.mark.parametrize("place", PLACES)
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
split = pytest.mark.parametrize("low", [torch.int16, torch.int8], ids=["split16", "split8"])
MASTER = {torch.int16: "split16", torch.int8: "split8"}


def twins(name: str, config: dict[str, Any], backend: str, dtype: torch.dtype, layout: str, **options: Any) -> Any:
    """An optimizer of 16-bit parameters with these options, and of float32 ones that begin with the same values."""
    params = make_parameters(SHAPES, dtype, layout)
    cls = OPTIMIZERS[name]
    both = [params, [Parameter(param.detach().float()) for param in params]]
    common = {"state_dtype": "float32", "backend": backend}
    return cls(both[0], **config, **common, **options), cls(both[1], **config, **common), *both


# --- master copies against float32 parameters ---

PAIRS = pairwise(row=rows(), place=PLACES, layout=["contiguous", "transposed", "stepped"])
every_pair = pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{row_id(*case['row'])}-{case['place']}-{i}") for i, case in enumerate(PAIRS)]
)


@every_pair
def test_split16_and_a_master_are_float32_bit_for_bit(case: dict[str, Any]) -> None:
    """After 200 steps, and with the states; the parameter is the upper part, or the rounded form of its master."""
    for dtype, master in ((torch.bfloat16, "split16"), (torch.bfloat16, "float32"), (torch.float16, "float32")):
        with at(case["place"]) as backend:
            ours, theirs, params, wide = twins(*case["row"], backend, dtype, case["layout"], master=master)
            # The reference is slow, and its 200 steps are held elsewhere to the native ones.
            for number in range(200 if backend == "cpu" else 40):
                step(ours, number % 10)
                step(theirs, number % 10)
        for param, expected in zip(params, wide):
            copied = ours.state[param]["master"]
            if master == "split16":
                assert_same_bits(joined(param, copied), expected.detach(), master)
            else:
                assert_same_bits(copied, expected.detach(), f"{master} beside {dtype}")
                assert_same_bits(param.detach(), rounded(expected.detach(), dtype), "rounded master")
            for key in ours.state[param].keys() - {"master"}:
                assert_same_bits(ours.state[param][key], theirs.state[expected][key], key)


@every_pair
def test_split8_is_float32_rounded_to_24_bits_each_step(case: dict[str, Any]) -> None:
    with at(case["place"]) as backend:
        ours, theirs, params, wide = twins(*case["row"], backend, torch.bfloat16, case["layout"], master="split8")
        for number in range(10):
            step(ours, number)
            step(theirs, number)
            for param, other in zip(params, wide):
                found = joined(param, ours.state[param]["master"])
                assert_same_bits(found, rounded_to_24_bits(other.detach()))
                other.data.copy_(found)  # so that the next step of both is from the same value


@pytest.mark.parametrize("name", ["AdamW", "Lion", "AdEMAMix"])
def test_split8_stays_near_float32(name: str) -> None:
    """A step rounds by 2^-16 of the value at most, float32 by 2^-24 a few times; decay only shrinks what was lost."""
    config = dict(next(config for row, config in rows() if row == name))
    count = 200
    distance: dict[Any, float] = {}
    for master in ("split8", None):
        ours, theirs, params, wide = twins(name, config, "cpu", torch.bfloat16, "contiguous", master=master)
        largest = torch.stack([param.abs().max() for param in wide]).max()
        for number in range(count):
            step(ours, number % 10)
            step(theirs, number % 10)
            largest = torch.stack([largest, *(param.abs().max() for param in wide)]).max()
        found = [joined(p, ours.state[p]["master"]) if master else p.detach().float() for p in params]
        distance[master] = max((a - b).abs().max().item() for a, b in zip(found, wide))
    assert 0 < distance["split8"] <= count * largest * (2.0**-16 + 2.0**-21)
    assert distance["split8"] < distance[None] / 20  # eight bits more


@everywhere
def test_small_steps_are_kept(place: str) -> None:
    """Decay by 2^-10 a step, where half a unit of bfloat16 below 1 is 2^-9: to nearest the parameter stays where it is.

    Stochastically the mean decays as it should. A step has a variance of at most a quarter of a unit of 2^-8 squared.
    """
    count, size = 64, 1 << 14
    found = {}
    options: dict[str, Any] = {
        "float32": {},
        "split16": {"master": "split16"},
        "master": {"master": "float32"},
        "split8": {"master": "split8"},
        "nearest": {},
        "stochastic": {"rounding": "stochastic"},
    }
    for name, option in options.items():
        param = Parameter(torch.ones(size, dtype=torch.float32 if name == "float32" else torch.bfloat16))
        with at(place) as backend:
            optimizer = fusedopt.AdamW([param], lr=2.0**-5, weight_decay=2.0**-5, backend=backend, **option)
            for _ in range(count):
                param.grad = torch.zeros_like(param)
                optimizer.step()
        low = optimizer.state[param].get("master")
        split_up = low is not None and low.dtype != torch.float32
        found[name] = joined(param, low) if split_up else (param.detach().float() if low is None else low)
    exact = (1 - 2.0**-10) ** count
    assert abs(found["float32"][0].item() - exact) < count * 2.0**-24
    for name in ("split16", "master"):
        assert_same_bits(found[name], found["float32"], name)
    # Values below 1 are rounded by half of 2^-16 at most.
    assert 0 < (found["split8"] - exact).abs().max() <= count * (2.0**-17 + 2.0**-24)
    assert (found["nearest"] == 1).all()
    sigma = math.sqrt(count / 4 / size) * 2.0**-8
    assert abs(found["stochastic"].double().mean().item() - exact) < 5 * sigma


# --- the split itself ---


@split
def test_reference_splits_every_pattern(low: torch.dtype) -> None:
    x = every_low_half()
    param, remainder = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=low)
    encode_parameter(x, param, remainder, None)
    expected = x if low == torch.int16 else rounded_to_24_bits(x)
    assert_same_bits(joined(param, remainder), expected)
    decoded = decode_parameter(param, remainder, torch.float32)
    assert_same_bits(decoded, expected)
    if low == torch.int16:
        assert torch.equal(decoded.view(torch.int32)[~x.isnan()], x.view(torch.int32)[~x.isnan()])  # zero's sign too
    # The parameter is the nearest bfloat16, of two the larger: ties to even would need a remainder of 2^15.
    finite = expected.isfinite()
    wide = expected[finite].double()
    unit = 2.0 ** (wide.frexp().exponent.clamp(min=-125) - 8).double()
    nearest = (wide.abs() / unit + 0.5).floor() * unit * wide.sign()
    assert_same_bits(param[finite].float(), nearest.float())
    assert same_bits(param[~finite], expected[~finite].bfloat16())
    assert (remainder == torch.iinfo(low).min).any() and (remainder == torch.iinfo(low).max).any()
    assert not remainder[x.isnan() | x.isinf()].any()


@everywhere
@split
def test_native_splits_every_pattern(low: torch.dtype, place: str) -> None:
    x = every_low_half()
    expected, expected_low = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=low)
    encode_parameter(x, expected, expected_low, None)
    param, remainder = stored(x, place, master=MASTER[low])
    assert_same_bits(param, expected)
    assert_same_bits(remainder, expected_low)
    # Joined and split again, by steps that change nothing: x * 1 - 0 * sign(0).
    again = Parameter(param.clone())
    with at(place) as backend:
        optimizer: Any = fusedopt.Lion([again], lr=0.0, master=MASTER[low], backend=backend)
        optimizer.state[again] = {"master": remainder.clone(), "step": torch.tensor(1.0)}
        again.grad = torch.zeros_like(again)
        optimizer.step()
    assert_same_bits(again.detach(), param)
    assert_same_bits(optimizer.state[again]["master"], remainder)


@everywhere
@split
def test_a_split_parameter_that_is_written_stays_near_what_was_written(low: torch.dtype, place: str) -> None:
    """What is left below moves it by half a unit at most. Of zero the signs must not meet: bits 0 - 1 are NaN."""
    x = values((4099,), 3)
    param = Parameter(torch.zeros(x.shape, dtype=torch.bfloat16))
    set_grad(param, x)
    with at(place) as backend:
        optimizer: Any = fusedopt.SGD([param], lr=1.0, maximize=True, master=MASTER[low], backend=backend)
        optimizer.step()
        assert (optimizer.state[param]["master"] < 0).any() and (optimizer.state[param]["master"] > 0).any()
        written = torch.tensor([0.0, -0.0, 1.0, -3.0, float("nan"), 2.0**-133]).repeat(684)[: len(x)].bfloat16()
        param.data.copy_(written)
        param.grad = torch.zeros_like(param)
        optimizer.step()
    found = joined(param, optimizer.state[param]["master"])
    assert torch.equal(found.isnan(), written.isnan())
    unit = 2.0 ** (written.double().frexp().exponent.clamp(min=-125) - 8).double()
    near = (found.double() - written.double()).abs() <= unit / 2
    assert near[~written.isnan()].all()


@everywhere
@narrow
def test_a_parameter_that_is_written_counts_against_its_master(dtype: torch.dtype, place: str) -> None:
    param = Parameter(values((1000,), 4, dtype=dtype))
    with at(place) as backend:
        optimizer: Any = fusedopt.AdamW([param], lr=2.0**-12, weight_decay=0.5, master="float32", backend=backend)
        for number in range(3):
            set_grads([param], number)
            optimizer.step()
        assert not torch.equal(optimizer.state[param]["master"], param.float())
        kept = optimizer.state[param]["master"][500:].clone()
        param.data[:500] = 3.0
        param.data[7] = float("nan")
        optimizer.param_groups[0]["lr"] = 0.0
        set_grads([param], 3)
        optimizer.step()
    expected = torch.cat([torch.full((500,), 3.0), kept])
    expected[7] = float("nan")
    assert_same_bits(optimizer.state[param]["master"], expected)
    assert_same_bits(param.detach(), rounded(expected, dtype))


# --- options ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two roundings": (
        {"master": "float32", "rounding": "stochastic"},
        "rounding='stochastic' with master='float32': .*or master='split8'",
    ),
    "nothing to round": ({"master": "split16", "rounding": "stochastic"}, "with master='split16'"),
    "unknown master": ({"master": "split"}, "master='split' is not supported; use one of None, 'float32', 'split16'"),
    "a dtype": ({"master": torch.float32}, "master=torch.float32 is not supported"),
    "unknown rounding": ({"rounding": "up"}, "rounding='up' is not supported; use one of 'nearest', 'stochastic'"),
    "no rounding": ({"rounding": None}, "rounding=None is not supported"),
    "a negative seed": ({"seed": -1}, "seed=-1 must be an integer from 0 to 18446744073709551615"),
    "a large seed": ({"seed": 2**64}, "seed=18446744073709551616 must be"),
    "a fraction": ({"seed": 0.5}, "seed=0.5 must be"),
    "split16 of float16": ({"master": "split16"}, "'split16' keeps the bits .* parameter 'b' is float16; use master="),
    "split8 of float16": ({"master": "split8"}, "master='split8' .* parameter 'b' is float16; use master='float32'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be(case: str) -> None:
    """At construction, in a group added later and in a group changed later, where nothing has changed then."""
    options, message = REFUSED[case]

    def named() -> list[tuple[str, Parameter]]:
        dtypes = {"a": torch.bfloat16, "b": torch.float16, "c": torch.float32}
        return [(name, Parameter(torch.ones(3, dtype=dtype))) for name, dtype in dtypes.items()]

    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW(named(), **options)
    optimizer: Any = fusedopt.AdamW(named())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": named(), **options})
    assert_untouched(optimizer, before)
    for place in ("eager", "cpu"):
        optimizer = fusedopt.AdamW(named(), backend=place)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        optimizer.step()
        if options.keys() == {"seed"}:
            continue  # read when a group is made
        optimizer.param_groups[0].update(options)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert_untouched(optimizer, before)


@on_every_backend
def test_a_parameter_cast_to_float16_later(backend: str) -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer: Any = fusedopt.AdamW(model.named_parameters(), master="split16", backend=backend)
    model.half()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="parameter 'weight' is float16"):
        optimizer.step()
    assert_untouched(optimizer, before)


@on_every_backend
def test_a_master_of_another_kind_is_refused(backend: str) -> None:
    """An option changed amid training; None and back is no change."""
    params = make_parameters(((3,), (2, 2)), torch.bfloat16)
    optimizer: Any = fusedopt.AdamW(params, master="split16", backend=backend)
    for number in range(2):
        set_grads(params, number)
        optimizer.step()
    optimizer.param_groups[0]["master"] = "float32"
    before = snapshot(optimizer)
    message = "'master' of parameter 0 of group 0 is torch.int16, .* asks for torch.float32; load .* state_dict again"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_untouched(optimizer, before)
    exact = [joined(param, optimizer.state[param]["master"]) for param in params]
    optimizer.load_state_dict(optimizer.state_dict())
    for param, value in zip(params, exact):
        assert_same_bits(optimizer.state[param]["master"], value)
    optimizer.step()


@on_every_backend
@pytest.mark.parametrize("options", [{"master": "float32"}, {"master": "split8"}, {"rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_wide_parameters_are_as_without(dtype: torch.dtype, options: dict[str, Any], backend: str) -> None:
    found = []
    for each in ({}, options):
        params = make_parameters(((3, 5), (600,)), dtype)
        optimizer = fusedopt.AdamW(params, lr=0.1, backend=backend, **each)
        for number in range(3):
            set_grads(params, number)
            optimizer.step()
        found.append(results(optimizer))
    assert_same_results(*found)


@on_every_backend
def test_groups_of_their_own_kinds(backend: str) -> None:
    """Each group as if it were alone, but for the number of its parameters, by which they are rounded."""
    kinds: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.bfloat16, {"rounding": "stochastic"}),
        (torch.bfloat16, {"master": "split16"}),
        (torch.float16, {"master": "float32", "state_dtype": "int8", "min_quantized_size": 0}),
        (torch.bfloat16, {"master": "split8", "state_dtype": "bfloat16"}),
        (torch.float32, {"master": "split8"}),
        (torch.float16, {}),
    ]

    def make(indices: Sequence[int]) -> Any:
        groups = [{"params": [Parameter(values((700,), 6, i, dtype=kinds[i][0]))], **kinds[i][1]} for i in indices]
        return fusedopt.AdamW(groups, lr=0.01, backend=backend)

    together, alone = make(range(len(kinds))), [make([index]) for index in range(len(kinds))]
    for number in range(4):
        for index, group in enumerate(together.param_groups):
            grad = values((700,), 7, number, index)
            for param in (group["params"][0], alone[index].param_groups[0]["params"][0]):
                set_grad(param, grad)
                if number == 2 and index % 2:
                    param.grad = None
        for optimizer in (together, *alone):
            optimizer.step()
    for group, single in zip(together.param_groups, alone):
        (param,), (other,) = group["params"], single.param_groups[0]["params"]
        assert_same_bits(param.detach(), other.detach())
        assert list(together.state[param]) == list(single.state[other])
        for key, value in together.state[param].items():
            assert_same_bits(value, single.state[other][key], key)


@on_every_backend
@pytest.mark.parametrize("options", [{"master": "float32"}, {"rounding": "stochastic"}, {}], ids=str)
def test_float16_under_a_scaler(options: dict[str, Any], backend: str) -> None:
    """A scale of 8 is exact, so as without; of a skipped step nothing remains, and no random numbers are drawn."""

    def make() -> tuple[list[Parameter], Any]:
        params = make_parameters(((33,), (5, 7)), torch.float16)
        return params, fusedopt.AdamW(params, lr=0.01, fused=True, backend=backend, **options)

    params, optimizer = make()
    plain, expected = make()
    scaler = scaler_of(8.0)
    for number in range(6):
        set_grads(params, number)
        for param in params:
            param.grad *= scaler.get_scale()
        if number == 3:
            params[1].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if number != 3:
            set_grads(plain, number)
            for param in plain:
                # What float16 has left of it: tiny values are subnormal there.
                scale = 8.0 if number < 3 else 4.0
                set_grad(param, (param.grad * scale).float() / scale)
            expected.step()
    assert_same_results(results(optimizer), results(expected))
    assert optimizer.param_groups[0].get("rounding_step") == expected.param_groups[0].get("rounding_step")
