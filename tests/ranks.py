"""One of the two processes of test_distributed.py: `ranks.py RANK WORLD FOLDER`.

They step the shards of what one process steps whole, to the same bits.
"""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import CONFIGS
from helpers import FSDP_ON_CPU, assert_same_bits
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import fusedopt
from fusedopt.backends import BACKENDS

CASES: list[tuple[Any, dict[str, Any]]] = [
    (fusedopt.AdamW, CONFIGS["AdamW"][-1]),
    (fusedopt.SGD, CONFIGS["SGD"][-1]),
    (fusedopt.NAdam, {**CONFIGS["NAdam"][0], "state_dtype": "bfloat16"}),
]


def make_model() -> torch.nn.Module:
    """Rows that two do not divide, and a layer of one row: the second process has nothing of it."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
    )


def make_sharded() -> torch.nn.Module:
    model = make_model()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(sharded: torch.nn.Module, optimizer: Any, steps: range, whole: torch.nn.Module, expected: Any) -> None:
    """Steps of both, the whole one with the gradients of the sharded one put together."""
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        sharded(torch.randn(6, 5)).square().mean().backward()
        for param, shards in zip(whole.parameters(), sharded.parameters(), strict=True):
            param.grad = shards.grad.full_tensor()
            assert param.grad.any()
        optimizer.step()
        expected.step()


def assert_equal(sharded: torch.nn.Module, optimizer: Any, whole: torch.nn.Module, expected: Any) -> None:
    """The same parameters and states, which are sharded as their parameters are."""
    for (name, shards), param in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert_same_bits(shards.full_tensor(), param.detach(), name)
        states = optimizer.state[shards]
        assert list(states) == list(expected.state[param])
        for key, state in states.items():
            if key not in optimizer.counters:
                assert isinstance(state, DTensor) and state.placements == shards.placements
                state = state.full_tensor()
            assert_same_bits(state, expected.state[param][key], f"{key} of {name}")


def check_sharded(cls: Any, config: dict[str, Any], backend: str) -> None:
    sharded, whole = make_sharded(), make_model()
    optimizer = cls(sharded.parameters(), **config, backend=backend)
    expected = cls(whole.parameters(), **config, backend=backend)
    train(sharded, optimizer, range(4), whole, expected)
    assert_equal(sharded, optimizer, whole, expected)
    saved, reference = optimizer.state_dict(), expected.state_dict()
    assert saved["param_groups"] == reference["param_groups"] and saved["state"].keys() == reference["state"].keys()

    # A sharded checkpoint, by torch's own functions and by state_dict; then training goes on.
    for resume in ("distributed", "state_dict"):
        resumed = cls(sharded.parameters(), lr=99.0, backend=backend, state_dtype=config.get("state_dtype"))
        if resume == "distributed":
            set_optimizer_state_dict(sharded, resumed, get_optimizer_state_dict(sharded, optimizer))
        else:
            resumed.load_state_dict(saved)
        assert_equal(sharded, resumed, whole, expected)
    train(sharded, resumed, range(4, 6), whole, expected)
    assert_equal(sharded, resumed, whole, expected)


BY_SHARD: list[tuple[Any, torch.dtype, dict[str, Any]]] = [
    (fusedopt.AdamW, torch.float32, {"state_dtype": "int8"}),
    (fusedopt.SGD, torch.bfloat16, {"state_dtype": "int8", "momentum": 0.9, "master": "split16"}),
    (fusedopt.Lion, torch.bfloat16, {"state_dtype": "int8", "rounding": "stochastic", "seed": 3}),
]


def make_wide(dtype: torch.dtype) -> torch.nn.Module:
    """Shards of four blocks and of three, and a layer of one row: the second process has nothing of it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 33), torch.nn.Linear(33, 1)).to(dtype)
    return fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


def train_by_shard(sharded: torch.nn.Module, optimizer: Any, steps: range, local: Any, expected: Any) -> None:
    """Steps of the sharded parameters, and of each local shard as a parameter of its own."""
    for step in steps:
        for index, (shards, param) in enumerate(zip(sharded.parameters(), local, strict=True)):
            torch.manual_seed(100 * step + 10 * index + distributed.get_rank())
            param.grad = torch.randn(param.shape).to(param.dtype)
            grad = DTensor.from_local(
                param.grad.clone(), shards.device_mesh, shards.placements, shape=shards.shape, stride=shards.stride()
            )
            shards.grad = grad
        optimizer.step()
        expected.step()


