"""State in 8 bits, in steps of every class: the same bits everywhere, right, robust. test_codecs.py has the codec."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from configs import CONFIGS, row_id, rows
from helpers import (
    GRAD_LAYOUTS,
    LAYOUTS,
    assert_same_bits,
    assert_same_results,
    exchange_api,
    instruction_set,
    make_parameters,
    pairwise,
    results,
    same_bits,
    set_grads,
    threads,
    values,
)
from steps import CLASSES, assert_same_optimizers, assert_untouched, on_every_backend, scaler_of, snapshot
from test_bad_input import assert_refused
from test_codecs import papers_magnitudes
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt._state import converted
from fusedopt.backends import native
from fusedopt.codecs import SCALE_SUFFIX, STORAGE_DTYPES
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = native().instruction_sets()
every_row = pytest.mark.parametrize(("name", "config"), [pytest.param(*row, id=row_id(*row)) for row in rows()])
with_state = [(name, row) for name, row in rows() if (name, row) != ("SGD", CONFIGS["SGD"][0])]
every_state = pytest.mark.parametrize(("name", "config"), [pytest.param(*row, id=row_id(*row)) for row in with_state])

# Sizes around blocks of 256 and 512, and one for more than one thread.
SHAPES = [(), (0,), (1,), (255,), (256,), (257,), (511,), (512,), (513,), (3, 5, 7), (2, 3, 8, 9), (0, 3), (150, 131)]


def make(name: str, config: dict[str, Any], backend: str, params: Sequence[Tensor], **options: Any) -> Any:
    options = {"state_dtype": "int8", "min_quantized_size": 0, **options}
    return OPTIMIZERS[name](params, **config, **options, backend=backend)


def states_of(optimizer: Any, index: int = 0) -> list[str]:
    """The names of a group's states."""
    return list(optimizer.rule(optimizer.param_groups[index]).states)


# --- the same bits ---

AXES: dict[str, Sequence[Any]] = {
    "row": rows(),
    "instructions": SETS,
    "threads": [1, 2, 4],
    "param_dtype": [torch.float32, torch.bfloat16, torch.float16],
    "grad_dtype": STORAGE_DTYPES,
    "layout": list(LAYOUTS),
    "scale": [None, 3.0],
    "exchange": [True, False],
}
CASES = pairwise(**AXES)


def trained(case: dict[str, Any], backend: str, steps: int = 3) -> dict[str, Tensor]:
    """From the first step on. Gradients are None in turns, so that step counts differ."""
    optimizer = make(*case["row"], backend, make_parameters(SHAPES, case["param_dtype"], case["layout"]))
    if case["scale"]:
        # As GradScaler does.
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(case["scale"]), torch.tensor(0.0)
    params = optimizer.param_groups[0]["params"]
    with exchange_api(case["exchange"]), threads(case["threads"] if backend == "cpu" else 1):
        for step in range(steps):
            set_grads(params, step, case["grad_dtype"])
            for index, param in enumerate(params[:-1]):
                if (index + step) % 3 == 0:
                    param.grad = None
            optimizer.step()
    return results(optimizer)


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{row_id(*case['row'])}-{i}") for i, case in enumerate(CASES)])
def test_training(case: dict[str, Any]) -> None:
    """Every two of: row, instruction set, threads, dtypes, layout of the parameter, gradient scale."""
    with instruction_set(case["instructions"]):
        assert_same_results(trained(case, "cpu"), trained(case, "eager"))


@every_state
def test_any_number_of_threads(name: str, config: dict[str, Any]) -> None:
    """Shares of the work begin and end amid tensors, never amid blocks."""
    found = []
    for backend, count in [("eager", 1), ("cpu", 1), ("cpu", 2), ("cpu", 3), ("cpu", 4)]:
        optimizer = make(name, config, backend, make_parameters([(61_003,), (300,), (38_700,)]))
        with threads(count):
            for step in range(2):
                set_grads(optimizer.param_groups[0]["params"], step)
                optimizer.step()
        found.append(results(optimizer))
    for other in found[1:]:
        assert_same_results(other, found[0])


