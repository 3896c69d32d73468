"""What an optimizer keeps for a parameter: made, read and converted between the ways to store it.

A state NAME is a tensor of the parameter's shape; in 8 bits it is uint8, and NAME_scale lies beside it. A parameter of
16 bits may have a `master`. Of a DTensor every process keeps its own shard, quantized in blocks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .codecs import (
    MASTERS,
    SCALE_SUFFIX,
    Codes,
    Key,
    State,
    blocks,
    decode,
    decode_parameter,
    encode,
    map_of,
    nearest,
    remainder,
    rounding_key,
    state_dtype,
)

Group = dict[str, Any]

NARROW = (torch.bfloat16, torch.float16)


def local_shard(tensor: Tensor) -> Tensor:
    """A DTensor's shard, or the tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def dtype_of(param: Tensor, kind: str, group: Group) -> torch.dtype:
    """How the group's options have a state of `kind` stored; uint8 for codes."""
    option = getattr(param, "optimizer_state_dtype", group["state_dtype"])
    if option == "int8" and param.numel() < group["min_quantized_size"]:
        option = "float32"
    return state_dtype(option, kind, param.dtype)


def new_state(name: str, param: Tensor, kind: str, dtype: torch.dtype, first: float = 0.0) -> dict[str, Tensor]:
    """The entries of a state full of `first`, which is 0 or a normal float32 that `kind` can hold."""
    if dtype != torch.uint8:
        value = complex(first, first) if dtype.is_complex else first
        return {name: _like(param, dtype, value, torch.preserve_format)}
    map = map_of(kind)
    code = map.zero + map.first[-1] if first else map.zero
    codes = _like(param, torch.uint8, code, torch.contiguous_format)
    return {name: codes, name + SCALE_SUFFIX: _new_scale(param, first)}


def _like(param: Tensor, dtype: torch.dtype, value: Any, memory_format: torch.memory_format) -> Tensor:
    return torch.full_like(param, value, dtype=dtype, memory_format=memory_format, requires_grad=False)


def scale_shape(param: Tensor) -> tuple[int, ...]:
    """One scale for each block. Of a DTensor as many in each shard as the largest needs, and each shard in a row."""
    placements = getattr(param, "placements", None)
    if placements is None:
        return (blocks(param.numel()),)
    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    sizes, rows = list(param.shape), []
    for axis, placement in enumerate(placements):
        shards = 1 if placement.is_replicate() else mesh.size(axis)
        if shards > 1:
            sizes[placement.dim] = -(-sizes[placement.dim] // shards)
        rows.append(shards)
    return (*rows, blocks(torch.Size(sizes).numel()))


def _new_scale(param: Tensor, value: float) -> Tensor:
    shape, placements = scale_shape(param), getattr(param, "placements", None)
    if placements is None:
        return torch.full(shape, value, dtype=torch.float32, device=param.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    local = torch.full([1] * len(placements) + [shape[-1]], value, dtype=torch.float32, device=param.device)
    alike = [Replicate() if placement.is_replicate() else Shard(axis) for axis, placement in enumerate(placements)]
    return DTensor.from_local(local, param.device_mesh, alike, run_check=False)  # type: ignore[attr-defined]


def stored(state: Mapping[str, Any], name: str, kind: str) -> State:
    """The state `name`, for the codecs: local."""
    tensor = local_shard(state[name])
    if tensor.dtype != torch.uint8:
        return tensor
    return Codes(tensor, local_shard(state[name + SCALE_SUFFIX]), map_of(kind))


def converted(
    state: Mapping[str, Any], name: str, param: Tensor, kind: str, dtype: torch.dtype, copy: bool = False
) -> dict[str, Tensor]:
    """The entries of the state `name` stored as `dtype` on the parameter's device.

    Args:
        copy: new tensors also where they are stored so already.
    """
    names = [name, name + SCALE_SUFFIX] if dtype == torch.uint8 else [name]
    if state[name].dtype == dtype and not copy:
        return {each: state[each] for each in names}
    result = new_state(name, param, kind, dtype)
    if state[name].dtype == dtype:
        for each in names:
            result[each].copy_(state[each])
    elif state[name].dtype == torch.uint8:
        values = decode(stored(state, name, kind), torch.float32)
        encode(values.to(param.device), local_shard(result[name]))
    elif dtype == torch.uint8:
        values = _like(param, torch.float32, 0.0, torch.contiguous_format).copy_(state[name])
        encode(local_shard(values), stored(result, name, kind))
    else:
        result[name].copy_(state[name])
    return result


# --- parameters of 16 bits ---


def master_dtype(param: Tensor, group: Group) -> torch.dtype | None:
    """The dtype of the parameter's master copy; None where it needs none."""
    return MASTERS[group["master"]] if param.dtype in NARROW else None


def new_master(param: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        return param.detach().to(dtype, copy=True)
    return _like(param, dtype, 0, torch.preserve_format)


def converted_master(master: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the master as `dtype`, for the parameter as it is now."""
    result = new_master(param, dtype)
    if master.dtype == dtype:
        return result.copy_(master)
    master = local_shard(torch.empty_like(param, dtype=master.dtype, requires_grad=False).copy_(master))
    own = local_shard(param.detach())
    values = decode_parameter(own, master, torch.float32)
    if dtype == torch.float32:
        # A tie that the split rounded away from zero would round to even, and the master count as out of date.
        away = nearest(values, own.dtype) != own
        values = (values.view(torch.int32) + away).view(torch.float32)
    local_shard(result).copy_(values if dtype == torch.float32 else remainder(values, own, dtype))
    return result


def key_of(param: Tensor, group: Group, number: int) -> Key | None:
    """Of this step's random numbers for parameter number `number`, or None where it is rounded to nearest."""
    if group["rounding"] != "stochastic" or param.dtype not in NARROW:
        return None
    return rounding_key(group["seed"], group.get("rounding_step", 0), number)
