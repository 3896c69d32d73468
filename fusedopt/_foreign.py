"""bitsandbytes' and torchao's optimizers in fusedopt's terms, for `swap` and `load_state_dict`.

Neither library is imported: a class is known by its module and name, a state by its entries. Everything here reads
only, as of bitsandbytes 0.50 and torchao 0.18.

What goes on is bitsandbytes' mathematics, which is not always in its names: `Adam` decays decoupled, SGD's dampening
and nesterov and RMSprop's momentum and centered make no difference to its step. Its CUDA kernels part from its other
backends in two places, and there those are followed: AdamW's parameter decays before the step and not after it, and
the weight decay of RMSprop and Adagrad in 8 bits is in the numerator too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._state import local_shard, new_state
from .codecs import BLOCK, SCALE_SUFFIX, SIGNED, UNSIGNED, DynamicMap, blocks, magnitudes, map_of

if TYPE_CHECKING:
    from .optimizer import Optimizer

Group = dict[str, Any]
Entries = dict[str, Any]

# --- which classes ---

_BITSANDBYTES = {"Adam": "AdamW", **{name: name for name in ("AdamW", "AdEMAMix", "Adagrad", "Lion", "RMSprop", "SGD")}}

PEERS = {
    **{
        ("bitsandbytes", f"{paged}{theirs}{bits}"): ours
        for theirs, ours in _BITSANDBYTES.items()
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    },
    **{("torchao", name + bits): name for name in ("Adam", "AdamW") for bits in ("8bit", "4bit", "Fp8")},
}
"""The name of fusedopt's class for a package and the name of its class."""


KNOWN = f"bitsandbytes' {', '.join(_BITSANDBYTES)} and torchao's Adam and AdamW"
"""For messages."""


def counterpart(optimizer: Any) -> str | None:
    """The name of fusedopt's class that steps like this optimizer of a peer's; None where there is none.

    A subclass is not taken, since it may step differently.
    """
    cls = type(optimizer)
    return PEERS.get((cls.__module__.partition(".")[0], cls.__name__))


# --- a running optimizer ---


@dataclass
class Translated:
    """An optimizer of a peer's as one of fusedopt's. Tensors are the peer's own, where they can be.

    defaults: the options it was made with; of what it does not name, fusedopt's class has defaults.
    groups: the parameter groups.
    states: of every parameter that has one. A state of 8 bits is NAME (uint8) and NAME_scale, any other a floating
        tensor, not necessarily in the dtype that the options ask for.
    state_dtypes: the `state_dtype` of each parameter that has one of its own, by bitsandbytes' GlobalOptimManager.
    """

    defaults: Group
    groups: list[Group]
    states: dict[Tensor, Mapping[str, Any]]
    state_dtypes: dict[Tensor, str]


def translate(optimizer: Any, cls: type[Optimizer], names: Sequence[Sequence[str]]) -> Translated:
    """The optimizer as one of class `cls`, its `counterpart`.

    Args:
        names: for each group, what messages call its parameters.

    Raises:
        ValueError, TypeError: an option or a state cannot be taken over; the message names the parameter.
    """
    theirs = type(optimizer).__module__.startswith("bitsandbytes")
    storage = _bitsandbytes_storage(optimizer) if theirs else _torchao_storage(optimizer)
    groups, states, state_dtypes = [], {}, {}
    for index, group in enumerate(optimizer.param_groups):
        for position, (param, what) in enumerate(zip(group["params"], names[index])):
            state = optimizer.state.get(param, {})
            if theirs:
                config = _config(optimizer, index, position)
                _check_config(config, group, what)
                quantized = state["state1"].dtype == torch.uint8 if "state1" in state else _quantizes(config, param)
                if quantized != _quantizes(vars(optimizer.args), param):
                    state_dtypes[param] = "int8" if quantized else "float32"
            if state:
                states[param] = translate_state(cls, state, param, what)
        groups.append({**translate_group(cls, group), **storage})
    return Translated({**translate_group(cls, optimizer.defaults), **storage}, groups, states, state_dtypes)


