"""The contract of `torch.optim.Optimizer`: groups, hooks, closures, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, make_parameters, set_grads
from steps import (
    CLASSES,
    CONFIGURED,
    DROP_IN,
    DROP_IN_CONFIGURED,
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
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt
from fusedopt.optimizer import GROUP_OPTIONS


def both(cls: Any, backend: str | None = None, **config: Any) -> tuple[Any, Any]:
    """The optimizer and its torch counterpart, over equal parameters."""
    return cls(parameters(), **config, backend=backend), cls.torch_class(parameters(), **copy.deepcopy(config))


def test_where_torch_is_built_for_cuda_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a build, which is what `pip install torch` brings on Linux, raises when it is asked about a stream."""

    def ask() -> bool:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", ask)
    train(fusedopt.AdamW(parameters()), range(2))


# --- groups ---


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_groups_with_their_own_options(cls: Any, config: dict[str, Any], backend: str) -> None:
    """Of different hyperparameters, one ascending; one added before the first step, one after three."""
    pair = []
    for kind, extra in ((cls, {"backend": backend}), (cls.torch_class, {})):
        a, b, c, d = parameters()
        optimizer = kind([{"params": [a]}, {"params": b, "lr": config["lr"] / 4, "maximize": True}], **config, **extra)
        optimizer.add_param_group({"params": c, "weight_decay": 0.25})
        if kind is torch.optim.Adagrad:  # older releases of torch leave what is added without state
            optimizer.state.update(kind([c, d], **config).state)
        train(optimizer, range(3))
        optimizer.add_param_group({"params": (d,), "lr": 0.5})
        train(optimizer, range(3, 6))
        pair.append(optimizer)
    assert_optimizers_near(*pair, steps=6)
    ours, theirs = pair
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {**as_in_torch(cls, mine), "params": 0} == {**other, "params": 0, **GROUP_OPTIONS}


@pytest.mark.parametrize("cls", CLASSES)
def test_named_parameters(cls: Any) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = cls(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    del saved["param_groups"][0]["param_names"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model.bias.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients .*'bias'"):
        optimizer.step()


def step_with_gradients_of(optimizer: Any, present: Sequence[int], step: int) -> None:
    """A step in which no other parameter has a gradient."""
    params = parameters_of(optimizer)
    set_grads(params, step)
    for index in {*range(len(params))} - {*present}:
        params[index].grad = None
    optimizer.step()


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), DROP_IN_CONFIGURED)
def test_gradients_that_come_and_go(cls: Any, config: dict[str, Any], backend: str) -> None:
    """A parameter is stepped when it has a gradient; its state starts, and its steps are counted, from then on."""
    pair = both(cls, backend, **config)
    for step, present in enumerate([(0,), (0, 1), (1, 2), (0, 1, 2, 3), (), (3,), (0, 2)]):
        for optimizer in pair:
            step_with_gradients_of(optimizer, present, step)
            has_state = [bool(optimizer.state.get(param)) for param in parameters_of(optimizer)]
            if cls is not fusedopt.Adagrad and pair[0].state:
                assert has_state[2] == (step >= 2) and has_state[3] == (step >= 3)
        assert_optimizers_near(*pair, steps=step + 1)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=["plain", "clipped"])
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_gradients_that_alternate(cls: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
    """As of experts that are routed to in turn: one plan serves all once each has had a gradient."""
    native, eager = [cls(parameters(), **config, **options, backend=backend) for backend in ("cpu", "eager")]
    plans = []
    for step, present in enumerate([(0,), (1,), (2, 3), (0, 1), (), (1, 3), (0, 2)]):
        for optimizer in (native, eager):
            step_with_gradients_of(optimizer, present, step)
        assert_same_optimizers(native, eager)
        plans.append(native._plan)
    assert plans[2] is not None and all(plan is plans[2] for plan in plans[3:])


LYING: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "zeroed": {"zero_grads": True},
    "int8": {"state_dtype": "int8", "min_quantized_size": 1},  # elements are then walked in row-major order
}


@pytest.mark.parametrize("options", LYING.values(), ids=LYING)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_gradients_that_lie_otherwise_each_time(dtype: torch.dtype, layout: str, options: dict[str, Any]) -> None:
    """One plan serves them all, and gradients keep their memory."""
    layouts: list[Callable[[Tensor], Tensor | None]] = [
        lambda grad: grad,
        lambda grad: grad.t().contiguous().t(),
        lambda grad: None,
        lambda grad: torch.cat([grad, grad], 1)[:, ::2],
        lambda grad: grad[:1].expand(4, 6),
        lambda grad: torch._neg_view(-grad),
        lambda grad: torch._efficientzerotensor((4, 6), dtype=dtype),
        lambda grad: grad,
    ]
    both = [make_parameters(((4, 6), (5,)), dtype, layout) for _ in range(2)]
    native, eager = [fusedopt.AdamW(each, **options, backend=name) for each, name in zip(both, ("cpu", "eager"))]
    plans = []
    for step, lie in enumerate(layouts):
        for optimizer in (native, eager):
            params = parameters_of(optimizer)
            set_grads(params, step)
            assert params[0].grad is not None
            params[0].grad = lie(params[0].grad.clone())
            optimizer.step()
            if options.get("zero_grads") and params[0].grad is not None:
                assert not params[0].grad.any()
        assert_same_optimizers(native, eager)
        plans.append(native._plan)
    assert plans[0] is not None and all(plan is plans[0] for plan in plans)


