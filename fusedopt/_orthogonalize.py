"""Newton-Schulz orthogonalization: the plan for a shape, the iteration, and the public function.

The iteration is stated once, in the Gram form: of X only R = X X^T is needed to find the polynomial Q(R) that makes
Q X orthogonal, and all of R, Q and what is between are symmetric and commute, so that each product takes half the work.
Computed anew before every step, R makes of it the standard form. (Dao et al., Gram Newton-Schulz, 2025; Jordan et al.,
Muon, 2024.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._matrix import Batches, NativeProducts, TorchProducts, TritonProducts, Workspace
from ._schedules import Coefficients, coefficients_of, restarts_in_float16, restarts_with_bfloat16_factors
from .backends import BACKENDS, native, requested_backend

METHODS = ("auto", "standard", "gram")
NORMS = ("schatten4", "frobenius")
LARGEST_WORKSPACE = 1 << 26
"""Elements of a batch's intermediate results, beyond which it is computed in parts; one matrix is never cut."""
EPS = 1e-20

# Sums of squares in float32 beyond these have lost digits, or all.
_LEAST_SQUARE, _GREATEST_SQUARE = 1e-24, 1e30


class Plan(NamedTuple):
    """How matrices of one shape are orthogonalized.

    backend: "cpu", "triton" or "eager".
    method: "standard" or "gram".
    dtype: what the factors of products are rounded to; sums are float32 at least.
    storage: the dtype of what is stored in between.
    reason: why this method.
    """

    backend: str
    method: str
    dtype: torch.dtype
    storage: torch.dtype
    reason: str

    def products(self) -> TorchProducts:
        if self.backend == "cpu":
            return NativeProducts(self.dtype is torch.bfloat16)
        return TritonProducts() if self.backend == "triton" else TorchProducts()

    def segments(self, steps: Sequence[Coefficients]) -> list[Sequence[Coefficients]]:
        """The steps, parted where X X^T is computed anew."""
        if self.method == "standard":
            return [[step] for step in steps]
        restarts: tuple[int, ...] = ()
        if self.dtype is torch.bfloat16:
            restarts = restarts_with_bfloat16_factors(steps)
        elif self.dtype is torch.float16:
            restarts = restarts_in_float16(tuple(steps))
        return [steps[begin:end] for begin, end in itertools.pairwise((0, *restarts, len(steps)))]


