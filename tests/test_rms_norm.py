"""rms_norm: against the model families' formulae in float64, on every kind of memory, and through autograd."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import GRAD_LAYOUTS, assert_same_bits, exchange_api, values
from row_ops import DTYPES, HAS_NATIVE, ROW_BACKENDS, SIZES, error, gradients, on_every_machine
from torch import Tensor
from torch.nn import functional as F

import fusedopt
from fusedopt._ops import CASTINGS
from fusedopt.backends import use_backend

on_row_backends = pytest.mark.parametrize("backend", ROW_BACKENDS)
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
pytestmark = pytest.mark.usefixtures("one_thread")


# Transcribed from transformers: LlamaRMSNorm, and Gemma3RMSNorm, whose 1.0 is the offset.
def llama(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    input_dtype = x.dtype
    hidden = x if x.dtype == torch.float64 else x.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + eps)
    return (offset + weight) * hidden.to(input_dtype)


def gemma(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    output = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    output = output * (offset + weight.to(wide.dtype))
    return output.type_as(x)


def plain(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)  # where torch on the CPU would round twice
    mean = (x * x).mean(-1, keepdim=True, dtype=wide).to(x.dtype)
    return x * torch.rsqrt((mean + eps).to(wide)).to(x.dtype) * (offset + weight)


FORMULAE = {"llama": llama, "gemma": gemma, "none": plain}


def inputs(rows: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> list[Tensor]:
    """x, residual, weight, gradient of the result, gradient of the sum."""
    shapes = ((rows, columns), (rows, columns), (columns,), (rows, columns), (rows, columns))
    dtypes = (dtype, dtype, weight_dtype or dtype, dtype, dtype)
    return [values(shape, 5, index, dtype=dt) for index, (shape, dt) in enumerate(zip(shapes, dtypes, strict=True))]


@on_row_backends
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, casting: str, columns: int, backend: str) -> None:
    """At most twice the error of torch's own operations in that dtype, or two epsilons; in float64, where the formula's
    own sums round too, eight."""
    least = 8.0 if dtype == torch.float64 else 2.0
    x, residual, weight, grad, grad_total = inputs(3, columns, dtype)
    offset = 1.0 if casting == "gemma" else 0.0

    def run(function: Any, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        total = leaves[0] + leaves[1]
        y = function(total, leaves[2], 1e-5, offset)
        found = gradients((y, total), leaves, (grad.to(y.dtype), grad_total.to(total.dtype)))
        return [y.detach(), *found]

    # The sum is rounded once, and that is what is normalized: so it is in the exact results.
    total = (x + residual).double()
    exact = run(FORMULAE[casting], total, torch.zeros_like(total), weight.double())
    theirs = run(FORMULAE[casting], x, residual, weight)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    with use_backend(backend):
        y, summed = fusedopt.rms_norm(leaves[0], leaves[2], 1e-5, residual=leaves[1], offset=offset, casting=casting)
        ours = [y.detach(), *gradients((y, summed), leaves, (grad, grad_total))]
    assert_same_bits(summed.detach(), x + residual)
    for name, mine, other, right in zip(("y", "x", "residual", "weight"), ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype == dtype
        if other.isnan().any():  # of float16, a square that underflows has no inverse root
            continue
        bound = max(least, 2 * error(other, right))
        if columns == 1 and name in ("x", "residual") and dtype in (torch.float32, torch.float64):
            bound = max(bound, 64.0)  # the difference of two equal terms of order 1, but for eps
        assert error(mine, right) <= bound, name


@on_row_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_roundings_fall(dtype: torch.dtype, backend: str) -> None:
    """The formulae's bits: sums of squares of small integers are exact in any order, so only an inverse root that is a
    unit off in float32 can tell, and that is lost in the rounding of all but a few products."""
    x = torch.randint(-8, 9, (50, 256), generator=torch.Generator().manual_seed(1)).to(dtype)
    for weight_dtype in (dtype, torch.float32):
        weight = values((256,), 17, dtype=weight_dtype)
        for offset in (0.0, 0.25):
            found = {}
            for casting, formula in FORMULAE.items():
                with use_backend(backend):
                    found[casting] = fusedopt.rms_norm(x, weight, 1e-6, offset=offset, casting=casting)
                expected = formula(x, weight, 1e-6, offset)
                assert float((found[casting] != expected).float().mean()) < 0.002, casting
            for a, b in itertools.combinations(found.values(), 2):
                assert float((a.float() != b.float()).float().mean()) > 0.02


@needs_native
@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(dtype: torch.dtype, casting: str) -> None:
    """For any instruction set, number of threads and way of cutting the batch."""
    for rows, columns in ((300, 257), (3, 6_001), (1, 7), (70, 64)):
        x, residual, weight, grad, grad_total = inputs(rows, columns, dtype)

        def run() -> list[Tensor]:
            leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]  # noqa: B023
            y, total = fusedopt.rms_norm(leaves[0], leaves[2], residual=leaves[1], offset=0.5, casting=casting)
            return [y.detach(), total.detach(), *gradients((y, total), leaves, (grad, grad_total))]  # noqa: B023

        first, *others = on_every_machine(run)
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                assert_same_bits(mine, theirs)
        parts = [fusedopt.rms_norm(part, weight, offset=0.5, casting=casting) for part in (x + residual).split(2)]
        assert_same_bits(torch.cat(parts), first[0])
        with exchange_api(False):
            assert_same_bits(run()[0], first[0])


@on_row_backends
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_layouts(layout: str, backend: str) -> None:
    """Any strides give what contiguous tensors do, and nothing of the caller's changes."""
    lay = GRAD_LAYOUTS[layout]
    for shape in ((6, 600), (2, 3, 4, 130)):
        base = [lay(values(shape, 6, index)) for index in range(4)]
        weight = lay(values(shape[-1:], 7))
        before = [tensor.clone() for tensor in (*base, weight)]

        def run(tensors: list[Tensor]) -> list[Tensor]:
            leaves = [tensors[0].detach(), tensors[1].detach(), tensors[4].detach()]
            for leaf in leaves:
                leaf.requires_grad_()
            y, total = fusedopt.rms_norm(leaves[0], leaves[2], residual=leaves[1])
            return [y.detach(), total.detach(), *gradients((y, total), leaves, tensors[2:4])]

        with use_backend(backend):
            strided = run([*base, weight])
            contiguous = run([tensor.resolve_neg().contiguous() for tensor in (*base, weight)])
        for mine, theirs in zip(strided, contiguous, strict=True):
            if backend == "cpu":
                assert_same_bits(mine, theirs)
            else:  # torch's reductions depend on strides
                torch.testing.assert_close(mine, theirs)
        for tensor, old in zip((*base, weight), before, strict=True):
            assert_same_bits(tensor, old)


