"""`orthogonalize`: against the polynomial of the singular values in float64, and the schedules' bands."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, needs_torchs_muon
from steps import USABLE
from torch import Tensor

import fusedopt
from fusedopt import _orthogonalize, orthogonalize
from fusedopt._matrix import TorchProducts, Workspace
from fusedopt._orthogonalize import LARGEST_WORKSPACE, METHODS, NORMS, newton_schulz, parts, plan
from fusedopt._schedules import (
    SCHEDULES,
    coefficients_of,
    restarts_in_float16,
    restarts_with_bfloat16_factors,
    singular_value_after,
)
from fusedopt.backends import native

CPU = torch.device("cpu")
BACKENDS = [name for name in USABLE if name in ("cpu", "eager")]
on_both = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(64, 64), (33, 100), (100, 33), (1, 50), (50, 1), (1, 1), (2, 3, 20, 45), (3, 45, 20), (530, 70), (70, 530)]


@functools.cache
def matrix(shape: tuple[int, ...], seed: int = 0, smallest: float = 1e-3) -> Tensor:
    """In float64, with singular values from `smallest` to 1."""
    generator = torch.Generator().manual_seed(seed)
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64, generator=generator), full_matrices=False)
    return u * torch.logspace(0, torch.tensor(smallest).log10().item(), s.shape[-1], dtype=torch.float64) @ v


def expected(g: Tensor, steps: Any, norm: str, eps: float = 1e-20) -> Tensor:
    """U f(S / norm) V^T, f being the steps."""
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    size = s.norm(dim=-1, keepdim=True) if norm == "frobenius" else (s**4).sum(-1, keepdim=True) ** 0.25
    return u * singular_value_after(steps, s / size.clamp(min=eps)).unsqueeze(-2) @ v  # type: ignore[arg-type]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest singular value, which is near 1."""
    return (a.double() - b.double()).abs().max().item() if b.numel() else 0.0


def amplification(steps: Any) -> float:
    """The largest sum, over singular values from 0.001 to 1, of what errors before each step grow to by the last."""
    worst = 0.0
    for index in range(2001):
        value, slopes = 1e-3 * 1e3 ** (index / 2000), []
        for a, b, c in steps:
            slopes.append(abs(a + 3 * b * value**2 + 5 * c * value**4))
            value = singular_value_after([(a, b, c)], value)
        worst = max(worst, sum(math.prod(slopes[step:]) for step in range(len(slopes))))
    return worst


# --- the iteration ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", SCHEDULES)
def test_float64(name: str, method: str, norm: str) -> None:
    """Rounding is amplified by the steps' slopes at 0 squared, at most 8.3 * 4.1 * 3.9 * 3.3 * 2.3 squared: 1e6."""
    for index, shape in enumerate(SHAPES):
        g = matrix(shape, index)
        before = g.clone()
        result = orthogonalize(g, coefficients=name, method=method, norm=norm)
        assert distance(result, expected(g, coefficients_of(name, 5), norm)) < 1e6 * 10 * torch.finfo(g.dtype).eps
        assert torch.equal(g, before) and result.dtype == g.dtype


@on_both
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", SCHEDULES)
def test_float32(name: str, method: str, norm: str, backend: str) -> None:
    """Sums of up to 530 terms are off by their root in epsilons at most; later steps amplify that by their slopes.

    Of the smallest singular value, 0.001, X X^T has the square, of which an epsilon is a tenth; an element of the
    result has a fifth of that.
    """
    limit = 20 * torch.finfo(torch.float32).eps * amplification(coefficients_of(name, 5))
    if method == "gram":
        limit = max(limit, 2e-2)
    for index, shape in enumerate(SHAPES):
        g = matrix(shape, index).float()
        with fusedopt.use_backend(backend):
            result = orthogonalize(g, coefficients=name, method=method, norm=norm, dtype=torch.float32)
        assert distance(result, expected(g, coefficients_of(name, 5), norm)) < limit