@functools.lru_cache(maxsize=1024)
def plan(
    rows: int,
    columns: int,
    device: torch.device,
    steps: tuple[Coefficients, ...],
    dtype: torch.dtype | None = None,
    method: str = "auto",
    backend: str | None = None,
    batch: int = 1,
) -> Plan:
    """How the steps are computed for `batch` matrices of `rows` by `columns`: where products take the least time.

    Raises:
        ValueError: an unknown method, or one that does not go with the dtype.
        RuntimeError: the backend that is asked for cannot do it.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose one of {', '.join(METHODS)}")
    short, long = sorted((rows, columns))
    backend, default = _backend_of(device, dtype, backend, (short, long, batch))
    dtype = dtype or default
    storage = torch.float32 if backend == "cpu" else dtype
    standard, gram = [Plan(backend, name, dtype, storage, "asked for") for name in ("standard", "gram")]
    if storage is torch.bfloat16:
        if method == "gram":
            raise ValueError(
                f"method='gram' with dtype={dtype}: its errors grow from step to step, and 8 bits are too few for what "
                "is stored in between; use float16 or float32, or method='standard'"
            )
        return standard._replace(reason="gram is not accurate where all is stored in bfloat16")
    if method != "auto":
        return standard if method == "standard" else gram
    aspect = long / max(short, 1)
    ratio = _work(standard.segments(steps), aspect) / _work(gram.segments(steps), aspect)
    reason = f"standard would take {ratio:.2f} times the time of gram"
    return (gram if ratio > 1 else standard)._replace(reason=reason)


def _work(segments: Sequence[Sequence[Coefficients]], aspect: float) -> float:
    """In products of the shorter side's square matrices, of which half is computed.

    Of each part X X^T, and Q X whose result is not symmetric. Of each step R^2, unless c is 0, Q Z but for a part's
    first, and two for the next R but for its last.
    """
    products = [4 * len(segment) - 3 - sum(c == 0 for _, _, c in segment) for segment in segments]
    return len(segments) * 3 * aspect + sum(products)


def _backend_of(
    device: torch.device, dtype: torch.dtype | None, requested: str | None, sizes: tuple[int, int, int]
) -> tuple[str, torch.dtype]:
    """Which products, and what their factors are rounded to unless it is asked for."""
    choices = _choices(device, dtype)
    if requested is None:
        dense = not choices["triton"] and not _halves_pay(device, dtype or torch.float16, sizes)
        name = next(name for name, reason in choices.items() if not (reason or (dense and name == "triton")))
    elif choices.get(requested, "it has no such operation"):
        reason = choices.get(requested, "it has no such operation")
        raise RuntimeError(f"backend={requested!r} cannot orthogonalize: {reason}; use_backend('eager') does anywhere")
    else:
        name = requested
    if name == "triton":
        return name, torch.float16
    if name == "cpu":
        return name, torch.bfloat16 if native().has_bfloat16_matmul else torch.float32
    tiles = device.type == "cpu" and requested is None and _has_tiles()
    return name, torch.bfloat16 if tiles else torch.float32 if device.type == "cpu" else torch.float16


def _halves_pay(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> bool:
    """Whether products that compute half of a symmetric result are faster than the vendor's dense ones."""
    from .kernels.symmetric_tiles import pays

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return pays(*sizes, dtype, capability)


def _choices(device: torch.device, dtype: torch.dtype | None) -> dict[str, str | None]:
    """The backends, fastest first, with None or why one cannot."""
    cpu, triton = BACKENDS["cpu"].unavailable(), BACKENDS["triton"].unavailable()
    if not cpu and device.type != "cpu":
        cpu = f"the matrix is on {device}, and the cpu backend works on the CPU"
    elif not cpu and dtype not in (None, torch.float32, torch.bfloat16):
        cpu = f"it multiplies float32 and bfloat16, not {dtype}"
    elif not cpu and dtype is torch.bfloat16 and not native().has_bfloat16_matmul:
        cpu = "this CPU does not multiply bfloat16"
    if not triton:
        triton = BACKENDS["triton"].refuses(torch.empty(0, device=device))
    if not triton and dtype is torch.float64:
        triton = "it multiplies float16, bfloat16 and float32, not float64"
    if device.type == "cpu" and _has_tiles():
        return {"eager": None, "cpu": cpu, "triton": triton}
    return {"cpu": cpu, "triton": triton, "eager": None}


@functools.cache
def _has_tiles() -> bool:
    """Whether the CPU has AMX, with which torch's bfloat16 products outrun everything else."""
    return bool(torch.cpu._is_amx_tile_supported())


