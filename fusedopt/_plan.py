"""Plans: what is remembered from step to step, and runs a step whose tensors are of the same form as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._clip import clipped
from ._gpu import Driver, Launch, control_of
from ._state import Group
from .binding import Rule


class Step(NamedTuple):
    """What a step brings.

    scalars: as `fusedopt._native.Plan.step` takes it.
    draws: seed and step of stochastic rounding, for each group.
    scale, found_inf: what GradScaler sets, where a captured step is to read them on the device.
    captured: rows of scalars computed on the device for the parameters of these numbers, from the gradient scale and
        the control, and the keys of those that are rounded stochastically; it also counts the step.
    """

    state: Any
    groups: list[Group]
    scalars: Callable[..., Any]
    draws: list[tuple[int, int]]
    grad_scale: float
    max_norm: float | None
    zero_grads: bool
    scale: Tensor | None
    found_inf: Tensor | None
    captured: Callable[[Sequence[int], float, Tensor], tuple[Tensor, Tensor | None]]


class CpuPlan:
    """Of the parameters that the native module steps."""

    grad_norm: Tensor | None = None

    def __init__(self, plan: Any):
        self._plan = plan

    def prepare(self, step: Step) -> bool:
        return True  # it declines as it runs

    def run(self, step: Step) -> bool:
        """False where the plan does not fit."""
        self.stepped = self._plan.step(
            step.state,
            step.groups,
            step.scalars,
            torch.get_num_threads(),
            step.grad_scale,
            step.draws,
            step.max_norm,
            step.zero_grads,
        )
        if self.stepped is not None and step.max_norm is not None:
            self.grad_norm = torch.tensor(self._plan.grad_norm, device="cpu")
        return self.stepped is not None

    def finish(self, done: bool) -> tuple[list[Tensor], bool]:
        """The parameters that were stepped, and whether a gradient was left that is to be zeroed."""
        return self.stepped, self._plan.left_grads


class GpuPlan:
    """Of the parameters that one backend steps on GPUs. The native module fills its tables, and a driver launches.

    Args:
        rules: of each group.
    """

    grad_norm: Tensor | None = None

    def __init__(self, plan: Any, driver: Driver, rules: Sequence[Rule]):
        self._plan, self._driver, self._rules = plan, driver, rules

    def prepare(self, step: Step) -> bool:
        """False where the plan does not fit; else `finish` must follow."""
        clips = step.max_norm is not None
        scale = 1.0 if clips else step.grad_scale
        fits: bool = self._plan.prepare(
            step.state, step.groups, step.scalars, scale, step.draws, clips, step.zero_grads
        )
        return fits

    def run(self, step: Step) -> bool:
        launches: list[tuple[int, Launch]] = self._plan.launches
        if not launches:
            self.grad_norm = None if step.max_norm is None else torch.zeros((), device="cpu")
            return True
        control = control_of(step.scale, step.found_inf, _device(launches[0][1]))
        scale = step.grad_scale
        if step.max_norm is not None:
            self.grad_norm, control = self._clipped(step, control, any(launch.captured for _, launch in launches))
            scale = 1.0
        for place, launch in launches:
            there = control.to(_device(launch), non_blocking=True)
            scalars, keys = step.captured(launch.parameters, scale, there) if launch.captured else (None, None)
            self._driver.launch(place, launch, self._rules[launch.group], there, scalars, keys)
        if any(launch.captured for _, launch in launches) and (empty := _without_elements(step.groups)):
            step.captured(empty, scale, control)
        return True

    def _clipped(self, step: Step, control: Tensor, captured: bool) -> tuple[Tensor, Tensor]:
        assert step.max_norm is not None
        if step.grad_scale != 1:
            control = torch.stack([control[0] * step.grad_scale, control[1]])
        launches = self._plan.norm_launches
        if launches is not None:
            return self._driver.norm(launches, control, step.max_norm, captured)
        grads = [param.grad for group in step.groups for param in group["params"] if param.grad is not None]
        return clipped(grads, control, step.max_norm)

    def finish(self, done: bool) -> tuple[list[Tensor], bool]:
        return self._plan.finish(done), self._plan.left_grads


Plan = CpuPlan | GpuPlan


def run(plans: Sequence[Plan], step: Step) -> tuple[list[Tensor], bool, Tensor | None] | None:
    """One step by all plans together, which share the parameters among them.

    Returns:
        The parameters that were stepped, whether there are gradients that are still to be zeroed, and the norm of the
        gradients where they were clipped. None where a plan does not fit; nothing has changed then.
    """
    if len(plans) == 1 and isinstance(plans[0], CpuPlan):
        # There is nothing to take back, and in a small model this function would be a tenth of the step.
        return (*plans[0].finish(True), plans[0].grad_norm) if plans[0].run(step) else None
    prepared: list[Plan] = []
    done = False
    stepped, norm, left = [], None, False
    try:
        for plan in plans:
            if not plan.prepare(step):
                return None
            prepared.append(plan)
        # The CPU's, which comes first, may still decline; the others have only queued work when they return.
        done = all(plan.run(step) for plan in plans)
    finally:
        for plan in prepared:
            if done or isinstance(plan, GpuPlan):
                params, left_grads = plan.finish(done)
                if done:
                    stepped += params
                    left |= left_grads
                    norm = plan.grad_norm if plan.grad_norm is not None else norm
    return (stepped, left, norm) if done else None


def _without_elements(groups: Sequence[Group]) -> list[int]:
    """The numbers of parameters that are in no launch but whose steps are counted on the device all the same."""
    owned = ((group, param) for group in groups for param in group["params"])
    return [
        number
        for number, (group, param) in enumerate(owned)
        if group.get("capturable") and param.grad is not None and not param.numel()
    ]


def _device(launch: Launch) -> torch.device:
    return torch.device("cpu") if launch.device < 0 else torch.device("cuda", launch.device)