def _torchao_storage(optimizer: Any) -> Group:
    # 4 bits and float8 become float32, which holds their every value.
    storage = {"state_dtype": "int8" if type(optimizer).__name__.endswith("8bit") else "float32"}
    return {**storage, "rounding": "stochastic"} if optimizer.bf16_stochastic_round else storage


def _bitsandbytes_storage(optimizer: Any) -> Group:
    args = optimizer.args
    return {"state_dtype": "int8" if args.optim_bits == 8 else "float32", "min_quantized_size": args.min_8bit_size}


# Options that change the step, and the values with which they do not.
_NEUTRAL = {"max_unorm": 0.0, "skip_zeros": False, "percentile_clipping": 100, "block_wise": True}


def _config(optimizer: Any, index: int, position: int) -> Group:
    """bitsandbytes' options for one parameter, with GlobalOptimManager's overrides."""
    group = optimizer.param_groups[index]
    config = optimizer.get_config(index, position, group)
    if not optimizer.initialized:  # the first step would look for the overrides of modules, like StableEmbedding's
        for module, name, override in optimizer.mng.module_weight_config_triple:
            if getattr(module, name) is group["params"][position]:
                config.update(override)
    return config


def _quantizes(config: Group, param: Tensor) -> bool:
    return config["optim_bits"] == 8 and param.numel() >= config["min_8bit_size"]


def _check_config(config: Group, group: Group, what: str) -> None:
    for name, neutral in _NEUTRAL.items():
        if config.get(name, neutral) != neutral:
            raise ValueError(
                f"{what}: bitsandbytes' {name}={config[name]!r} has no counterpart here; set it to {neutral!r} first"
            )
    for name, value in config.items():
        if name in group and value != group[name]:
            raise ValueError(
                f"{what}: GlobalOptimManager gives it {name}={value!r}, its group has {group[name]!r}; "
                "put it in a parameter group of its own"
            )


# --- groups ---


@dataclass(frozen=True)
class _Layout:
    """How bitsandbytes keeps what a class of fusedopt's does."""

    state1: tuple[str, ...]  # two are stacked
    state2: str | None
    mark: str  # an option by which a group is known to be bitsandbytes'
    options: Callable[[Group], Group]


_LAYOUTS = {
    "Adagrad": _Layout(("sum",), None, "betas", lambda group: {"eps": group["eps"], "lr_decay": 0}),
    "Adam": _Layout(
        ("exp_avg",),
        "exp_avg_sq",
        "t_alpha",
        lambda group: {
            "betas": tuple(group["betas"]),
            "eps": group["eps"],
            "amsgrad": False,
            "decoupled_weight_decay": True,
        },
    ),
    "AdEMAMix": _Layout(
        ("exp_avg", "exp_avg_slow"),
        "exp_avg_sq",
        "t_alpha",
        lambda group: {
            "betas": tuple(group["betas"]),
            "alpha": group["alpha"],
            "eps": group["eps"],
            "t_alpha": group["t_alpha"] or None,
            "t_beta3": group["t_beta3"] or None,
        },
    ),
    "Lion": _Layout(("exp_avg",), None, "eps", lambda group: {"betas": tuple(group["betas"])}),
    "RMSprop": _Layout(
        ("square_avg",),
        None,
        "betas",
        lambda group: {"alpha": group["betas"][0], "eps": group["eps"], "momentum": 0, "centered": False},
    ),
    "SGD": _Layout(
        ("momentum_buffer",),
        None,
        "betas",
        lambda group: {"momentum": group["betas"][0], "dampening": 0, "nesterov": False},
    ),
}
_OPTIONS = ("betas", "eps", "alpha", "t_alpha", "t_beta3")


def _layout(cls: type[Optimizer]) -> _Layout | None:
    return next((_LAYOUTS[base.__name__] for base in cls.__mro__ if base.__name__ in _LAYOUTS), None)


