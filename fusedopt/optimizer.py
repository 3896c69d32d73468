"""The base class: options, parameter groups and the state_dict. The step itself is in `_stepper.py`."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import _checks, _foreign
from ._state import Group, converted, converted_master, dtype_of, master_dtype
from ._stepper import Stepper, counter_of, parameter_names
from .backends import check_backend
from .codecs import SCALE_SUFFIX

# What a group of an old checkpoint that lacks an option means by it, as in torch.
_ABSENT = {
    "amsgrad": False,
    "capturable": False,
    "centered": False,
    "decoupled_weight_decay": False,
    "differentiable": False,
    "foreach": None,
    "fused": None,
    "maximize": False,
    "momentum": 0,
    "nesterov": False,
}


class GroupOptions(TypedDict, total=False):
    """What every optimizer takes beside its own arguments; a parameter group may set each for itself."""

    state_dtype: str | None
    min_quantized_size: int
    master: str | None
    rounding: str
    seed: int


class Options(GroupOptions, total=False):
    """These are of the whole optimizer."""

    max_grad_norm: float | None
    zero_grads: bool
    backend: str | None


GROUP_OPTIONS = GroupOptions(state_dtype=None, min_quantized_size=4096, master=None, rounding="nearest", seed=0)
"""Their defaults."""

OPTIONS = Options({**GROUP_OPTIONS, "max_grad_norm": None, "zero_grads": False, "backend": None})

# How things are stored: a checkpoint does not change it.
_STORAGE_OPTIONS = ("state_dtype", "min_quantized_size", "master", "rounding")


class Optimizer(Stepper):
    """Base of every optimizer here. A subclass declares `states`, `rule` and `scalars`.

    Args:
        params: parameters, named parameters or groups, as for `torch.optim.Optimizer`.
        defaults: the options of a group that does not set them.
        state_dtype: storage of the states: None for torch's choice (the parameter's dtype), "float32", "bfloat16"
            (signed states only; unsigned ones, like second moments, are then float32) or "int8" (block-wise codes,
            `NAME`, with a float32 scale for every 256 elements, `NAME_scale`).
        min_quantized_size: parameters of fewer elements have float32 state under "int8".
        master: for parameters of 16 bits: None, "float32" (a copy that is updated, of which the parameter is the
            rounded form), or for bfloat16 "split16" (the 16 bits that it lacks of float32) or "split8" (8 of them).
        rounding: "nearest" or "stochastic", of a parameter of 16 bits, or of the 24 of "split8".
        seed: of stochastic rounding, which depends on it, the step, the parameter's number and the element alone.
        max_grad_norm: gradients are clipped to this norm, taken of all of them together, as they are read; they stay as
            they are. None does not clip. Also an attribute, which may be changed. `grad_norm` then has the norm before.
            With DTensors every process must step, and the norm's last bits depend on how they are sharded.
        zero_grads: set the gradients to zero once they are read.
        backend: None for the fastest that serves a parameter, or the name of one.

    Raises:
        ValueError: an option is not valid, or there is no such backend.
        RuntimeError: the backend cannot run here.
    """

    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The counterpart in torch.optim."""

    group_options: ClassVar[GroupOptions] = GROUP_OPTIONS
    """Defaults of the options that every class takes."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _checks.check_states(cls.__name__, cls.states, cls.counters)
        # For help() and for frameworks that pass on what a signature names.
        signature = inspect.signature(cls.__init__)
        own = [p for name, p in signature.parameters.items() if p.kind != p.VAR_KEYWORD and name != "self"]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in {**OPTIONS, **cls.group_options}.items()
            if name not in signature.parameters
        ]
        takes_options = len(own) + 1 < len(signature.parameters)
        cls.__signature__ = signature.replace(parameters=own + options * takes_options)  # type: ignore[attr-defined]

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[Options]):
        unknown = sorted(options.keys() - OPTIONS.keys())
        if unknown:
            known = ", ".join(inspect.signature(type(self)).parameters)
            raise TypeError(f"{type(self).__name__} got an unexpected argument {unknown[0]!r}; it takes {known}")
        self._backend = check_backend(options.pop("backend", None), "backend")
        self.max_grad_norm = options.pop("max_grad_norm", None)
        self.zero_grads = options.pop("zero_grads", False)
        self.grad_norm = None
        _checks.check_max_grad_norm(self.max_grad_norm)
        self._forget_plan()
        super().__init__(params, {**defaults, **self.group_options, **options})
        if defaults.get("fused"):
            # As torch: GradScaler then leaves unscaling and skipping to the step.
            self._step_supports_amp_scaling = True

    # --- groups ---

    def add_param_group(self, param_group: Group) -> None:
        _checks.check_options({**self.defaults, **param_group})
        if param_group.get("differentiable", self.defaults.get("differentiable")):
            raise RuntimeError(_checks.NOT_DIFFERENTIABLE)
        super().add_param_group(param_group)
        try:
            self._check_masters(len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check_masters(self, index: int) -> None:
        group = self.param_groups[index]
        for param, what in zip(group["params"], parameter_names(group, index)):
            _checks.check_master(param, group["master"], what)

    # --- state_dict, pickle ---

    def __getstate__(self) -> dict[str, Any]:
        own = {"_backend": self._backend, "max_grad_norm": self.max_grad_norm, "zero_grads": self.zero_grads}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        declared = set(state.get("defaults", self.__dict__.get("defaults", ())))
        super().__setstate__(state)
        # torch adds an option here that not every class has.
        self.defaults = {name: value for name, value in self.defaults.items() if name in declared}
        for name, value in (("_backend", None), ("max_grad_norm", None), ("zero_grads", False), ("grad_norm", None)):
            self.__dict__.setdefault(name, value)
        self._forget_plan()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, _ABSENT.get(name, default))
            for param in group["params"]:
                own = self.state.get(param, {})
                captured = self._is_captured(group)
                own.update({name: counter_of(own[name], param, captured) for name in self.counters if name in own})

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict saved by this class, its torch.optim counterpart, or bitsandbytes' or torchao's.

        Every tensor is copied. A loaded state keeps its dtype, unless `state_dtype` asks for another; torch would cast
        it to the parameter's. How state and parameters are stored is this optimizer's choice, not the checkpoint's:
        codes of 8 bits are taken as they are under "int8", and read as numbers where not.

        Raises:
            ValueError: the groups do not match, or a state is not of its parameter's shape, or codes are not in blocks
                of 256 or of another map; nothing has changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saved_groups = copy.deepcopy(state_dict["param_groups"])
        saved_groups = [_foreign.translate_group(type(self), group) for group in saved_groups]
        _checks.check_groups(self.param_groups, saved_groups)
        owner = {}
        for index, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            for key, param, what in zip(saved_group["params"], group["params"], parameter_names(group, index)):
                owner[key] = (param, group, what)
            _checks.check_saved_format(saved_group, index)
            saved_group["params"] = group["params"]
            saved_group.update({name: group[name] for name in _STORAGE_OPTIONS})
            _checks.check_options({**self.defaults, **saved_group})
            if "param_names" in group:
                saved_group.setdefault("param_names", group["param_names"])
        state: defaultdict[Any, Any] = defaultdict(dict)
        for key, saved in state_dict["state"].items():
            if key in owner:
                param, group, what = owner[key]
                saved = _foreign.translate_state(type(self), saved, param, what)
                state[param] = self._load_state(saved, param, group, what)
            else:
                state[key] = saved
        self.__setstate__({"state": state, "param_groups": saved_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_state(self, saved: Mapping[str, Any], param: Tensor, group: Group, what: str) -> dict[str, Any]:
        """Copies of one parameter's saved state, stored as the group's options say."""
        _checks.check_state(param, saved, self.states, what, same_device=False)
        scales = [name + SCALE_SUFFIX for name in self.states]
        loaded: dict[str, Any] = {}
        for name, value in saved.items():
            if value is None or name in scales:
                continue
            if name in self.counters:
                _checks.check_counters({name: value}, what)
                loaded[name] = counter_of(value, param, self._is_captured(group)).clone()
            elif name in self.states:
                dtype = dtype_of(param, self.states[name], group)
                if group["state_dtype"] is None and value.dtype != torch.uint8:
                    dtype = value.dtype
                loaded.update(converted(saved, name, param, self.states[name], dtype, copy=True))
            elif name == "master":
                master = master_dtype(param, group)
                if master:
                    _checks.check_master_state(param, value, what, same_device=False)
                    loaded[name] = converted_master(value, param, master)
            else:
                loaded[name] = value.to(param.device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        return loaded
