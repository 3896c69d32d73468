"""Checks of what a step and a checkpoint are given, and their messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._state import local_shard, scale_shape
from .backends import Backend, Gpu
from .binding import Rule
from .codecs import BLOCK, MASTERS, ROUNDINGS, SCALE_SUFFIX, STATE_DTYPES, STORAGE_DTYPES

NOT_DIFFERENTIABLE = (
    "differentiable=True: a fused step is not recorded by autograd; use torch.optim for a differentiable step, "
    "or leave differentiable=False"
)


def not_capturable(optimizer: str) -> str:
    return (
        f"a step of {optimizer} is captured in a CUDA graph, but a group has no capturable=True: replays would not "
        "count steps; pass capturable=True to the optimizer"
    )


_PARAM_DTYPES = (*STORAGE_DTYPES, torch.complex64, torch.complex128)


def check_states(optimizer: str, states: Mapping[str, str], counters: Iterable[str]) -> None:
    """Raises TypeError where a class's states cannot be what they are declared as."""
    taken = {"master", *counters, *(name + SCALE_SUFFIX for name in states)}
    for name, kind in states.items():
        if kind not in ("signed", "unsigned"):
            raise TypeError(f"{optimizer}.states[{name!r}] must be 'signed' or 'unsigned', got {kind!r}")
        if name in taken:
            raise TypeError(f"{optimizer}.states has {name!r}, which names something else in a state; rename it")


def check_rule(optimizer: str, rule: str, states: Iterable[str], declared: Iterable[str]) -> None:
    """Raises TypeError where a rule has a state that its class does not declare."""
    missing = [name for name in states if name not in declared]
    if missing:
        raise TypeError(f"{optimizer}.states does not declare {missing[0]!r}, a state of its rule {rule!r}")


def check_param(param: Tensor, local: Tensor, what: str) -> None:
    """Raises TypeError or ValueError where the parameter cannot be updated in place."""
    if param.dtype not in _PARAM_DTYPES:
        known = ", ".join(str(dtype) for dtype in _PARAM_DTYPES)
        raise TypeError(f"{what} is {param.dtype}; fusedopt updates {known}")
    _check_memory(local, what)


def check_scalars(optimizer: str, named: Mapping[str, Any], rule: Rule) -> None:
    """Raises TypeError where `scalars` lacks one."""
    missing = [name for name in rule.scalars if name not in named]
    if missing:
        raise TypeError(f"{optimizer}.scalars does not return {missing[0]!r}, a scalar of its rule {rule.name!r}")


def check_capturable(backend: Backend, what: str) -> None:
    """Raises RuntimeError where a step of the parameter cannot be captured in a CUDA graph."""
    if not (isinstance(backend, Gpu) and backend.plans):
        raise RuntimeError(
            f"capturable=True: the {backend.name} backend, which steps {what}, cannot be captured in a CUDA graph; "
            "set capturable=False, or have the parameters on a GPU and fusedopt's native module built"
        )