def translate_group(cls: type[Optimizer], group: Group) -> Group:
    """A parameter group, or an optimizer's defaults, with bitsandbytes' options as those of `cls`.

    Any other group, like torchao's whose options are torch's, is returned as it is.
    """
    layout = _layout(cls)
    if layout is None or layout.mark not in group:
        return group
    kept = {name: value for name, value in group.items() if name not in _OPTIONS}
    return {**kept, **layout.options(group)}


# --- states ---

_WRAPPED = "__bnb_optimizer_quant_state__"
"""In a state_dict of bitsandbytes' the entry that holds the tensors."""

_UNSUPPORTED = {
    "max1": "block_wise=False, one scale for the whole tensor",
    "gnorm_vec": "percentile_clipping",
    "unorm_vec": "max_unorm",
}
"""Entries of a state that tell of an option without a counterpart."""


def translate_state(cls: type[Optimizer], saved: Mapping[str, Any], param: Tensor, what: str) -> Mapping[str, Any]:
    """A parameter's state with bitsandbytes' or torchao's entries as that of `cls`.

    Any other state is returned as it is. Codes and scales in blocks of 256 in fusedopt's own map are taken as they
    are. The second moments of Adagrad and RMSprop, which bitsandbytes keeps in the signed map, and torchao's states of
    4 bits, float8 and other block sizes are read as float32.

    Raises:
        ValueError, TypeError: another shape, block size or map, or a state that `cls` does not have.
    """
    if "state1" in saved or _WRAPPED in saved:
        return _from_bitsandbytes(cls, {**saved.get(_WRAPPED, {}), **saved}, param, what)
    if not any(map(_is_torchao, saved.values())):
        return saved
    result: Entries = {}
    for name, value in saved.items():
        if _is_torchao(value):
            if name not in cls.states:
                raise ValueError(f"the state {name!r} of {what} is torchao's; {cls.__name__} has no such state")
            result.update(_from_torchao(name, value, cls.states[name], param, what))
        else:
            result[name] = value
    return result


def _from_bitsandbytes(cls: type[Optimizer], saved: Mapping[str, Any], param: Tensor, what: str) -> Entries:
    layout = _layout(cls)
    for entry, option in _UNSUPPORTED.items():
        if entry in saved:
            raise ValueError(
                f"the state of {what} has {entry!r}, of bitsandbytes' {option}: that has no counterpart here; "
                "start it without its state"
            )
    if layout is None or ("state2" in saved) != (layout.state2 is not None):
        entries = [name for name in ("state1", "state2") if name in saved]
        raise ValueError(
            f"the state of {what} has bitsandbytes' {entries}: that is of another optimizer than {cls.__name__}"
        )
    result: Entries = {name: saved[name] for name in cls.counters if name in saved}
    result.update(_averages(cls, layout.state1, saved, "1", SIGNED, param, what))
    if layout.state2 is not None:
        result.update(_averages(cls, (layout.state2,), saved, "2", UNSIGNED, param, what))
    return result


def _averages(
    cls: type[Optimizer],
    names: tuple[str, ...],
    saved: Mapping[str, Any],
    number: str,
    map: DynamicMap,
    param: Tensor,
    what: str,
) -> Entries:
    """The entries of bitsandbytes' state number `number`, which holds the states `names`."""
    stack = (len(names),) if len(names) > 1 else ()
    state = saved["state" + number]
    _check(state, (*stack, *param.shape), f"'state{number}' of {what}", (torch.float32, torch.uint8))
    if not state.is_contiguous():
        raise ValueError(
            f"'state{number}' of {what} has strides {state.stride()}: bitsandbytes' kernels read it in another order "
            "than its indices; make the parameter contiguous before the first step"
        )
    each = state.to(param.device).unbind() if stack else [state.to(param.device)]
    if state.dtype.is_floating_point:
        return dict(zip(names, each))
    absmax: Any = saved.get("absmax" + number)
    qmap: Any = saved.get("qmap" + number)
    _check(absmax, (*stack, blocks(param.numel())), f"'absmax{number}', one for each block of {BLOCK}, of {what}")
    _check_map(qmap, map, f"'qmap{number}' of {what}")
    if stack:
        _check_scales(each[1], absmax[1], what)
    scales = absmax.to(param.device).view(len(names), -1)
    result: Entries = {}
    for name, codes, scale in zip(names, each, scales):
        if map_of(cls.states[name]) is map:
            result.update({name: codes, name + SCALE_SUFFIX: scale})
        else:
            values = qmap.to(param.device)[codes.flatten().long()] * scale.repeat_interleave(BLOCK)[: codes.numel()]
            result[name] = values.view(codes.shape)
    return result


