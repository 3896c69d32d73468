"""`swap`: a running torch optimizer becomes fusedopt's in place, with everything that hangs on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from configs import CONFIGS
from helpers import NOT_YET, same_bits, set_grads
from schedulers import SCHEDULERS, advance
from steps import (
    DROP_IN,
    DROP_IN_CONFIGURED,
    as_in_torch,
    assert_optimizers_near,
    assert_same_optimizers,
    assert_untouched,
    forbid_torch_steps,
    on_every_backend,
    parameters,
    parameters_of,
    scaler_of,
    snapshot,
    train,
)
from torch.optim import lr_scheduler

import fusedopt
from fusedopt import Muon
from fusedopt.optim import OPTIMIZERS
from fusedopt.optimizer import _ABSENT, GROUP_OPTIONS

KNOWN = {cls.torch_class: cls for cls in OPTIMIZERS.values() if cls.torch_class is not None}


def test_torch_steps_are_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof below that a step is fusedopt's own can fail."""
    forbid_torch_steps(monkeypatch)
    for cls in KNOWN:
        with pytest.raises(AssertionError, match="torch's own step was called"):
            train(cls(parameters()), [0])


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_swapping_amid_training(
    cls: Any, config: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same object with the same groups, tensors and hooks goes on as torch would have."""
    expected = cls.torch_class(parameters(), **config)
    train(expected, range(6))
    optimizer = cls.torch_class(parameters(), **config)
    hooked = []
    optimizer.register_step_post_hook(lambda opt, *_: hooked.append(type(opt)))
    train(optimizer, range(3))
    groups, state = optimizer.param_groups, optimizer.state
    options = copy.copy(groups[0])
    tensors = {param: dict(of_param) for param, of_param in state.items()}

    assert fusedopt.swap(optimizer, backend=backend) is optimizer
    assert type(optimizer) is cls and optimizer.param_groups is groups and optimizer.state is state
    assert as_in_torch(cls, groups[0]) == {**options, **GROUP_OPTIONS} and groups[0]["params"] is options["params"]
    for param, before in tensors.items():
        assert list(state[param]) == list(before)
        assert all(value is before[name] for name, value in state[param].items())

    forbid_torch_steps(monkeypatch)
    train(optimizer, range(3, 6))
    assert hooked == [cls.torch_class] * 3 + [cls] * 3
    assert_optimizers_near(optimizer, expected, steps=6)
    assert (optimizer._plan is not None) == (backend == "cpu")


@pytest.mark.parametrize("cls", DROP_IN)
def test_swapping_before_the_first_step(cls: Any) -> None:
    """As an optimizer made by fusedopt: its options, its repr, its step, its state_dict."""
    made = cls(parameters(), lr=0.125)
    swapped: Any = fusedopt.swap(cls.torch_class(parameters(), lr=0.125))
    assert repr(swapped) == repr(made) and swapped.defaults == made.defaults
    swapped.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    made.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    train(made, range(2))
    train(swapped, range(2))
    assert_same_optimizers(swapped, made)
    keys = [list(optimizer.state_dict()["param_groups"][0]) for optimizer in (swapped, made)]
    if NOT_YET and issubclass(cls, fusedopt.Adam):
        keys = [sorted(each) for each in keys]  # what torch's have not is added at the end
    assert keys[0] == keys[1]
    assert_same_optimizers(copy.deepcopy(swapped), made)


@pytest.mark.parametrize("cls", DROP_IN)
def test_an_optimizer_of_an_older_torch(cls: Any) -> None:
    """Neither its groups nor its defaults have the options that came later."""
    optimizer = cls.torch_class(parameters(), weight_decay=0.1)
    expected = copy.deepcopy(optimizer)
    for name, default in _ABSENT.items():
        for options in (optimizer.defaults, *optimizer.param_groups):
            if options.get(name) == default or name == "decoupled_weight_decay":  # not AdamW's to choose
                options.pop(name, None)
    for each in (optimizer, expected):
        train(fusedopt.swap(each), range(2))
    assert_same_optimizers(optimizer, expected)
    assert optimizer.param_groups[0].keys() == expected.param_groups[0].keys()
    assert optimizer.defaults == expected.defaults


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cls", DROP_IN)
def test_state_dtype_converts_the_state(cls: Any, state_dtype: str) -> None:
    config = CONFIGS[cls.__name__][-1]
    source = cls.torch_class(parameters(), **config)
    train(source, range(3))
    optimizer: Any = fusedopt.swap(copy.deepcopy(source), state_dtype=state_dtype)
    assert optimizer.param_groups[0]["state_dtype"] == state_dtype == optimizer.defaults["state_dtype"]
    loaded = cls(copy.deepcopy(parameters_of(source)), state_dtype=state_dtype)
    loaded.load_state_dict(source.state_dict())
    assert_same_optimizers(optimizer, loaded)
    train(optimizer, range(3, 5))
    train(loaded, range(3, 5))
    assert_same_optimizers(optimizer, loaded)


@pytest.mark.parametrize("cls", [pytest.param(cls, id=name) for name, cls in OPTIMIZERS.items()])
def test_an_optimizer_of_fusedopt_is_returned_as_it_is(cls: Any) -> None:
    optimizer = cls(parameters(), backend="eager", state_dtype="bfloat16")
    expected = cls(parameters(), backend="eager", state_dtype="bfloat16")
    train(optimizer, range(2))
    before = snapshot(optimizer)
    assert fusedopt.swap(optimizer) is optimizer
    assert_untouched(optimizer, before)
    assert fusedopt.swap(fusedopt.swap(optimizer)) is optimizer
    train(optimizer, range(2, 4))
    train(expected, range(4))
    assert_same_optimizers(optimizer, expected)


@on_every_backend
def test_a_fused_optimizer_under_a_scaler(backend: str) -> None:
    """Of torch's `fused=True`, which leaves unscaling and skipping to the step: so does the swapped one."""
    expected = torch.optim.AdamW(parameters(), lr=0.125)
    optimizer = torch.optim.AdamW(parameters(), lr=0.125, fused=True)
    scaler = scaler_of(1024.0)
    for step in range(6):
        if step == 3:
            fusedopt.swap(optimizer, backend=backend)
        params = parameters_of(optimizer)
        set_grads(params, step)
        for param in params:
            param.grad *= scaler.get_scale()
        if step == 4:
            params[0].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 4:
            train(expected, [step])
    assert_optimizers_near(optimizer, expected, steps=6)


# --- LR schedulers ---


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "amid", "loaded"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_driving_it(name: str, when: str, tensor_lr: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached before or after the swap, swapped amid training, and after a load_state_dict: torch's course."""

    def make() -> Any:
        lr = torch.tensor(0.125) if tensor_lr else 0.125
        return torch.optim.AdamW(parameters(), lr=lr, weight_decay=0.25)

    def drive(optimizer: Any, scheduler: Any, steps: range) -> list[Any]:
        course = []
        for step in steps:
            train(optimizer, [step])
            advance(scheduler)
            course.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))
        return course

    expected = make()
    expected_course = drive(expected, SCHEDULERS[name](expected), range(6))
    optimizer = make()
    if when == "after":
        fusedopt.swap(optimizer)
    scheduler = SCHEDULERS[name](optimizer)
    course = drive(optimizer, scheduler, range(3)) if when in ("amid", "loaded") else []
    fusedopt.swap(optimizer)
    if when == "loaded":
        saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        optimizer.load_state_dict(saved[0])
        if name not in ("SequentialLR", "ChainedScheduler"):  # whose state holds the schedulers they are made of
            scheduler.load_state_dict(saved[1])
    forbid_torch_steps(monkeypatch)
    course += drive(optimizer, scheduler, range(len(course), 6))
    assert course == expected_course
    assert_optimizers_near(optimizer, expected, steps=6)