@every_row
def test_float64(name: str, config: dict[str, Any]) -> None:
    """torch's own root of a double may be one rounding off, which a step, of order 1, takes on, and the next ones up to
    ten times: in three steps at most a hundred. A code that flips for that would be one in a hundred million."""
    case = {"row": (name, config), "threads": 2, "layout": "contiguous", "scale": 3.0, "exchange": True}
    case |= {"param_dtype": torch.float64, "grad_dtype": torch.float64}
    actual, expected = trained(case, "cpu"), trained(case, "eager")
    assert list(actual) == list(expected)
    for key in expected:
        tolerance = 100 * torch.finfo(torch.float64).eps if key.startswith("parameter") else 0
        torch.testing.assert_close(actual[key], expected[key], rtol=tolerance, atol=tolerance, msg=key)


@every_state
def test_complex_parameters_keep_complex_state(name: str, config: dict[str, Any]) -> None:
    found = []
    for state_dtype in ("int8", None):
        optimizer = make(name, config, "cpu", make_parameters([(300,)], torch.complex64), state_dtype=state_dtype)
        for step in range(3):
            set_grads(optimizer.param_groups[0]["params"], step)
            optimizer.step()
        found.append(results(optimizer))
    ours, expected = ({key: state.dtype for key, state in each.items()} for each in found)
    assert ours == expected
    if not config.get("centered"):  # whose variance has another floor
        assert_same_results(*found)


@on_every_backend
@pytest.mark.parametrize("cls", [case for case in CLASSES if "fused" in case.values[0]([torch.ones(1)]).defaults])
def test_grad_scaler(cls: Any, backend: str) -> None:
    """With fused=True the step unscales, exactly by a power of two, and is skipped where a gradient is not finite."""
    scaler = scaler_of(1024.0)
    options: Any = {"lr": 0.125, "state_dtype": "int8", "min_quantized_size": 0, "backend": backend}
    actual, expected = (cls(make_parameters([(700,)]), **options, fused=fused) for fused in (True, False))
    for step in range(4):
        for optimizer, scale in ((actual, scaler.get_scale()), (expected, 1.0)):
            param = optimizer.param_groups[0]["params"][0]
            set_grads([param], step)
            param.grad *= scale
        if step == 1:
            actual.param_groups[0]["params"][0].grad[5] = torch.inf
        else:
            expected.step()
        scaler.step(actual)
        scaler.update()
    assert_same_optimizers(actual, expected)


@pytest.mark.parametrize("instructions", SETS)
def test_flushing_of_subnormals(instructions: str) -> None:
    """The reciprocal of a scale near the largest float32 is subnormal, and so are values of a scale near 2^-126."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    torch.set_flush_denormal(False)

    def stepped(name: str, config: dict[str, Any], size: float, flush: bool) -> dict[str, Tensor]:
        param = Parameter(torch.zeros(700))
        optimizer = make(name, config, "cpu", [param])
        for step in range(2):
            param.grad = values((700,), step).clamp(-1, 1) * size
            torch.set_flush_denormal(flush)
            try:
                optimizer.step()
            finally:
                torch.set_flush_denormal(False)
        return results(optimizer)

    lion, adagrad = ("Lion", {"betas": (0.5, 0.0)}), ("Adagrad", {"eps": 1.0})  # whose states are g and a sum of g * g
    with instruction_set(instructions):
        for case in [(*lion, 1.6e38), (*lion, 1.2e-38), (*adagrad, 1.2e19), (*adagrad, 1.1e-19)]:
            expected = stepped(*case, flush=False)
            assert any(state.dtype == torch.uint8 and len(state.unique()) > 50 for state in expected.values())
            assert_same_results(stepped(*case, flush=True), expected)


# --- right, not just the same ---


@on_every_backend
@every_row
def test_first_step_is_that_of_float32(name: str, config: dict[str, Any], backend: str) -> None:
    """State is quantized after use, and the state to begin with is exact in 8 bits."""
    found = []
    for size in (0, 1 << 40):
        optimizer = make(name, config, backend, make_parameters(SHAPES), min_quantized_size=size)
        params = optimizer.param_groups[0]["params"]
        set_grads(params, 0)
        optimizer.step()
        assert all(
            optimizer.state[param][key].dtype == (torch.float32 if size else torch.uint8)
            for param in params
            for key in states_of(optimizer)
        )
        found.append([param.detach() for param in params])
    for ours, expected in zip(*found):
        assert_same_bits(ours, expected)


def table(kind: str) -> Tensor:
    """What each code stands for, by the paper's formula, in double."""
    positive = torch.tensor([float(magnitude) for magnitude in papers_magnitudes(kind)], dtype=torch.float64)
    return positive if kind == "unsigned" else torch.cat([-positive[1:-1].flip(0), positive])


