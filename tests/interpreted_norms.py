"""RMSNorm and gated linear units in Triton under its interpreter, against formulas in float64.

`test_triton.py` runs this file, as interpreted.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, pairwise, surroundings, values
from torch import Tensor

import fusedopt
from fusedopt.backends import interpreted
from fusedopt.kernels import rms_norm
from fusedopt.kernels.glu import glu_backward, glu_forward
from fusedopt.kernels.rms_norm import rms_norm_backward, rms_norm_forward

assert interpreted(), "set TRITON_INTERPRET=1"
np.seterr(all="ignore")  # the interpreter computes with NumPy, which warns of every NaN
pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-5
CASTINGS = ("llama", "gemma", "none")
FLOAT, HALF, BFLOAT, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def assert_within(found: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """As far apart as `bound` at most; NaN and infinity in the same places."""
    found = found.double()
    special = ~expected.isfinite()
    assert_same_bits(torch.where(special, found, 0.0), torch.where(special, expected, 0.0), what)
    wrong = ~special & ~((found - expected).abs() <= bound)
    assert not wrong.any(), f"{what}: {found[wrong][:3]} for {expected[wrong][:3]}"


# --- how tensors lie ---


def plain(x: Tensor) -> Tensor:
    return x.clone()


def padded_rows(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), 7.0, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def unaligned_rows(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def swapped_rows(x: Tensor) -> Tensor:
    """Two dimensions of rows, which no single stride reaches."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 2 else padded_rows(x)


def stepped(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 7.0)], -1).flatten(-2)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    return x[:1].clone().expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": plain,
    "padded": padded_rows,
    "unaligned": unaligned_rows,
    "swapped": swapped_rows,
    "stepped": stepped,
    "expanded": expanded,
}


def unchanged(*tensors: Tensor | None) -> Callable[[], None]:
    """A check that nothing was written to tensors or beside them."""
    given = [(t, t.clone(), surroundings(t)) for t in tensors if t is not None]

    def check() -> None:
        for tensor, before, beside in given:
            assert_same_bits(tensor, before)
            assert_same_bits(surroundings(tensor), beside)

    return check


# --- RMSNorm ---


