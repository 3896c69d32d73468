"""Bad input gets a clear error that names the parameter, and leaves everything as it was, whatever came before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from configs import CONFIGS, row_id, rows
from helpers import GRAD_LAYOUTS, assert_same_results, make_parameters, results, same_bits, set_grad, set_grads, values
from steps import USABLE
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import BACKENDS
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["first", "second", "third", "last"]
on_every_backend = pytest.mark.parametrize("backend", [None, *USABLE])
every_class = pytest.mark.parametrize("name", OPTIMIZERS)
every_row = pytest.mark.parametrize(("name", "config"), [pytest.param(*row, id=row_id(*row)) for row in rows()])


def make(name: str, config: dict[str, Any], backend: str | None, named: bool, steps: int) -> Any:
    """Four parameters in two groups, after some steps, with gradients for the next. The last of them will be bad."""
    params = make_parameters([(3, 2), (600,), (), (6,)])
    pairs = list(zip(NAMES, params)) if named else params
    optimizer: Any = OPTIMIZERS[name](
        [{"params": pairs[:2]}, {"params": pairs[2:], "lr": config["lr"] / 2}], **config, backend=backend
    )
    for step in range(steps + 1):
        set_grads(params, step)
        if step < steps:
            optimizer.step()
    return optimizer


def tensors_of(optimizer: Any) -> dict[str, Any]:
    """Everything a step could touch, by name."""
    found: dict[str, Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        found |= {f"{key} of group {index}": value for key, value in group.items() if key != "params"}
        for place, param in enumerate(group["params"]):
            what = f"parameter {place} of group {index}"
            found |= {what: param, f"data of {what}": param.data, f"gradient of {what}": param.grad}
            state = optimizer.state.get(param)
            found[f"state of {what}"] = None if state is None else list(state)
            found |= {f"{key} of {what}": value for key, value in (state or {}).items()}
    return found


def copies(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: (value, value.clone() if isinstance(value, Tensor) else value) for key, value in tensors.items()}


def assert_untouched(optimizer: Any, before: dict[str, Any]) -> None:
    now = tensors_of(optimizer)
    assert list(now) == list(before)
    for key, value in now.items():
        was, copy = before[key]
        if not isinstance(value, Tensor):
            assert value == copy or (value != value and copy != copy), key
            continue
        assert value is was or key.startswith("data of"), key
        if value.layout == torch.strided and not value.is_meta:
            comparable = torch.Tensor.float if value.dtype.itemsize == 1 else torch.Tensor.clone
            assert same_bits(comparable(value), comparable(copy)), key
        else:
            assert (value.layout, value.shape) == (copy.layout, copy.shape), key


def assert_refused(optimizer: Any, error: type[Exception], words: str) -> None:
    """Twice, since the second step must not go by what the first has left."""
    before = copies(tensors_of(optimizer))
    for _ in range(2):
        with pytest.raises(error) as caught:
            optimizer.step()
        assert words in str(caught.value)
        assert_untouched(optimizer, before)


# --- gradients and parameters ---


def sparse_gradient(param: Tensor) -> None:
    param.grad = torch.ones(6).to_sparse()


def other_shape(param: Tensor) -> None:
    param.data = torch.ones(8)


def complex_gradient(param: Tensor) -> None:
    set_grad(param, torch.ones(6, dtype=torch.complex64))


def unknown_dtype(param: Tensor) -> None:
    param.data = param.data.to(torch.float8_e4m3fn)


def expanded_parameter(param: Tensor) -> None:
    param.data = torch.ones(1).expand(6)


def overlapping_parameter(param: Tensor) -> None:
    param.data = torch.ones(8).as_strided((2, 3), (2, 2))
    param.grad = torch.ones(2, 3)


BAD_TENSORS: dict[str, tuple[Callable[[Tensor], None], type[Exception], str]] = {
    "sparse gradient": (sparse_gradient, RuntimeError, "does not support sparse gradients ({what} has"),
    "other shape": (other_shape, ValueError, "the gradient of {what} has shape (6,), its parameter (8,)"),
    "complex gradient": (complex_gradient, TypeError, "the gradient of {what} is torch.complex64"),
    "unknown dtype": (unknown_dtype, TypeError, "{what} is torch.float8_e4m3fn; fusedopt updates torch.float32"),
    "expanded": (expanded_parameter, ValueError, "{what} has elements that share memory (shape (6,), strides (0,))"),
    "overlapping": (overlapping_parameter, ValueError, "{what} has elements that share memory"),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("bad", BAD_TENSORS)
@on_every_backend
@every_class
def test_bad_tensor(name: str, backend: str | None, bad: str, steps: int, named: bool) -> None:
    optimizer = make(name, CONFIGS[name][-1], backend, named, steps)
    spoil, error, words = BAD_TENSORS[bad]
    spoil(optimizer.param_groups[1]["params"][1])
    what = "parameter 'last'" if named else "parameter 1 of group 1"
    assert_refused(optimizer, error, words.format(what=what))


@pytest.mark.parametrize("steps", [0, 2])
@on_every_backend
@every_class
def test_integer_parameter(name: str, backend: str | None, steps: int) -> None:
    optimizer = make(name, CONFIGS[name][-1], backend, False, steps)
    bad = Parameter(torch.ones(6, dtype=torch.int32), requires_grad=False)
    bad.grad = torch.ones(6, dtype=torch.int32)
    optimizer.param_groups[1]["params"][1] = bad
    assert_refused(optimizer, TypeError, "parameter 1 of group 1 is torch.int32; fusedopt updates torch.float32")


@pytest.mark.parametrize("steps", [0, 2])
def test_parameter_the_backend_cannot_step(steps: int) -> None:
    for bad, words in [
        (Parameter(torch.ones(6, device="meta")), "it is on meta, and the cpu backend steps tensors on the CPU"),
        (Parameter(torch.complex(torch.ones(6), torch.ones(6)).conj().imag), "it is a negative or conjugate view"),
    ]:
        optimizer = make("AdamW", CONFIGS["AdamW"][-1], "cpu", False, steps)
        bad.grad = torch.ones_like(bad)
        optimizer.param_groups[1]["params"][1] = bad
        assert_refused(optimizer, RuntimeError, f"backend='cpu' cannot step parameter 1 of group 1: {words}")


# --- states ---

BAD_STATES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "other shape": (lambda state: torch.ones(7), ValueError, "the state {key!r} of {what} has shape (7,)"),
    "other device": (lambda state: state.to("meta"), ValueError, "the state {key!r} of {what} is on meta"),
    "a number": (lambda state: 1.0, TypeError, "the state {key!r} of {what} is a float; it must be a tensor"),
    "integers": (lambda state: state.int(), TypeError, "the state {key!r} of {what} is torch.int32"),
    "complex": (lambda state: state.to(torch.complex64), TypeError, "the state {key!r} of {what} is torch.complex64"),
    "sparse": (lambda state: state.to_sparse(), TypeError, "the state {key!r} of {what} "),
    "expanded": (
        lambda state: torch.ones(1).expand(6),
        ValueError,
        "the state {key!r} of {what} has elements that share",
    ),
}
BAD_COUNTERS: dict[str, tuple[Any, type[Exception], str]] = {
    "three elements": (torch.ones(3), ValueError, "the state {key!r} of {what} must have one element"),
    "other device": (torch.ones((), device="meta"), ValueError, "the state {key!r} of {what} must have one element"),
    "text": ("x", Exception, "the state {key!r} of {what}"),
}


@pytest.mark.parametrize("bad", BAD_STATES)
@on_every_backend
@every_row
def test_bad_state(name: str, config: dict[str, Any], backend: str | None, bad: str) -> None:
    change, error, words = BAD_STATES[bad]
    optimizer = make(name, config, backend, named=True, steps=2)
    last = optimizer.param_groups[1]["params"][1]
    for key in optimizer.rule(optimizer.param_groups[1]).states:
        good = optimizer.state[last][key]
        optimizer.state[last][key] = change(good)
        assert_refused(optimizer, error, words.format(key=key, what="parameter 'last'"))
        optimizer.state[last][key] = good


@pytest.mark.parametrize("bad", BAD_COUNTERS)
@on_every_backend
@every_class
def test_bad_counter(name: str, backend: str | None, bad: str) -> None:
    value, error, words = BAD_COUNTERS[bad]
    optimizer = make(name, CONFIGS[name][0], backend, True, steps=2)
    last = optimizer.param_groups[1]["params"][1]
    for key in optimizer.counters:
        good = optimizer.state[last][key]
        optimizer.state[last][key] = value
        assert_refused(optimizer, error, words.format(key=key, what="parameter 'last'"))
        optimizer.state[last][key] = good


@pytest.mark.parametrize("steps", [0, 2])
@every_row
def test_state_that_is_a_negative_view(name: str, config: dict[str, Any], steps: int) -> None:
    """Its memory holds the opposite of its values: refused, or stepped as the reference does."""
    found = []
    for backend in ("eager", None):
        optimizer = make(name, config, backend, True, steps)
        rule = optimizer.rule(optimizer.param_groups[1])
        if steps == 0 or not rule.states:
            optimizer.step()
        last = optimizer.param_groups[1]["params"][1]
        for key in rule.states:
            optimizer.state[last][key] = GRAD_LAYOUTS["imaginary"](optimizer.state[last][key])
        before = copies(tensors_of(optimizer))
        try:
            optimizer.step()
        except (TypeError, ValueError, RuntimeError) as error:
            assert "of parameter 'last'" in str(error)
            assert_untouched(optimizer, before)
            return
        found.append(results(optimizer))
    assert_same_results(*found)


# --- hyperparameters ---


@pytest.mark.parametrize("steps", [0, 2])
@on_every_backend
@every_row
def test_nan_hyperparameter(name: str, config: dict[str, Any], backend: str | None, steps: int) -> None:
    optimizer = make(name, config, backend, False, steps)
    group = optimizer.param_groups[1]
    nan = float("nan")
    for key, good in list(group.items()):
        if key not in config or not isinstance(good, float | tuple):
            continue
        if key == "dampening" and steps == 0 or key == "initial_accumulator_value":
            continue  # not used at that step
        bad = [nan] if isinstance(good, float) else [(*good[:i], nan, *good[i + 1 :]) for i in range(len(good))]
        for value in bad:
            group[key] = value
            before = copies(tensors_of(optimizer))
            with pytest.raises(ValueError, match=f"group 1: .*{key}=.*nan"):
                optimizer.step()
            assert_untouched(optimizer, before)
        group[key] = good
    optimizer.step()


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
@pytest.mark.parametrize("steps", [0, 2])
@on_every_backend
@every_class
def test_option_that_cannot_be_honoured(name: str, backend: str | None, steps: int, flag: str) -> None:
    optimizer = make(name, CONFIGS[name][0], backend, False, steps)
    if flag in optimizer.defaults:
        optimizer.param_groups[1][flag] = True
        assert_refused(optimizer, RuntimeError, f"{flag}=True")


@every_class
def test_unsupported_state_dtype(name: str) -> None:
    words = "state_dtype='int7' is not supported; use one of None, 'float32'"
    with pytest.raises(ValueError, match=words):
        OPTIMIZERS[name](make_parameters([(3,)]), state_dtype="int7")
    with pytest.raises(ValueError, match=words):
        OPTIMIZERS[name]([{"params": make_parameters([(3,)]), "state_dtype": "int7"}])
    optimizer = make(name, CONFIGS[name][-1], None, False, 0)
    before = copies(tensors_of(optimizer))
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": make_parameters([(3,)]), "state_dtype": "int7"})
    assert_untouched(optimizer, before)
    optimizer.param_groups[1]["state_dtype"] = "int7"
    assert_refused(optimizer, ValueError, "state_dtype='int7' is not supported")


@every_class
def test_unknown_backend(name: str) -> None:
    known = ", ".join(BACKENDS)
    with pytest.raises(ValueError, match=f"backend: there is no backend 'abacus'; choose one of {known}"):
        OPTIMIZERS[name](make_parameters([(3,)]), backend="abacus")
    with pytest.raises(ValueError, match="use_backend: there is no backend 'abacus'"):
        with fusedopt.use_backend("abacus"):
            raise AssertionError("entered")


# --- good input ---


@pytest.mark.parametrize("maximize", [True, False])
@on_every_backend
@every_row
def test_gradients_are_only_read(name: str, config: dict[str, Any], backend: str | None, maximize: bool) -> None:
    """Of every layout, with a scale to undo; the same bits as the reference's."""
    found = []
    for kind in ("eager", backend):
        params = make_parameters([(40,), (3, 5), ()])
        optimizer: Any = OPTIMIZERS[name](params, **{**config, "maximize": maximize}, backend=kind)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        for step, layout in enumerate(GRAD_LAYOUTS):
            grads = [GRAD_LAYOUTS[layout](values(param.shape, 8, step, i)) for i, param in enumerate(params)]
            before = [(grad.clone(), grad._version) for grad in grads]
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
            for param, grad, (copy, version) in zip(params, grads, before):
                assert param.grad is grad and same_bits(grad, copy) and grad._version == version
        found.append(results(optimizer))
    assert_same_results(*found)