def by_the_paper(codes: Tensor, scale: Tensor, kind: str) -> Tensor:
    return table(kind)[codes.flatten().long()] * scale.double().repeat_interleave(256)[: codes.numel()]


@on_every_backend
@every_state
def test_step_by_step(name: str, config: dict[str, Any], backend: str) -> None:
    """Each step is the rule's, in double, on what the codes say; and each new state is the nearest that there is.

    The codes' numbers are within 4 units in the last place of the paper's, float32 rounds a handful of times, and what
    is 3e-6 from the middle of two numbers may be quantized to either.
    """
    rounding = 16 * torch.finfo(torch.float32).eps
    shape = (13, 100)
    optimizer = make(name, config, backend, make_parameters([shape]))
    group = optimizer.param_groups[0]
    (param,), rule = group["params"], optimizer.rule(group)
    state = optimizer.state[param]
    kinds = {key: optimizer.states[key] for key in rule.states}
    start = torch.full(shape, config.get("initial_accumulator_value", 0.0), dtype=torch.float64)

    def read(key: str) -> tuple[Tensor, Tensor]:
        """The numbers that the codes stand for, and the scales, by element."""
        scale = state[key + SCALE_SUFFIX].double().repeat_interleave(256)[: param.numel()].view(shape)
        return table(kinds[key])[state[key].long()] * scale, scale

    for step in range(5):
        set_grads([param], step)
        assert param.grad is not None
        param.grad *= 10.0 ** torch.linspace(-4, 1, param.numel()).view(shape)  # each block has its own scale
        grad = param.grad.double() * (-1 if config.get("maximize") else 1)
        scalars, _ = optimizer._scalars(0, *optimizer._count(state, group, ""))
        before = [read(key)[0] if key in state else start for key in kinds]
        expected, *after = rule.reference(param.detach().double(), grad, *before, *scalars)
        optimizer.step()
        assert ((param.detach() - expected).abs() <= rounding * expected.abs().clamp(min=1.0)).all()
        for key, value in zip(kinds, after, strict=True):
            actual, scale = read(key)
            largest = torch.stack([block.abs().max() for block in value.flatten().split(256)])
            torch.testing.assert_close(state[key + SCALE_SUFFIX].double(), largest, rtol=rounding, atol=0)
            nearest = (table(kinds[key]) * scale[..., None] - value[..., None]).abs().amin(-1)
            assert ((actual - value).abs() <= nearest + rounding * scale + 4e-6 * value.abs()).all()


@on_every_backend
@every_state
def test_blocks_are_in_row_major_order(name: str, config: dict[str, Any], backend: str) -> None:
    """However a parameter lies in memory its codes are contiguous, and those of one that is contiguous."""
    found = []
    for layout in ("contiguous", "transposed", "channels_last", "stepped"):
        optimizer = make(name, config, backend, make_parameters([(6, 100), (2, 3, 10, 11)], layout=layout))
        params = optimizer.param_groups[0]["params"]
        for step in range(2):
            set_grads(params, step, layout=layout)
            optimizer.step()
        assert all(state.is_contiguous() for param in params for state in optimizer.state[param].values())
        found.append(results(optimizer))
    for other in found[1:]:
        assert_same_results(other, found[0])