def newton_schulz(
    xs: Batches,
    steps: Sequence[Coefficients],
    plan: Plan,
    workspace: Workspace,
    *,
    norm: str,
    eps: float,
    scales: Sequence[float],
) -> list[Tensor]:
    """Orthogonalized batches, of `plan.storage`, in the workspace.

    Args:
        xs: (batch, n, m) each, of any strides. They are not changed.
        norm, eps: as `orthogonalize`.
        scales: what each batch's result is multiplied by.
    """
    products = plan.products()
    if plan.storage.itemsize >= 4:
        xs = [x.to(plan.storage) for x in xs]
    tall = [x.shape[1] > x.shape[2] for x in xs]
    xs = [x.mT if is_tall else x for x, is_tall in zip(xs, tall, strict=True)]

    def take(name: str, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [
            workspace.tensor(f"{name}{index}", shape, plan.storage, x.device)
            for index, (x, shape) in enumerate(zip(xs, shapes, strict=True))
        ]

    squares = [(len(x), x.shape[1], x.shape[1]) for x in xs]
    r, z, q, spare = (take(name, squares) for name in ("r", "z", "q", "spare"))
    shapes = [tuple(x.shape) for x in xs]
    buffers = [[_oriented(each, x) for each, x in zip(take(name, shapes), xs, strict=True)] for name in ("even", "odd")]
    xs, pending = _normalized(xs, products, r, buffers[1], norm, eps)
    segments = plan.segments(steps)
    for index, segment in enumerate(segments):
        if index > 0:
            products.gram(xs, r)
        for step, (a, b, c) in enumerate(segment):
            if c:
                products.symmetric(r, r, r, b, c, z)
            else:
                torch._foreach_copy_(z, r)
                torch._foreach_mul_(z, b)
            if step == 0:
                # a X is not added apart from Z X: X would be rounded in one of them only, and they cancel in part.
                if len(segment) > 1:
                    torch._foreach_copy_(q, z)
                else:
                    q, z = z, q
                for each in q:
                    each.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                products.symmetric(q, z, q, a, 1.0, spare)
                q, spare = spare, q
            if step < len(segment) - 1:
                products.symmetric(r, z, r, a, 1.0, spare)
                products.symmetric(z, spare, spare, a, 1.0, r)
        if index == 0:
            torch._foreach_mul_(q, pending)
        if index == len(segments) - 1:
            torch._foreach_mul_(q, list(scales))
        # One buffer is read while the other is written, by turns.
        out = buffers[index % 2]
        products.multiply(q, xs, out)
        xs = out
    return [x.mT if is_tall else x for x, is_tall in zip(xs, tall, strict=True)]


def _oriented(buffer: Tensor, like: Tensor) -> Tensor:
    """`buffer` with the order of elements in memory that `like` has, which may be the transpose of a tall matrix."""
    batch, n, m = like.shape
    return buffer if like.stride(-1) == 1 or m == 1 else buffer.view(batch, m, n).mT


def _normalized(
    xs: Batches, products: TorchProducts, r: list[Tensor], buffers: list[Tensor], norm: str, eps: float
) -> tuple[Batches, list[Tensor]]:
    """Batches, and what is still to be multiplied with each of their matrices; `r` is X X^T as if it had been.

    The norms come from X X^T, so that no pass over X is needed where a float32 can hold its squares. Whether it can, a
    GPU would be waited for.
    """
    fits = [torch.zeros(len(x), 1, 1, dtype=torch.bool, device=x.device) for x in xs]
    if all(x.is_cpu and x.dtype is each.dtype and x.dtype.itemsize >= 4 for x, each in zip(xs, r, strict=True)):
        products.gram(xs, r)
        squares = [_squared_norm(each, norm) for each in r]
        fits = [(square > _LEAST_SQUARE) & (square < _GREATEST_SQUARE) for square in squares]
        if all(bool(fit.all()) for fit in fits):
            scales = [square.sqrt().clamp(min=eps).reciprocal() for square in squares]
            torch._foreach_mul_(r, [scale * scale for scale in scales])
            return xs, scales
    sizes = []
    for x, buffer, fit in zip(xs, buffers, fits, strict=True):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True, dtype=torch.float64).clamp(min=eps)
        # A matrix whose squares a float32 holds has the same result whatever others are in its batch.
        size = torch.where(fit, 1.0, size)
        # In two factors, since the inverse of a small norm may not be a float32.
        root = size.rsqrt().to(wide.dtype)
        buffer.copy_(wide * root * root)
        sizes.append(size.to(wide.dtype))
    products.gram(buffers, r)
    scales = [
        _squared_norm(each, norm).sqrt().clamp(min=eps / size).reciprocal().to(each.dtype)
        for each, size in zip(r, sizes, strict=True)
    ]
    if norm == "frobenius":
        scales = [torch.where(fit, scale, 1.0) for scale, fit in zip(scales, fits, strict=True)]
    torch._foreach_mul_(r, [scale * scale for scale in scales])
    return buffers, scales


