"""Clipping by the norm of all gradients, in the step and by itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from configs import CONFIGS
from helpers import (
    GRAD_LAYOUTS,
    LAYOUTS,
    assert_same_bits,
    assert_same_results,
    exchange_api,
    instruction_set,
    make_parameters,
    results,
    set_grads,
    threads,
    values,
)
from steps import CLASSES, on_every_backend
from torch.nn import Parameter

import fusedopt
from fusedopt._clip import TREE, clip_coefficient, grad_norm
from fusedopt.backends import BACKENDS, native
from fusedopt.codecs import STORAGE_DTYPES

SHAPES = ((5, 7), (), (0,), (1023,), (1024,), (1025,), (3, 4, 5, 6), (70_000,))
needs_native = pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="the native module is not built")


def tree_sum(numbers: list[float]) -> float:
    """Of at most 1024, written out: float32 additions of halves."""
    row = torch.tensor(numbers + [0.0] * (TREE - len(numbers)))
    while len(row) > 1:
        row = row[: len(row) // 2] + row[len(row) // 2 :]
    return float(row[0])


def test_the_norm_is_a_tree_of_trees() -> None:
    grads = [values((2500,), 1), values((10,), 2)]
    squares = [[x * x for x in grad] for grad in grads]
    trees = [tree_sum([float(x) for x in row[at : at + TREE]]) for row in squares for at in range(0, len(row), TREE)]
    assert len(trees) == 4
    assert_same_bits(grad_norm(grads), torch.tensor(math.sqrt(tree_sum(trees))))


def test_the_norm_is_right() -> None:
    """Each of log2(1024^2) additions rounds by half an epsilon, and so does each square: 11 epsilons of the square at
    the most, half of them of its root."""
    grads = [values(shape, 3, index) for index, shape in enumerate(SHAPES)]
    exact = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert float(grad_norm(grads)) == pytest.approx(exact, rel=6 * torch.finfo(torch.float32).eps)
    assert float(grad_norm(grads, 0.25)) == pytest.approx(exact / 4, rel=6 * torch.finfo(torch.float32).eps)
    assert float(grad_norm([])) == float(grad_norm([torch.empty(0)])) == 0


@needs_native
@pytest.mark.parametrize("dtype", [*STORAGE_DTYPES, torch.complex64], ids=str)
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_native_norm(layout: str, dtype: torch.dtype) -> None:
    """The same bits for every instruction set, number of threads and way of reading tensors."""
    if layout == "imaginary" and dtype.is_complex:
        return  # the part of a complex number is real
    grads = [GRAD_LAYOUTS[layout](values(shape, 4, index, dtype=dtype)) for index, shape in enumerate(SHAPES)]
    grads = [grad.resolve_conj().resolve_neg() for grad in grads]
    expected = grad_norm(grads)
    for name in native().instruction_sets():
        with instruction_set(name):
            for count in (1, 2, 4):
                assert_same_bits(torch.tensor(native().norm(grads, count)), expected, f"{name}, {count} threads")
    with exchange_api(False):
        assert_same_bits(torch.tensor(native().norm(grads, 1)), expected)


@on_every_backend
@pytest.mark.parametrize("cls", CLASSES)
def test_a_clipped_step(cls: Any, backend: str) -> None:
    """What torch's clipping before a step gives, but for its norm's last bits; gradients stay as they were."""
    config = CONFIGS[cls.__name__][-1]
    ours, theirs = (make_parameters(SHAPES) for _ in range(2))
    optimizer = cls(ours, **config, backend=backend, max_grad_norm=1.5)
    expected = cls(theirs, **config, backend="eager")
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        before = [param.grad.clone() for param in ours if param.grad is not None]
        optimizer.step()
        expected.step()
        assert optimizer.grad_norm.dtype == torch.float32 and norm > 200
        # torch's norm rounds otherwise, by at most an epsilon for each of the levels of its sums.
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        for param, grad in zip(ours, before, strict=True):
            assert param.grad is not None
            assert_same_bits(param.grad, grad)
    for mine, other in zip(ours, theirs, strict=True):
        if cls is fusedopt.Lion:  # of an average near zero the sign may differ; elsewhere nothing does
            assert ((mine - other).abs() > 1e-5).float().mean() < 1e-3 if mine.numel() else True
            continue
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_norm", [0.75, 1e6])
def test_same_bits(layout: str, max_norm: float) -> None:
    """On both backends, clipped and not, whatever the threads; with a scale from GradScaler too."""
    found = []
    for backend, count in (("eager", 1), ("cpu", 1), ("cpu", 2), ("cpu", 4)):
        params = make_parameters(SHAPES, torch.bfloat16, layout)
        optimizer: Any = fusedopt.AdamW(
            params, lr=0.1, backend=backend, max_grad_norm=max_norm, state_dtype="int8", min_quantized_size=1000
        )
        with threads(count):
            for step in range(3):
                set_grads(params, step, torch.float32, layout)
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
                optimizer.step()
        found.append({**results(optimizer), "norm": optimizer.grad_norm})
    for other in found[1:]:
        assert_same_results(found[0], other)


@on_every_backend
def test_a_large_limit_changes_no_bit(backend: str) -> None:
    found = []
    for options in ({}, {"max_grad_norm": 1e6}):
        params = make_parameters(SHAPES)
        optimizer = fusedopt.AdamW(params, backend=backend, **options)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        found.append(results(optimizer))
    assert_same_results(*found)
    assert optimizer.grad_norm is not None


@on_every_backend
def test_scaled_gradients(backend: str) -> None:
    """The norm is that of the unscaled gradients."""
    param = Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0]) * 1024
    optimizer: Any = fusedopt.SGD([param], lr=1.0, backend=backend, max_grad_norm=2.5, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == 5
    torch.testing.assert_close(param.detach(), -param.grad / 2048, rtol=1e-6, atol=0)


@on_every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_that_are_not_finite(bad: float, backend: str) -> None:
    """As torch's clipping: infinity makes the coefficient 0, and itself NaN; NaN makes all NaN."""
    param = Parameter(torch.ones(3))
    param.grad = torch.tensor([1.0, bad, 2.0])
    optimizer = fusedopt.SGD([param], lr=1.0, backend=backend, max_grad_norm=1.0)
    optimizer.step()
    clipped = torch.tensor([1.0, bad, 2.0]) * clip_coefficient(math.nan if math.isnan(bad) else math.inf, 1.0)
    assert_same_bits(param.detach(), 1 - clipped)