def _check_scales(codes: Tensor, scale: Tensor, what: str) -> None:
    """Refuse a slow average whose scales are not in their places.

    bitsandbytes' CUDA kernel puts them right after the whole blocks of the fast average. Where the last block is not
    whole, that is one place early: the two averages share a scale, and the last one is never written.
    """
    tail = codes.flatten()[codes.numel() // BLOCK * BLOCK :]
    if len(tail) and scale[-1] == 0 and tail.min() != tail.max():
        raise ValueError(
            f"'absmax1' of {what}: the scales of the slow average are misplaced, as bitsandbytes does on CUDA where "
            f"the number of elements, here {codes.numel()}, is no multiple of {BLOCK}; start without this state"
        )


def _is_torchao(value: Any) -> bool:
    cls = type(local_shard(value))
    return cls.__module__.startswith("torchao.") and cls.__name__.startswith("OptimState")


def _from_torchao(name: str, value: Any, kind: str, param: Tensor, what: str) -> Entries:
    local: Any = local_shard(value)
    like = local_shard(param)
    if local.shape != like.shape or local.scale.numel() * local.block_size != local.numel():
        raise ValueError(
            f"the state {name!r} of {what} has shape {tuple(local.shape)} and {local.scale.numel()} scales of "
            f"{local.block_size} elements, its parameter shape {tuple(like.shape)}"
        )
    quantized = type(local).__name__ == "OptimState8bit"
    if quantized:
        _check_map(local.qmap, map_of(kind), f"the map of the state {name!r} of {what}")
        quantized = local.block_size == BLOCK
    if quantized and local is value:
        return {name: local.codes.to(param.device), name + SCALE_SUFFIX: local.scale.to(param.device)}
    result = new_state(name, param, kind, torch.uint8 if quantized else torch.float32)
    local_shard(result[name]).copy_(local.codes if quantized else local.dequantize())
    if quantized:  # of a DTensor, whose shards have a row of scales each, as long as the longest
        local_shard(result[name + SCALE_SUFFIX]).view(-1)[: local.scale.numel()].copy_(local.scale)
    return result


def _check(tensor: Any, shape: tuple[int, ...], what: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes or tensor.shape != shape:
        given = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        known = " or ".join(map(str, dtypes))
        raise ValueError(f"{what} is {given}; it must be {known} of shape {shape}")


@functools.cache
def _table(map: DynamicMap) -> Tensor:
    """What each of the 256 codes stands for."""
    steps = torch.arange(256, device="cpu") - map.zero
    return magnitudes(map)[steps.abs()] * steps.sign()


def _check_map(table: Any, map: DynamicMap, what: str) -> None:
    """Within 4 units in the last place, as bitsandbytes' own values are."""
    _check(table, (256,), what)
    units = (table.cpu().view(torch.int32).long() - _table(map).view(torch.int32).long()).abs()
    if units.max() > 4:
        raise ValueError(
            f"{what} is not the dynamic map that fusedopt's codes are in (code {int(units.argmax())} stands for "
            f"{table[units.argmax()]:.6g}); give the state as float32"
        )
