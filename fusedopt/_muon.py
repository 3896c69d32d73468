"""Muon: momentum, orthogonalized; AdamW for what is not a matrix, in the same object."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ._distributed import Exchange, Wholes, check_process_group
from ._matrix import Workspace
from ._muon_units import (
    Unit,
    as_rows,
    check_group,
    check_matrix,
    in_workspace,
    is_adamw,
    lr_ratio,
    matrices_of,
    new_averages,
    stacked,
    steps_of,
    wide_dtype,
)
from ._orthogonalize import Plan, newton_schulz, parts, plan
from ._plan import Step
from ._routing import route
from ._state import Group, local_shard
from ._stepper import Entry, Number, Stepper, parameter_names
from .backends import Explanation, choose, requested_backend
from .binding import RULES, Rule
from .optim import AdamW, adam_scalars, check_betas, check_lr
from .optimizer import Optimizer, Options

JORDAN = (3.4445, -4.7750, 2.0315)
ROW_STATE = "row_exp_avg_sq"

OWN_DEFAULTS = {
    "norm": "frobenius",
    "method": "auto",
    "cautious": False,
    "beta2": None,
    "split": None,
    "flatten": None,
    "maximize": False,
    "algorithm": None,
}
"""Of the options that torch.optim.Muon has not."""
ADAMW_DEFAULTS = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


class Muon(Optimizer):
    """Muon (Jordan et al., 2024): SGD with momentum, the update of each matrix orthogonalized.

    Of an iterable of parameters or groups it is `torch.optim.Muon`. Of a module, matrices are stepped by Muon and the
    rest by AdamW, and so are groups with `algorithm="muon"` or `"adamw"`: `explain()` says which and why. Parameters of
    more than two dimensions are taken there too: those of three as stacks of matrices, of more as kernels, which are
    matrices of a row for each output channel. A group's `flatten=True` makes kernels of any, False stacks; a module's
    convolutions are kernels.

    Args:
        params: as for every optimizer, or a module. Of a module, AdamW takes parameters of less than two dimensions,
            embeddings, and the output layer.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as `torch.optim.Muon`.
            `ns_coefficients` may also be a schedule, by name or as triples, see `fusedopt.orthogonalize`.
            `adjust_lr_fn` may also be "spectral", sqrt(rows / columns).
        norm, method: as `fusedopt.orthogonalize`.
        cautious: decay an element only where the update does not enlarge it (Chen et al., arXiv:2510.12402).
        beta2: NorMuon's (Li et al., arXiv:2510.05491): each row of the orthogonalized update is divided by the root of
            an average, with this decay, of its mean square, and the whole brought back to its norm; None does not.
        split: rows of each matrix that is orthogonalized by itself: a number, such as that of a head, or one for each
            part, such as query, key and value. None for the whole. Best given to a group.
        maximize: ascend.
        process_group: of processes that have the same parameters and gradients, as under DDP: each matrix is then
            orthogonalized by one of them. None for each process by itself. Not saved; DTensors need none. Where
            processes share matrices each must step, with gradients of the same ones.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: of the groups on AdamW.
    """

    torch_class = getattr(torch.optim, "Muon", None)
    states = {"momentum_buffer": "signed", "update": "signed", **AdamW.states}

    def __init__(
        self,
        params: ParamsT | Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[Any] = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        norm: str = "frobenius",
        method: str = "auto",
        cautious: bool = False,
        beta2: float | None = None,
        split: int | Sequence[int] | None = None,
        maximize: bool = False,
        process_group: Any = None,
        adamw_lr: float | Tensor = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        **options: Unpack[Options],
    ):
        self._adamw = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        check_process_group(process_group)
        self._process_group = process_group
        self._reasons: dict[Tensor, str] = {}
        if isinstance(params, Module):
            params, self._reasons = route(params)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "norm": norm,
            "method": method,
            "cautious": cautious,
            "beta2": beta2,
            "split": split,
            "flatten": None,
            "maximize": maximize,
            "algorithm": None,
        }
        check_group(defaults)
        super().__init__(params, defaults, **options)
        self._prepare()

    def _prepare(self) -> None:
        self._workspace = Workspace()
        self._applier = _Applier(self)
        self._exchange: Exchange = self.__dict__.get("_exchange") or Exchange()

    # --- groups ---

    def add_param_group(self, param_group: Group) -> None:
        algorithm = param_group.get("algorithm")
        if algorithm == "adamw":
            for name, value in {**self._adamw, "amsgrad": False, "decoupled_weight_decay": True}.items():
                param_group.setdefault(name, value)
            check_lr(param_group["lr"])
            check_betas(param_group["betas"])
        merged = {**self.defaults, **param_group}
        check_group(merged)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param, what in zip(group["params"], parameter_names(group, len(self.param_groups) - 1)):
                check_matrix(param, group, what)
        except ValueError:
            del self.param_groups[-1]
            raise

    # --- checkpoints ---

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Those of torch.optim.Muon, where one is taken over, lack what is not torch's.
        defaults = state.get("defaults", self.__dict__.get("defaults", {}))
        for name, value in OWN_DEFAULTS.items():
            defaults.setdefault(name, value)
        super().__setstate__(state)
        self.__dict__.setdefault("_adamw", ADAMW_DEFAULTS)
        self.__dict__.setdefault("_reasons", {})
        self.__dict__.setdefault("_process_group", None)
        self._prepare()

    def _load_state(self, saved: Mapping[str, Any], param: Tensor, group: Group, what: str) -> dict[str, Any]:
        rows = saved.get(ROW_STATE)
        if rows is not None and rows.shape != (wanted := (*param.shape[: stacked(param, group) + 1], 1)):
            raise ValueError(
                f"the state {ROW_STATE!r} of {what} has shape {tuple(rows.shape)}; its parameter wants {wanted}"
            )
        loaded = super()._load_state(saved, param, group, what)
        if rows is not None:
            own = local_shard(param.detach()).to(wide_dtype(param))
            loaded[ROW_STATE] = new_averages(own, param, group).copy_(rows)
        return loaded

    # --- the step ---

    def counted(self, group: Group) -> Mapping[str, float]:
        return self.counters if is_adamw(group) else {}

    def rule(self, group: Group) -> Rule:
        return RULES["adam" if is_adamw(group) else "muon_momentum"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        if is_adamw(group):
            return adam_scalars(group, step)
        w1 = 1 - group["momentum"]
        return {"w1": w1, "blend": w1 if group["nesterov"] else 0.0}

    def _pass(self, grad_scale: float, scale: Tensor | None, found_inf: Tensor | None) -> None:
        units = self._units()
        for unit in units:
            for entry, update in zip(unit.entries, unit.placed_updates(), strict=True):
                self.state[entry.param]["update"] = update
        try:
            super()._pass(grad_scale, scale, found_inf)
        finally:
            for unit in units:
                for entry in unit.entries:
                    del self.state[entry.param]["update"]
                    if not self.state[entry.param]:
                        del self.state[entry.param]
        for unit in units:
            unit.averages = self._averages(unit)
        shared = [unit for unit in units if unit.layout]
        self._orthogonalize_shared(shared)
        for unit in itertools.chain(shared, self._orthogonalized([unit for unit in units if not unit.layout])):
            self._applier.apply(unit)

    def explain(self) -> Explanation:
        """For each parameter the algorithm, why, and how it is computed."""
        rows = []
        for index, group in enumerate(self.param_groups):
            for param, what in zip(group["params"], parameter_names(group, index)):
                why = self._reasons.get(param, "its group says so" if group["algorithm"] else "it is Muon's")
                how = "adamw" if is_adamw(group) else self._described(param, group)
                rows.append((what, how, f"{tuple(param.shape)}: {why}"))
        return Explanation(tuple(rows), ())

    def _described(self, param: Tensor, group: Group) -> str:
        stack = torch.empty((1, *param.shape), dtype=wide_dtype(param), device="meta")
        found = []
        for matrices in matrices_of(stack, group):
            count, rows, columns = matrices.shape
            chosen = self._how(group, stack.dtype, matrices.shape, param.device)
            found.append(
                f"{count} x {rows}x{columns} by {chosen.method} on {chosen.backend} in {str(chosen.dtype)[6:]} "
                f"({chosen.reason})"
            )
        return f"muon: {'; '.join(found)}"

    def _how(self, group: Group, dtype: torch.dtype, shape: torch.Size, device: torch.device) -> Plan:
        wanted = dtype if dtype is torch.float64 else None
        backend = self._backend or requested_backend()
        if wanted or backend == "cuda":
            # Which have rules for these, and no products.
            backend = None
        batch, rows, columns = shape
        return plan(rows, columns, device, steps_of(group), wanted, group["method"], backend, batch)

    def _units(self) -> list[Unit]:
        """The matrices with a gradient, in memory of their own for their updates; everything is checked before."""
        requested = self._backend or requested_backend()
        units: list[Unit] = []
        shared: defaultdict[Any, list[int]] = defaultdict(list)
        first = 0
        for index, group in enumerate(self.param_groups):
            if not is_adamw(group):
                alike: defaultdict[Any, list[Entry]] = defaultdict(list)
                for number, (param, what) in enumerate(zip(group["params"], parameter_names(group, index)), first):
                    if layout := self._exchange.layout(param, self._process_group, what):
                        shared[layout.group, param.device] += [number] * (param.grad is not None)
                    if param.grad is None:
                        continue
                    if param.is_complex():
                        raise RuntimeError(f"Muon does not support complex parameters, and {what} is {param.dtype}")
                    rule = self._applier.rule(group)
                    backend = choose(local_shard(param), requested, what, rule)
                    alike[layout, param.shape, param.device, backend.name].append(
                        Entry(index, param, number, what, rule, backend, (1.0,))
                    )
                if alike:
                    check_group(group)
                    self._applier._scalars(index, 1.0)
                units += [Unit(group, entries, layout) for (layout, *_), entries in alike.items()]
            first += len(group["params"])
        seen = {entry.param for unit in units for entry in unit.entries}
        if len(seen) < sum(len(unit.entries) for unit in units):
            raise ValueError("a matrix is among Muon's parameters twice; give each parameter once")
        self._exchange.check_same(shared)
        return units

    def _orthogonalized(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """The units, their updates replaced by what they come to. Each holds until the next is asked for."""
        together: defaultdict[Any, list[tuple[Unit, Tensor, float]]] = defaultdict(list)
        left: Counter[Unit] = Counter()
        for unit in units:
            group = unit.group
            for matrices in matrices_of(unit.stack, group):
                if not matrices.numel():
                    continue
                chosen = self._how(group, matrices.dtype, matrices.shape, matrices.device)
                # Only a GPU computes matrices of several shapes faster than one shape after another.
                alone = unit if chosen.backend == "cpu" or not matrices.is_cuda else None
                key = alone, chosen, steps_of(group), group["norm"], group["eps"], matrices.device
                scale = lr_ratio(group["adjust_lr_fn"], *matrices.shape[1:])
                together[key] += [(unit, part, scale) for part in parts(matrices)]
                left[unit] += len(parts(matrices))
            if not left[unit]:
                yield unit
        for (_, chosen, steps, norm, eps, _), members in together.items():
            for some in in_workspace(members):
                _, xs, scales = zip(*some, strict=True)
                found = newton_schulz(xs, steps, chosen, self._workspace, norm=norm, eps=eps, scales=scales)
                for (unit, part, _), result in zip(some, found, strict=True):
                    if result.numel() == unit.stack.numel() and result.dtype is unit.stack.dtype:
                        unit.stack = result.view(unit.stack.shape)
                    else:
                        part.copy_(result)
                    left[unit] -= 1
                for unit in {unit: None for unit, _, _ in some if not left[unit]}:
                    if unit.group["beta2"] is not None:
                        self._equalize_rows(unit)
                    yield unit

    def _orthogonalize_shared(self, units: list[Unit]) -> None:
        """As `_orthogonalized`, of units that several processes have parts of: each matrix in one of them."""

        def orthogonalize(wholes: Mapping[int, Wholes]) -> None:
            stacks = {}
            for number, (stack, averages) in wholes.items():
                unit = Unit(units[number].group, [], stack=stack)
                unit.averages = () if averages is None else averages.unbind()
                stacks[unit] = stack
            for unit in self._orthogonalized([*stacks]):
                if unit.stack is not stacks[unit]:
                    stacks[unit].copy_(unit.stack)

        self._exchange.orthogonalize([unit.shards() for unit in units], orthogonalize)

    def _averages(self, unit: Unit) -> Sequence[Tensor]:
        """NorMuon's second moments, this process's rows of each parameter."""
        if unit.group["beta2"] is None:
            return ()
        for entry, update in zip(unit.entries, unit.updates, strict=True):
            state = self.state[entry.param]
            if ROW_STATE not in state:
                state[ROW_STATE] = new_averages(update, entry.param, unit.group)
        return [local_shard(self.state[entry.param][ROW_STATE]) for entry in unit.entries]

    def _equalize_rows(self, unit: Unit) -> None:
        """NorMuon's second moment."""
        beta2 = unit.group["beta2"]
        for average, update in zip(unit.averages, unit.updates, strict=True):
            rows = as_rows(update, unit.group)
            average.lerp_(rows.square().mean(-1, keepdim=True), 1 - beta2)
            norm = torch.linalg.matrix_norm(rows, keepdim=True)
            rows.mul_(average.clamp(min=torch.finfo(average.dtype).tiny).rsqrt())
            now = torch.linalg.matrix_norm(rows, keepdim=True)
            rows.mul_(norm / now.clamp(min=torch.finfo(now.dtype).tiny))


class _Applier(Stepper):
    """The last pass: parameters from their orthogonalized updates."""

    max_grad_norm, zero_grads, _backend = None, False, None
    counters = {}
    states = {"update": "signed"}

    def __init__(self, owner: Muon) -> None:
        self._owner = owner
        self.state = defaultdict(dict)

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        return self._owner.param_groups

    def rule(self, group: Group) -> Rule:
        return RULES["muon_cautious" if group["cautious"] else "muon"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        return {"decay": 1 - group["lr"] * group["weight_decay"], "step_size": group["lr"]}

    def apply(self, unit: Unit) -> None:
        self.state.clear()
        for entry, update in zip(unit.entries, unit.placed_updates(), strict=True):
            self.state[entry.param] = {**self._owner.state[entry.param], "update": update}
        draws = [self._draw(group) for group in self.param_groups]
        captured = functools.partial(self._captured, self.param_groups)
        step = Step(self.state, self.param_groups, self._scalars, draws, 1.0, None, False, None, None, captured)
        self._run_once(unit.entries, step)
        self.state.clear()
