"""The norm of gradients and clipping by it, deterministic: the same bits on every backend and any number of threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ._checks import check_not_freed
from ._gpu import neutral_control
from ._state import local_shard
from .backends import BACKENDS, native
from .codecs import decode

TREE = 1024
"""Squares are summed so many at a time by halves, a tensor padded with zeros; and so are the sums. csrc/norm.h."""


def grad_norm(grads: Sequence[Tensor], scale: float | Tensor = 1.0) -> Tensor:
    """The 2-norm of all these tensors together, each element multiplied by `scale` first: zero-dimensional float32.

    Elements are taken in the order in which they lie in memory. The reference of every backend's.
    """
    sums = [_tree_sums(_in_memory_order(grad) * scale) for grad in grads]
    total = torch.cat(sums) if sums else torch.zeros(1, device="cpu")
    while len(total) > 1:
        total = _halved(total)
    # Through float64: torch's root of a float32 may be one unit off.
    return total.new_zeros(()) if not len(total) else total[0].double().sqrt().float()


def total_norm(grads: Sequence[Tensor], scale: float | Tensor = 1.0) -> Tensor:
    """As `grad_norm`, also of gradients on several devices, and of DTensors, for which every process must call it.

    Norms of shards are summed as squares over the processes, so the result depends on how tensors are sharded.
    """
    device = local_shard(grads[0]).device
    by_placement: dict[Any, list[Tensor]] = {}
    for grad in grads:
        where = (grad.device_mesh, grad.placements) if hasattr(grad, "_local_tensor") else None  # type: ignore[attr-defined]
        by_placement.setdefault(where, []).append(local_shard(grad).to(device, non_blocking=True))
    if by_placement.keys() == {None}:
        return grad_norm(by_placement[None], scale)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for where, members in by_placement.items():
        square = grad_norm(members, scale).double().square()
        for dim, placement in enumerate(where[1] if where else ()):
            if not placement.is_replicate():
                distributed.all_reduce(square, group=where[0].get_group(dim))
        squares += square
    return squares.sqrt().float()


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by to have at most `max_norm`, as torch has it."""
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient >= 1 else coefficient  # NaN stays NaN


def clipped(grads: Sequence[Tensor], control: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of gradients, and `control` with clipping in it, by torch; without a synchronization."""
    device = control.device
    norm = total_norm(grads, control[0].float()) if grads else torch.zeros((), device=device)
    coefficient = max_norm / (norm.double() + 1e-6)
    coefficient = torch.where(coefficient >= 1, torch.ones_like(coefficient), coefficient)
    return norm, torch.stack([control[0] * coefficient, control[1]])


def _in_memory_order(grad: Tensor) -> Tensor:
    grad = grad.resolve_conj().resolve_neg()
    order = sorted(range(grad.ndim), key=lambda dim: -grad.stride()[dim])
    return decode(grad.permute(order), torch.float32).reshape(-1)


def _with_memory(grad: Tensor) -> Tensor:
    """The gradient, or a copy of one of torch's tensors of zeros alone."""
    return grad.clone() if grad._is_zerotensor() else grad


def _tree_sums(values: Tensor) -> Tensor:
    return _halved(values * values)


def _halved(values: Tensor) -> Tensor:
    """The sums of every 1024."""
    values = torch.nn.functional.pad(values, (0, -len(values) % TREE)).view(-1, TREE)
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, with a norm that does not depend on threads or processor.

    Args:
        parameters: those whose gradients are scaled in place to have at most `max_norm` together; one without a
            gradient is passed over.
        max_norm: the limit.
        norm_type: 2; other norms are torch's.
        error_if_nonfinite: raise where the norm is NaN or infinite.
        foreach: as torch's; it makes no difference.

    Returns:
        The norm before, zero-dimensional float32 on the device of the first gradient.

    Raises:
        RuntimeError: the norm is not finite, and `error_if_nonfinite`; or the memory of a gradient was given back.
        ValueError: another `norm_type`, or a gradient that is sparse, or a DTensor of parts of a sum.
    """
    if norm_type != 2:
        raise ValueError(f"norm_type={norm_type}: only the 2-norm is deterministic here; use torch.nn.utils for others")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [param.grad for param in parameters if param.grad is not None]
    for grad in grads:
        check_clippable(grad, "a gradient")
    on_cpu = all(grad.device.type == "cpu" and not hasattr(grad, "_local_tensor") for grad in grads)
    if on_cpu and BACKENDS["cpu"].unavailable() is None:
        resolved = [_with_memory(grad.resolve_conj().resolve_neg()) for grad in grads]
        norm = torch.tensor(native().norm(resolved, torch.get_num_threads()), device="cpu")
        coefficient = torch.tensor(clip_coefficient(float(norm), max_norm), dtype=torch.float64, device="cpu")
    else:
        device = local_shard(grads[0]).device if grads else torch.device("cpu")
        norm, (coefficient, _) = clipped(grads, neutral_control(device), max_norm)
    # On a GPU this alone would wait for it.
    if error_if_nonfinite and not float(norm) < torch.inf:
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    if coefficient.is_cuda or coefficient != 1:
        for grad in map(local_shard, grads):
            grad.mul_(coefficient.to(grad.device, non_blocking=True))
    return norm


def check_clippable(grad: Tensor, what: str) -> None:
    """Raises ValueError or RuntimeError where the norm of a gradient is not to be had."""
    if any(placement.is_partial() for placement in getattr(grad, "placements", ())):
        raise ValueError(f"{what} is placed as {grad.placements}; redistribute the parts of a sum before it is clipped")  # type: ignore[attr-defined]
    if grad.layout != torch.strided:
        raise ValueError(f"{what} has layout {grad.layout}; only dense gradients are clipped")
    check_not_freed(local_shard(grad), what)