@pytest.mark.filterwarnings("error")
def test_two_schedulers_one_before_and_one_after() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    first = lr_scheduler.ExponentialLR(optimizer, 0.5)
    fusedopt.swap(optimizer)
    second = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(optimizer, [0])
    first.step()
    second.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*before")
def test_a_scheduler_stepped_first_is_still_warned_of() -> None:
    optimizer = fusedopt.swap(torch.optim.SGD(parameters(), lr=1.0))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.raises(UserWarning, match="before `optimizer.step"):
        scheduler.step()


# --- what is refused, with nothing changed ---


class UsersAdam(torch.optim.Adam):
    def step(self, closure: Any = None) -> None:
        for param in parameters_of(self):
            param.data.zero_()


def unknown_optimizers() -> list[Any]:
    params = [torch.nn.Parameter(torch.ones(2, 2))]
    theirs = [getattr(torch.optim, name) for name in torch.optim.__all__]
    known = (*KNOWN, Muon.torch_class, torch.optim.Optimizer)
    classes = [cls for cls in theirs if isinstance(cls, type) and cls not in known]
    made = [cls(params) for cls in classes]
    return [*made, UsersAdam(params), torch.nn.Linear(1, 1), None, [torch.optim.Adam(params)]]


@pytest.mark.parametrize("optimizer", unknown_optimizers(), ids=lambda optimizer: type(optimizer).__name__)
def test_an_unknown_optimizer_is_refused_by_name(optimizer: Any) -> None:
    before = snapshot(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None
    with pytest.raises(TypeError) as error:
        fusedopt.swap(optimizer)
    assert f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" in str(error.value)
    assert all(cls.__name__ in str(error.value) for cls in KNOWN)
    if before is not None:
        assert_untouched(optimizer, before)


def capturable(optimizer: Any) -> None:
    optimizer.param_groups[0]["capturable"] = True


def differentiable(optimizer: Any) -> None:
    optimizer.param_groups[0]["differentiable"] = True


def other_step(optimizer: Any) -> None:
    optimizer.step = lambda closure=None: None


def wrong_shape(optimizer: Any) -> None:
    optimizer.state[parameters_of(optimizer)[1]]["exp_avg"] = torch.zeros(3)


def wrong_counter(optimizer: Any) -> None:
    optimizer.state[parameters_of(optimizer)[1]]["step"] = torch.zeros(3, dtype=torch.int64)


def integer_parameter(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][1] = torch.zeros(33, dtype=torch.int64)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "capturable": (capturable, {}, "capturable=True: .* set capturable=False"),
    "differentiable": (differentiable, {}, "differentiable=True: .* leave differentiable=False"),
    "another step": (other_step, {}, r"swap cannot find AdamW.step .*swap the optimizer before it is wrapped"),
    "a state of another shape": (wrong_shape, {}, r"'exp_avg' of parameter 1 of group 0 has shape \(3,\)"),
    "a counter of three": (wrong_counter, {}, "'step' of parameter 1 of group 0"),
    "an integer parameter": (integer_parameter, {}, "parameter 1 of group 0 is torch.int64; fusedopt updates"),
    "an unknown backend": (lambda _: None, {"backend": "gpu"}, "there is no backend 'gpu'; choose one of"),
    "an unknown state_dtype": (lambda _: None, {"state_dtype": "int9"}, "state_dtype='int9' is not supported"),
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_nothing_has_changed_on_an_error(case: str, scheduled: bool) -> None:
    spoil, options, message = REFUSED[case]
    optimizer = torch.optim.AdamW(parameters(), lr=0.125)
    if scheduled:
        lr_scheduler.ConstantLR(optimizer)
    train(optimizer, range(2))
    spoil(optimizer)
    before = snapshot(optimizer)
    cells = [cell.cell_contents for cell in getattr(optimizer.step, "__closure__", None) or ()]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        fusedopt.swap(optimizer, **options)
    assert_untouched(optimizer, before)
    assert "state_dtype" not in optimizer.defaults
    assert cells == [cell.cell_contents for cell in getattr(optimizer.step, "__closure__", None) or ()]


def test_a_pending_sparse_gradient_is_refused_at_the_step() -> None:
    """As torch's Adam refuses it; with a dense one training goes on."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([param])
    param.grad = torch.ones(3).to_sparse()
    fusedopt.swap(optimizer)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()
    assert same_bits(param.detach(), torch.ones(3))
    param.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(param, torch.ones(3))