@on_every_backend
@every_state
def test_no_block_holds_two_parameters(name: str, config: dict[str, Any], backend: str) -> None:
    """Each parameter is stepped as it is alone."""
    params = make_parameters([(300,), (300,), (7,)])
    together = make(name, config, backend, params)
    alone = [make(name, config, backend, [Parameter(param.detach().clone())]) for param in params]
    for step in range(2):
        set_grads(params, step)
        for size, param, optimizer in zip((1e-3, 1.0, 1e3), params, alone):
            param.grad *= size
            optimizer.param_groups[0]["params"][0].grad = param.grad
            optimizer.step()
        together.step()
    expected = [list(results(optimizer).values()) for optimizer in alone]
    assert all(
        same_bits(a, b) for a, b in zip(results(together).values(), [x for each in expected for x in each], strict=True)
    )


@on_every_backend
@every_state
def test_a_bad_gradient_spoils_its_block_alone(name: str, config: dict[str, Any], backend: str) -> None:
    """Every other parameter, code and scale is that of a run without it."""
    found = []
    block = slice(512, 768)
    for bad in ([], [torch.nan, torch.inf, -torch.inf]):
        params = make_parameters([(1100,)] * 3 + [(2, 300)])
        optimizer = make(name, config, backend, params)
        for step in range(4):
            set_grads(params, step)
            if step == 1:
                for param, value in zip(params, bad):
                    param.grad[600] = value
            optimizer.step()
        for param in params[:3]:
            for key in states_of(optimizer):
                codes, scale = optimizer.state[param][key], optimizer.state[param][key + SCALE_SUFFIX]
                assert scale.isnan().tolist() == [False, False, bool(bad), False, False]
                codes[block] = scale[2] = 0
            spoilt = param.detach()[block]
            assert not bad or spoilt.isnan().all() or name == "Lion"  # since the sign of NaN is 0
            spoilt.zero_()
        found.append(results(optimizer))
    assert_same_results(*found)


# --- what is quantized ---


def dtypes_of(optimizer: Any, param: Tensor) -> set[torch.dtype]:
    return {optimizer.state[param][key].dtype for key in optimizer.states if key in optimizer.state[param]}


def stepped(optimizer: Any) -> Any:
    set_grads([param for group in optimizer.param_groups for param in group["params"]], 0)
    optimizer.step()
    return optimizer


@on_every_backend
@pytest.mark.parametrize("cls", CLASSES)
def test_small_parameters_keep_float32(cls: Any, backend: str) -> None:
    config = {"momentum": 0.9} if cls is fusedopt.SGD else {}
    params = make_parameters([(4095,), (4096,), (64, 64), ()])
    optimizer = stepped(cls(params, lr=0.1, **config, state_dtype="int8", backend=backend))
    single, codes = {torch.float32}, {torch.uint8}
    assert [dtypes_of(optimizer, param) for param in params] == [single, codes, codes, single]
    params = make_parameters([(9,), (10,)], torch.bfloat16)
    optimizer = stepped(cls(params, lr=0.1, **config, state_dtype="int8", min_quantized_size=10, backend=backend))
    assert [dtypes_of(optimizer, param) for param in params] == [single, codes]