@on_row_backends
@pytest.mark.parametrize("shape", [(0, 7), (7,), (2, 0, 7), (1, 1, 7), (3, 0)])
def test_awkward_shapes(shape: tuple[int, ...], backend: str) -> None:
    x, weight = values(shape, 8).requires_grad_(), values(shape[-1:], 9).requires_grad_()
    with use_backend(backend):
        y = fusedopt.rms_norm(x, weight, 1e-5)
        found = gradients(y, (x, weight), (torch.ones_like(y),))
    torch.testing.assert_close(y, llama(x, weight, 1e-5))
    expected = gradients(llama(x, weight, 1e-5), (x, weight), (torch.ones_like(y),))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.0, 1e4])
def test_values_that_are_not_normal(eps: float, dtype: torch.dtype) -> None:
    """NaN, infinities and zeros come out where the reference has them, and stay in their rows."""
    x = values((8, 700), 10, dtype=dtype)
    x[1], x[2, 3], x[3, 4], x[4] = 0, torch.nan, -torch.inf, 1e-30
    weight, grad = values((700,), 11, dtype=dtype), values((8, 700), 12, dtype=dtype)
    found = []
    for backend in ("cpu", "eager"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = fusedopt.rms_norm(leaf, weight, eps)
            found.append((y.detach(), *gradients(y, (leaf,), (grad,))))
    for mine, theirs in zip(*found, strict=True):
        kept = [0, 5, 6, 7] if eps == 0 else [0, 1, 4, 5, 6, 7]
        assert mine[kept].isfinite().all() and mine[2].isnan().all()
        eps_of_dtype = torch.finfo(dtype).eps
        torch.testing.assert_close(mine[kept], theirs[kept], rtol=16 * eps_of_dtype, atol=16 * eps_of_dtype)
    assert_same_bits(found[0][0][1:4], found[1][0][1:4])


@on_row_backends
@pytest.mark.parametrize("casting", CASTINGS)
def test_mixed_dtypes(casting: str, backend: str) -> None:
    """The dtypes of the formulae, and their values to two epsilons of the coarsest dtype."""
    for dtype, weight_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ):
        x, _, weight, *_ = inputs(4, 300, dtype, weight_dtype)
        x.requires_grad_()
        weight.requires_grad_()
        eps = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
        with use_backend(backend):
            y = fusedopt.rms_norm(x, weight, offset=0.25, casting=casting)
            expected = FORMULAE[casting](x, weight, 1e-6, 0.25)
            assert y.dtype == expected.dtype
            torch.testing.assert_close(y, expected, rtol=4 * eps, atol=4 * eps)
            for mine, leaf in zip(gradients(y, (x, weight), (torch.ones_like(y),)), (x, weight), strict=True):
                assert mine.dtype == leaf.dtype
            for out_dtype in DTYPES:
                cast = fusedopt.rms_norm(x, weight, offset=0.25, casting=casting, out_dtype=out_dtype)
                assert_same_bits(cast, y.to(out_dtype))
                assert gradients(cast, (x,), (torch.ones_like(cast),))[0].dtype == dtype