@on_every_backend
def test_several_groups_and_what_has_no_gradient(backend: str) -> None:
    """The norm is of all groups together; the limit may change between steps."""
    a, b, c = (Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = fusedopt.SGD([{"params": [a, c]}, {"params": [b], "maximize": True}], 1.0, backend=backend)
    for limit, expected in ((5.0, 1.0), (2.5, 0.5), (None, 1.0), (1.25, 0.25)):
        a.data, b.data = torch.zeros(1), torch.zeros(1)
        a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
        optimizer.max_grad_norm = limit
        optimizer.step()
        assert a.item() == pytest.approx(-3 * expected, rel=1e-6)
        assert b.item() == pytest.approx(4 * expected, rel=1e-6)
        assert optimizer.grad_norm is None if limit is None else float(optimizer.grad_norm) == 5


@on_every_backend
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_zeroing_gradients(layout: str, backend: str) -> None:
    found = []
    for zero in (False, True):
        params = make_parameters(SHAPES)
        optimizer = fusedopt.AdamW(params, backend=backend, zero_grads=zero)
        for step in range(3):
            set_grads(params, step, layout=layout)
            optimizer.step()
            left = [param for param in params if param.grad is not None and param.grad.any()]
            assert not left if zero else len(left) > 4
        found.append(results(optimizer))
    assert_same_results(*found)


def test_options_are_kept() -> None:
    param = Parameter(torch.ones(1))
    optimizer = fusedopt.AdamW([param], max_grad_norm=0.5, zero_grads=True)
    swapped: Any = fusedopt.swap(torch.optim.AdamW([param]), max_grad_norm=0.5, zero_grads=True)
    for other in (copy.deepcopy(optimizer), swapped):
        assert (other.max_grad_norm, other.zero_grads) == (0.5, True)
    assert "max_grad_norm" not in optimizer.state_dict()["param_groups"][0]


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, "1"])
def test_bad_limits(limit: Any) -> None:
    param = Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    with pytest.raises(ValueError, match="max_grad_norm=.* must be a number above 0, or None not to clip"):
        fusedopt.AdamW([param], max_grad_norm=limit)
    with pytest.raises(ValueError, match="max_grad_norm="):
        fusedopt.swap(torch.optim.AdamW([param]), max_grad_norm=limit)
    optimizer = fusedopt.AdamW([param])
    optimizer.step()
    before = param.detach().clone()
    optimizer.max_grad_norm = limit
    with pytest.raises(ValueError, match="max_grad_norm="):
        optimizer.step()
    assert_same_bits(param.detach(), before)


# --- clip_grad_norm_ ---


CASES = [
    (dtype, layout)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    for layout in ("contiguous", "transposed", "stepped", "imaginary")
    if not (dtype.is_complex and layout == "imaginary")
]


@pytest.mark.parametrize(("dtype", "layout"), CASES, ids=str)
@pytest.mark.parametrize("limit", [1.5, 1e6])
def test_clip_grad_norm(limit: float, dtype: torch.dtype, layout: str) -> None:
    """Torch's results, but for the norm's last bits; the norm has the reference's bits."""
    ours, theirs = (make_parameters(SHAPES, dtype) for _ in range(2))
    set_grads(ours, 0, layout=layout)
    set_grads(theirs, 0, layout=layout)
    expected = grad_norm([param.grad for param in ours if param.grad is not None])
    found = fusedopt.clip_grad_norm_(iter(ours), limit)
    assert_same_bits(found, expected)
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit, foreach=False)
    epsilon = torch.finfo(dtype).eps
    assert float(found) == pytest.approx(float(norm), rel=max(1e-5, 2 * epsilon))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=max(1e-5, 2 * epsilon), atol=0)


def test_clip_grad_norm_of_nothing() -> None:
    assert float(fusedopt.clip_grad_norm_([], 1.0)) == 0
    assert float(fusedopt.clip_grad_norm_(Parameter(torch.ones(1)), 1.0)) == 0


def test_clip_grad_norm_refuses() -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(ValueError, match="norm_type=1.0: .*use torch.nn.utils"):
        fusedopt.clip_grad_norm_(param, 1.0, norm_type=1.0)
    with pytest.raises(RuntimeError, match="non-finite"):
        fusedopt.clip_grad_norm_(param, 1.0, error_if_nonfinite=True)
    assert_same_bits(param.grad, torch.tensor([1.0, math.nan]))
    param.grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match="a gradient has layout torch.sparse_coo"):
        fusedopt.clip_grad_norm_(param, 1.0)
