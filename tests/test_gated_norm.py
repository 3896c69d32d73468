"""gated_rms_norm: against the model families' formulae, in their dtype and in float64, and through autograd."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, values
from row_ops import DTYPES, ROW_BACKENDS, SIZES, error, gradients
from torch import Tensor
from torch.nn import functional as F

from fusedopt._gated_norm import gated_rms_norm
from fusedopt.backends import use_backend

on_row_backends = pytest.mark.parametrize("backend", ROW_BACKENDS)
pytestmark = pytest.mark.usefixtures("one_thread")


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Transcribed from transformers: Qwen3NextRMSNormGated, and Mamba2's MambaRMSNormGated.
def qwen(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    hidden = wide(x)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    hidden = weight * hidden.to(x.dtype)
    return (hidden * F.silu(wide(gate))).to(x.dtype)


def mamba(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int | None = None) -> Tensor:
    hidden = wide(x) * F.silu(wide(gate))
    groups = hidden.view(*x.shape[:-1], -1, group_size or x.shape[-1])
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    return weight * groups.view(x.shape).to(x.dtype)


FORMULAE: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen": (qwen, {}),
    "mamba": (mamba, dict(gate_first=True)),
    "mamba_groups": (functools.partial(mamba, group_size=5), dict(gate_first=True, group_size=5)),
}
every_form = pytest.mark.parametrize("form", FORMULAE)


def inputs(rows: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    """x, gate, weight, gradient."""
    shapes = (rows, columns), (rows, columns), (columns,), (rows, columns)
    dtypes = dtype, dtype, weight_dtype or dtype, dtype
    return [values(shape, 41, index, dtype=each) for index, (shape, each) in enumerate(zip(shapes, dtypes))]


@on_row_backends
@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, form: str, backend: str) -> None:
    """At most twice the error of the family's own operations in that dtype, or two epsilons; in float64, where the
    formula rounds too, eight."""
    formula, options = FORMULAE[form]
    least = 8.0 if dtype == torch.float64 else 2.0
    for columns in (size for size in SIZES if size > 1 and size % options.get("group_size", 1) == 0):
        *tensors, grad = inputs(3, columns, dtype)

        def run(function: Any, *tensors: Tensor) -> list[Tensor]:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            y = function(*leaves)
            return [y.detach(), *gradients(y, leaves, (grad.to(y.dtype),))]  # noqa: B023

        exact = run(lambda *leaves: formula(*leaves, 1e-5), *(tensor.double() for tensor in tensors))
        theirs = run(lambda *leaves: formula(*leaves, 1e-5), *tensors)
        with use_backend(backend):
            ours = run(lambda *leaves: gated_rms_norm(*leaves, 1e-5, **options), *tensors)
        for name, mine, other, right in zip(("y", "x", "gate", "weight"), ours, theirs, exact, strict=True):
            assert mine.dtype == other.dtype == dtype
            assert error(mine, right) <= max(least, 2 * error(other, right)), (name, columns)


@on_row_backends
@every_form
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_where_roundings_fall(weight_dtype: torch.dtype, form: str, backend: str) -> None:
    """The formulae's bits, but where a float32 some ulps off is rounded to another bfloat16: a few of 2^16. Elsewhere
    rounded, a tenth differ."""
    formula, options = FORMULAE[form]
    x, gate, weight, _ = inputs(50, 400, torch.bfloat16, weight_dtype)
    with use_backend(backend):
        y = gated_rms_norm(x, gate, weight, 1e-6, **options)
    expected = formula(x, gate, weight, 1e-6)
    assert y.dtype == expected.dtype
    assert float((y != expected).float().mean()) < 0.001


@on_row_backends
@every_form
def test_gradcheck(form: str, backend: str) -> None:
    *tensors, _ = inputs(3, 10, torch.float64)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    function = functools.partial(gated_rms_norm, eps=1e-2, **FORMULAE[form][1])
    with use_backend(backend):
        for arguments in (tensors, tensors[:2]):
            assert torch.autograd.gradcheck(function, arguments)
            assert torch.autograd.gradgradcheck(function, arguments)


@every_form
def test_compile(form: str) -> None:
    """One graph with the eager results."""
    torch._dynamo.reset()
    *tensors, grad = inputs(4, 60, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    function = functools.partial(gated_rms_norm, **FORMULAE[form][1])
    found, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors), function(*tensors)
    assert_same_bits(found, expected)
    for mine, theirs in zip(*(gradients(y, tensors, (grad,)) for y in (found, expected)), strict=True):
        assert_same_bits(mine, theirs)


@on_row_backends
def test_awkward_input(backend: str) -> None:
    """Strides, other dtypes of the gate, one dimension and no elements."""
    x, gate = values((2, 3, 20), 42).transpose(0, 1)[..., ::2], values((3, 2, 10), 43, dtype=torch.bfloat16)
    with use_backend(backend):
        for options in ({}, dict(gate_first=True, group_size=5)):
            expected = gated_rms_norm(x.contiguous(), gate.float(), **options)
            assert_same_bits(gated_rms_norm(x, gate, **options), expected)
            assert_same_bits(gated_rms_norm(x[1, 0], gate[1, 0], **options), expected[1, 0])
            assert gated_rms_norm(x[:0], gate[:0], **options).shape == (0, 2, 10)


def test_bad_input() -> None:
    x = torch.randn(3, 6)
    for arguments, message in (
        (dict(gate=x[:1]), r"gate has shape \(1, 6\), and x \(3, 6\)"),
        (dict(x=x[0, 0], gate=x[0, 0]), r"gate has shape \(\), and x \(\)"),
        (dict(weight=torch.ones(1)), r"weight has shape \(1,\); x of shape \(3, 6\) wants \(6,\)"),
        (dict(group_size=4), "group_size=4 does not divide the 6 elements"),
        (dict(group_size=0), "group_size=0 does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_rms_norm(**{"x": x, "gate": x, **arguments})
