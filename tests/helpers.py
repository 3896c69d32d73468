"""What the tests share: the same bits, tensors of every kind of memory, and pairwise selection."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fusedopt.backends import native

# --- what is not there ---


def needs_triton() -> None:
    """Skips where there is no Triton that fusedopt takes: older releases of torch bring an older one."""
    pytest.importorskip("triton", minversion="3.6")


needs_torchs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")

FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether a model of `fully_shard` runs on a CPU. Older releases of torch call what the stream of one does not have."""

NOT_YET = {"decoupled_weight_decay"} - inspect.signature(torch.optim.Adam).parameters.keys()
"""Options of Adam and AdamW that older releases of torch do not have there."""


# --- the same bits ---


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values of one dtype and shape, NaN in the same places. Zero's sign and NaN's payload are free."""
    return a.dtype == b.dtype and a.shape == b.shape and not bool(_differ(a, b).any())


def assert_same_bits(a: Tensor, b: Tensor, what: str = "tensor") -> None:
    """As `same_bits`, and says where and by how much they differ."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape), what
    wrong = _differ(a, b)
    if wrong.any():
        first = int(wrong.flatten().nonzero()[0])
        pair = f"{_real(a).flatten()[first].item()!r} and {_real(b).flatten()[first].item()!r}"
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, element {first} first: {pair}")


def _differ(a: Tensor, b: Tensor) -> Tensor:
    a, b = _real(a), _real(b)
    return (a != b) & ~(a.isnan() & b.isnan())


def _real(a: Tensor) -> Tensor:
    a = a.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(a) if a.is_complex() else a


# --- values ---


def values(shape: Sequence[int], *seed: int, dtype: torch.dtype = torch.float32, awkward: bool = False) -> Tensor:
    """Normal values of order 1, among them zeros and tiny ones; where `awkward` also NaN, infinity, subnormals, giants.

    They are drawn in float32 and converted: a seed gives every real dtype the same values, rounded.
    """
    generator = torch.Generator().manual_seed(functools.reduce(lambda a, b: 1009 * a + b, seed))
    if dtype.is_complex:
        part = dtype.to_real()
        parts = values([*shape, 2], *seed, dtype=part, awkward=awkward)
        return torch.view_as_complex(parts.contiguous())
    x = torch.randn(shape, dtype=torch.float32, generator=generator)
    special = [0.0, -0.0, 1e-6, -1e-12]
    if awkward:
        special += [float("nan"), float("inf"), -float("inf"), 1e-40, -1e-45, 3e38, -1e30, 6e-8, 65519.0, 70000.0]
    which = torch.randint(0, 5 * len(special), shape, generator=generator)
    replaced = torch.tensor(special, dtype=torch.float32)[which.clamp(max=len(special) - 1)]
    return torch.where(which < len(special), replaced, x).to(dtype)


# --- memory ---

PADDING = 7.0


def _place(x: Tensor, shape: Sequence[int], view: Callable[[Tensor], Tensor]) -> Tensor:
    """`x` written into `view` of a tensor of `shape` full of padding."""
    placed = view(torch.full(shape, PADDING, dtype=x.dtype))
    assert placed.shape == x.shape
    return placed.copy_(x)


def _unaligned(x: Tensor) -> Tensor:
    return _place(x, [x.numel() + 5], lambda base: base[3 : 3 + x.numel()].view(x.shape))


def _stepped(x: Tensor) -> Tensor:
    if x.ndim == 0:
        return _unaligned(x)
    return _place(x, [*x.shape[:-1], 2 * x.shape[-1] + 1], lambda base: base[..., 1::2])


def _rows_apart(x: Tensor) -> Tensor:
    if x.ndim == 0:
        return _unaligned(x)
    return _place(x, [*x.shape[:-1], x.shape[-1] + 3], lambda base: base[..., 1:-2])