@on_every_backend
def test_groups_and_parameters_decide_for_themselves(backend: str) -> None:
    params = make_parameters([(300,)] * 7)
    params[5].optimizer_state_dtype = "float32"  # type: ignore[attr-defined]
    params[6].optimizer_state_dtype = "int8"  # type: ignore[attr-defined]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "min_quantized_size": 301},
        {"params": params[2:3], "min_quantized_size": 301, "state_dtype": "bfloat16"},
        {"params": params[3:4], "state_dtype": None},
        {"params": params[4:6]},
        {"params": params[6:], "state_dtype": None},
    ]
    optimizer: Any = fusedopt.AdamW(groups, state_dtype="int8", min_quantized_size=300, backend=backend)
    stepped(optimizer)
    single, codes = {torch.float32}, {torch.uint8}
    expected = [codes, single, {torch.bfloat16, torch.float32}, single, codes, single, codes]
    assert [dtypes_of(optimizer, param) for param in params] == expected


@pytest.mark.parametrize("cls", CLASSES)
def test_options_are_checked(cls: Any) -> None:
    (param,) = make_parameters([(3,)])
    sizes = {bad: f"min_quantized_size={bad!r} must be an integer from 0 to" for bad in (-1, "x", 2.5, None)}
    known = "use one of None, 'float32', 'bfloat16', 'int8'"
    dtypes = {bad: f"state_dtype={bad!r} is not supported; {known}" for bad in ("int7", "uint8", 8, torch.uint8)}
    cases = [*(("min_quantized_size", *case) for case in sizes.items()), *(("state_dtype", *c) for c in dtypes.items())]
    for option, bad, words in cases:
        with pytest.raises(ValueError) as caught:
            cls([param], **{option: bad})
        assert words in str(caught.value)
        with pytest.raises(ValueError) as caught:
            cls([{"params": [param], option: bad}])
        assert words in str(caught.value)
        optimizer = cls([param])
        param.grad = torch.ones(3)
        optimizer.param_groups[0][option] = bad
        before = snapshot(optimizer)
        with pytest.raises(ValueError) as caught:
            optimizer.step()
        assert words in str(caught.value)
        assert_untouched(optimizer, before)


@on_every_backend
@every_state
def test_entries_and_their_size(name: str, config: dict[str, Any], backend: str) -> None:
    """NAME and NAME_scale, in the rule's order; a byte and 4/256 for an element of a state, plus the step count."""
    (param,) = make_parameters([(300, 1000)], torch.bfloat16, "transposed")
    optimizer = stepped(make(name, config, backend, [param]))
    state = {key: value for key, value in optimizer.state[param].items() if key not in optimizer.counters}
    assert list(state) == [key + suffix for key in states_of(optimizer) for suffix in ("", SCALE_SUFFIX)]
    for key in states_of(optimizer):
        codes, scale = state[key], state[key + SCALE_SUFFIX]
        assert (codes.dtype, codes.shape, codes.is_contiguous()) == (torch.uint8, param.shape, True)
        assert (scale.dtype, scale.shape, scale.is_contiguous()) == (torch.float32, (1172,), True)
        assert type(codes) is type(scale) is Tensor and not codes.requires_grad and not scale.requires_grad
    size = sum(value.untyped_storage().nbytes() for value in optimizer.state[param].values())
    assert size <= len(states_of(optimizer)) * 1.0157 * param.numel() + 8


# --- many steps ---


def adversarial_gradients() -> list[list[Tensor]]:
    """Of each step, for three parameters: nearly constant; in half of the rows rarely anything but zero; of sizes from
    1e-8 to 1e3 within a block."""
    generator = torch.Generator().manual_seed(11)
    shape = (6, 128)
    mean, size = torch.randn(shape, generator=generator), 10 ** (11 * torch.rand(shape, generator=generator) - 8)
    found = []
    for _ in range(64):
        noise = torch.randn((3, *shape), generator=generator)
        seldom = torch.rand(6, 1, generator=generator) < torch.tensor([1.0, 0.02]).repeat(3)[:, None]
        found.append([mean * (1 + 1e-3 * noise[0]), noise[1] * seldom, noise[2] * size])
    return found