def with_a_negative_view() -> list[Parameter]:
    """Parameters of which one has no memory of its own values, so that no plan serves it."""
    params = parameters()
    params[1] = Parameter(torch.complex(torch.zeros(7), torch.arange(7.0)).conj().imag)
    assert params[1].is_neg()
    return params


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"zero_grads": True}], ids=["", "clipped", "zeroed"])
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_a_parameter_that_no_plan_serves(cls: Any, config: dict[str, Any], options: dict[str, Any]) -> None:
    """It is stepped beside the others, which keep their plan; where its gradient is not valid none is stepped."""
    chosen, eager = [cls(with_a_negative_view(), **config, **options, backend=backend) for backend in (None, "eager")]
    plans = []
    for step, present in enumerate([(0, 1, 2, 3), (0, 1, 2, 3), (0, 2), (1, 3), (0, 1)]):
        for optimizer in (chosen, eager):
            step_with_gradients_of(optimizer, present, step)
        assert_same_optimizers(chosen, eager)
        plans.append(chosen._plan)
    assert plans[0] is not None and all(plan is plans[0] for plan in plans)

    params = parameters_of(chosen)
    set_grads(params, 5)
    before = snapshot(chosen)
    params[1].grad = torch.ones(7).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients .parameter 1 of group 0"):
        chosen.step()
    params[1].grad = None
    assert_untouched(chosen, before)


@on_every_backend
def test_frozen_parameters(backend: str) -> None:
    """Frozen for a while, as in fine-tuning: untouched, and no state until first stepped."""
    pair = []
    for kind, extra in ((fusedopt.AdamW, {"backend": backend}), (torch.optim.AdamW, {})):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        model[0].requires_grad_(False)
        frozen = model[0].weight.clone()
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.5, **extra)
        for step in range(6):
            model[0].requires_grad_(step >= 3)
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
            if step < 3:
                assert torch.equal(model[0].weight, frozen) and model[0].weight not in optimizer.state
        assert optimizer.state[model[0].weight]["step"] == 3
        pair.append(optimizer)
    for mine, other in zip(*map(parameters_of, pair), strict=True):
        # Adam amplifies: a gradient's rounding moves the step by its ratio to the root of the second moment.
        assert_near(mine, other, steps=60)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_states_lie_in_memory_like_their_parameter(cls: Any, config: dict[str, Any], layout: str) -> None:
    """In torch too; so that all are walked alike, and a channels-last model stays one."""
    params = make_parameters(((2, 3, 4, 5), (5, 7)), layout=layout)
    optimizer = cls(params, **config)
    train(optimizer, [0])
    resumed = cls(params, **config)
    resumed.load_state_dict(optimizer.state_dict())
    for param in params:
        for name in cls.states:
            if name in optimizer.state.get(param, {}):
                like = torch.empty_like(param).stride()
                assert optimizer.state[param][name].stride() == resumed.state[param][name].stride() == like


# --- hooks and closures ---


def test_step_hooks() -> None:
    """Global and own hooks in torch's order; a pre-hook may change the arguments, a post-hook sees the new values."""
    calls: list[Any] = []
    optimizer = fusedopt.SGD(parameters(), lr=0.5)
    first = parameters_of(optimizer)[0]
    before = first.detach().clone()

    def pre(opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        calls.append(("pre", opt is optimizer, torch.equal(first, before)))
        assert args == (optimizer,) and kwargs == {}
        return args, {"closure": lambda: calls.append("closure") or torch.tensor(3.0)}

    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
        optimizer.register_step_pre_hook(pre),
        optimizer.register_step_post_hook(lambda *_: calls.append(("post", torch.equal(first, before)))),
    ]
    try:
        set_grads(parameters_of(optimizer), 0)
        assert optimizer.step() == 3.0
        assert calls == ["global pre", ("pre", True, True), "closure", ("post", False), "global post"]
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    assert optimizer.step() is None and not calls
    handle = optimizer.register_step_pre_hook(lambda *_: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    handle.remove()


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("of", ["this", "every"])
def test_one_hook_alone(of: str, when: str) -> None:
    optimizer = fusedopt.SGD(parameters())
    calls: list[Any] = []
    every = register_optimizer_step_pre_hook if when == "pre" else register_optimizer_step_post_hook
    this = optimizer.register_step_pre_hook if when == "pre" else optimizer.register_step_post_hook
    handle = (this if of == "this" else every)(lambda opt, *_: calls.append(opt))
    try:
        train(optimizer, range(2))
    finally:
        handle.remove()
    assert calls == [optimizer] * 2


def test_state_dict_hooks() -> None:
    optimizer = fusedopt.AdamW(parameters())
    train(optimizer, [0])
    calls: list[str] = []

    def replace(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**state_dict, "extra": 1}

    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))
    optimizer.register_state_dict_post_hook(replace)
    assert optimizer.state_dict()["extra"] == 1 and calls == ["pre", "post"]