def check_grad(param: Tensor, grad: Tensor, optimizer: str, what: str) -> None:
    """Raises RuntimeError or ValueError where the gradient does not fit its parameter."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{optimizer} does not support sparse gradients ({what} has a gradient of layout {grad.layout}); "
            "use sparse=False in the embedding, or torch.optim.SparseAdam"
        )
    check_not_freed(local_shard(grad), f"the gradient of {what}")
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


def check_state(
    param: Tensor, state: Mapping[str, Any], names: Iterable[str], what: str, same_device: bool = True
) -> None:
    """Raises ValueError or TypeError where one of these states does not fit its parameter; None is one yet to come."""
    for name in names:
        if state.get(name) is None:
            continue
        _check_like(param, state[name], f"the state {name!r} of {what}", same_device)
        if state[name].dtype == torch.uint8 and not param.is_complex():
            _check_scale(param, name, state[name], state.get(name + SCALE_SUFFIX), what, same_device)
        elif state[name].dtype not in _PARAM_DTYPES or state[name].is_complex() != param.is_complex():
            raise TypeError(f"the state {name!r} of {what} is {state[name].dtype}, its parameter {param.dtype}")


def _check_like(param: Tensor, state: Any, what: str, same_device: bool) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{what} is a {type(state).__name__}; it must be a tensor")
    if state.shape != param.shape:
        raise ValueError(f"{what} has shape {tuple(state.shape)}, its parameter {tuple(param.shape)}")
    if not same_device:
        return
    _check_memory(local_shard(state), what)
    if state.is_neg() or state.is_conj():
        raise ValueError(f"{what} is a negative or conjugate view; use a clone of it")
    if state.device != param.device:
        raise ValueError(
            f"{what} is on {state.device}, its parameter on {param.device}; "
            "move the model before the first step, or load the optimizer's state_dict again"
        )
    if getattr(param, "placements", None) != getattr(state, "placements", None):
        raise ValueError(f"{what} is not placed like its parameter; distribute it alike")


def _check_scale(param: Tensor, name: str, codes: Tensor, scale: Any, what: str, same_device: bool) -> None:
    scale_name = name + SCALE_SUFFIX
    if not isinstance(scale, Tensor):
        raise ValueError(f"the state {name!r} of {what} is uint8 codes without their scales, {scale_name!r}")
    expected = scale_shape(param)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"{scale_name!r} of {what} has shape {tuple(scale.shape)}, where blocks of {BLOCK} elements of "
            f"{tuple(param.shape)} have {expected}: codes of another block size, or sharded otherwise, cannot be read"
        )
    if scale.dtype != torch.float32 or not local_shard(scale).is_contiguous() or scale.is_neg():
        view = ", a negative view" if scale.is_neg() else ""
        raise TypeError(f"{scale_name!r} of {what} must be contiguous float32; it is {scale.dtype}{view}")
    if getattr(param, "placements", None) != getattr(codes, "placements", None):
        raise ValueError(f"the codes {name!r} of {what} are not placed like their parameter; distribute them alike")
    if same_device and scale.device != param.device:
        raise ValueError(f"{scale_name!r} of {what} is on {scale.device}, its parameter on {param.device}")


def check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError where an option of a group is not valid."""
    for name, known in (("state_dtype", STATE_DTYPES), ("master", tuple(MASTERS)), ("rounding", ROUNDINGS)):
        if group[name] not in known:
            raise ValueError(f"{name}={group[name]!r} is not supported; use one of {', '.join(map(repr, known))}")
    if group["rounding"] == "stochastic" and group["master"] in ("float32", "split16"):
        raise ValueError(
            f"rounding='stochastic' with master={group['master']!r}: that keeps float32, of which rounding loses "
            "nothing; use one or the other, or master='split8'"
        )
    for name, limit in (("min_quantized_size", 2**63), ("seed", 2**64)):
        value = group[name]
        if not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(f"{name}={value!r} must be an integer from 0 to {limit - 1}")


def check_max_grad_norm(value: Any) -> None:
    """Raises ValueError where gradients cannot be clipped to this norm."""
    if value is not None and not (isinstance(value, (int, float)) and value > 0):
        raise ValueError(f"max_grad_norm={value!r} must be a number above 0, or None not to clip")


def check_master(param: Tensor, master: str | None, what: str) -> None:
    """Raises ValueError where the parameter cannot have this kind of master copy."""
    if param.dtype == torch.float16 and master in ("split16", "split8"):
        raise ValueError(
            f"master={master!r} keeps the bits that bfloat16 lacks, and {what} is float16; use master='float32'"
        )


def check_master_state(
    param: Tensor, master: Any, what: str, dtype: torch.dtype | None = None, same_device: bool = True
) -> None:
    """Raises ValueError or TypeError where a master copy does not fit, or is of another dtype than this."""
    if master is None:
        return
    _check_like(param, master, f"the state 'master' of {what}", same_device)
    if master.dtype not in MASTERS.values():
        raise TypeError(f"the state 'master' of {what} is {master.dtype}; it must be float32, int16 or int8")
    if dtype not in (None, master.dtype):
        raise ValueError(
            f"the state 'master' of {what} is {master.dtype}, where the option master asks for {dtype}; load the "
            "optimizer's state_dict again to convert it"
        )


def check_saved_format(group: Mapping[str, Any], index: int) -> None:
    """Raises ValueError where a checkpoint's group says that its state is stored in a way unknown here."""
    if group.get("state_dtype") not in STATE_DTYPES:
        raise ValueError(
            f"group {index} of the loaded state dict has state_dtype={group['state_dtype']!r}, whose map this version "
            f"does not know; it reads {', '.join(map(repr, STATE_DTYPES))}"
        )


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


def declined(optimizer: str) -> str:
    """Of a plan that was made of what passed every check."""
    return (
        f"{optimizer}: the native backend declined tensors that passed every check; please report this, and use "
        "backend='eager' meanwhile"
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
    """Raises TypeError, ValueError or RuntimeError where elements have no memory of their own."""
    if local.layout != torch.strided:
        raise TypeError(f"{what} has layout {local.layout}; fusedopt updates dense (strided) tensors")
    check_not_freed(local, what)
    if _overlaps(local):
        raise ValueError(
            f"{what} has elements that share memory (shape {tuple(local.shape)}, strides {local.stride()}), "
            "so an update in place has no one result; use a contiguous copy"
        )


def check_not_freed(tensor: Tensor, what: str) -> None:
    """Raises RuntimeError where the memory of a tensor was given back, as frameworks do that shard models."""
    try:
        size = tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):  # a wrapper's, as under a transform of torch.func
        return
    if not size and tensor.numel():
        raise RuntimeError(f"the storage of {what} has been resized to 0 bytes; restore it before the step")


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share an address: unless every stride steps over all smaller dimensions."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