def largest_steps(optimizer: Any, steps: int) -> float:
    """The largest change of a parameter in any step. NaN where anything is."""
    params, gradients = optimizer.param_groups[0]["params"], adversarial_gradients()
    largest = torch.zeros(())
    for step in range(steps):
        before = [param.detach().clone() for param in params]
        for param, grad in zip(params, gradients[step % len(gradients)]):
            param.grad = grad
        optimizer.step()
        changes = [(param.detach() - value).abs().max() for param, value in zip(params, before)]
        largest = torch.stack([largest, *changes]).max()
    scales = [value for param in params for key, value in optimizer.state[param].items() if key.endswith(SCALE_SUFFIX)]
    assert all(scale.isfinite().all() for scale in scales)
    return largest.item()


STEADY = [*rows(), *((name, {"lr": 0.01}) for name in OPTIMIZERS), ("AdamW", {"lr": 0.01, "amsgrad": True})]
many = pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])


@many
@pytest.mark.parametrize(("name", "config"), [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(STEADY)])
def test_steps_stay_finite(name: str, config: dict[str, Any], steps: int) -> None:
    assert math.isfinite(largest_steps(make(name, config, "cpu", make_parameters([(6, 128)] * 3)), steps))


@many
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centered_rmsprop_is_bounded(momentum: float, steps: int) -> None:
    """The mean square is at least 1 - alpha of the gradient's, and the variance 1/16 of that. The difference of two
    averages in 8 bits is often 0 or less; with no such floor the step is then lr * g / eps."""
    config = {"lr": 0.01, "alpha": 0.99, "centered": True, "momentum": momentum}
    largest = largest_steps(make("RMSprop", config, "cpu", make_parameters([(6, 128)] * 3)), steps)
    # No code stands for more than its block's largest, so the bound of a momentum buffer holds in 8 bits too.
    assert largest < 1.001 * 0.01 * 4 / math.sqrt(1 - 0.99) / (1 - momentum)


# --- what users do to codes and scales ---

SHAPE = (30, 20)
BAD_CODES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "another shape": (lambda codes: codes[:5], ValueError, " has shape (5, 20)"),
    "in a row": (Tensor.flatten, ValueError, " has shape (600,)"),
    "signed": (lambda codes: codes.view(torch.int8), TypeError, " is torch.int8"),
    "bools": (Tensor.bool, TypeError, " is torch.bool"),
    "expanded": (lambda codes: codes[:1].expand(SHAPE), ValueError, " has elements that share memory"),
    "elsewhere": (lambda codes: codes.to("meta"), ValueError, " is on meta"),
}
NO_SCALES = "is uint8 codes without their scales"
BAD_SCALES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "none": (lambda scale: None, ValueError, NO_SCALES),
    "a number": (lambda scale: 1.0, ValueError, NO_SCALES),
    "too few": (lambda scale: scale[:2], ValueError, " has shape (2,), where blocks of 256 elements of (30, 20) have"),
    "too many": (lambda scale: scale.repeat(2), ValueError, " has shape (6,)"),
    "in a column": (lambda scale: scale[:, None], ValueError, " has shape (3, 1)"),
    "double": (Tensor.double, TypeError, " must be contiguous float32"),
    "strided": (LAYOUTS["stepped"], TypeError, " must be contiguous float32"),
    "expanded": (lambda scale: scale[:1].expand(3), TypeError, " must be contiguous float32"),
    "negative view": (GRAD_LAYOUTS["imaginary"], TypeError, " must be contiguous float32"),
    "elsewhere": (lambda scale: scale.to("meta"), ValueError, " is on meta"),
}


