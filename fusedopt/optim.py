"""The optimizers, in order of increasing complexity. Each is its arguments, its states, its rule and its scalars.

The classes that torch.optim has take its arguments in its order, with its defaults, and keep its state names, so that
a checkpoint of either loads in the other. `foreach` and `fused` are accepted and make no difference to the update:
every step is fused. As in torch, `fused=True` also leaves gradient unscaling under `torch.amp.GradScaler` to the step.

Every class also takes `state_dtype`, `min_quantized_size`, `master`, `rounding`, `seed` and `backend`, see
`fusedopt.Optimizer`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ._state import Group
from ._stepper import Number
from .binding import RULES, Rule
from .codecs import SCALE_SUFFIX
from .optimizer import GROUP_OPTIONS, GroupOptions, Optimizer, Options

# --- arithmetic on a float or on a zero-dimensional tensor ---


def _where(condition: Any, a: Number, b: Number) -> Number:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)


def _sqrt(x: Number) -> Number:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def _exp(x: Number) -> Number:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def _weight_decay(group: Group, decoupled: bool) -> dict[str, Number]:
    """The two scalars of weight decay: an L2 penalty in the gradient, or decay of the parameter."""
    amount = group["weight_decay"]
    return {"l2": 0.0, "decay": 1 - group["lr"] * amount} if decoupled else {"l2": amount, "decay": 1.0}


# --- checks of arguments, in torch's words ---


def check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_betas(betas: tuple[Any, ...]) -> None:
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


def check_not_negative(**values: Any) -> None:
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"Invalid {name} value: {value}")


def _check_flags(foreach: bool | None, fused: bool | None) -> None:
    if foreach and fused:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _check_fused_differentiable(fused: bool | None, differentiable: bool) -> None:
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")


class SGD(Optimizer):
    """`torch.optim.SGD`: stochastic gradient descent, with momentum (`momentum`, `dampening`, `nesterov`)."""

    torch_class = torch.optim.SGD
    states = {"momentum_buffer": "signed"}
    counters = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_not_negative(momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        _check_fused_differentiable(fused, differentiable)
        _check_flags(foreach, fused)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        return RULES["sgd_momentum" if group["momentum"] else "sgd"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        lr, momentum, nesterov = group["lr"], group["momentum"], group["nesterov"]
        return {
            "l2": group["weight_decay"],
            "lr": lr,
            "momentum": momentum,
            "gain": _where(step == 1, 1.0, 1.0 - group["dampening"]),
            "lr_grad": lr if nesterov else 0.0,
            "lr_buffer": lr * momentum if nesterov else lr,
        }


class Adagrad(Optimizer):
    """`torch.optim.Adagrad`. State is created with the optimizer, as in torch."""

    torch_class = torch.optim.Adagrad
    states = {"sum": "unsigned"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_not_negative(
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            epsilon=eps,
        )
        _check_fused_differentiable(fused, differentiable)
        _check_flags(foreach, fused)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)
        for group in self.param_groups:
            for param in group["params"]:
                self._init_state(param, group)

    def share_memory(self) -> None:
        """Move the sums to shared memory, for Hogwild training."""
        for group in self.param_groups:
            for param in group["params"]:
                for name in ("sum", "sum" + SCALE_SUFFIX):
                    if name in self.state[param]:
                        self.state[param][name].share_memory_()

    def initial(self, name: str) -> float:
        return float(self.defaults["initial_accumulator_value"])

    def rule(self, group: Group) -> Rule:
        return RULES["adagrad"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        return {"l2": group["weight_decay"], "lr": lr, "eps": group["eps"]}


class RMSprop(Optimizer):
    """`torch.optim.RMSprop`. Where `centered`, the variance is clamped at zero; torch takes its root as it is.

    Under state_dtype="int8" it is clamped at 1/16 of the mean square, about the error of a variance that is the
    difference of two averages in 8 bits. Clamped at zero it would let a step of `lr * g / eps` through.
    """

    torch_class = torch.optim.RMSprop
    states = {"square_avg": "unsigned", "momentum_buffer": "signed", "grad_avg": "signed"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_not_negative(epsilon=eps, momentum=momentum, weight_decay=weight_decay, alpha=alpha)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        centered = "_centered" if group["centered"] else ""
        return RULES[f"rmsprop{centered}_momentum" if group["momentum"] else f"rmsprop{centered}"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        return {
            "l2": group["weight_decay"],
            "w2": 1 - group["alpha"],
            "floor": 1 / 16 if group["state_dtype"] == "int8" else 0.0,
            "momentum": group["momentum"],
            "lr": group["lr"],
            "eps": group["eps"],
        }


class Lion(Optimizer):
    """Lion (Chen et al., arXiv:2302.06675): the sign of a momentum average, one state.

    Args:
        lr: learning rate; 3 to 10 times smaller than AdamW's, with `weight_decay` as much larger.
        betas: for the update and for the average.
        weight_decay: decoupled.
        maximize: ascend instead.
        capturable: as torch's AdamW has it.
    """

    states = {"exp_avg": "signed"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_betas(betas)
        check_not_negative(weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        return RULES["lion"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        beta1, beta2 = group["betas"]
        return {
            **_weight_decay(group, decoupled=True),
            "w1": 1 - beta1,
            "w2": 1 - beta2,
            "lr": group["lr"],
        }


class Adam(Optimizer):
    """`torch.optim.Adam`; with `decoupled_weight_decay`, AdamW."""

    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Adam
    states = {"exp_avg": "signed", "exp_avg_sq": "unsigned", "max_exp_avg_sq": "unsigned"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ):
        if isinstance(lr, Tensor) and foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        check_lr(lr)
        check_not_negative(epsilon=eps, weight_decay=weight_decay)
        check_betas(betas)
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        if isinstance(betas[0], Tensor) and foreach and not capturable:
            raise ValueError("betas[0] as a Tensor is not supported for capturable=False and foreach=True")
        _check_fused_differentiable(fused, differentiable)
        _check_flags(foreach, fused)
        defaults = {
            "lr": lr,
            "betas": tuple(beta.squeeze() if isinstance(beta, Tensor) else beta for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        return RULES["amsgrad" if group["amsgrad"] else "adam"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        return adam_scalars(group, step)


def adam_scalars(group: Group, step: Number) -> dict[str, Number]:
    """The scalars of `adam` and `amsgrad`."""
    beta1, beta2 = group["betas"]
    correction2 = _sqrt(1 - beta2**step)
    return {
        **_weight_decay(group, group["decoupled_weight_decay"]),
        "w1": 1 - beta1,
        "w2": 1 - beta2,
        "step_size": group["lr"] * correction2 / (1 - beta1**step),
        "eps": group["eps"] * correction2,
    }


class AdamW(Adam):
    """`torch.optim.AdamW`: Adam with decoupled weight decay."""

    torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A checkpoint from before the option existed, or of Adam: AdamW decays decoupled whatever it says, as in torch.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


class Adamax(Optimizer):
    """`torch.optim.Adamax`: Adam with the infinity norm."""

    torch_class = torch.optim.Adamax
    states = {"exp_avg": "signed", "exp_inf": "unsigned"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_not_negative(epsilon=eps, weight_decay=weight_decay)
        check_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        return RULES["adamax"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        beta1, beta2 = group["betas"]
        return {
            "l2": group["weight_decay"],
            "w1": 1 - beta1,
            "beta2": beta2,
            "step_size": group["lr"] / (1 - beta1**step),
            "eps": group["eps"],
        }


class NAdam(Optimizer):
    """`torch.optim.NAdam`: Adam with Nesterov momentum and a momentum schedule, whose product is kept per parameter."""

    torch_class = torch.optim.NAdam
    states = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}
    counters = {"step": 0.0, "mu_product": 1.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_not_negative(epsilon=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)
        check_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        return RULES["nadam"]

    @staticmethod
    def _mu(group: Group, step: Number) -> Number:
        return group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))

    def advance(self, group: Group, step: Number, mu_product: Number = 1.0) -> tuple[Number, ...]:
        return step + 1, mu_product * self._mu(group, step + 1)

    def scalars(self, group: Group, step: Number, mu_product: Number = 1.0) -> dict[str, Number]:
        beta1, beta2 = group["betas"]
        mu, mu_next = self._mu(group, step), self._mu(group, step + 1)
        lr, correction2 = group["lr"], _sqrt(1 - beta2**step)
        return {
            **_weight_decay(group, group["decoupled_weight_decay"]),
            "w1": 1 - beta1,
            "w2": 1 - beta2,
            "step_grad": lr * (1 - mu) * correction2 / (1 - mu_product),
            "step_avg": lr * mu_next * correction2 / (1 - mu_product * mu_next),
            "eps": group["eps"] * correction2,
        }


class RAdam(Optimizer):
    """`torch.optim.RAdam`: Adam whose step is rectified for the variance of its second moment."""

    torch_class = torch.optim.RAdam
    states = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_not_negative(epsilon=eps, weight_decay=weight_decay)
        check_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        return RULES["radam"]

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        beta1, beta2 = group["betas"]
        correction2 = 1 - beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / correction2
        tractable = rho > 5
        # Where the variance is not tractable any positive number will do here: the result is not used.
        safe = _where(tractable, rho, 5.5)
        rectified = _sqrt(
            (safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe) * correction2
            if rho_inf > 5
            else correction2
        )
        return {
            **_weight_decay(group, group["decoupled_weight_decay"]),
            "w1": 1 - beta1,
            "w2": 1 - beta2,
            "step_size": group["lr"] / (1 - beta1**step) * _where(tractable, rectified, 1.0),
            "adapt": _where(tractable, 1.0, 0.0),
            "eps": _where(tractable, group["eps"], 1.0 + 0.0 * group["eps"]),  # NaN stays NaN, and is refused
        }


class AdEMAMix(Optimizer):
    """AdEMAMix (Pagliardini et al., arXiv:2409.03137): AdamW with a second, slow average of the gradient.

    Args:
        betas: of the fast average, the second moment and the slow average.
        alpha: weight of the slow average.
        weight_decay: decoupled.
        t_alpha: steps over which alpha grows linearly from 0; None for alpha from the start.
        t_beta3: steps over which the slow average's half-life grows from beta1's to beta3's; None for beta3 from the
            start. The paper sets both to the length of the training.
        maximize: ascend instead.
        capturable: as torch's AdamW has it.
    """

    states = {"exp_avg": "signed", "exp_avg_slow": "signed", "exp_avg_sq": "unsigned"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ):
        check_lr(lr)
        check_betas(betas)
        if len(betas) != 3:
            raise ValueError(f"betas must be three values, for the fast, second-moment and slow averages; got {betas}")
        check_not_negative(alpha=alpha, epsilon=eps, weight_decay=weight_decay)
        for name, steps in (("t_alpha", t_alpha), ("t_beta3", t_beta3)):
            if steps is not None and not steps > 0:
                raise ValueError(f"Invalid {name} value: {steps}; it must be a positive number of steps, or None")
        if t_beta3 is not None and not (betas[0] > 0 and betas[2] > 0):
            raise ValueError(f"t_beta3={t_beta3} needs betas[0] and betas[2] above 0; got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: Group) -> Rule:
        return RULES["ademamix"]

    @staticmethod
    def _schedules(group: Group, step: Number) -> tuple[Number, Number]:
        """alpha and beta3 at `step`, appendix A.1 of the paper."""
        beta1, _, beta3 = group["betas"]
        alpha = group["alpha"]
        if group["t_alpha"] is not None:
            alpha = _where(step < group["t_alpha"], step / group["t_alpha"] * alpha, alpha)
        if group["t_beta3"] is not None:
            done = step / group["t_beta3"]
            log1, log3 = math.log(beta1), math.log(beta3)
            scheduled = _exp(log1 * log3 / ((1 - done) * log3 + done * log1))
            beta3 = _where((done < 1) & (scheduled < beta3), scheduled, beta3)
        return alpha, beta3

    def scalars(self, group: Group, step: Number) -> dict[str, Number]:
        beta1, beta2, _ = group["betas"]
        alpha, beta3 = self._schedules(group, step)
        lr, correction2 = group["lr"], _sqrt(1 - beta2**step)
        return {
            **_weight_decay(group, decoupled=True),
            "w1": 1 - beta1,
            "w2": 1 - beta2,
            "w3": 1 - beta3,
            "step_size": lr * correction2 / (1 - beta1**step),
            "step_slow": lr * alpha * correction2,
            "eps": group["eps"] * correction2,
        }


# --- 8-bit state by another name ---

_INT8 = GroupOptions({**GROUP_OPTIONS, "state_dtype": "int8"})


class SGD8bit(SGD):
    """`SGD` with state_dtype="int8"."""

    group_options = _INT8


class Adagrad8bit(Adagrad):
    """`Adagrad` with state_dtype="int8"."""

    group_options = _INT8


class RMSprop8bit(RMSprop):
    """`RMSprop` with state_dtype="int8"."""

    group_options = _INT8


class Lion8bit(Lion):
    """`Lion` with state_dtype="int8"."""

    group_options = _INT8


class Adam8bit(Adam):
    """`Adam` with state_dtype="int8". Weight decay is an L2 penalty, where bitsandbytes' Adam8bit decouples it."""

    group_options = _INT8


class AdamW8bit(AdamW):
    """`AdamW` with state_dtype="int8"."""

    group_options = _INT8


class AdEMAMix8bit(AdEMAMix):
    """`AdEMAMix` with state_dtype="int8"."""

    group_options = _INT8


OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.__name__: cls for cls in (SGD, Adagrad, RMSprop, Lion, Adam, AdamW, Adamax, NAdam, RAdam, AdEMAMix)
}
"""Every optimizer class by name."""