def _transposed(x: Tensor) -> Tensor:
    return _place(x, x.shape[::-1], lambda base: base.permute(tuple(reversed(range(x.ndim)))))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else _transposed(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.clone,
    "unaligned": _unaligned,
    "stepped": _stepped,
    "rows_apart": _rows_apart,
    "transposed": _transposed,
    "channels_last": _channels_last,
}
"""Ways for a tensor to lie in memory; each gives a copy of the same values."""


def _expanded(x: Tensor) -> Tensor:
    return x[:1].clone().expand(x.shape) if x.ndim and x.shape[0] else x.clone()


def _imaginary(x: Tensor) -> Tensor:
    # The imaginary part of a conjugate: a negative view, two elements apart. Complex numbers of 16 bits are no use.
    if x.dtype.itemsize == 2:
        return _stepped(x)
    return torch.complex(torch.full_like(x, PADDING), x.neg()).conj().imag


def _conjugate(x: Tensor) -> Tensor:
    return _stepped(x.conj().resolve_conj()).conj() if x.is_complex() else _stepped(x)


GRAD_LAYOUTS = {**LAYOUTS, "expanded": _expanded, "imaginary": _imaginary, "conjugate": _conjugate}
"""A gradient is only read, so it may be more: rows may share memory, and signs may be pending."""


def surroundings(tensor: Tensor) -> Tensor:
    """A copy of what lies in the tensor's storage beside its own elements."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    beside = torch.ones(whole.numel(), dtype=torch.bool)
    beside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return whole[beside]


def set_grad(param: Tensor, grad: Tensor) -> None:
    """`param.grad = grad`, of any dtype: torch compares dtypes only at the assignment."""
    if grad.dtype == param.dtype:
        param.grad = grad
        return
    data = param.data
    param.data = torch.empty(data.shape, dtype=grad.dtype)
    param.grad = grad
    param.data = data


# --- optimizers ---


def make_parameters(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> list[Parameter]:
    """Parameters of these shapes, the same at every call."""
    return [Parameter(LAYOUTS[layout](values(shape, 1, index, dtype=dtype))) for index, shape in enumerate(shapes)]


def set_grads(
    params: Sequence[Tensor],
    step: int,
    dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    awkward: bool = False,
) -> None:
    """Gradients that depend on the step and the parameter's place alone."""
    for index, param in enumerate(params):
        grad = values(param.shape, 2, step, index, dtype=dtype or param.dtype, awkward=awkward)
        set_grad(param, GRAD_LAYOUTS[layout](grad))


def results(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of every parameter and state, by a name that says which it is."""
    found = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        found[f"parameter {index} {list(param.shape)}"] = param.detach().clone()
        for name, state in optimizer.state.get(param, {}).items():
            found[f"{name} of parameter {index} {list(param.shape)}"] = torch.as_tensor(state).clone()
    return found


def assert_same_results(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert_same_bits(a[name], b[name], name)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads, and so fusedopt's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = native().instruction_set()
    native().use_instruction_set(name)
    try:
        yield
    finally:
        native().use_instruction_set(before)


@contextlib.contextmanager
def exchange_api(use: bool) -> Iterator[None]:
    """Whether tensors are read through torch's DLPack exchange API, where torch has it."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    native().use_exchange_api(api if use else None)
    try:
        yield
    finally:
        native().use_exchange_api(api)


# --- selection ---


def pairwise(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows with one value of each axis, so that every two values of two axes meet in some row. Always the same rows."""
    names = list(axes)
    wanted = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    rows: list[dict[str, Any]] = []
    while wanted:
        row = dict(min(map(sorted, wanted)))
        for name in names:
            if name not in row:
                count, taken = len(axes[name]), list(row.items())
                # Among equals another one in each row, so that what no pair decides is spread too.
                order = [(index + len(rows)) % count for index in range(count)]
                met = [sum(frozenset([(name, index), other]) in wanted for other in taken) for index in order]
                row[name] = order[met.index(max(met))]
        wanted -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: axes[name][row[name]] for name in names})
    return rows
