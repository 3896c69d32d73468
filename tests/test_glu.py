"""Gated linear units: against their formulae in float64, on every kind of memory, and through autograd."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import GRAD_LAYOUTS, assert_same_bits, values
from row_ops import DTYPES, HAS_NATIVE, ROW_BACKENDS, SIZES, error, gradients, on_every_machine
from torch import Tensor
from torch.nn import functional as F

import fusedopt
from fusedopt._glu import LAYOUTS, glu, glu_packed, unpacked
from fusedopt._ops import KINDS
from fusedopt.backends import native, use_backend

on_row_backends = pytest.mark.parametrize("backend", ROW_BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 0.75


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    """Transcribed from transformers' GptOssExperts."""
    gate = gate.clamp(min=None, max=LIMIT)
    up = up.clamp(min=-LIMIT, max=LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


FORMULAE: dict[str, Any] = {
    "swiglu": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "geglu": lambda gate, up: 0.5 * gate * torch.special.erfc(-gate / 2**0.5) * up,
    "geglu_tanh": lambda gate, up: (
        0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    ),
    "reglu": lambda gate, up: torch.where(gate <= 0, 0, gate) * up,
    "relu2": lambda gate: torch.where(gate <= 0, 0, gate) ** 2,
    "swiglu_oai": gpt_oss,
}
EAGER: dict[str, Any] = {
    **FORMULAE,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}
PUBLIC: dict[str, Any] = {
    "swiglu": fusedopt.swiglu,
    "geglu": fusedopt.geglu,
    "geglu_tanh": lambda gate, up: fusedopt.geglu(gate, up, approximate="tanh"),
    "reglu": fusedopt.reglu,
    "relu2": fusedopt.relu2,
    "swiglu_oai": lambda gate, up: fusedopt.swiglu_oai(gate, up, limit=LIMIT),
}


def inputs(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    count = 1 if kind == "relu2" else 2
    return [(2 * values(shape, 21, index)).to(dtype) for index in range(count)]


def run(function: Any, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return [y.detach(), *gradients(y, leaves, (grad.to(y.dtype),))]


@on_row_backends
@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, kind: str, backend: str) -> None:
    """At most twice the error of torch's own operations in that dtype, or two epsilons; in float64, where the formula
    rounds too, eight."""
    least = 8.0 if dtype == torch.float64 else 2.0
    for columns in SIZES:
        tensors, grad = inputs(kind, (2, columns), dtype), values((2, columns), 22, dtype=dtype)
        exact = run(FORMULAE[kind], [tensor.double() for tensor in tensors], grad)
        theirs = run(EAGER[kind], tensors, grad)
        with use_backend(backend):
            ours = run(PUBLIC[kind], tensors, grad)
        for mine, other, right in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == dtype
            assert error(mine, right) <= max(least, 2 * error(other, right)), columns


@needs_native
@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(dtype: torch.dtype, kind: str) -> None:
    """For any instruction set, number of threads and way of cutting the batch."""
    for shape in ((70, 257), (3, 6_001), (1, 7)):
        tensors, grad = inputs(kind, shape, dtype), values(shape, 23, dtype=dtype)
        first, *others = on_every_machine(lambda: run(PUBLIC[kind], tensors, grad))  # noqa: B023
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert_same_bits(mine, theirs)
        parts = zip(*(tensor.split(2) for tensor in tensors), strict=True)
        assert_same_bits(torch.cat([PUBLIC[kind](*part) for part in parts]), first[0])


@on_row_backends
@every_kind
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_layouts(layout: str, kind: str, backend: str) -> None:
    """Any strides give what contiguous tensors do, and nothing of the caller's changes."""
    lay = GRAD_LAYOUTS[layout]
    for shape in ((), (600,), (6, 600), (2, 3, 4, 30)):
        tensors, grad = [lay(tensor) for tensor in inputs(kind, shape, torch.float32)], lay(values(shape, 24))
        before = [tensor.clone() for tensor in (*tensors, grad)]
        with use_backend(backend):
            strided = run(PUBLIC[kind], tensors, grad)
            contiguous = run(
                PUBLIC[kind], [tensor.resolve_neg().contiguous() for tensor in tensors], grad.resolve_neg().contiguous()
            )
        for mine, theirs in zip(strided, contiguous, strict=True):
            if backend == "cpu":
                assert_same_bits(mine, theirs)
            else:  # torch's vectors and its remainders differ
                torch.testing.assert_close(mine, theirs)
        for tensor, old in zip((*tensors, grad), before, strict=True):
            assert_same_bits(tensor, old)


@on_row_backends
@every_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed(layout: str, kind: str, backend: str) -> None:
    """What a gate and an up by themselves give."""
    if kind == "relu2":
        return
    for shape in ((5, 600), (3, 4, 2), (0, 4), (4, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            x = values(shape, 25, dtype=dtype).requires_grad_()
            grad = values((*shape[:-1], shape[-1] // 2), 26, dtype=dtype)
            with use_backend(backend):
                y = glu_packed(x, kind, layout, LIMIT)
                gate, up = unpacked(x, layout)
                expected = glu(gate, up, kind, LIMIT)
                assert_same_bits(y, expected)
                assert_same_bits(gradients(y, (x,), (grad,))[0], gradients(expected, (x,), (grad,))[0])
    x = values((5, 8), 27)
    gate, up = x.chunk(2, -1) if layout == "halves" else x.view(5, 4, 2).unbind(-1)
    assert_same_bits(fusedopt.swiglu_packed(x, layout), fusedopt.swiglu(gate, up))


@on_row_backends
def test_mixed_dtypes(backend: str) -> None:
    for gate_dtype in DTYPES:
        for up_dtype in DTYPES:
            tensors = [values((3, 30), 28, dtype=gate_dtype), values((3, 30), 29, dtype=up_dtype)]
            with use_backend(backend):
                y, *grads = run(fusedopt.swiglu, tensors, torch.ones(3, 30))
            assert y.dtype == torch.promote_types(gate_dtype, up_dtype)
            assert [grad.dtype for grad in grads] == [gate_dtype, up_dtype]
            exact = FORMULAE["swiglu"](*(tensor.double() for tensor in tensors))
            assert error(y, exact) <= (1 if y.dtype != torch.float64 else 4)


@needs_native
@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_normal(dtype: torch.dtype, kind: str) -> None:
    """NaN, infinities and giants come out where the formula has them."""
    special = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, 80.0, 110.0, -80.0, -90.0, -104.0, -110.0, 3e38]
    epsilon = torch.finfo(dtype).eps
    edge, one = torch.tensor(special, dtype=dtype), torch.ones(len(special), dtype=dtype)
    for tensors in ([edge],) if kind == "relu2" else ([edge, one], [one, edge]):
        exact = FORMULAE[kind](*(tensor.double() for tensor in tensors)).to(dtype)
        torch.testing.assert_close(PUBLIC[kind](*tensors), exact, rtol=4 * epsilon, atol=1e-37, equal_nan=True)


@on_row_backends
@every_kind
def test_gradcheck(kind: str, backend: str) -> None:
    """Both derivatives. Values keep away from where a derivative jumps."""
    tensors = [tensor.clamp(-1.5, 1.5) for tensor in inputs(kind, (3, 4), torch.float64)]
    tensors = [torch.where((x.abs() < 0.1) | ((x.abs() - LIMIT).abs() < 0.1), 0.4, x) for x in tensors]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with use_backend(backend):
        assert torch.autograd.gradcheck(PUBLIC[kind], tensors)
        assert torch.autograd.gradgradcheck(PUBLIC[kind], tensors)
        if kind != "relu2":
            for layout in LAYOUTS:
                packed = torch.cat(tensors, -1).detach().requires_grad_()
                function = lambda x: glu_packed(x, kind, layout, LIMIT)  # noqa: B023, E731
                assert torch.autograd.gradcheck(function, packed)
                assert torch.autograd.gradgradcheck(function, packed)
            one = tensors[0].detach()
            assert torch.autograd.gradgradcheck(lambda up: PUBLIC[kind](one, up), tensors[1:])
            assert torch.autograd.gradgradcheck(lambda x: PUBLIC[kind](x, x), tensors[:1])


@every_kind
def test_transforms(kind: str) -> None:
    tensors, grad = inputs(kind, (3, 4), torch.float64), values((3, 4), 30, dtype=torch.float64)

    def loss(function: Any) -> Any:
        return lambda *tensors: (function(*tensors) * grad).sum()

    ours, theirs = loss(PUBLIC[kind]), loss(FORMULAE[kind])
    torch.testing.assert_close(torch.func.grad(ours)(*tensors), torch.func.grad(theirs)(*tensors))
    torch.testing.assert_close(torch.func.vmap(PUBLIC[kind])(*tensors), FORMULAE[kind](*tensors))
    tangents = tuple(torch.ones_like(tensor) for tensor in tensors)
    torch.testing.assert_close(
        torch.func.jvp(ours, tuple(tensors), tangents), torch.func.jvp(theirs, tuple(tensors), tangents)
    )


@needs_native
def test_compile() -> None:
    """One graph, with the eager results."""
    torch._dynamo.reset()
    x, grad = values((4, 60), 31).requires_grad_(), values((4, 30), 32)

    def function(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        y = fusedopt.swiglu(gate, up) + fusedopt.relu2(gate) + fusedopt.swiglu_packed(x, "interleaved")
        return fusedopt.swiglu_oai(y, fusedopt.geglu(gate, up), 1.0)

    found, expected = torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x)
    assert_same_bits(found, expected)
    torch.testing.assert_close(gradients(found, (x,), (grad,)), gradients(expected, (x,), (grad,)))


@on_row_backends
def test_operators(backend: str) -> None:
    gate, up = (tensor.requires_grad_() for tensor in inputs("swiglu", (3, 8), torch.float32))
    grad = values((3, 8), 33)
    with use_backend(backend):
        for arguments in ((gate, up, "swiglu", 0.0), (gate, None, "relu2", 0.0), (gate, up[..., :], "swiglu_oai", 1.0)):
            torch.library.opcheck(torch.ops.fusedopt.glu.default, arguments)
            plain = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
            torch.library.opcheck(torch.ops.fusedopt.glu_backward.default, (grad, *plain))


def test_what_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    gate, up = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fusedopt.swiglu(gate, up)
    assert not HAS_NATIVE or [tensor.numel() for tensor in kept] == [128, 128]


@needs_native
def test_backends() -> None:
    x = torch.empty(3, 6, device="meta")
    assert fusedopt.swiglu(x, x).is_meta and fusedopt.swiglu_packed(x).shape == (3, 3)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="backend='cpu' cannot run swiglu: a tensor is on meta"):
        fusedopt.swiglu(x, x)


def test_bad_input() -> None:
    x = torch.randn(3, 6)
    for call, message in (
        (lambda: fusedopt.swiglu(x, x[:1]), r"gate has shape \(3, 6\), and up \(1, 6\)"),
        (lambda: fusedopt.geglu(x, x, "erf"), "approximate='erf': choose 'none' or 'tanh'"),
        (lambda: fusedopt.swiglu_packed(x, "rows"), "layout='rows': choose one of halves, interleaved"),
        (lambda: fusedopt.swiglu_packed(x[:, :5]), r"x has shape \(3, 5\); its last dimension must be even"),
        (lambda: fusedopt.swiglu_packed(torch.tensor(1.0)), "its last dimension must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- the elementary functions of csrc/elementary.h ---


@needs_native
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_elementary_functions(tmp_path: Path) -> None:
    """Their errors, over every thousandth float32, are what csrc/elementary.h says, on every instruction set."""
    source = Path(__file__).with_name("functions.cpp")
    bits = torch.arange(0, 2**32, 1021)
    x = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    functions = (
        (lambda x: torch.exp(-x.abs()), 1.0),
        (torch.sigmoid, 2.5),
        (lambda x: torch.sigmoid(-x.clamp(max=70)), 2.5),
        (torch.erf, 1.5),
    )
    first: dict[int, Tensor] = {}
    for name in native().instruction_sets():
        library = tmp_path / f"{name}.so"
        flags = native().kernel_flags()[name].split()
        subprocess.run(["c++", *flags, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        evaluate = ctypes.CDLL(str(library)).evaluate
        for index, (exact, ulps) in enumerate(functions):
            y = torch.empty_like(x)
            evaluate(index, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
            if index in first:
                assert_same_bits(y, first[index])
                continue
            first[index] = y
            right = exact(x.double())
            rounded = right.float()
            finite = rounded.isfinite()
            assert_same_bits(y[~finite], rounded[~finite])
            size = rounded.abs()
            ulp = (torch.nextafter(size, size + torch.inf) - size).double()
            assert float(((y.double() - right).abs() / ulp)[finite].max()) <= ulps, exact