def _squared_norm(r: Tensor, norm: str) -> Tensor:
    """Of X, from X X^T: of Frobenius, or of Schatten for p = 4, both at least the largest singular value squared."""
    wide = torch.promote_types(r.dtype, torch.float32)
    if norm == "frobenius":
        return r.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=wide)[:, None, None]
    return torch.linalg.vector_norm(r, dim=(-2, -1), keepdim=True, dtype=wide)


@torch.no_grad()
def orthogonalize(
    G: Tensor,
    *,
    steps: int | None = 5,
    coefficients: str | Sequence[Sequence[float]] = "jordan",
    method: str = "auto",
    dtype: torch.dtype | None = None,
    eps: float = EPS,
    norm: str = "schatten4",
) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns, U V^T of G = U S V^T, by Newton-Schulz iteration.

    Each singular value goes to near 1, as near as the coefficients take it: "jordan"'s 5 steps take those from 0.01 to
    1 of the norm to 0.68 ... 1.13. Those much smaller stay small: a matrix of zeros is its own result. Not recorded by
    autograd; G is not changed. The last bits depend on the instruction set, and not on the number of threads.

    Args:
        G: (..., n, m) with n, m >= 0, of any strides, real.
        steps: of the iteration; None for as many as `coefficients` has.
        coefficients: "jordan", "polar_express", "you", "cans" or "cubic5" (`fusedopt._schedules` has their sources), or
            (a, b, c) for each step.
        method: "standard", or "gram", which takes fewer flops where one side is longer; "auto" chooses by shape. In 16
            bits gram returns to the matrix itself where the coefficients require it.
        dtype: what factors of products are rounded to; None for the fastest that does: float16 on a GPU, bfloat16 on a
            CPU that multiplies it natively, else float32. Norms and sums are float32 at least. float64 for float64.
        eps: a norm below this counts as this.
        norm: of G, divided by at first: "frobenius" as in torch.optim.Muon, or "schatten4", the fourth root of
            tr (G G^T)^2, which is as free and lies closer above the largest singular value, so that small ones come
            nearer to 1.

    Returns:
        of the shape and dtype of G.

    Raises:
        ValueError: a shape or argument that will not do, or more steps than the coefficients are made for.
        TypeError: G is not a real floating-point tensor.
        RuntimeError: the backend asked for cannot do this.
    """
    if G.ndim < 2:
        raise ValueError(f"G has shape {tuple(G.shape)}; it must have two dimensions or more: (..., n, m)")
    if not G.dtype.is_floating_point:
        raise TypeError(f"G is {G.dtype}; orthogonalize takes float32, float64, bfloat16 and float16")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(NORMS)}")
    if not eps > 0:
        raise ValueError(f"eps={eps}: it must be greater than 0, or a matrix of zeros would give NaN")
    if dtype is None and G.dtype is torch.float64:
        dtype = torch.float64
    how = coefficients_of(coefficients, steps)
    rows, columns = G.shape[-2:]
    out = torch.empty(G.shape, dtype=G.dtype, device=G.device)
    if not out.numel():
        return out
    batch = G.numel() // (rows * columns)
    chosen = plan(rows, columns, G.device, how, dtype, method, requested_backend(), batch)
    flat, results = G.reshape(-1, rows, columns), out.view(-1, rows, columns)
    workspace = Workspace()
    for part, result in zip(parts(flat), parts(results), strict=True):
        (found,) = newton_schulz([part], how, chosen, workspace, norm=norm, eps=eps, scales=[1.0])
        result.copy_(found)
    return out


def parts(batch: Tensor) -> Sequence[Tensor]:
    """A batch of matrices, in parts whose intermediate results are bounded."""
    return batch.split(max(1, LARGEST_WORKSPACE // workspace_size(batch[:1])))


def workspace_size(batch: Tensor) -> int:
    """Elements of the intermediate results of a batch of matrices."""
    short, long = sorted(batch.shape[1:])
    return len(batch) * (2 * short * long + 4 * short * short)