def test_load_state_dict_hooks() -> None:
    """A pre-hook sees a shallow copy and may return another; `prepend` puts it first; a post-hook sees it loaded."""
    source = fusedopt.AdamW(parameters(), lr=0.25)
    train(source, range(2))
    saved = source.state_dict()
    target = fusedopt.AdamW(parameters())
    calls: list[str] = []

    def in_place(opt: Any, state_dict: dict[str, Any]) -> None:
        calls.append("in place")
        assert "mark" in state_dict and opt is target and opt.param_groups[0]["lr"] == 1e-3
        state_dict["param_groups"] = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]

    def replace(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("replace")
        return {**state_dict, "mark": True}

    target.register_load_state_dict_pre_hook(in_place)
    target.register_load_state_dict_pre_hook(replace, prepend=True)
    target.register_load_state_dict_post_hook(lambda opt: calls.append(f"post {opt.param_groups[0]['lr']}"))
    target.load_state_dict(saved)
    assert calls == ["replace", "in place", "post 0.125"]
    assert set(saved) == {"state", "param_groups"} and saved["param_groups"][0]["lr"] == 0.25


@pytest.mark.parametrize("cls", CLASSES)
def test_closure(cls: Any) -> None:
    """Called once, with gradients enabled whatever surrounds the step; its loss is returned, and may be anything."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([param], lr=0.125)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    with torch.no_grad():
        assert optimizer.step(closure=closure).item() != 3
    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(closure)
        assert torch.is_grad_enabled()
    assert calls == [True] * 3 and param.requires_grad and param.is_leaf
    assert optimizer.step(lambda: None) is None and optimizer.step(lambda: 7) == 7


def test_a_closure_that_raises_changes_nothing() -> None:
    optimizer = fusedopt.AdamW(parameters())
    train(optimizer, range(2))
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_untouched(optimizer, before)


@pytest.mark.parametrize("flag", [None, "foreach", "fused"])
def test_zero_grad(flag: str | None) -> None:
    optimizer = fusedopt.AdamW(parameters(), **({flag: True} if flag else {}))
    params = train(optimizer, [0])
    grads = [param.grad for param in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is grad and not grad.any() for param, grad in zip(params, grads, strict=True))
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


# --- copies ---


@on_every_backend
@pytest.mark.parametrize(("cls", "config"), CONFIGURED)
def test_pickle_and_deepcopy(cls: Any, config: dict[str, Any], backend: str) -> None:
    """The copy has parameters of its own, keeps every option, and both continue alike."""
    original = cls(parameters(), **config, backend=backend, state_dtype="float32")
    train(original, range(2))
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert type(copied) is cls and not set(map(id, parameters_of(copied))) & set(map(id, parameters_of(original)))
        assert copied._backend == backend
        for options, expected in zip(
            (copied.defaults, *copied.param_groups), (original.defaults, *original.param_groups), strict=True
        ):
            assert all(options[name] == value for name, value in expected.items() if name != "params")
        assert_same_optimizers(copied, original)
        reference = copy.deepcopy(original)
        train(copied, range(2, 5))
        train(reference, range(2, 5))
        assert_same_optimizers(copied, reference)
    train(original, range(2, 5))
    assert_same_optimizers(copied, original)


def test_deepcopy_of_model_and_optimizer_together() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)
    train(optimizer, range(2))
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert parameters_of(copied) == list(copied_model.parameters())
    train(optimizer, range(2, 4))
    train(copied, range(2, 4))
    assert_same_optimizers(copied, optimizer)
    assert not torch.equal(copied_model.weight, torch.nn.Linear(3, 2).weight)


@pytest.mark.parametrize("cls", DROP_IN)
def test_groups_of_an_old_pickle(cls: Any) -> None:
    """Options that a group lacks get the meaning that torch gives them, and counters become tensors."""
    restored = []
    for kind in (cls, cls.torch_class):
        optimizer = kind(parameters())
        train(optimizer, range(2))
        state = {
            param: {name: value.item() if name in cls.counters else value for name, value in states.items()}
            for param, states in optimizer.state.items()
        }
        group = {"params": parameters_of(optimizer), "lr": 0.125, "weight_decay": 0.25, "initial_lr": 1.0}
        optimizer.__setstate__({"state": state, "param_groups": [group]})
        restored.append(optimizer)
    ours, theirs = restored
    meant = {name: value for name, value in theirs.param_groups[0].items() if name != "params"}
    # torch gives `fused` and `foreach` False or None, which mean the same.
    assert {name: ours.param_groups[0][name] or None for name in meant} == {
        name: value or None for name, value in meant.items()
    }
    assert set(ours.param_groups[0]) >= set(ours.defaults)
    assert all(isinstance(value, torch.Tensor) for state in ours.state.values() for value in state.values())
    train(ours, range(2, 4))
    assert all(state["step"] == 4 for state in ours.state.values() if "step" in cls.counters)