@on_row_backends
@pytest.mark.parametrize("casting", CASTINGS)
def test_without_a_weight(casting: str, backend: str) -> None:
    x = values((4, 300), 13).requires_grad_()
    ones = torch.ones(300)
    with use_backend(backend):
        y = fusedopt.rms_norm(x, offset=3.0, casting=casting)  # added to a weight, of which there is none
        expected = fusedopt.rms_norm(x, ones, casting=casting)
        grad = values((4, 300), 14)
        assert_same_bits(y, expected)
        assert_same_bits(gradients(y, (x,), (grad,))[0], gradients(expected, (x,), (grad,))[0])


@on_row_backends
def test_gradients_of_either_result(backend: str) -> None:
    x, residual, weight, grad, grad_total = inputs(4, 300, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    with use_backend(backend):
        y, total = fusedopt.rms_norm(x, weight, residual=residual)
        both = gradients((y, total), leaves, (grad, grad_total))
        y, total = fusedopt.rms_norm(x, weight, residual=residual)
        of_y = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        of_total = torch.autograd.grad(total, leaves, grad_total, allow_unused=True)
    for index in (0, 1):
        torch.testing.assert_close(of_y[index] + of_total[index], both[index])
        assert_same_bits(of_total[index], grad_total)
    assert of_total[2] is None
    assert_same_bits(of_y[2], both[2])


@on_row_backends
def test_a_residual_of_another_dtype(backend: str) -> None:
    x, residual, weight = values((4, 300), 1, dtype=torch.bfloat16), values((4, 300), 2), values((300,), 3)
    with use_backend(backend):
        y, total = fusedopt.rms_norm(x, weight, residual=residual)
        assert_same_bits(total, x + residual)
        assert_same_bits(y, fusedopt.rms_norm(x + residual, weight))


@on_row_backends
def test_nothing_of_the_callers_changes(backend: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(4, 300, torch.float32)]
    before = [tensor.detach().clone() for tensor in leaves]
    with use_backend(backend):
        y, total = fusedopt.rms_norm(leaves[0], leaves[2], residual=leaves[1])
        first = torch.autograd.grad((y, total), leaves[:3], leaves[3:], retain_graph=True)
        second = torch.autograd.grad((y, total), leaves[:3], leaves[3:])
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    for tensor, old in zip(leaves, before, strict=True):
        assert_same_bits(tensor, old)


@needs_native
def test_what_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(128)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fusedopt.rms_norm(x, weight)
    assert sorted(tensor.numel() for tensor in kept) == [64, 128, 64 * 128]


@on_row_backends
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("casting", CASTINGS)
def test_gradcheck(casting: str, offset: float, backend: str) -> None:
    """Both derivatives, with and without a residual and a weight."""
    x, residual, weight, *_ = (tensor.requires_grad_() for tensor in inputs(3, 5, torch.float64))

    def function(x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None) -> Any:
        return fusedopt.rms_norm(x, weight, 1e-2, residual=residual, offset=offset, casting=casting)

    with use_backend(backend):
        for arguments in ((x,), (x, weight), (x, weight, residual), (x, None, residual)):
            assert torch.autograd.gradcheck(function, arguments)
            assert torch.autograd.gradgradcheck(function, arguments)


@on_row_backends
def test_transforms(backend: str) -> None:
    """torch.func and forward-mode AD see through it."""
    x, _, weight, grad, _ = inputs(4, 30, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (fusedopt.rms_norm(x, weight) * grad).sum()

    def expected(x: Tensor) -> Tensor:
        return (llama(x, weight, 1e-6) * grad).sum()

    if backend == "cpu":  # asked for by name it must run, and it cannot
        with use_backend("cpu"), pytest.raises(RuntimeError, match="backend='cpu' cannot run rms_norm: torch.func"):
            torch.func.grad(loss)(x)
        return
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(expected)(x))
    torch.testing.assert_close(torch.func.hessian(loss)(x[:1]), torch.func.hessian(expected)(x[:1]))
    torch.testing.assert_close(torch.func.vmap(fusedopt.rms_norm, in_dims=(0, None))(x, weight), llama(x, weight, 1e-6))
    tangents = torch.func.jvp(loss, (x,), (grad,)), torch.func.jvp(expected, (x,), (grad,))
    torch.testing.assert_close(*tangents)
    traced = torch.jit.trace(lambda x: fusedopt.rms_norm(x, weight), x)
    torch.testing.assert_close(traced(2 * x), llama(2 * x, weight, 1e-6))


def test_tensors_that_outlive_a_transform() -> None:
    """What torch.func wraps a tensor in may be kept by the caller; it has no memory of its own."""
    kept: list[Tensor] = []
    x, weight = values((4, 30), 1), values((30,), 2).requires_grad_()
    torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
    for result in (fusedopt.rms_norm(kept[0], weight), fusedopt.swiglu(kept[0], weight.expand(4, 30))):
        (grad,) = gradients(result, (weight,), (torch.ones_like(x),))
        assert grad.isfinite().all()
    torch.testing.assert_close(fusedopt.rms_norm(kept[0], weight), fusedopt.rms_norm(x, weight))


@needs_native
def test_compile() -> None:
    """One graph with the eager results; compiled again at most once for another eps, as torch does for any number."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    x, residual, weight, grad, grad_total = inputs(4, 300, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]

    def function(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        y, total = fusedopt.rms_norm(2 * x, weight, eps, residual=residual)
        return fusedopt.rms_norm(y, offset=1.0), total

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for eps in (1e-6, 1e-5, 1e-3, 1e-2):
        found, expected = compiled(*leaves, eps), function(*leaves, eps)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same_bits(mine, theirs)
        pairs = zip(*(gradients(of, leaves, (grad, grad_total)) for of in (found, expected)), strict=True)
        for mine, theirs in pairs:
            assert_same_bits(mine, theirs)
    assert counter.frame_count <= 2


@on_row_backends
def test_operators(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight, grad, grad_total = inputs(4, 30, dtype)
        for tensor in (x, residual, weight):
            tensor.requires_grad_()
        with use_backend(backend):
            eps = torch.full((), 1e-6, dtype=torch.float64)
            plainest = (x, None, None, eps, 0.0, "llama", None)
            for arguments in (plainest, (x, weight, residual, eps, 1.0, "gemma", torch.float32)):
                torch.library.opcheck(torch.ops.fusedopt.rms_norm.default, arguments)
            rstd = torch.rand(4)
            for more in ((None, x.detach(), None), (grad_total, x.detach(), weight.detach())):
                arguments = (grad, *more, rstd, 0.0, "llama", more[2] is not None)
                torch.library.opcheck(torch.ops.fusedopt.rms_norm_backward.default, arguments)


@needs_native
def test_backends() -> None:
    """What the native module cannot reach runs the reference, unless it was asked for by name."""

    class Own(Tensor):
        pass

    weight = torch.randn(6)
    for x in (torch.randn(3, 6).as_subclass(Own), torch.empty(3, 6, device="meta")):
        here = weight.to(x.device)
        assert type(fusedopt.rms_norm(x, here)) is type(x) and fusedopt.rms_norm(x, here).device == x.device
        with use_backend("cpu"), pytest.raises(RuntimeError, match="backend='cpu' cannot run rms_norm: a tensor is"):
            fusedopt.rms_norm(x, here)


def test_autocast_changes_nothing() -> None:
    x, weight = values((3, 6), 1, dtype=torch.bfloat16), values((6,), 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = fusedopt.rms_norm(x, weight)
    assert y.dtype == torch.float32
    assert_same_bits(y, fusedopt.rms_norm(x, weight))


def test_bad_input() -> None:
    x, weight = torch.randn(3, 6), torch.randn(6)
    for arguments, message in (
        (dict(x=torch.tensor(1.0)), "x has no dimensions"),
        (dict(weight=torch.randn(5)), r"weight has shape \(5,\); x of shape \(3, 6\) wants \(6,\)"),
        (dict(residual=torch.randn(6)), r"residual has shape \(6,\), and x \(3, 6\)"),
        (dict(casting="float"), "casting='float': choose one of llama, gemma, none"),
    ):
        with pytest.raises(ValueError, match=message):
            fusedopt.rms_norm(**{"x": x, "weight": weight, **arguments})
    with pytest.raises(ValueError, match="casting='float'"):
        fusedopt.RMSNorm(6, casting="float")


@on_row_backends
def test_module(backend: str) -> None:
    """In the place of torch.nn.RMSNorm, whose checkpoints it loads."""
    theirs = torch.nn.RMSNorm(300, eps=1e-5)
    torch.nn.init.normal_(theirs.weight)
    ours = fusedopt.RMSNorm(300, eps=1e-5)
    assert_same_bits(ours.weight.detach(), torch.ones(300))
    ours.load_state_dict(theirs.state_dict())
    x = values((2, 3, 300), 15)
    with use_backend(backend):
        torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))
        y, total = ours(x, x)
        assert_same_bits(total, x + x)
        assert_same_bits(y, ours(x + x))
    assert not fusedopt.RMSNorm(4, offset=1.0, dtype=torch.bfloat16).weight.any()
    assert fusedopt.RMSNorm(4, elementwise_affine=False).state_dict() == {}
    assert fusedopt.RMSNorm(4, device="meta").weight.is_meta
    torch.testing.assert_close(fusedopt.RMSNorm(300, 1e-5, False)(x), F.rms_norm(x, (300,), eps=1e-5))
    assert "300, eps=1e-05" in repr(ours)