def norm_case(case: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a case."""
    shape, x_dtype = (*case["rows"], case["columns"]), case["x"]
    place = LAYOUTS[case["layout"]]
    x = place(values(shape, 1, dtype=x_dtype))
    weight = None if case["weight"] is None else values(shape[-1:], 2, dtype=case["weight"])
    residual = None if case["residual"] is None else place(values(shape, 3, dtype=case["residual"]))
    natural = x_dtype if weight is None or case["casting"] == "gemma" else torch.promote_types(x_dtype, weight.dtype)
    grad_y = place(values(shape, 4, dtype=case["out"] or natural))
    grad_total = None if residual is None else place(values(shape, 5, dtype=x_dtype))
    return {"x": x, "weight": weight, "residual": residual, "grad_y": grad_y, "grad_total": grad_total}


NORM_AXES: dict[str, Any] = {
    "columns": [1, 2, 7, 64, 255, 257, 1024],
    "rows": [(3,), (37,), (2, 3), ()],
    "x": [FLOAT, BFLOAT, HALF, DOUBLE],
    "weight": [FLOAT, None, BFLOAT, DOUBLE],
    "residual": [None, FLOAT, BFLOAT],
    "casting": CASTINGS,
    "offset": [0.0, 1.0, 0.3],
    "out": [None, FLOAT, BFLOAT],
    "layout": list(LAYOUTS),
}
LONG: list[dict[str, Any]] = [
    {"columns": n, "rows": (2,), "x": x, "weight": w, "residual": r, "casting": c, "offset": 1.0, "out": None,
     "layout": place}
    for n, x, w, r, c, place in (
        (5000, BFLOAT, FLOAT, BFLOAT, "llama", "padded"),
        (13000, BFLOAT, BFLOAT, None, "gemma", "plain"),
        (20000, FLOAT, FLOAT, FLOAT, "llama", "unaligned"),
        (33000, BFLOAT, None, BFLOAT, "none", "padded"),
    )
]  # fmt: skip


def case_id(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.mark.parametrize("case", pairwise(**NORM_AXES) + LONG, ids=case_id)
def test_rms_norm(case: dict[str, Any]) -> None:
    t, casting, offset = norm_case(case), case["casting"], case["offset"]
    x, weight, residual, grad_y, grad_total = t["x"], t["weight"], t["residual"], t["grad_y"], t["grad_total"]
    real = DOUBLE if DOUBLE in (x.dtype, case["weight"]) else FLOAT
    check = unchanged(x, weight, residual, grad_y, grad_total)
    y, total, rstd = rms_norm_forward(x, weight, residual, EPS, offset, casting, case["out"])
    assert y.is_contiguous() and (rstd.dtype, rstd.shape) == (real, x.shape[:-1])

    summed = x
    if residual is None:
        assert total is None
    else:
        summed = (x.to(real) + residual.to(real)).to(x.dtype)
        assert_same_bits(total, summed, "total")

    # Each term, product and partial sum of a sum of squares is off by half a unit at most; a chunk's sums come first.
    columns, s = x.shape[-1], summed.double()
    inverse = ((s * s).mean(-1) + EPS) ** -0.5
    depth = 16 + math.log2(columns)
    # "none" rounds squares, mean, sum and root, of which all but the last count half.
    slack = depth * eps_of(real) / 2 + (1.25 * eps_of(x.dtype) if casting == "none" else 0)
    assert_within(rstd, inverse, slack * inverse, "rstd")

    # From this 1 / RMS on, whose error is judged, every rounding has its place.
    root = rstd[..., None]
    normalized = summed.to(real) * root
    if casting == "gemma":
        expected = normalized if weight is None else normalized * (offset + weight.to(real))
        expected = expected.to(x.dtype)
    else:
        normalized = normalized.to(x.dtype)
        # On a CPU torch would round the offset itself.
        expected = normalized if weight is None else (weight.to(real) + offset).to(weight.dtype) * normalized
    assert_same_bits(y, expected.to(case["out"] or expected.dtype), "y")

    grad_x, grad_weight = rms_norm_backward(grad_y, grad_total, summed, weight, rstd, offset, casting)
    check()
    scale: Tensor | float = 1.0
    if weight is not None:
        scale = weight.to(real) + offset
        scale = (scale if casting == "gemma" else scale.to(weight.dtype)).double()
    g, root, added = grad_y.double() * scale, root.double(), 0.0 if grad_total is None else grad_total.double()
    products = g * s * root
    expected = root * (g - s * root * products.mean(-1, keepdim=True)) + added
    # The roundings are of numbers of these sizes.
    sizes = root * (g.abs() + (s * root).abs() * products.abs().mean(-1, keepdim=True)) + abs(added)
    tiny = torch.finfo(x.dtype).smallest_normal * eps_of(x.dtype)
    assert grad_x.dtype == x.dtype and grad_x.is_contiguous()
    bound = depth * eps_of(real) / 2 * sizes + 0.51 * eps_of(x.dtype) * expected.abs() + tiny
    assert_within(grad_x, expected, bound, "grad_x")
    if weight is None:
        assert grad_weight is None
        return
    alone, none = rms_norm_backward(grad_y, grad_total, summed, weight, rstd, offset, casting, wants_weight=False)
    assert none is None
    assert_same_bits(alone, grad_x)
    assert grad_weight is not None and grad_weight.dtype == weight.dtype
    terms = (grad_y.double() * normalized.double()).reshape(-1, columns)
    bound = (len(terms) + 2) * eps_of(real) / 2 * terms.abs().sum(0) + 0.51 * eps_of(weight.dtype) * terms.sum(0).abs()
    assert_within(grad_weight, terms.sum(0), bound, "grad_weight")


def test_awkward_values() -> None:
    """NaN and infinity stay in their rows; a row of zeros is normal."""
    x = values((6, 300), 1)
    x[1, 7], x[2, 299], x[3] = float("nan"), float("inf"), 0.0
    weight, grad_y = values((300,), 2), values((6, 300), 3)
    y, _, rstd = rms_norm_forward(x, weight, None, 1e-6, 0.0, "llama", None)
    expected = torch.nn.functional.rms_norm(x, (300,), weight, 1e-6)
    assert_same_bits(y.isnan(), expected.isnan())
    assert not y[3].any() and not y[2, :299].any() and y[2, 299].isnan()
    grad_x, grad_weight = rms_norm_backward(grad_y, None, x, weight, rstd, 0.0, "llama")
    assert grad_x[[0, 3, 4, 5]].isfinite().all() and grad_x[1].isnan().all()
    assert grad_weight is not None
    assert grad_weight[[7, 299]].isnan().all() and grad_weight[:7].isfinite().logical_not().all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 5)])
def test_empty_rows(shape: tuple[int, ...]) -> None:
    shape = (*shape, 0) if len(shape) == 1 else shape
    x, weight = torch.ones(shape), torch.ones(shape[-1])
    y, total, rstd = rms_norm_forward(x, weight, x, 1e-6, 0.0, "llama", None)
    assert total is not None and y.shape == total.shape == shape and rstd.shape == shape[:-1]
    grad_x, grad_weight = rms_norm_backward(y, total, total, weight, rstd, 0.0, "llama")
    assert grad_x.shape == shape and grad_weight is not None and not grad_weight.any()


def test_eps_in_double() -> None:
    """Of float64 eps is not rounded to float32."""
    x = torch.zeros(1, 4, dtype=DOUBLE)
    for eps in (0.1, 1e-300):
        _, _, rstd = rms_norm_forward(x, None, None, eps, 0.0, "llama", None)
        assert_within(rstd, torch.tensor([eps**-0.5], dtype=DOUBLE), 2 * eps_of(DOUBLE) * eps**-0.5, "rstd")


def test_every_rounding_of_none() -> None:
    """Two columns, of which sums are exact: the bits of torch's operations, one after the other."""
    x = values((300, 2), 1, dtype=BFLOAT)
    _, _, rstd = rms_norm_forward(x, None, None, EPS, 0.0, "none", None)
    mean = (x * x).float().sum(-1).div(2).to(BFLOAT)
    assert_same_bits(rstd, (mean + EPS).float().sqrt().reciprocal().to(BFLOAT).float())


@pytest.mark.parametrize(("groups", "rows", "columns"), [(2, 200, 64), (256, 70, 1100)])
def test_grad_weight_of_many_rows(groups: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows of a group, and more groups than are summed at once; wherever the rows lie."""
    monkeypatch.setattr(rms_norm, "GROUPS", groups)
    x, grad_y, weight = values((rows, columns), 1), values((rows, columns), 2), values((columns,), 3)
    rstd = (x.square().mean(-1) + EPS).rsqrt()
    _, found = rms_norm_backward(grad_y, None, x, weight, rstd, 0.0, "llama")
    terms = grad_y.double() * x.double() * rstd.double()[:, None]
    assert found is not None
    assert_within(found, terms.sum(0), rows / 2 * eps_of(FLOAT) * terms.abs().sum(0), "grad_weight")
    _, again = rms_norm_backward(padded_rows(grad_y), None, unaligned_rows(x), weight, rstd, 0.0, "llama")
    assert again is not None
    assert_within(again, terms.sum(0), rows / 2 * eps_of(FLOAT) * terms.abs().sum(0), "grad_weight")


# --- gated linear units ---

KINDS = ("swiglu", "geglu", "geglu_tanh", "reglu", "relu2", "swiglu_oai")
LIMIT = 1.5


def activation(x: Tensor, kind: str) -> Tensor:
    if kind == "geglu":
        return x * 0.5 * torch.erfc(-x / math.sqrt(2))
    if kind == "geglu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind in ("reglu", "relu2"):
        return torch.relu(x) ** (2 if kind == "relu2" else 1)
    return x / (1 + torch.exp(-(1.702 if kind == "swiglu_oai" else 1) * x))


def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    if kind == "swiglu_oai":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT) + 1
    return activation(gate, kind) * (1 if kind == "relu2" else up)


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, : x.shape[1] // 2].clone(), x[:, x.shape[1] // 2 :].clone()


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, ::2], x[:, 1::2]


def odd_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, 1::2], x[:, ::2]


def transposed(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = two(x)
    return gate.t().contiguous().t(), up


SPLITS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "two": two,
    "halves": halves,
    "pairs": pairs,
    "odd pairs": odd_pairs,
    "transposed": transposed,
}
GLU_AXES: dict[str, Any] = {
    "kind": KINDS,
    "dtype": [FLOAT, BFLOAT, HALF, DOUBLE],
    "split": list(SPLITS),
    "rows": [1, 3, 37],
    "columns": [1, 7, 64, 257, 1100],
}


@pytest.mark.parametrize("case", pairwise(**GLU_AXES), ids=case_id)
def test_glu(case: dict[str, Any]) -> None:
    kind, dtype, split = case["kind"], case["dtype"], SPLITS[case["split"]]
    packed = (values((case["rows"], 2 * case["columns"]), 1) * 4).to(dtype)
    gate, up = split(packed)
    grad_y = padded_rows(values(gate.shape, 2, dtype=dtype))
    check = unchanged(packed, gate, up, grad_y)
    given = None if kind == "relu2" else up
    y = glu_forward(gate, given, kind, LIMIT)
    grads = glu_backward(grad_y, gate, given, kind, LIMIT)
    check()
    if given is not None and case["split"] != "transposed":
        whole = torch.full_like(packed, 7.0)
        out = split(whole)
        filled = glu_backward(grad_y, gate, up, kind, LIMIT, out if out[0]._base is whole else None)
        for ours, expected in zip(filled, grads, strict=True):
            assert ours is not None and expected is not None
            assert_same_bits(ours, expected)
        assert out[0]._base is None or filled[0] is out[0] and filled[1] is out[1]
    check()

    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = glu(g, u, kind)
    exact.backward(grad_y.double())
    real = DOUBLE if dtype == DOUBLE else FLOAT
    # A few units of the sizes of what is added and multiplied: 1 + erf(x) is off by a unit of 1, an activation's
    # slope is a sum of numbers below 1 + |x|; 0.044715 x^3 in an exponent counts by its size, which is below 100.
    steep = 8 if kind != "geglu_tanh" else 100
    u1 = (up.double() + 1).abs() if kind == "swiglu_oai" else up.double().abs() if kind != "relu2" else torch.ones(())
    reach = 1 + gate.double().abs()
    tiny = torch.finfo(dtype).smallest_normal * eps_of(dtype)
    assert y.dtype == dtype and y.is_contiguous()

    def bound(size: Tensor, expected: Tensor) -> Tensor:
        return steep * eps_of(real) * size + 0.51 * eps_of(dtype) * expected.abs() + tiny

    power = 2 if kind == "relu2" else 1
    assert_within(y, exact.detach(), bound(reach**power * u1, exact), "y")
    assert g.grad is not None
    slope = reach * u1 * grad_y.double().abs()
    assert_within(grads[0], g.grad, bound(slope, g.grad), "grad_gate")
    if given is None:
        assert grads[1] is None
        return
    assert u.grad is not None and grads[1] is not None
    assert_within(grads[1], u.grad, bound(reach * grad_y.double().abs(), u.grad), "grad_up")


@pytest.mark.parametrize("kind", KINDS)
def test_far_values_of_glu(kind: str) -> None:
    """No overflow far from 0, where torch has none; NaN stays; and an error of two units, relative, near 0."""
    x = torch.tensor([-1e12, -3e4, -200.0, -89.0, -20.0, -1.0, -1e-8, -0.0, 1e-30, 1.0, 20.0, 89.0, 200.0, 1e12])
    gate = torch.stack([x, torch.full_like(x, float("nan"))])
    up = None if kind == "relu2" else torch.ones_like(gate)
    y, (grad, _) = glu_forward(gate, up, kind, 1e30), glu_backward(torch.ones_like(gate), gate, up, kind, 1e30)
    assert y[1].isnan().all() and (grad[1].isnan().all() or kind in ("reglu", "swiglu_oai"))  # as torch's
    exact = x.double().requires_grad_()
    expected = activation(exact, kind) * (2 if kind == "swiglu_oai" else 1)
    expected.sum().backward()
    assert exact.grad is not None
    # Below -87 an exponential counts as 0: of at most 200 times 2e-38.
    relative = 1.0 if kind == "geglu" else 8 * eps_of(FLOAT)  # 1 + erf(x) has no digits left below -5
    size = expected.detach().abs() * relative + 1e-35 + (2e-6 * (x > -30) if kind == "geglu" else 0)
    assert_within(y[0], expected.detach(), size * (20 if kind in ("geglu_tanh", "swiglu_oai") else 1), "y")
    assert_within(grad[0], exact.grad.nan_to_num(0.0), 1e-5 + 1e-6 * exact.grad.abs().nan_to_num(0.0), "grad")


@pytest.mark.parametrize("layout", ["plain", "swapped", "stepped"])
def test_glu_of_more_dimensions_and_dtypes(layout: str) -> None:
    gate, up = values((2, 3, 20), 1), LAYOUTS[layout](values((2, 3, 20), 2, dtype=BFLOAT))
    grad_y, flat = expanded(values((2, 3, 20), 3)), [gate.view(6, 20), up.float().reshape(6, 20)]
    assert_same_bits(glu_forward(gate, up, "swiglu", 0.0).view(6, 20), glu_forward(*flat, "swiglu", 0.0))
    expected = glu_backward(grad_y.reshape(6, 20), *flat, "swiglu", 0.0)
    assert expected[1] is not None
    out = swapped_rows(gate), swapped_rows(up)
    for given in (None, out):
        grads = glu_backward(grad_y, gate, up, "swiglu", 0.0, given)
        assert grads[1] is not None and (given is None or (grads[0] is out[0] and grads[1] is out[1]))
        assert_same_bits(grads[0].reshape(6, 20), expected[0])
        assert_same_bits(grads[1].reshape(6, 20), expected[1].to(BFLOAT))


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "reglu"])
def test_ends_of_glu(kind: str) -> None:
    gate = torch.tensor([[-3e38, 3e38]])
    one = torch.ones_like(gate)
    grad, _ = glu_backward(one, gate, one, kind, 0.0)
    assert_same_bits(glu_forward(gate, one, kind, 0.0), torch.tensor([[0.0, 3e38]]))
    assert_same_bits(grad, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_glu(shape: tuple[int, int]) -> None:
    x = torch.ones(shape)
    assert glu_forward(x, x, "swiglu", 0.0).shape == shape
    assert all(grad is not None and grad.shape == shape for grad in glu_backward(x, x, x, "swiglu", 0.0))


# --- the public functions ---


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: fusedopt.rms_norm(x, w, EPS),
        lambda x, w: sum(fusedopt.rms_norm(x, w, EPS, residual=x * 0.5, casting="gemma")),
        lambda x, w: fusedopt.swiglu(x * w, x),
        lambda x, w: fusedopt.swiglu_packed(x * w, "interleaved"),
        lambda x, w: fusedopt.relu2(x * w),
    ],
    ids=["rms_norm", "with a residual", "swiglu", "packed", "relu2"],
)
def test_public_functions_run_here(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """By this backend where asked for: the reference's results and gradients but for a few roundings of the largest."""
    found = []
    for backend in ("triton", "eager"):
        x, w = (values(shape, seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(((2, 3, 24), (24,))))
        with fusedopt.use_backend(backend):
            y = call(x, w)
            grads = torch.autograd.grad(y.square().sum(), (x, w))
        found.append((y, *grads))
    for ours, theirs in zip(*found):
        scale = theirs.detach().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * eps_of(dtype) * scale)
