"""Checkpoints and `swap` where state is in 8 bits: going on to the same bits, and from one storage to another."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from configs import row_id, rows
from helpers import (
    LAYOUTS,
    assert_same_bits,
    assert_same_results,
    make_parameters,
    pairwise,
    results,
    same_bits,
)
from steps import (
    CONFIGURED,
    DROP_IN_CONFIGURED,
    USABLE,
    assert_same_optimizers,
    on_every_backend,
    parameters_of,
    train,
)
from torch import Tensor
from torch.distributed.checkpoint import state_dict as distributed
from torch.nn import Parameter

import fusedopt
from fusedopt.codecs import STATE_DTYPES, Codes, blocks, dequantize, map_of, quantize
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

# Blocks are 256 elements; the last three parameters are below the smallest size that is quantized.
SHAPES = ((3, 5, 37), (300,), (256,), (7,), (), (0,))
SMALLEST = 100
INT8: dict[str, Any] = {"state_dtype": "int8", "min_quantized_size": SMALLEST}


def parameters(dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Parameter]:
    return make_parameters(SHAPES, dtype, layout)


def copies(optimizer: Any, layout: str = "contiguous") -> list[Parameter]:
    return [Parameter(LAYOUTS[layout](param.detach())) for param in parameters_of(optimizer)]


def saved(optimizer: Any) -> Any:
    """The state_dict through a file, by the loader that runs no code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def read(state: Any, name: str, kind: str) -> Tensor:
    """A state's values, by the reference's decoder."""
    value = state[name]
    return dequantize(Codes(value, state[name + "_scale"], map_of(kind))) if value.dtype == torch.uint8 else value


def written(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales, by the reference's encoder."""
    codes = Codes(
        torch.empty(values.shape, dtype=torch.uint8), torch.empty(blocks(values.numel())), map_of(kind)
    )
    quantize(values.detach().float().contiguous(), codes)
    return codes.codes, codes.scale


# --- going on as if nothing had happened ---

FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "int8": (torch.float32, INT8),
    "int8 of float64": (torch.float64, INT8),
    "int8 of all": (torch.bfloat16, {"state_dtype": "int8", "min_quantized_size": 0}),
    "split8, stochastic": (torch.bfloat16, {**INT8, "master": "split8", "rounding": "stochastic", "seed": 5}),
    "split16": (torch.bfloat16, {"state_dtype": "bfloat16", "master": "split16"}),
    "master": (torch.float16, {**INT8, "master": "float32"}),
    "stochastic": (torch.float16, {"state_dtype": "float32", "rounding": "stochastic", "seed": 2**63}),
}


def by_file(optimizer: Any, make: Any) -> Any:
    """The seed comes with the checkpoint; how things are stored does not."""
    target = make(copies(optimizer), seed=99)
    target.load_state_dict(saved(optimizer))
    return target


def by_file_in_another_layout(optimizer: Any, make: Any) -> Any:
    target = make(copies(optimizer, "transposed"), seed=99)
    target.load_state_dict(saved(optimizer))
    return target


def by_name(optimizer: Any, make: Any) -> Any:
    """torch.distributed's functions, which create state by a step that must change no parameter."""
    module, other = (torch.nn.ParameterList(params) for params in (parameters_of(optimizer), copies(optimizer)))
    target = make(list(other))
    state = distributed.get_optimizer_state_dict(module, optimizer)
    distributed.set_optimizer_state_dict(other, target, state)
    assert_same_results(
        {str(i): param.detach() for i, param in enumerate(other)}, {str(i): p.detach() for i, p in enumerate(module)}
    )
    return target


WAYS = {
    "file": by_file,
    "layout": by_file_in_another_layout,
    "name": by_name,
    "deepcopy": lambda optimizer, _: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, _: pickle.loads(pickle.dumps(optimizer)),
}
RESUMED = pairwise(row=rows(), form=list(FORMATS), way=list(WAYS), backend=USABLE)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{row_id(*case['row'])}-{case['form']}-{case['way']}") for case in RESUMED]
)
def test_resuming_changes_no_bit(case: dict[str, Any]) -> None:
    (name, config), (dtype, options) = case["row"], FORMATS[case["form"]]

    def make(params: Any, **changed: Any) -> Any:
        return OPTIMIZERS[name](params, **{**config, **options, **changed}, backend=case["backend"])

    expected = make(parameters(dtype))
    train(expected, range(3))
    for state in expected.state_dict()["state"].values():
        for key, value in state.items():
            assert type(value) is Tensor, key
    actual = WAYS[case["way"]](expected, make)
    assert [{**group, "params": 0} for group in actual.param_groups] == [
        {**group, "params": 0} for group in expected.param_groups
    ]
    assert_same_optimizers(actual, expected)
    pointers = [value.data_ptr() for opt in (actual, expected) for s in opt.state.values() for value in s.values()]
    assert len(set(pointers) - {0}) == len([pointer for pointer in pointers if pointer])
    train(actual, range(3, 6))
    train(expected, range(3, 6))
    assert_same_optimizers(actual, expected)


