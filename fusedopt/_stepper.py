"""The step: which parameters take part, on which backend, by which plan."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.autograd.graph import increment_version
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import _checks
from ._clip import check_clippable, clip_coefficient, total_norm
from ._gpu import is_capturing, scalar_rows
from ._plan import CpuPlan, GpuPlan, Plan, Step, run
from ._state import Group, dtype_of, key_of, local_shard, master_dtype, new_master, new_state, stored
from .backends import Backend, Eager, Gpu, Update, choose, is_traced, native, requested_backend
from .binding import Rule
from .codecs import rounding_keys

Number = Any
"""A float, or a float64 tensor: `scalars` computes on either."""

# Options that decide what a plan does, beside the rule.
_PLANNED_OPTIONS = ("maximize", "state_dtype", "master", "rounding", "capturable", "differentiable")


@dataclass
class Entry:
    """A parameter that takes part in this step."""

    group: int
    param: Tensor
    number: int  # among all parameters
    what: str  # its name, for messages
    rule: Rule
    backend: Backend
    counters: tuple[float, ...] | None  # None where they are on the device, to be captured


class Stepper(torch.optim.Optimizer):
    """What steps, and what a subclass declares for it: `states`, `rule` and `scalars`."""

    states: ClassVar[Mapping[str, str]] = {}
    """Every state a rule of this class may use, and its kind: "signed" or "unsigned"."""

    counters: ClassVar[Mapping[str, float]] = {"step": 0.0}
    """Zero-dimensional CPU tensors in the state that `advance` counts on, and their first values."""

    max_grad_norm: float | None
    zero_grads: bool
    _backend: str | None

    grad_norm: Tensor | None
    """The norm of the last step's gradients, unscaled, zero-dimensional float32; None where they were not clipped."""

    def rule(self, group: Group) -> Rule:
        """The update rule of this group's parameters. Where all groups have one, `rule = rule_of(function)` will do."""
        raise NotImplementedError

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        """The rule's scalars by name, in double. `step` counts from 1 (and so do other counters, advanced)."""
        raise NotImplementedError

    def advance(self, group: Group, step: Number) -> tuple[Number, ...]:
        """The counters of the coming step from those of the last."""
        return (step + 1,)

    def counted(self, group: Group) -> Mapping[str, float]:
        """The counters of this group's parameters."""
        return self.counters

    def initial(self, name: str) -> float:
        """The first value of a state."""
        return 0.0

    def _forget_plan(self) -> None:
        self._plan: list[Plan] | None = None
        self._planned: list[tuple[Any, ...]] = []
        self._rest: list[tuple[int, Tensor, int, str]] = []  # parameters that no plan serves, as `_numbered` has them
        self._sharded = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError, ValueError, TypeError: a gradient, state or hyperparameter is not valid; every parameter and
                state is then as it was.
        """
        # torch's wrapper for hooks and the profiler costs more than stepping a small model, so it is entered only
        # where there is a hook or a profiler.
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return self._hooked_step() if closure is None else self._hooked_step(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # GradScaler sets these two while it steps an optimizer that supports scaling.
        found_inf, scale = self.__dict__.get("found_inf"), self.__dict__.get("grad_scale")
        if found_inf is None and scale is None:
            self._update(1.0)
        elif all(map(self._is_captured, self.param_groups)):
            self._update(1.0, scale, found_inf)
        elif found_inf is None or not found_inf.item():
            self._update(1.0 if scale is None else 1.0 / scale.item())
        return loss

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)

    @torch._disable_dynamo
    def _update(self, grad_scale: float, scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        self._pass(grad_scale, scale, found_inf)
        for group in self.param_groups:
            if group["rounding"] == "stochastic" and not self._is_captured(group):
                group["rounding_step"] = int(group.get("rounding_step", 0)) + 1
            elif group["rounding"] == "stochastic":
                drawn = 1 if found_inf is None else (found_inf == 0).to(group["rounding_step"], non_blocking=True)
                group["rounding_step"].add_(drawn)

    def _pass(self, grad_scale: float, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Apply the rules, once to every parameter that has a gradient."""
        if self.counters and is_capturing() and not all(map(self._is_captured, self.param_groups)):
            raise RuntimeError(_checks.not_capturable(type(self).__name__))
        requested = self._backend or requested_backend()
        clips = self.max_grad_norm is not None
        if clips:
            _checks.check_max_grad_norm(self.max_grad_norm)
        circumstances = requested, clips, is_traced()
        form = [
            (self.rule(group), *circumstances, *[group.get(option) for option in _PLANNED_OPTIONS])
            for group in self.param_groups
        ]
        step = Step(
            self.state,
            self.param_groups,
            self._scalars,
            [self._draw(group) for group in self.param_groups],
            grad_scale,
            self.max_grad_norm,
            self.zero_grads,
            scale,
            found_inf,
            functools.partial(self._captured, self.param_groups),
        )
        fits = self._plan is not None and form == self._planned
        if not (fits and self._by_plan(self._found_rest(requested), step)):
            self._plan = None
            self._replan(form, requested, step)

    def _draw(self, group: Group) -> tuple[int, int]:
        """What stochastic rounding draws from; of a captured step the keys are computed on the device."""
        return group["seed"], 0 if self._is_captured(group) else int(group.get("rounding_step", 0))

    def _is_captured(self, group: Group) -> bool:
        """Whether steps count on the device. A class that counts nothing has nothing to keep there."""
        return bool(group.get("capturable") and self.counted(group))

    def _found_rest(self, requested: str | None) -> list[Entry]:
        """The parameters with a gradient that no plan serves, checked."""
        if not self._rest:
            return []
        rest = [self._checked(*each, requested) for each in self._rest if each[1].grad is not None]
        self._complete(rest)
        return rest

    def _by_plan(self, rest: list[Entry], step: Step) -> bool:
        """A step by the plans, and of the rest. False where a plan does not fit."""
        assert self._plan is not None
        if step.max_norm is not None and (rest or len(self._plan) > 1 or self._sharded):
            grads = [param.grad for group in step.groups for param in group["params"] if param.grad is not None]
            step = self._clipped(grads, step)
        if not self._run(self._plan, step):
            return False
        if rest:
            self._run_once(rest, step)
        return True

    def _run(self, plans: list[Plan], step: Step) -> bool:
        """False where a plan does not fit."""
        result = run(plans, step)
        if result is None:
            return False
        stepped, left_grads, norm = result
        if norm is not None:
            self.grad_norm = norm
        if left_grads:
            _zero_grads(stepped)
        # So that autograd refuses a backward through values saved before the step, as after any update in place.
        increment_version(stepped)
        return True

    def _scalars(self, index: int, *counters: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """A group's scalars in its rule's order, and its counters advanced."""
        group = _without_tensors(self.param_groups[index])
        advanced = self.advance(group, *counters)
        named = self.scalars(group, *advanced)
        rule = self.rule(group)
        try:
            values = tuple([float(named[name]) for name in rule.scalars])
        except KeyError:
            _checks.check_scalars(type(self).__name__, named, rule)
            raise
        if any(map(math.isnan, values)):
            raise ValueError(_checks.nan_hyperparameter(group, index))
        return values, advanced

    def _replan(self, form: list[tuple[Any, ...]], requested: str | None, step: Step) -> None:
        """A step from scratch: check everything, then create missing state, then plan and run."""
        entries = list(self._entries(requested))
        if not entries:
            return
        self._complete(entries)
        if self.max_grad_norm is None:
            self.grad_norm = None
        repeated = len({entry.param for entry in entries}) < len(entries)
        plannable = [entry for entry in entries if entry.backend.plans]
        if not repeated and self._is_plannable() and plannable:
            planned = [*plannable, *self._absent(plannable, requested)]
            rest = [entry for entry in entries if not entry.backend.plans]
            self._rest = [(entry.group, entry.param, entry.number, entry.what) for entry in rest]
            self._sharded = any(local_shard(entry.param) is not entry.param for entry in planned)
            self._plan, self._planned = self._make_plans(planned, {entry.param for entry in rest}), form
            if not self._by_plan(rest, step):
                raise RuntimeError(_checks.declined(type(self).__name__))
            return
        step = self._clipped([entry.param.grad for entry in entries if entry.param.grad is not None], step)
        if not repeated:
            self._run_once(entries, step)
            return
        # torch warns of a parameter that is in a group twice, and steps it twice.
        seen = set()
        for entry in entries:
            if entry.param in seen and entry.counters is not None:
                group = self.param_groups[entry.group]
                entry.counters = self._count(self.state.get(entry.param, {}), group, entry.what)
            seen.add(entry.param)
            self._run_once([entry], step)

    def _complete(self, entries: list[Entry]) -> None:
        """Create what their state lacks, once all is known to be valid."""
        for index, counters in {(entry.group, entry.counters) for entry in entries}:
            if counters is not None:
                # Raises, while nothing has changed, where a hyperparameter is not valid.
                self._scalars(index, *counters)
        for entry in entries:
            self._init_state(entry.param, self.param_groups[entry.group])

    def _clipped(self, grads: list[Tensor], step: Step) -> Step:
        """The step with clipping in its gradient scale; `grad_norm` is set."""
        if step.max_norm is None:
            return step
        scale = step.grad_scale if step.scale is None else step.grad_scale / step.scale.item()
        self.grad_norm = total_norm(grads, ctypes.c_float(scale).value)
        coefficient = clip_coefficient(float(self.grad_norm), step.max_norm)
        return step._replace(grad_scale=step.grad_scale * coefficient, max_norm=None)

    def _is_plannable(self) -> bool:
        """Whether the containers are those torch makes; a plan walks them natively."""
        lists = isinstance(self.state, dict) and type(self.param_groups) is list
        return lists and all(type(group["params"]) is list for group in self.param_groups)

    def _run_once(self, entries: list[Entry], step: Step) -> None:
        """A step of these parameters alone, each on its own backend."""
        planned = [entry for entry in entries if entry.backend.plans]
        if planned:
            # Each parameter in a group of its own, to keep the order.
            groups = [{**self.param_groups[entry.group], "params": [entry.param]} for entry in planned]

            def scalars(index: int, *counters: float) -> Any:
                return self._scalars(planned[index].group, *counters)

            alone = step._replace(
                state={entry.param: self.state.get(entry.param, {}) for entry in planned},
                groups=groups,
                scalars=scalars,
                draws=[step.draws[entry.group] for entry in planned],
                captured=functools.partial(self._captured, groups),
            )
            if not self._run(self._make_plans(planned, set(), groups), alone):
                raise RuntimeError(_checks.declined(type(self).__name__))
        others = [entry for entry in entries if not entry.backend.plans]
        counted = [
            (self._scalars(entry.group, *entry.counters), entry) for entry in others if entry.counters is not None
        ]
        updates = [(self._update_of(entry, scalars, step.grad_scale), entry) for (scalars, _), entry in counted]
        for update, entry in updates:
            if isinstance(entry.backend, Eager):
                Eager.step(update)
        on_gpu = [update for update, entry in updates if isinstance(entry.backend, Gpu)]
        for device in {update.param.device for update in on_gpu}:
            from .kernels.driver import step_updates

            step_updates([update for update in on_gpu if update.param.device == device])
        if on_gpu:
            increment_version([entry.param for _, entry in updates if isinstance(entry.backend, Gpu)])
        for (_, advanced), entry in counted:
            for name, value in zip(self.counted(self.param_groups[entry.group]), advanced):
                self.state[entry.param][name].fill_(value)
        if self.zero_grads:
            _zero_grads([entry.param for entry in others])

    def _make_plans(
        self, entries: list[Entry], rest: set[Tensor], groups: list[Group] | None = None
    ) -> list[Plan]:
        """A plan for each backend among these. The CPU's is the first, since a plan for GPUs does not wait.

        Args:
            entries: some may have no gradient.
            rest: parameters that are stepped beside the plans.
            groups: one for each entry, in place of the optimizer's.
        """
        state: Any = self.state
        if groups is None:
            groups = self.param_groups
            sizes = [len(group["params"]) for group in groups]
            firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        else:
            state = {entry.param: self.state.get(entry.param, {}) for entry in entries}
            firsts = [entry.number for entry in entries]
        fresh = {entry.param for entry in entries if entry.counters == (0.0,)}
        backends = sorted({entry.backend for entry in entries}, key=lambda backend: isinstance(backend, Gpu))
        plans: list[Plan] = []
        for backend in backends:
            params = {entry.param for entry in entries if entry.backend is backend}
            others = {entry.param for entry in entries} - params | rest
            # Of a group that is stepped otherwise the rule may have no kernel here.
            numbers = [
                -1 if params.isdisjoint(group["params"]) else backend.rule_number(self.rule(group)) for group in groups
            ]
            specs = [self._spec(*each) for each in zip(groups, numbers, firsts, strict=True)]
            plan = native().Plan(specs, state, groups, params, fresh, others, isinstance(backend, Gpu))
            if isinstance(backend, Gpu):
                plans.append(GpuPlan(plan, backend.driver(), [self.rule(group) for group in groups]))
            else:
                plans.append(CpuPlan(plan))
        return plans

    def _spec(self, group: Group, number: int, first: int) -> Any:
        rule = self.rule(group)
        captured = self._is_captured(group)
        return native().GroupSpec(
            rule=number,
            scalars=len(rule.scalars),
            maximize=bool(group.get("maximize", False)),
            states=list(rule.states),
            is_signed=[self.states[name] == "signed" for name in rule.states],
            counters=[] if captured else list(self.counted(group)),
            has_master=group["master"] is not None,
            stochastic=group["rounding"] == "stochastic",
            first_parameter=first,
            captured=captured,
        )

    @torch.no_grad()
    def _captured(
        self, groups: list[Group], numbers: Sequence[int], grad_scale: float, control: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of scalars for parameters, given by number, and keys of those that are rounded stochastically.

        Computed on their device, where their counters are advanced.
        """
        owners = [(index, param) for index, group in enumerate(groups) for param in group["params"]]
        rows, keys = [], []
        for index, members in itertools.groupby((owners[number] for number in numbers), lambda pair: pair[0]):
            group, params = groups[index], [param for _, param in members]
            tensors = {name: [self.state[param][name] for param in params] for name in self.counted(group)}
            counters = [torch.stack(steps).double() for steps in tensors.values()]
            doubles = _in_double(group)
            advanced = self.advance(doubles, *counters)
            named = self.scalars(doubles, *advanced)
            _checks.check_scalars(type(self).__name__, named, self.rule(group))
            sign = -grad_scale if group.get("maximize") else grad_scale
            rows.append(scalar_rows([*(named[name] for name in self.rule(group).scalars), sign], len(params), control))
            for steps, before, after in zip(tensors.values(), counters, advanced):
                kept = torch.where(control[1] == 0, after, before)
                torch._foreach_copy_(steps, list(kept.to(steps[0].dtype).unbind()))
            if group["rounding"] == "stochastic":
                keys.append(self._captured_keys(group, params, control.device))
        return torch.cat(rows), torch.cat(keys) if keys else None

    def _captured_keys(self, group: Group, params: list[Tensor], device: torch.device) -> Tensor:
        number_of = {param: number for number, param in enumerate(itertools.chain(*map(_params_of, self.param_groups)))}
        numbers = [number_of[param] for param in params]
        # By runs, which are made on the device: a list would have to be sent.
        starts = [at for at, number in enumerate(numbers) if at == 0 or number != numbers[at - 1] + 1]
        runs = [
            torch.arange(numbers[start], numbers[start] + end - start, device=device)
            for start, end in zip(starts, [*starts[1:], len(numbers)])
        ]
        step = group["rounding_step"].to(device, non_blocking=True)
        return rounding_keys(group["seed"], step, torch.cat(runs))

    def _update_of(self, entry: Entry, scalars: tuple[float, ...], grad_scale: float) -> Update:
        param, group = entry.param, self.param_groups[entry.group]
        state = self.state.get(param, {})
        assert param.grad is not None
        return Update(
            entry.rule,
            local_shard(param),
            local_shard(param.grad),
            [stored(state, name, self.states[name]) for name in entry.rule.states],
            scalars,
            -grad_scale if group.get("maximize") else grad_scale,
            local_shard(state["master"]) if master_dtype(param, group) else None,
            key_of(param, group, entry.number),
        )

    def _entries(self, requested: str | None) -> Iterator[Entry]:
        """Every parameter with a gradient, checked."""
        for group in self.param_groups:
            if group.get("differentiable"):
                raise RuntimeError(_checks.NOT_DIFFERENTIABLE)
            _checks.check_options(group)
            rule = self.rule(group)
            _checks.check_rule(type(self).__name__, rule.name, rule.states, self.states)
        for index, param, number, what in self._numbered():
            if param.grad is not None:
                yield self._checked(index, param, number, what, requested)

    def _checked(self, index: int, param: Tensor, number: int, what: str, requested: str | None) -> Entry:
        """A parameter that has a gradient."""
        assert param.grad is not None
        _checks.check_param(param, local_shard(param), what)
        _checks.check_grad(param, param.grad, type(self).__name__, what)
        if self.max_grad_norm is not None:
            check_clippable(param.grad, f"the gradient of {what}")
        return self._entry(index, param, number, what, requested)

    def _absent(self, entries: list[Entry], requested: str | None) -> Iterator[Entry]:
        """Parameters with state but no gradient in this step, as of a mixture's expert that is not routed to.

        They are planned too, on the backends of `entries`, or each step with others among them would need a new plan.
        """
        backends = {entry.backend for entry in entries}
        for index, param, number, what in self._numbered():
            group, state = self.param_groups[index], self.state.get(param, {})
            names = [*self.rule(group).states, *self.counted(group), *["master"] * (group["master"] is not None)]
            if param.grad is not None or any(state.get(name) is None for name in names):
                continue
            try:
                _checks.check_param(param, local_shard(param), what)
                entry = self._entry(index, param, number, what, requested)
            except (RuntimeError, TypeError, ValueError):
                continue  # it is told of once it has a gradient
            if entry.backend in backends:
                yield entry

    def _numbered(self) -> Iterator[tuple[int, Tensor, int, str]]:
        """Every parameter: its group's index, itself, its number among all, its name for messages."""
        number = itertools.count()
        for index, group in enumerate(self.param_groups):
            for param, what in zip(group["params"], parameter_names(group, index)):
                yield index, param, next(number), what

    def _entry(self, index: int, param: Tensor, number: int, what: str, requested: str | None) -> Entry:
        """A parameter whose state is checked."""
        group, state = self.param_groups[index], self.state.get(param, {})
        rule = self.rule(group)
        _checks.check_master(param, group["master"], what)
        _checks.check_state(param, state, rule.states, what)
        if master := master_dtype(param, group):
            _checks.check_master_state(param, state.get("master"), what, master)
        backend = choose(local_shard(param), requested, what, rule)
        if group.get("capturable"):
            _checks.check_capturable(backend, what)
        counters = None if self._is_captured(group) else self._count(state, group, what)
        return Entry(index, param, number, what, rule, backend, counters)

    def _count(self, state: Mapping[str, Any], group: Group, what: str) -> tuple[float, ...]:
        """The counters' values. Where there are none, the first step, 0, is still told from the others, 1."""
        counters = self.counted(group)
        if not counters:
            return (0.0 if any(state.get(name) is None for name in self.rule(group).states) else 1.0,)
        _checks.check_counters({name: state[name] for name in counters if name in state}, what)
        return tuple(float(state.get(name, first)) for name, first in counters.items())

    def _init_state(self, param: Tensor, group: Group) -> None:
        """Create what the parameter's state lacks, and bring its counters where they are counted."""
        rule, master = self.rule(group), master_dtype(param, group)
        counters = self.counted(group)
        if not rule.states and not counters and not master:
            return
        if self._is_captured(group) and group["rounding"] == "stochastic":
            drawn, device = group.get("rounding_step", 0), local_shard(param).device
            if not (isinstance(drawn, Tensor) and drawn.is_cuda):
                group["rounding_step"] = torch.full((), int(drawn), dtype=torch.int64, device=device)
        state = self.state[param]
        for name, first in counters.items():
            state[name] = counter_of(state.get(name, first), param, self._is_captured(group))
        for name in rule.states:
            if state.get(name) is None:
                kind = self.states[name]
                state.update(new_state(name, param, kind, dtype_of(param, kind, group), self.initial(name)))
        if master and state.get("master") is None:
            state["master"] = new_master(param, master)


def parameter_names(group: Group, index: int) -> list[str]:
    """What messages call the parameters of group number `index`."""
    names = [f"parameter {name!r}" for name in group.get("param_names", ())]
    # A parameter appended to the list afterwards has no name.
    return names + [f"parameter {position} of group {index}" for position in range(len(names), len(group["params"]))]


def _zero_grads(params: list[Tensor]) -> None:
    """As `torch.optim.Optimizer.zero_grad(set_to_none=False)`, where elements may share memory, or have none."""
    for param in params:
        if param.grad is not None and not param.grad._is_zerotensor():
            param.grad = torch.zeros_like(param.grad) if 0 in param.grad.stride() else param.grad.detach().zero_()


def counter_of(value: Any, param: Tensor, captured: bool) -> Tensor:
    """`value` as a counter: its own tensor where that is one already. One that is captured is on the device."""
    device = local_shard(param).device if captured else torch.device("cpu")
    if isinstance(value, Tensor) and value.device == device and value.dtype in (torch.float32, torch.float64):
        return value.detach() if value.requires_grad else value
    if isinstance(value, Tensor) and value.device == device:
        return value.float()
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.full((), float(value), dtype=dtype, device=device)


def _params_of(group: Group) -> list[Tensor]:
    params: list[Tensor] = group["params"]
    return params


def _in_double(group: Group) -> Group:
    """The group with tensors on a GPU, like a tensor lr, in double, and others as numbers."""

    def converted(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.double().reshape(()) if value.is_cuda else value.item()
        return tuple(map(converted, value)) if isinstance(value, tuple) else value

    return {name: converted(value) for name, value in group.items() if name not in ("params", "param_names")}


def _without_tensors(group: Group) -> Group:
    """The group with one-element tensors, like a tensor lr, as numbers."""
    if isinstance(group.get("lr"), float) and not isinstance(group.get("weight_decay"), Tensor):
        if not any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            return group
    number = {name: _number(value) for name, value in group.items() if name not in ("params", "param_names")}
    return {**group, **number}


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return tuple(map(_number, value)) if isinstance(value, tuple) else value