@on_every_backend
@every_state
def test_bad_codes_and_scales(name: str, config: dict[str, Any], backend: str) -> None:
    """A clear error, and nothing has changed; set right, the optimizer goes on. Each after a step, and so a plan."""
    shapes = [(300,), (5,), SHAPE]
    params = make_parameters(shapes)
    optimizer = make(name, config, backend, list(zip(("first", "second", "last"), params)))
    untouched = make(name, config, backend, make_parameters(shapes))

    def step_both() -> None:
        for each in (optimizer, untouched):
            set_grads(each.param_groups[0]["params"], 0)
            each.step()

    def assert_bad(entry: str, value: Any, error: type[Exception], words: str) -> None:
        step_both()
        good, state[entry] = state[entry], value
        assert_refused(optimizer, error, words)
        state[entry] = good

    step_both()
    state = optimizer.state[params[2]]
    for key in states_of(optimizer):
        codes, scale = f"the state {key!r} of parameter 'last'", f"{key + SCALE_SUFFIX!r} of parameter 'last'"
        for change, error, words in BAD_CODES.values():
            assert_bad(key, change(state[key]), error, codes + words)
        for change, error, words in BAD_SCALES.values():
            words = f"{codes} {words}, {key + SCALE_SUFFIX!r}" if words == NO_SCALES else scale + words
            assert_bad(key + SCALE_SUFFIX, change(state[key + SCALE_SUFFIX]), error, words)
        step_both()
        good = state.pop(key + SCALE_SUFFIX)
        assert_refused(optimizer, ValueError, f"{codes} {NO_SCALES}, {key + SCALE_SUFFIX!r}")
        state[key + SCALE_SUFFIX] = good
    step_both()
    actual, expected = results(optimizer), results(untouched)
    assert_same_results({key: actual[key] for key in expected}, expected)


def change_data(change: Any) -> Any:
    def apply(optimizer: Any) -> None:
        for param in optimizer.param_groups[0]["params"][1:]:
            param.data = change(param.detach())

    return apply


def change_states(change: Any, suffix: str = "") -> Any:
    """Of all parameters but the first, each entry."""

    def apply(optimizer: Any) -> None:
        for state in list(optimizer.state.values())[1:]:
            for key in states_of(optimizer):
                if key + suffix in state:
                    state[key + suffix] = change(state[key + suffix])

    return apply


def convert_states(dtype: torch.dtype, keep_scale: bool = False) -> Any:
    def apply(optimizer: Any) -> None:
        for param, state in list(optimizer.state.items())[1:]:
            for key in states_of(optimizer):
                new = converted(state, key, param, optimizer.states[key], dtype)
                if not keep_scale:
                    state.pop(key + SCALE_SUFFIX, None)
                state.update(new)

    return apply


def reverse_keys(optimizer: Any) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = dict(reversed(state.items()))


CHANGES: dict[str, Any] = {
    "parameters moved": change_data(Tensor.clone),
    "parameters' layout": change_data(LAYOUTS["transposed"]),
    "parameters' dtype": change_data(Tensor.bfloat16),
    "codes moved": change_states(Tensor.clone),
    "codes' layout": change_states(LAYOUTS["stepped"]),
    "codes transposed": change_states(LAYOUTS["transposed"]),
    "scales moved": change_states(Tensor.clone, SCALE_SUFFIX),
    "scales within a tensor": change_states(LAYOUTS["unaligned"], SCALE_SUFFIX),
    "scales doubled": change_states(lambda scale: scale.mul_(2), SCALE_SUFFIX),
    "no longer quantized": convert_states(torch.float32),
    "no longer quantized, scales left": convert_states(torch.float32, keep_scale=True),
    "quantized again": lambda optimizer: [convert_states(dtype)(optimizer) for dtype in (torch.float32, torch.uint8)],
    "order of keys": reverse_keys,
    "option": lambda optimizer: optimizer.param_groups[0].update(state_dtype="float32"),
    "state cleared": lambda optimizer: optimizer.state.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_change_between_steps(name: str, change: str) -> None:
    """Twice, since what is planned after a change must not be less careful."""
    found = []
    for backend in ("eager", "cpu"):
        optimizer = make(name, CONFIGS[name][-1], backend, make_parameters([SHAPE] * 3))
        for step in range(5):
            set_grads(optimizer.param_groups[0]["params"], step)
            optimizer.step()
            if step in (1, 2):
                CHANGES[change](optimizer)
        found.append(results(optimizer))
    assert_same_results(*found)
