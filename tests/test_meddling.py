"""What users do to an optimizer, its parameters and its state between steps, and around one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import set_grads
from steps import (
    CLASSES,
    DROP_IN,
    DROP_IN_CONFIGURED,
    assert_optimizers_near,
    assert_same_optimizers,
    assert_untouched,
    on_every_backend,
    parameters,
    parameters_of,
    snapshot,
    train,
)

import fusedopt


def both(cls: Any, backend: str, **config: Any) -> tuple[Any, Any]:
    """The optimizer and its torch counterpart, over equal parameters."""
    return cls(parameters(), **config, backend=backend), cls.torch_class(parameters(), **copy.deepcopy(config))


@on_every_backend
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("cls", DROP_IN)
def test_tensor_lr(cls: Any, shape: tuple[int, ...], backend: str) -> None:
    """Read at every step, so that filling it in place drives the optimizer; never replaced."""
    # That of torch's optimizer without dimensions, since older releases take no other.
    pair = (
        cls(parameters(), lr=torch.full(shape, 0.125), backend=backend),
        cls.torch_class(parameters(), lr=torch.tensor(0.125)),
    )
    for step in range(4):
        for optimizer in pair:
            lr = optimizer.param_groups[0]["lr"]
            lr.fill_(0.125 / (step + 1))
            train(optimizer, [step])
            assert optimizer.param_groups[0]["lr"] is lr and lr == 0.125 / (step + 1)
    assert_optimizers_near(*pair, steps=4)


@on_every_backend
def test_other_tensor_hyperparameters(backend: str) -> None:
    options = {"lr": torch.tensor(0.125), "weight_decay": 0.5}
    betas = torch.tensor(0.5), torch.tensor([[0.75]])  # numbers for torch's optimizer, whose older releases fail
    pair = (
        fusedopt.AdamW(parameters(), betas=betas, **options, backend=backend),
        torch.optim.AdamW(parameters(), betas=(0.5, 0.75), **options),
    )
    decay = both(fusedopt.SGD, backend, lr=0.125, weight_decay=torch.tensor(0.5), momentum=0.5)
    assert [beta.shape for beta in pair[0].param_groups[0]["betas"]] == [(), ()]  # as torch keeps them
    for ours, theirs in (pair, decay):
        train(ours, range(3))
        train(theirs, range(3))
        assert_optimizers_near(ours, theirs, steps=3)


def set_option(name: str, value: Any) -> Any:
    return lambda optimizer: optimizer.param_groups[0].__setitem__(name, value)


def replace_states(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()


def halve_states(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step":
                value.mul_(0.5)


def replace_parameters(optimizer: Any) -> None:
    """As frameworks do that shard or flatten: other tensors in the same list."""
    group = optimizer.param_groups[0]
    group["params"][:2] = [torch.nn.Parameter(param.detach() + 1) for param in group["params"][:2]]


def replace_data(optimizer: Any) -> None:
    for param in parameters_of(optimizer):
        param.data = param.detach() + 1


def drop_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": optimizer.param_groups[0]["params"].pop(0), "lr": 0.25})


def hold_in_a_tuple(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["params"] = tuple(group["params"])


def look_at_states(optimizer: Any) -> None:
    """A defaultdict: looking makes an empty entry."""
    assert all(optimizer.state[param] is not None for param in parameters_of(optimizer))


def add_own_states(optimizer: Any) -> None:
    optimizer.state["of the user"] = {"note": 1}
    for index, state in enumerate(list(optimizer.state.values())):
        state["mine"] = torch.ones(3) if index % 2 else "note"


MEDDLING = {
    "lr": set_option("lr", 0.25),
    "integer lr": set_option("lr", 1),
    "weight_decay": set_option("weight_decay", 0.5),
    "maximize": set_option("maximize", True),
    "state cleared": lambda optimizer: optimizer.state.clear(),
    "state of one parameter deleted": lambda optimizer: optimizer.state.pop(parameters_of(optimizer)[1], None),
    "states replaced": replace_states,
    "states changed in place": halve_states,
    "states looked at": look_at_states,
    "parameters replaced": replace_parameters,
    "parameters' data replaced": replace_data,
    "parameter moved to another group": drop_group,
    "parameters in a tuple": hold_in_a_tuple,
}


# torch's Adagrad creates state in its constructor only.
NEEDS_NEW_STATE = {"state cleared", "state of one parameter deleted", "parameters replaced"}


@on_every_backend
@pytest.mark.parametrize("meddling", MEDDLING)
@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_meddling_between_steps(cls: Any, config: dict[str, Any], meddling: str, backend: str) -> None:
    """What a step has planned must not outlive what it was planned for."""
    if cls is fusedopt.Adagrad and meddling in NEEDS_NEW_STATE:
        return
    pair = both(cls, backend, **config)
    for optimizer in pair:
        train(optimizer, range(3))
        MEDDLING[meddling](optimizer)
        train(optimizer, range(3, 6))
    assert_optimizers_near(*pair, steps=6)


@on_every_backend
def test_a_parameter_appended_without_a_name_is_stepped(backend: str) -> None:
    optimizer = fusedopt.SGD([("a", torch.nn.Parameter(torch.ones(3)))], lr=0.5, backend=backend)
    params = optimizer.param_groups[0]["params"]
    params.append(torch.nn.Parameter(torch.ones(3)))
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert all(torch.equal(param, torch.full((3,), 0.5)) for param in params)


@on_every_backend
@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (fusedopt.SGD, "momentum", 0.75),
        (fusedopt.SGD, "nesterov", True),
        (fusedopt.SGD, "dampening", 0.5),
        (fusedopt.Adam, "betas", (0.5, 0.75)),
        (fusedopt.Adam, "betas", [0.5, 0.75]),
        (fusedopt.NAdam, "decoupled_weight_decay", True),
        (fusedopt.RMSprop, "alpha", 0.5),
    ],
)
def test_options_changed_between_steps(cls: Any, option: str, value: Any, backend: str) -> None:
    """SGD's momentum may even start between steps, which changes the rule."""
    start = {"momentum": 0.5} if option in ("nesterov", "dampening") else {}
    pair = both(cls, backend, lr=0.125, weight_decay=0.25, **start)
    for optimizer in pair:
        train(optimizer, range(2))
        optimizer.param_groups[0][option] = value
        train(optimizer, range(2, 5))
    assert_optimizers_near(*pair, steps=5)


