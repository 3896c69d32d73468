"""Checks of what a step and a checkpoint are given, and their messages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .codecs import STORAGE_DTYPES

NOT_DIFFERENTIABLE = (
    "differentiable=True: a fused step is not recorded by autograd; use torch.optim for a differentiable step, "
    "or leave differentiable=False"
)
NOT_CAPTURABLE = (
    "capturable=True: no backend here can be captured in a graph; set capturable=False, "
    "or use torch.optim where the step must be captured"
)

_PARAM_DTYPES = (*STORAGE_DTYPES, torch.complex64, torch.complex128)


def check_param(param: Tensor, local: Tensor, what: str) -> None:
    """Raises TypeError or ValueError where the parameter cannot be updated in place."""
    if param.dtype not in _PARAM_DTYPES:
        known = ", ".join(str(dtype) for dtype in _PARAM_DTYPES)
        raise TypeError(f"{what} is {param.dtype}; fusedopt updates {known}")
    _check_memory(local, what)


def check_grad(param: Tensor, grad: Tensor, optimizer: str, what: str) -> None:
    """Raises RuntimeError or ValueError where the gradient does not fit its parameter."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{optimizer} does not support sparse gradients ({what} has a gradient of layout {grad.layout}); "
            "use sparse=False in the embedding, or torch.optim.SparseAdam"
        )
    if grad.shape != param.shape:
        raise ValueError(f"the gradient of {what} has shape {tuple(grad.shape)}, its parameter {tuple(param.shape)}")
    if grad.device != param.device:
        raise ValueError(f"the gradient of {what} is on {grad.device}, its parameter on {param.device}")
    if grad.dtype not in _PARAM_DTYPES or grad.is_complex() != param.is_complex():
        raise TypeError(f"the gradient of {what} is {grad.dtype}, its parameter {param.dtype}")
    ours, theirs = getattr(param, "placements", None), getattr(grad, "placements", None)
    if ours != theirs:
        raise ValueError(
            f"the gradient of {what} is placed {theirs}, its parameter {ours}; redistribute the gradient to match"
        )


def check_state(param: Tensor, states: Mapping[str, Any], what: str, same_device: bool = True) -> None:
    """Raises ValueError or TypeError where a state does not fit its parameter; a state of None is yet to come."""
    for name, state in states.items():
        if state is None:
            continue
        if not isinstance(state, Tensor):
            raise TypeError(f"the state {name!r} of {what} is a {type(state).__name__}; it must be a tensor")
        if state.shape != param.shape:
            raise ValueError(
                f"the state {name!r} of {what} has shape {tuple(state.shape)}, its parameter {tuple(param.shape)}"
            )
        if state.dtype not in _PARAM_DTYPES or state.is_complex() != param.is_complex():
            raise TypeError(f"the state {name!r} of {what} is {state.dtype}, its parameter {param.dtype}")
        if not same_device:
            continue
        _check_memory(getattr(state, "_local_tensor", state), f"the state {name!r} of {what}")
        if state.is_neg() or state.is_conj():
            raise ValueError(f"the state {name!r} of {what} is a negative or conjugate view; use a clone of it")
        if state.device != param.device:
            raise ValueError(
                f"the state {name!r} of {what} is on {state.device}, its parameter on {param.device}; "
                "move the model before the first step, or load the optimizer's state_dict again"
            )
        if getattr(param, "placements", None) != getattr(state, "placements", None):
            raise ValueError(f"the state {name!r} of {what} is not placed like its parameter; distribute it alike")


def check_counters(counters: Mapping[str, Any], what: str) -> None:
    """Raises ValueError where a step count, or another counter, is not one number."""
    for name, counter in counters.items():
        if not isinstance(counter, (Tensor, int, float)):
            raise ValueError(f"the state {name!r} of {what} must be a number; got {counter!r}")
        if isinstance(counter, Tensor) and (counter.numel() != 1 or counter.is_meta):
            raise ValueError(
                f"the state {name!r} of {what} must have one element; got a tensor of shape {tuple(counter.shape)} "
                f"on {counter.device}"
            )


def check_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Raises ValueError, in torch's words, where a checkpoint's groups are not the optimizer's."""
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(group["params"]) != len(other["params"]) for group, other in zip(groups, saved, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )


def nan_hyperparameter(group: Mapping[str, Any], index: int) -> str:
    """The message for a group whose scalars are not numbers."""
    numbers = {name: value if isinstance(value, tuple) else (value,) for name, value in group.items()}
    bad = [
        f"{name}={group[name]}"
        for name, values in numbers.items()
        if any(isinstance(value, float) and math.isnan(value) for value in values)
    ]
    blame = ", ".join(bad) or "its hyperparameters together"
    return f"group {index}: {blame} gives NaN in the update; no parameter was changed"


def _check_memory(local: Tensor, what: str) -> None:
    """Raises TypeError or ValueError where elements have no memory of their own."""
    if local.layout != torch.strided:
        raise TypeError(f"{what} has layout {local.layout}; fusedopt updates dense (strided) tensors")
    if _overlaps(local):
        raise ValueError(
            f"{what} has elements that share memory (shape {tuple(local.shape)}, strides {local.stride()}), "
            "so an update in place has no one result; use a contiguous copy"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share an address: unless every stride steps over all smaller dimensions."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
