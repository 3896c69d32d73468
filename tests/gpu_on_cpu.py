"""Optimizers on a GPU backend without a GPU: under Triton's interpreter, or by a stand-in for NVIDIA's driver.

`test_triton.py` and `test_cuda.py` run this file, in processes of their own, with TRITON_INTERPRET=1 or
FUSEDOPT_CUDA_DRIVER set.
"""

from __future__ import annotations

import copy
import itertools
import os
from typing import Any

import numpy as np
import pytest
import torch
from configs import CONFIGS, row_id, rows
from helpers import assert_same_bits, assert_same_results, make_parameters, results, set_grad, set_grads
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import BACKENDS
from fusedopt.optim import OPTIMIZERS

BACKEND = "cuda" if "FUSEDOPT_CUDA_DRIVER" in os.environ else "triton"
assert BACKENDS[BACKEND].unavailable() is None
np.seterr(all="ignore")  # the interpreter computes with NumPy, which warns of every NaN
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((5, 7), (), (0,), (700,))

OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"state_dtype": "int8", "min_quantized_size": 100, "max_grad_norm": 1.0}),
    (torch.bfloat16, {"state_dtype": "float32", "rounding": "stochastic", "zero_grads": True}),
    (torch.bfloat16, {"master": "split16"}),
]


@pytest.mark.parametrize(("dtype", "options"), OPTIONS)
@pytest.mark.parametrize("native", [True, False], ids=["", "without the native module"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_an_optimizer(
    name: str, native: bool, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        if BACKEND == "cuda":
            pytest.skip("it is in the native module")
        monkeypatch.setattr("fusedopt.backends.Gpu.plans", False)
    found = []
    for backend in (BACKEND, "eager"):
        params = make_parameters(SHAPES, dtype)
        optimizer = OPTIMIZERS[name](params, **CONFIGS[name][-1], **options, backend=backend)
        for step in range(3):
            set_grads(params, step)
            versions = [param._version for param in params]
            optimizer.step()
            assert all(param._version > version for param, version in zip(params, versions) if param.numel())
            if "zero_grads" in options:
                assert not any(param.grad.any() for param in params if param.grad is not None)
        found.append((results(optimizer), optimizer.grad_norm))
    (ours, norm), (theirs, expected) = found
    assert_same_results(ours, theirs)
    assert (norm is None) == (expected is None) == ("max_grad_norm" not in options)
    if norm is not None:
        assert_same_bits(norm, expected)


# --- the norm ---


SIZES = ((), (0,), (1,), (1023,), (1024, 1025), (5000, 0, 3), (4097,) * 300)
MIXES = ((torch.float32,), (torch.bfloat16, torch.float32), (torch.float16, torch.float64))


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)} of {sizes[:2]}")
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_clipping(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Gradients of mixed formats, at any address; few, and so many that their sums have a tree of trees."""
    found = []
    for backend in (BACKEND, "cpu"):
        generator = torch.Generator().manual_seed(1)
        params = []
        for index, size in enumerate(sizes):
            param = Parameter(torch.zeros(size))
            grad = torch.randn(size + index % 3, generator=generator).to(dtypes[index % len(dtypes)])[index % 3 :]
            set_grad(param, grad)
            params.append(param)
        params = params or [Parameter(torch.zeros(0))]
        optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=0.7, backend=backend)
        optimizer.step()
        found.append([*params, optimizer.grad_norm if sizes else torch.zeros(())])
    for ours, theirs in zip(*found):
        assert_same_bits(ours.detach(), theirs.detach())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan], ids=str)
def test_a_norm_that_is_no_number(bad: float) -> None:
    found = []
    for backend in (BACKEND, "cpu"):
        param = Parameter(torch.ones(3000))
        param.grad = torch.ones(3000)
        param.grad[2999] = bad
        optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=0.7, backend=backend)
        optimizer.step()
        found.append((param.detach(), optimizer.grad_norm))
    for ours, theirs in zip(*found):
        assert_same_bits(ours, theirs)


def test_gradients_in_pieces_are_clipped() -> None:
    """Whose norm the kernels do not take."""
    found = []
    for backend in (BACKEND, "cpu"):
        param = Parameter(torch.ones(40, 30))
        param.grad = torch.randn(80, 30, generator=torch.Generator().manual_seed(1))[::2]
        optimizer = fusedopt.AdamW([param], max_grad_norm=0.7, backend=backend)
        optimizer.step()
        found.append((param.detach(), optimizer.grad_norm))
    for ours, theirs in zip(*found):
        assert_same_bits(ours, theirs)


# --- capturable=True: what a captured step does, which here is not captured ---

CAPTURABLE = [
    pytest.param(name, row, id=row_id(name, row))
    for name, row in rows()
    if "capturable" in OPTIMIZERS[name]([Parameter(torch.zeros(1))]).defaults
]


def trained(name: str, config: dict[str, Any], steps: int = 4, **options: Any) -> tuple[Any, list[Parameter]]:
    params = make_parameters(SHAPES, torch.float32)
    optimizer = OPTIMIZERS[name](params, **config, **options, backend=BACKEND)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return optimizer, params


def assert_close(ours: Any, theirs: Any) -> None:
    """Scalars computed on the device may have another last bit, of double and then of float32: 4 roundings of values
    of order 1."""
    mine, others = results(ours), results(theirs)
    assert mine.keys() == others.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, others[key], rtol=4 * 2**-23, atol=4 * 2**-23, equal_nan=True)


@pytest.mark.parametrize(("name", "config"), CAPTURABLE)
def test_scalars_on_the_device(name: str, config: dict[str, Any]) -> None:
    ours, _ = trained(name, config, capturable=True)
    theirs, _ = trained(name, config)
    assert_close(ours, theirs)


def test_groups_of_their_own() -> None:
    """Each with its scalars, a parameter that was stepped less often than others, and one without elements."""
    found = []
    for capturable in (True, False):
        params = make_parameters(SHAPES, torch.float32)
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.3, "maximize": True}]
        optimizer = fusedopt.AdamW(groups, lr=0.01, capturable=capturable, backend=BACKEND)
        for step in range(4):
            set_grads(params, step)
            if step == 1:
                params[0].grad = params[3].grad = None
            optimizer.step()
        found.append(optimizer)
        assert [optimizer.state[param]["step"].item() for param in params] == [3, 4, 4, 3]
    assert_close(*found)


def amp(optimizer: Any, scale: float, found_inf: float) -> None:
    """What GradScaler does where the step supports scaling."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_scaled_gradients(max_grad_norm: float | None, capturable: bool) -> None:
    """Unscaled as they are read, and where one is infinite nothing happens: no update, no count."""
    found = []
    for scale in (1.0, 64.0):
        params = make_parameters(SHAPES, torch.float32)
        options = {"fused": True, "capturable": capturable, "max_grad_norm": max_grad_norm}
        optimizer = fusedopt.AdamW(params, **options, backend=BACKEND)
        for step in range(3):
            set_grads(params, step)
            for param in params:
                param.grad.mul_(scale)
            amp(optimizer, scale, 0.0)
        before = {key: value.clone() for key, value in results(optimizer).items()}
        for param in params:
            param.grad.fill_(torch.inf)
        amp(optimizer, scale, 1.0)
        assert_same_results(results(optimizer), before)
        found.append((results(optimizer), optimizer.grad_norm))
    assert_same_results(found[0][0], found[1][0])
    if max_grad_norm and not capturable:
        assert_same_bits(found[0][1], found[1][1])


def test_scaled_gradients_of_groups_of_both_kinds() -> None:
    """One is captured, the other not; clipping is of both together."""
    found = []
    for scale in (1.0, 64.0):
        params = make_parameters(SHAPES, torch.float32)
        groups = [{"params": params[:2], "capturable": True}, {"params": params[2:]}]
        optimizer = fusedopt.AdamW(groups, fused=True, max_grad_norm=0.5, backend=BACKEND)
        for step in range(3):
            set_grads(params, step)
            for param in params:
                param.grad.mul_(scale)
            amp(optimizer, scale, 0.0)
        found.append(results(optimizer))
    assert_same_results(*found)


def test_a_lr_that_changes() -> None:
    """A tensor lr that is filled takes effect, as a number that is set."""
    found = []
    for lr in (torch.tensor(0.1), 0.1):
        params = make_parameters(SHAPES, torch.float32)
        optimizer = fusedopt.AdamW(params, lr=lr, capturable=isinstance(lr, Tensor), backend=BACKEND)
        for step in range(3):
            group = optimizer.param_groups[0]
            group["lr"] = group["lr"].fill_(0.1 / (1 + step)) if isinstance(lr, Tensor) else 0.1 / (1 + step)
            set_grads(params, step)
            optimizer.step()
        found.append(optimizer)
    for param, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in found)):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)  # the tensor holds lr in float32