@on_every_backend
def test_entries_of_the_users_own_are_kept(backend: str) -> None:
    pair = both(fusedopt.AdamW, backend, lr=0.125)
    for optimizer in pair:
        train(optimizer, range(2))
    ours, theirs = pair
    before = {param: dict(state) for param, state in ours.state.items()}
    add_own_states(ours)
    added = {
        param: {name: state[name] for name in set(state) - set(before.get(param, {}))}
        for param, state in ours.state.items()
    }
    train(ours, range(2, 4))
    train(theirs, range(2, 4))
    for param, entries in added.items():
        assert entries and all(ours.state[param].pop(name) is value for name, value in entries.items())
    assert_optimizers_near(ours, theirs, steps=4)


@on_every_backend
def test_a_deleted_state_is_made_anew(backend: str) -> None:
    actual, expected = (fusedopt.AdamW(parameters(), lr=0.125, amsgrad=True, backend=backend) for _ in range(2))
    train(actual, range(2))
    train(expected, range(2))
    actual.state[parameters_of(actual)[1]].pop("max_exp_avg_sq")
    expected.state[parameters_of(expected)[1]]["max_exp_avg_sq"].zero_()
    train(actual, range(2, 4))
    train(expected, range(2, 4))
    assert_same_optimizers(actual, expected)


@on_every_backend
@pytest.mark.parametrize("flag", ["differentiable", "capturable"])
def test_a_flag_set_between_steps_is_refused(flag: str, backend: str) -> None:
    optimizer = fusedopt.AdamW(parameters(), backend=backend)
    train(optimizer, range(2))
    before = snapshot(optimizer)
    optimizer.param_groups[0][flag] = True
    with pytest.raises(RuntimeError, match=f"{flag}=True"):
        train(optimizer, [2])
    optimizer.param_groups[0][flag] = False
    assert_untouched(optimizer, before)
    train(optimizer, [2])