@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_what_is_saved(cls: Any, config: dict[str, Any]) -> None:
    """Codes of the parameter's shape and a scale for each block, of large parameters; float32 of small ones."""
    optimizer = cls(parameters(torch.bfloat16), **config, **INT8, master="split16")
    train(optimizer, [0])
    names = optimizer.rule(optimizer.param_groups[0]).states
    for shape, state in zip(SHAPES, saved(optimizer)["state"].values(), strict=True):
        size = torch.Size(shape).numel()
        expected: dict[str, Any] = {name: (torch.float32, ()) for name in optimizer.counters}
        for name in names:
            expected[name] = (torch.uint8 if size >= SMALLEST else torch.float32, shape)
            if size >= SMALLEST:
                expected[name + "_scale"] = (torch.float32, (blocks(size),))
        expected["master"] = (torch.int16, shape)
        assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == expected


# --- from one storage to another ---


def assert_converted(target: Any, source: Any, state_dtype: str | None, smallest: int) -> None:
    """Every state of `target` is that of `source`, stored as the options say: encoded from its values, or as it was."""
    kinds = target.states
    for mine, other in zip(parameters_of(target), parameters_of(source), strict=True):
        state, old = target.state.get(mine, {}), source.state.get(other, {})
        for name in kinds.keys() & old.keys():
            value = read(old, name, kinds[name])
            if state_dtype == "int8" and mine.numel() >= smallest:
                codes, scale = written(value, kinds[name])
                if old[name].dtype == torch.uint8:
                    codes, scale = old[name], old[name + "_scale"]
                assert_same_bits(state[name], codes, name)
                assert_same_bits(state[name + "_scale"], scale, name)
                continue
            assert name + "_scale" not in state
            dtype = {"int8": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(str(state_dtype))
            if state_dtype == "bfloat16" and kinds[name] == "unsigned":
                dtype = torch.float32
            if state_dtype is None:
                dtype = mine.dtype if old[name].dtype == torch.uint8 else old[name].dtype
            assert_same_bits(state[name], value.to(dtype), name)
        assert {name for name in state if not name.endswith("_scale")} == {n for n in old if not n.endswith("_scale")}


def options_of(state_dtype: str | None) -> dict[str, Any]:
    return {"state_dtype": state_dtype, "min_quantized_size": SMALLEST}


CONVERSIONS = [(a, b) for a in STATE_DTYPES for b in STATE_DTYPES if "int8" in (a, b)]


@pytest.mark.parametrize(("before", "after"), CONVERSIONS)
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_loading_converts(cls: Any, config: dict[str, Any], before: str | None, after: str | None) -> None:
    """How state is stored is the optimizer's choice; and both backends go on from it to the same bits."""
    dtype = torch.bfloat16 if before == "bfloat16" or after is None else torch.float32
    source = cls(parameters(dtype), **config, **options_of(before))
    train(source, range(3))
    kept = results(source)
    found = []
    for backend in USABLE:
        target = cls(copies(source), **options_of(after), backend=backend)
        target.load_state_dict(saved(source))
        assert target.param_groups[0]["state_dtype"] == after
        assert_converted(target, source, after, SMALLEST)
        train(target, range(3, 5))
        found.append(results(target))
    assert_same_results(*found)
    assert_same_results(results(source), kept)


@pytest.mark.parametrize(("before", "after"), [(0, SMALLEST), (SMALLEST, 0), (SMALLEST, 1000)])
def test_another_smallest_size(before: int, after: int) -> None:
    source = fusedopt.AdamW8bit(parameters(), min_quantized_size=before)
    train(source, range(3))
    target = fusedopt.AdamW8bit(copies(source), min_quantized_size=after)
    target.load_state_dict(saved(source))
    assert target.param_groups[0]["min_quantized_size"] == after
    assert_converted(target, source, "int8", after)
    swapped = fusedopt.swap(source, min_quantized_size=after)
    assert_same_states(swapped, target)
    train(target, [3])
    train(swapped, [3])
    assert_same_states(swapped, target)


def assert_same_states(a: Any, b: Any) -> None:
    """As assert_same_optimizers, in any order of names."""
    one, other = results(a), results(b)
    assert_same_results(dict(sorted(one.items())), dict(sorted(other.items())))


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_from_torch_into_8_bits(cls: Any, config: dict[str, Any], backend: str) -> None:
    """torch's checkpoint and torch's running optimizer, to the same codes; then both go on alike.

    torch's state lies as its parameter does, here transposed, and codes in row-major order.
    """
    theirs = cls.torch_class(parameters(layout="transposed"), **config)
    train(theirs, range(3))
    loaded = cls(copies(theirs, "transposed"), lr=99.0, **INT8, backend=backend)
    loaded.load_state_dict(saved(theirs))
    assert_converted(loaded, theirs, "int8", SMALLEST)
    before = copy.deepcopy(theirs)
    swapped: Any = fusedopt.swap(theirs, **INT8, backend=backend)
    assert swapped is theirs and type(swapped) is cls and swapped.defaults["state_dtype"] == "int8"
    assert_converted(swapped, before, "int8", SMALLEST)
    train(loaded, range(3, 6))
    train(swapped, range(3, 6))
    assert_same_states(swapped, loaded)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_the_8_bit_classes_read_torchs_checkpoints(name: str) -> None:
    theirs = getattr(torch.optim, name)([Parameter(torch.ones(64, 65)), Parameter(torch.ones(65))], lr=0.125)
    if name in ("SGD", "RMSprop"):
        theirs.param_groups[0]["momentum"] = 0.5
    train(theirs, range(2))
    ours = getattr(fusedopt, name + "8bit")(copies(theirs))
    ours.load_state_dict(saved(theirs))
    assert_converted(ours, theirs, "int8", 4096)
    large, small = (ours.state[param] for param in parameters_of(ours))
    assert torch.uint8 in {value.dtype for value in large.values()}
    assert torch.uint8 not in {value.dtype for value in small.values()}
    train(ours, range(2, 4))


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_swapping_to_8_bits_and_back(cls: Any, config: dict[str, Any], backend: str) -> None:
    optimizer = cls(parameters(), **config, backend=backend)
    train(optimizer, range(3))
    before = copy.deepcopy(optimizer)
    assert fusedopt.swap(optimizer, **INT8) is optimizer
    assert_converted(optimizer, before, "int8", SMALLEST)
    train(optimizer, [3])
    coded = copy.deepcopy(optimizer)
    fusedopt.swap(optimizer, state_dtype="float32")
    assert optimizer.param_groups[0]["state_dtype"] == "float32"
    assert_converted(optimizer, coded, "float32", SMALLEST)
    fresh = cls(copies(coded), state_dtype="float32", backend=backend)
    fresh.load_state_dict(saved(coded))
    train(fresh, [4])
    train(optimizer, [4])
    assert_same_states(optimizer, fresh)


# --- devices ---


@pytest.mark.parametrize("after", ["int8", "float32"])
def test_loaded_state_goes_to_the_parameters_device(after: str) -> None:
    """The meta device stands for any other: codes, scales and masters go there, step counts stay on the CPU."""
    source = fusedopt.AdamW(parameters(torch.bfloat16), **INT8, master="split16")
    train(source, range(2))
    params = [Parameter(torch.empty_like(param, device="meta")) for param in parameters_of(source)]
    target = fusedopt.AdamW(params, **{**INT8, "state_dtype": after}, master="split16")
    target.load_state_dict(saved(source))
    for param, state in target.state.items():
        assert {name: value.device.type for name, value in state.items()} == {
            name: "cpu" if name == "step" else "meta" for name in state
        }
        is_code = after == "int8" and param.numel() >= SMALLEST
        assert state["exp_avg"].dtype == (torch.uint8 if is_code else torch.float32)
        assert ("exp_avg_scale" in state) == is_code and state["master"].dtype == torch.int16


def test_loading_copies_codes_scales_and_masters() -> None:
    """Training on from a checkpoint leaves it as it was."""
    source = fusedopt.AdamW(parameters(torch.bfloat16), **INT8, master="split16")
    train(source, range(3))
    checkpoint = source.state_dict()
    kept = copy.deepcopy(checkpoint)
    target = fusedopt.AdamW(copies(source), **INT8, master="split16")
    target.load_state_dict(checkpoint)
    train(target, range(3, 6))
    for key, state in kept["state"].items():
        assert all(same_bits(value, checkpoint["state"][key][name]) for name, value in state.items())