@needs_torchs_muon
@on_both
@pytest.mark.parametrize("method", METHODS)
def test_default_dtype_is_as_near_as_torchs(method: str, backend: str) -> None:
    """Whatever it is: torch rounds everything to bfloat16, here it is factors at most; twice as far by chance.

    And 0.03 for a matrix of one row, which roundings of 2 ** -9 in five steps with slopes up to 3 put off as a whole.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz

    for index, shape in enumerate(shape for shape in SHAPES if len(shape) == 2):
        g = matrix(shape, index, smallest=0.1).float()
        steps = coefficients_of("jordan", 5)
        wanted = expected(g, steps, "frobenius")
        theirs = _zeropower_via_newtonschulz(g, steps[0], 5, 1e-7)
        with fusedopt.use_backend(backend):
            ours = orthogonalize(g, method=method, norm="frobenius")
        errors = [(result.double() - wanted).norm().item() for result in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 0.03


@on_both
def test_strided_and_other_dtypes(backend: str) -> None:
    g = matrix((40, 90)).float()
    with fusedopt.use_backend(backend):
        whole = orthogonalize(g, dtype=torch.float32)
        padded = torch.zeros(80, 91)[::2, 1:].copy_(g)
        assert distance(orthogonalize(padded, dtype=torch.float32), whole) < 1e-5
        assert distance(orthogonalize(g.mT.contiguous().mT, dtype=torch.float32), whole) < 1e-5
        assert distance(orthogonalize(g.mT, dtype=torch.float32), whole.mT) < 1e-5
        for dtype in (torch.bfloat16, torch.float16):
            narrow = orthogonalize(g.to(dtype), dtype=torch.float32)
            wanted = orthogonalize(g.to(dtype).float(), dtype=torch.float32)
            assert narrow.dtype == dtype and distance(narrow, wanted) < torch.finfo(dtype).eps


@on_both
@pytest.mark.parametrize("method", METHODS[1:])
def test_any_magnitude(method: str, backend: str) -> None:
    """Nothing over- or underflows on the way; below eps a matrix counts as small."""
    g = matrix((40, 90), smallest=0.1).float()
    with fusedopt.use_backend(backend):
        wanted = orthogonalize(g, method=method, dtype=torch.float32)
        for scale in (2.0**-60, 2.0**-40, 2.0**40, 2.0**120):
            assert distance(orthogonalize(g * scale, method=method, dtype=torch.float32), wanted) < 1e-4, scale
        assert not orthogonalize(torch.zeros(40, 90), method=method).any()
        for norm in NORMS:
            small = orthogonalize(g, method=method, norm=norm, eps=100.0, dtype=torch.float32)
            assert distance(small, expected(g, coefficients_of("jordan", 5), norm, eps=100.0)) < 1e-4
            tiny = orthogonalize(g * 2.0**-100, method=method, norm=norm, dtype=torch.float32)
            assert tiny.abs().max() < 1e-6
        mixed = torch.stack([g * 2.0**-60, g, torch.zeros_like(g), g * 2.0**100])
        results = orthogonalize(mixed, method=method, dtype=torch.float32)
        assert distance(results[[0, 1, 3]], wanted.expand(3, -1, -1)) < 1e-4 and not results[2].any()


@on_both
def test_deficient_rank_and_nan(backend: str) -> None:
    g = matrix((50, 80)).float().clone()
    g[:, 10:] = 0
    with fusedopt.use_backend(backend):
        for method in METHODS[1:]:
            result = orthogonalize(g, method=method, dtype=torch.float32)
            assert distance(result, expected(g, coefficients_of("jordan", 5), "schatten4")) < 4e-3
        g[3, 3] = float("nan")
        both = orthogonalize(torch.stack([g, matrix((50, 80)).float()]), dtype=torch.float32)
        assert both[0].isnan().all() and both[1].isfinite().all()


def test_no_elements() -> None:
    for shape in ((0, 5), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4)):
        assert orthogonalize(torch.empty(shape)).shape == shape


@on_both
def test_band(backend: str) -> None:
    """Five steps of Jordan's take singular values from 0.01 to 1 of the norm to 0.68 ... 1.14."""
    u, _, v = torch.linalg.svd(torch.randn(96, 96, generator=torch.Generator().manual_seed(1)))
    s = torch.logspace(-2, 0, 96)
    with fusedopt.use_backend(backend):
        # A norm that counts as 1 leaves these as what the steps see.
        size = s.norm().item()
        after = torch.linalg.svdvals(orthogonalize(u * s @ v / size, norm="frobenius", dtype=torch.float32))
    seen = (s / size).tolist()
    wanted = [singular_value_after(coefficients_of("jordan", 5), value) for value in seen]
    assert after.sort().values.tolist() == pytest.approx(sorted(wanted), abs=1e-3)
    assert all(0.68 < found < 1.14 for found, value in zip(wanted, seen, strict=True) if value > 0.01)