def test_checkpoints_of_captured_steps() -> None:
    ours, _ = trained("AdamW", {}, capturable=True)
    other, params = trained("AdamW", {}, steps=0, capturable=True)
    other.load_state_dict(ours.state_dict())
    assert all(other.state[param]["step"].dtype == torch.float32 for param in params)
    for steps in ("step", "exp_avg"):
        for param, mine in zip(params, ours.state.values()):
            assert_same_bits(other.state[param][steps], mine[steps])


@pytest.mark.parametrize("master", [None, "split8"])
def test_random_numbers_of_captured_steps(master: str | None) -> None:
    """Those of other steps: keys are computed on the device, for groups and parameters that come and go."""
    found = []
    for capturable in (True, False):
        params = make_parameters(SHAPES, torch.bfloat16)
        groups = [{"params": params[:2], "seed": 2**63 + 5}, {"params": params[2:]}]
        # Lion's scalars do not depend on the step, so that not even their last bits differ.
        options = {"rounding": "stochastic", "master": master, "seed": 3, "backend": BACKEND}
        optimizer = fusedopt.Lion(groups, lr=2.0**-9, capturable=capturable, **options)
        for step in range(4):
            set_grads(params, step)
            if step == 1:
                params[0].grad = None
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [int(group["rounding_step"]) for group in optimizer.param_groups] == [4, 4]
        found.append(results(optimizer))
    assert_same_results(*found)


def test_a_skipped_step_draws_nothing() -> None:
    params = make_parameters(SHAPES, torch.bfloat16)
    options = {"rounding": "stochastic", "capturable": True, "fused": True}
    optimizer = fusedopt.AdamW(params, **options, backend=BACKEND)
    for step in range(3):
        set_grads(params, step)
        amp(optimizer, 1.0, float(step == 1))
    assert int(optimizer.param_groups[0]["rounding_step"]) == 2


def test_parameters_of_two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan each, together one step: the norm is of all gradients."""
    names = itertools.cycle(("cpu", BACKEND))
    monkeypatch.setattr("fusedopt._stepper.choose", lambda param, name, *_: BACKENDS[name or next(names)])
    found = []
    for mixed in (True, False):
        params = make_parameters(((300,), (40, 30)), torch.float32)
        optimizer = fusedopt.AdamW(params, max_grad_norm=0.3, backend=None if mixed else "eager")
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        assert not mixed or len(optimizer._plan) == 2
        found.append((results(optimizer), optimizer.grad_norm))
    assert_same_results(found[0][0], found[1][0])
    assert_same_bits(found[0][1], found[1][1])
