"""What the right result is, in float64, stated by others than fusedopt: torch.optim, or the paper, word for word."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers import NOT_YET
from torch import Tensor
from torch.nn import Parameter

from fusedopt.optim import OPTIMIZERS

Gradients = Sequence[Sequence[Tensor]]
"""Of each step, of each parameter."""

States = list[dict[str, Tensor]]
"""Of each parameter, by torch's names."""


def lion(
    params: list[Tensor],
    gradients: Gradients,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool = False,
) -> States:
    """Algorithm 2 of arXiv:2302.06675, in place."""
    beta1, beta2 = betas
    m = [torch.zeros_like(theta) for theta in params]
    for grads in gradients:
        for i, g in enumerate(grads):
            if maximize:
                g = -g
            c = beta1 * m[i] + (1 - beta1) * g
            params[i] -= lr * (torch.sign(c) + weight_decay * params[i])
            m[i] = beta2 * m[i] + (1 - beta2) * g
    return [{"exp_avg": average} for average in m]


def ademamix(
    params: list[Tensor],
    gradients: Gradients,
    *,
    lr: float,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    weight_decay: float,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    maximize: bool = False,
) -> States:
    """Algorithm 1 of arXiv:2409.03137 with the schedulers of its equations 4 and 5, in place."""
    beta1, beta2, beta3 = betas
    m1 = [torch.zeros_like(theta) for theta in params]
    m2 = [torch.zeros_like(theta) for theta in params]
    nu = [torch.zeros_like(theta) for theta in params]
    for t, grads in enumerate(gradients, 1):
        alpha_t = alpha if t_alpha is None else min(t * alpha / t_alpha, alpha)
        beta3_t = beta3
        if t_beta3 is not None and t < t_beta3:
            start, end = math.log(beta1), math.log(beta3)
            beta3_t = min(math.exp(start * end / ((1 - t / t_beta3) * end + t / t_beta3 * start)), beta3)
        for i, g in enumerate(grads):
            if maximize:
                g = -g
            m1[i] = beta1 * m1[i] + (1 - beta1) * g
            m2[i] = beta3_t * m2[i] + (1 - beta3_t) * g
            nu[i] = beta2 * nu[i] + (1 - beta2) * g**2
            m1_hat = m1[i] / (1 - beta1**t)
            nu_hat = nu[i] / (1 - beta2**t)
            params[i] -= lr * ((m1_hat + alpha_t * m2[i]) / (nu_hat.sqrt() + eps) + weight_decay * params[i])
    return [{"exp_avg": a, "exp_avg_slow": b, "exp_avg_sq": c} for a, b, c in zip(m1, m2, nu)]


PAPERS: dict[str, Callable[..., States]] = {"Lion": lion, "AdEMAMix": ademamix}
"""For the classes that torch.optim does not have."""


def oracle(
    name: str,
    config: dict[str, Any],
    params: Sequence[Tensor],
    gradients: Gradients,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], States]:
    """The parameters and states after a step for each of `gradients`, all computed in `dtype` from copies."""
    gradients = [[grad.to(dtype) for grad in grads] for grads in gradients]
    start = [param.detach().to(dtype, copy=True) for param in params]
    torch_class = OPTIMIZERS[name].torch_class
    if torch_class is None:
        states = PAPERS[name](start, gradients, **config)
        return start, states
    if name == "Adam" and NOT_YET:
        config = dict(config)
        torch_class = torch.optim.AdamW if config.pop("decoupled_weight_decay", False) else torch_class
    leaves = [Parameter(param) for param in start]
    optimizer = torch_class(leaves, **config)
    for grads in gradients:
        for leaf, grad in zip(leaves, grads):
            leaf.grad = grad.clone()
        optimizer.step()
    return [leaf.detach() for leaf in leaves], [dict(optimizer.state.get(leaf, {})) for leaf in leaves]