# --- schedules ---

BANDS = {  # from 0.01 to 1, after 5 steps; from the literature's own coefficients
    "jordan": (0.682, 1.1345),
    "polar_express": (0.870, 1.124),
    "you": (0.977, 1.145),
    "cans": (0.860, 1.120),
    "cubic5": (0.774, 1.3005),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_keeps_its_band(name: str) -> None:
    steps = coefficients_of(name, 5)
    found = [singular_value_after(steps, 0.01 * 100 ** (index / 5000)) for index in range(5001)]
    low, high = BANDS[name]
    assert low - 1e-3 < min(found) and max(found) < high + 1e-3


def test_polar_express_converges() -> None:
    found = [singular_value_after(coefficients_of("polar_express", 10), 1e-3 * 10 ** (k / 100)) for k in range(301)]
    assert max(abs(value - 1) for value in found) < 1e-12


def test_steps_beyond_a_schedule_are_refused() -> None:
    for name, schedule in SCHEDULES.items():
        assert len(coefficients_of(name, None)) == len(schedule.steps)
        if schedule.repeats:
            assert coefficients_of(name, 12)[-1] == schedule.steps[-1]
        else:
            with pytest.raises(ValueError, match=r"steps=6: .* at most 5 steps, and repeated they would flip signs"):
                coefficients_of(name, 6)
    with pytest.raises(ValueError, match="steps=3"):
        orthogonalize(torch.ones(2, 2), coefficients=[(1.5, -0.5, 0.0)], steps=3)


def test_restarts() -> None:
    """Where the authors of the Gram form restart, for their coefficients; float32 needs none."""
    in_float16 = {name: restarts_in_float16(coefficients_of(name, 5)) for name in SCHEDULES}
    assert in_float16 == {"polar_express": (2,), "you": (2,), "jordan": (3,), "cans": (1,), "cubic5": ()}
    factors = {name: restarts_with_bfloat16_factors(coefficients_of(name, 5)) for name in SCHEDULES}
    assert factors == {"polar_express": (2, 4), "you": (2, 4), "jordan": (3,), "cans": (2, 4), "cubic5": (3,)}
    assert restarts_with_bfloat16_factors(coefficients_of("jordan", 10)) == (3, 5, 7, 9)
    assert restarts_with_bfloat16_factors(coefficients_of("jordan", 1)) == ()
    steps = coefficients_of("you", 5)
    how = plan(64, 512, CPU, steps, torch.float16, "gram", "eager")
    assert [len(part) for part in how.segments(steps)] == [2, 3]
    assert len(how._replace(dtype=torch.float32).segments(steps)) == 1


def spectra(n: int) -> dict[str, Tensor]:
    few = torch.arange(n) < 4
    return {
        "log2": torch.logspace(0, -2, n),
        "log4": torch.logspace(0, -4, n),
        "one": torch.where(torch.arange(n) < 1, 1.0, 1e-2),
        "few": torch.where(few, 1.0, 1e-3),
        "half": torch.where(torch.arange(n) < n // 2, 1.0, 1e-3),
    }


@pytest.mark.skipif("cpu" not in BACKENDS or not native().has_bfloat16_matmul, reason="needs AVX512-BF16")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_gram_with_bfloat16_factors_is_as_accurate_as_standard(name: str, norm: str) -> None:
    """Over all spectra; of a single one either may be the better."""
    steps = coefficients_of(name, 5)
    errors: dict[str, list[float]] = {"standard": [], "gram": []}
    for index, s in enumerate(spectra(96).values()):
        g = torch.randn(96, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        g = (u * s @ v).float()
        wanted = expected(g, steps, norm)
        for method, found in errors.items():
            with fusedopt.use_backend("cpu"):
                result = orthogonalize(g, coefficients=name, method=method, norm=norm, dtype=torch.bfloat16)
            found.append(((result.double() - wanted).norm() / wanted.norm()).item())
    assert sum(errors["gram"]) <= 1.25 * sum(errors["standard"])
    assert all(a <= 3 * b for a, b in zip(errors["gram"], errors["standard"], strict=True))


def test_gram_in_float16_by_restarts() -> None:
    """What 11 bits come to with them, measured by its authors as 0.04, and without them 0.4."""
    g = matrix((48, 192), smallest=1e-5).float()
    close = expected(g, steps := coefficients_of("polar_express", 5), "frobenius")
    how = plan(48, 192, CPU, steps, torch.float16, "gram", "eager")
    for segments, least, most in ((None, 0.0, 0.1), ([steps], 0.15, float("inf"))):
        chosen: Any = how if segments is None else _Segmented(how, segments)
        (found,) = newton_schulz([g[None]], steps, chosen, Workspace(), norm="frobenius", eps=1e-7, scales=[1.0])
        error = (found[0].double() - close).norm() / close.norm()
        assert least < error < most


class _Segmented:
    def __init__(self, how: Any, segments: Any) -> None:
        self.how, self.given = how, segments

    def segments(self, steps: Any) -> Any:
        return self.given

    def __getattr__(self, name: str) -> Any:
        return getattr(self.how, name)


# --- the plan ---


def test_plan() -> None:
    jordan = coefficients_of("jordan", 5)
    planned = functools.partial(plan, device=CPU, steps=jordan, backend="eager")
    assert planned(512, 512, dtype=torch.float32).method == "standard"
    assert planned(512, 768, dtype=torch.float32).method == "gram"
    assert planned(512, 512, dtype=torch.float16).method == "standard"
    assert planned(512, 4096, dtype=torch.float16).method == "gram"
    assert planned(4096, 512, dtype=torch.float16).method == "gram"
    assert planned(512, 4096, dtype=torch.bfloat16).method == "standard"
    assert "2.02 times" in planned(512, 4096, dtype=torch.float16).reason
    with pytest.raises(ValueError, match="method='gram' with dtype=torch.bfloat16: .* float16 or float32"):
        planned(512, 4096, dtype=torch.bfloat16, method="gram")
    if "cpu" in BACKENDS:
        # What is stored and summed is float32 there, so that bfloat16 factors do no harm.
        assert plan(512, 4096, CPU, jordan, backend="cpu").storage is torch.float32
        assert plan(512, 8192, CPU, jordan, backend="cpu").method == "gram"
        multiplies = native().has_bfloat16_matmul
        assert (plan(64, 64, CPU, jordan, backend="cpu").dtype is torch.bfloat16) == multiplies
    assert plan(64, 64, CPU, jordan, torch.float64).backend == "eager"


def test_one_step_is_the_same_in_both_forms() -> None:
    for aspect in (1, 3):
        how = plan(256, 256 * aspect, CPU, coefficients_of("jordan", 1), torch.float32, backend="eager")
        assert how.method == "standard" and "1.00 times" in how.reason


def test_parts_bound_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.empty(100, 1000, 3000, device="meta")
    sizes = [len(part) for part in parts(batch)]
    assert sum(sizes) == 100 and max(sizes) * (2 * 3_000_000 + 4 * 1_000_000) <= LARGEST_WORKSPACE
    assert len(parts(torch.empty(2, 40_000, 40_000, device="meta"))) == 2
    g = torch.stack([matrix((20, 30), seed) for seed in range(7)]).float()
    whole = orthogonalize(g, dtype=torch.float32)
    monkeypatch.setattr(_orthogonalize, "LARGEST_WORKSPACE", 6000)
    assert len(parts(g)) == 4
    assert_same_bits(orthogonalize(g, dtype=torch.float32), whole)


@on_both
def test_a_matrix_does_not_depend_on_its_batch(backend: str) -> None:
    g = torch.stack([matrix((64, 200), seed) for seed in range(5)]).float()
    with fusedopt.use_backend(backend):
        for method in METHODS[1:]:
            whole = orthogonalize(g, method=method)
            for index in range(5):
                assert distance(orthogonalize(g[index], method=method), whole[index]) < 1e-5


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native module")
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g = matrix((130, 300)).float()
    whole = {method: orthogonalize(g, method=method) for method in METHODS[1:]}
    for threads, method in itertools.product((1, 2, 3), METHODS[1:]):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert_same_bits(orthogonalize(g, method=method), whole[method])


def test_symmetric_by_halves() -> None:
    """torch's products, where they are large enough to be halved, are the dense ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1100, 90, generator=generator)
    c = torch.randn(2, 1100, 1100, generator=generator)
    c = c + c.mT
    out = torch.full((2, 1100, 1100), float("nan"))
    TorchProducts().symmetric([x], [x.mT], [c], 0.5, 2.0, [out])
    # Of 90 products in float32, each rounded in another order.
    torch.testing.assert_close(out, 0.5 * c + 2.0 * x @ x.mT, rtol=0, atol=2e-4)
    TorchProducts().gram([x], [out])
    torch.testing.assert_close(out, x @ x.mT, rtol=0, atol=1e-4)


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"G": torch.ones(3)}, ValueError, r"G has shape \(3,\)"),
        ({"G": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "G is torch.int64"),
        ({"G": torch.ones(3, 3, dtype=torch.complex64)}, TypeError, "G is torch.complex64"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"steps": 100}, ValueError, "steps=100"),
        ({"coefficients": "muon"}, ValueError, "coefficients='muon': choose one of jordan"),
        ({"coefficients": [(1.0, 2.0)]}, ValueError, r"coefficients has \(1.0, 2.0\)"),
        ({"coefficients": [], "steps": None}, ValueError, "coefficients is empty"),
        ({"method": "qr"}, ValueError, "method='qr': choose one of auto"),
        ({"norm": "nuclear"}, ValueError, "norm='nuclear': choose one of schatten4"),
        ({"eps": 0.0}, ValueError, "eps=0.0: it must be greater than 0"),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonalize(**{"G": torch.ones(3, 3), **arguments})


def test_not_recorded() -> None:
    g = torch.randn(4, 4, requires_grad=True)
    assert not orthogonalize(g).requires_grad


def test_a_backend_that_cannot_says_why() -> None:
    g = torch.ones(3, 3, dtype=torch.float64)
    if "cpu" in BACKENDS:
        with fusedopt.use_backend("cpu"), pytest.raises(RuntimeError, match="cannot orthogonalize: it multiplies"):
            orthogonalize(g)
        with pytest.raises(RuntimeError, match="the matrix is on meta"):
            plan(3, 3, torch.device("meta"), (), backend="cpu")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot orthogonalize: it has no such operation"):
        plan(3, 3, CPU, (), backend="cuda")