def assert_equal_by_shard(sharded: torch.nn.Module, optimizer: Any, local: Any, expected: Any) -> None:
    """The same bits; codes and masters are placed like their parameter, and each shard has a row of scales."""
    for (name, shards), param in zip(sharded.named_parameters(), local, strict=True):
        assert_same_bits(shards.to_local(), param.detach(), name)
        states = optimizer.state[shards]
        assert list(states) == list(expected.state[param])
        for key, state in states.items():
            if key in optimizer.counters:
                assert_same_bits(state, expected.state[param][key], key)
                continue
            assert isinstance(state, DTensor)
            mine = state.to_local()
            if key.endswith("_scale"):
                largest = -(-shards.shape[0] // distributed.get_world_size()) * shards.shape[1:].numel()
                assert state.shape == (distributed.get_world_size(), -(-largest // 256)) and mine.shape[0] == 1
                mine = mine.flatten()[: -(-param.numel() // 256)]
            else:
                assert state.placements == shards.placements and state.shape == shards.shape
                assert state.dtype != torch.uint8 or key + "_scale" in states
            assert_same_bits(mine, expected.state[param][key], f"{key} of {name}")


def check_by_shard(cls: Any, dtype: torch.dtype, config: dict[str, Any], backend: str) -> None:
    """In 8 bits every shard is quantized, and under stochastic rounding rounded, as if it were a tensor of its own."""
    options = {**config, "lr": 0.01, "min_quantized_size": 0, "backend": backend}
    sharded = make_wide(dtype)
    local = [torch.nn.Parameter(shards.to_local().detach().clone()) for shards in sharded.parameters()]
    optimizer, expected = cls(sharded.parameters(), **options), cls(local, **options)
    train_by_shard(sharded, optimizer, range(3), local, expected)
    assert_equal_by_shard(sharded, optimizer, local, expected)
    # gloo gathers no int16, so no checkpoint can be made whole where there is one.
    ways = ("distributed", "state_dict", "full")[: 2 if config.get("master") == "split16" else 3]
    for number, resume in enumerate(ways):
        resumed = cls(sharded.parameters(), **{**options, "lr": 99.0, "seed": 99})
        optimizer.zero_grad()  # so that torch's functions create the state that they load into
        if resume == "state_dict":
            resumed.load_state_dict(optimizer.state_dict())
        else:
            whole = StateDictOptions(full_state_dict=resume == "full")
            saved = get_optimizer_state_dict(sharded, optimizer, options=whole)
            set_optimizer_state_dict(sharded, resumed, saved, options=whole)
        assert_equal_by_shard(sharded, resumed, local, expected)
        optimizer = resumed
        train_by_shard(sharded, optimizer, range(3 + 2 * number, 5 + 2 * number), local, expected)
        assert_equal_by_shard(sharded, optimizer, local, expected)

    # Codes in the blocks of shards are not those of the whole tensor.
    unsharded = cls(
        [(name, torch.nn.Parameter(p.full_tensor().detach())) for name, p in sharded.named_parameters()], **options
    )
    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {
        key: {name: value.full_tensor() for name, value in state.items() if name.startswith(("exp_avg", "momentum"))}
        for key, state in checkpoint["state"].items()
    }
    with pytest.raises(ValueError, match="_scale' of parameter '0.weight' .* or sharded otherwise, cannot be read"):
        unsharded.load_state_dict(checkpoint)
    assert not unsharded.state


def check_swap_to_8_bits(backend: str) -> None:
    """A sharded optimizer amid training, to 8 bits and back: as loading its state_dict does it, shard by shard."""
    sharded = make_wide(torch.float32)
    local = [torch.nn.Parameter(shards.to_local().detach().clone()) for shards in sharded.parameters()]
    options: dict[str, Any] = {"lr": 0.01, "backend": backend}
    optimizer, expected = fusedopt.AdamW(sharded.parameters(), **options), fusedopt.AdamW(local, **options)
    for state_dtype in ("float32", "int8", "float32"):
        for each in (optimizer, expected):
            fusedopt.swap(each, state_dtype=state_dtype, min_quantized_size=0)
        train_by_shard(sharded, optimizer, range(2), local, expected)
        for shards, param in zip(sharded.parameters(), local, strict=True):
            assert_same_bits(shards.to_local(), param.detach())
            for key in ("exp_avg", "exp_avg_sq"):
                assert_same_bits(optimizer.state[shards][key].to_local(), expected.state[param][key], key)
            assert ("exp_avg_scale" in optimizer.state[shards]) == (state_dtype == "int8")


def check_swap(backend: str) -> None:
    """torch's own AdamW swapped amid training goes on from its sharded state."""
    sharded, whole = make_sharded(), make_model()
    optimizer: Any = torch.optim.AdamW(sharded.parameters(), lr=0.125)
    expected: Any = torch.optim.AdamW(whole.parameters(), lr=0.125, foreach=False)
    train(sharded, optimizer, range(2), whole, expected)
    # torch's two steps may differ in rounding; from here on the whole one starts where the sharded one is.
    for shards, param in zip(sharded.parameters(), whole.parameters(), strict=True):
        param.data.copy_(shards.full_tensor())
        for key, state in optimizer.state[shards].items():
            expected.state[param][key].copy_(state.full_tensor() if isinstance(state, DTensor) else state)
    fusedopt.swap(optimizer, backend=backend)
    fusedopt.swap(expected, backend=backend)
    train(sharded, optimizer, range(2, 4), whole, expected)
    assert_equal(sharded, optimizer, whole, expected)


def check_clipping(backend: str) -> None:
    """In the step and by the function. Every process finds one norm, of shards and of a parameter that is whole."""
    for in_step in (True, False):
        sharded, lone = make_sharded(), torch.nn.Parameter(torch.ones(3))
        optimizer = fusedopt.SGD([*sharded.parameters(), lone], lr=0.5, backend=backend)
        for step in range(2):
            optimizer.zero_grad()
            torch.manual_seed(step)
            sharded(torch.randn(6, 5)).square().mean().backward()
            lone.grad = torch.full((3,), 0.01)
            whole = [param.grad.full_tensor() for param in sharded.parameters()]
            expected = torch.cat([grad.flatten() for grad in (*whole, lone.grad)]).double().norm()
            weight = sharded[0].weight.full_tensor().clone()
            if in_step:
                optimizer.max_grad_norm = expected.item() / 2
                optimizer.step()
                norm = optimizer.grad_norm
            else:
                norm = fusedopt.clip_grad_norm_([*sharded.parameters(), lone], expected.item() / 2)
                optimizer.step()
            # Float32 sums of some hundred squares.
            torch.testing.assert_close(norm.double(), expected, rtol=2**-20, atol=0)
            gathered = [torch.zeros(()) for _ in range(distributed.get_world_size())]
            distributed.all_gather(gathered, norm)
            assert len({each.item() for each in gathered}) == 1
            # lr * coefficient, of which the norm has the last bits.
            torch.testing.assert_close(
                sharded[0].weight.full_tensor(), weight - 0.25 * whole[0], rtol=2**-20, atol=2**-20
            )


def check_placement() -> None:
    """A gradient placed unlike its parameter is refused by name before anything changes."""
    sharded = make_sharded()
    optimizer = fusedopt.AdamW(sharded.named_parameters())
    sharded(torch.ones(6, 5)).sum().backward()
    weight = sharded[2].weight
    weight.grad = weight.grad.redistribute(placements=[torch.distributed.tensor.Replicate()])
    before = [param.full_tensor().clone() for param in sharded.parameters()]
    with pytest.raises(ValueError, match="gradient of parameter '2.weight' is placed .*redistribute the gradient"):
        optimizer.step()
    assert not optimizer.state
    for param, value in zip(sharded.parameters(), before, strict=True):
        assert torch.equal(param.full_tensor(), value)


def check_zero(cls: Any, config: dict[str, Any]) -> None:
    """`ZeroRedundancyOptimizer` constructs the class by keyword, and steps a part of the parameters in each process."""
    model, whole = make_model(), make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **config)
    expected = cls(whole.parameters(), **config)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = 0.125 / (step + 1)
        torch.manual_seed(step)
        for param, other in zip(model.parameters(), whole.parameters(), strict=True):
            param.grad = torch.randn(param.shape)
            other.grad = param.grad.clone()
        optimizer.step()
        expected.step()
    for param, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert_same_bits(param.detach(), other.detach())
    optimizer.consolidate_state_dict(to=0)
    if distributed.get_rank() == 0:
        state = optimizer.state_dict()["state"]
        for index, other in enumerate(whole.parameters()):
            assert list(state[index]) == list(expected.state[other])
            for name, value in state[index].items():
                assert_same_bits(value, expected.state[other][name], name)


def main(rank: int, world: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=50),
    )
    for backend in BACKENDS:
        if not (BACKENDS[backend].unavailable() or BACKENDS[backend].refuses(torch.empty(1))):
            for cls, dtype, config in BY_SHARD:
                check_by_shard(cls, dtype, config, backend)
            check_swap_to_8_bits(backend)
            if FSDP_ON_CPU:
                for cls, config in CASES:
                    check_sharded(cls, config, backend)
                check_swap(backend)
                check_clipping(backend)
    if FSDP_ON_CPU:
        check_placement()
    for cls, config in CASES:
        check_zero(cls, config)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # Without the interpreter's teardown, amid which one of gloo's threads may drop a tensor, ask for the interpreter's
    # lock and abort the process (pytorch#38228, pytorch#190489).
    sys.stdout.flush()
    os._exit(0)