# --- around a step ---


@on_every_backend
@pytest.mark.parametrize("cls", CLASSES)
def test_autograd_sees_that_parameters_changed(cls: Any, backend: str) -> None:
    """A backward through values saved before the step is refused, as with torch; else its gradients would be wrong."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = cls([param], backend=backend)
    for _ in range(2):  # planning the step, and running the plan
        loss = param.square().sum()
        param.grad = torch.ones(4)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@on_every_backend
def test_gradients_with_a_graph(backend: str) -> None:
    """`backward(create_graph=True)`: the gradient itself requires gradients; the step is not recorded."""
    results = []
    for optimizer in both(fusedopt.AdamW, backend, lr=0.125):
        param = parameters_of(optimizer)[0]
        for _ in range(3):
            optimizer.zero_grad()
            (param.grad,) = torch.autograd.grad(param.pow(3).sum(), param, create_graph=True)
            assert param.grad.requires_grad
            optimizer.step()
        assert param.is_leaf and param.requires_grad and not optimizer.state[param]["exp_avg"].requires_grad
        results.append(optimizer)
    assert_optimizers_near(*results, steps=3)


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_default_device(cls: Any, config: dict[str, Any], backend: str) -> None:
    """`torch.set_default_device` says where new tensors go, not where the optimizer's are."""
    ours, theirs = both(cls, backend, **config)
    for step in range(3):
        set_grads(parameters_of(ours), step)
        with torch.device("meta"):
            ours.step()
    train(theirs, range(3))
    assert all(value.device.type == "cpu" for state in ours.state.values() for value in state.values())
    assert_optimizers_near(ours, theirs, steps=3)


STORED: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.1},
    "int8": {"state_dtype": "int8", "min_quantized_size": 1},
    "stochastic": {"rounding": "stochastic"},
    "split": {"master": "split8", "rounding": "stochastic"},
}


@on_every_backend
@pytest.mark.parametrize("options", STORED.values(), ids=STORED)
def test_default_device_with_options(options: dict[str, Any], backend: str) -> None:
    def run(where: str) -> Any:
        optimizer = fusedopt.AdamW(parameters(torch.bfloat16), **options, backend=backend)
        for step in range(3):
            set_grads(parameters_of(optimizer), step)
            with torch.device(where):
                optimizer.step()
                norm = fusedopt.clip_grad_norm_(parameters_of(optimizer), 0.1)
            assert all(each is None or each.device.type == "cpu" for each in (norm, optimizer.grad_norm))
        return optimizer

    assert_same_optimizers(run("meta"), run("cpu"))


@on_every_backend
def test_shared_memory(backend: str) -> None:
    """Adagrad's sums can be shared between processes; the step follows them to where they are."""
    pair = both(fusedopt.Adagrad, backend, lr=0.125)
    for optimizer in pair:
        train(optimizer, range(2))
        optimizer.share_memory()
        assert all(state["sum"].is_shared() for state in optimizer.state.values())
        train(optimizer, range(2, 4))
    assert_optimizers_near(*pair, steps=4)


@on_every_backend
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    ("cls", "config"),
    # torch's SGD starts two momentum buffers for it, and keeps one.
    [case for case in DROP_IN_CONFIGURED if case.values[0] is not fusedopt.SGD or "momentum" not in case.values[1]],
)
def test_a_parameter_twice_in_a_group(cls: Any, config: dict[str, Any], backend: str) -> None:
    """torch warns, and steps it twice."""
    pair = []
    for kind, extra in ((cls, {"backend": backend}), (cls.torch_class, {})):
        a, b, *_ = parameters()
        optimizer = kind([a, b, a], **config, **extra)
        train(optimizer, range(3))
        pair.append(optimizer)
    assert_optimizers_near(*pair, steps=6)
