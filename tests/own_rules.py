"""Optimizers as a user writes them, with rules of their own, for `test_own_rule.py` and the processes it starts."""

from __future__ import annotations

from typing import Any

import fusedopt

# mypy: ignore-errors
# ruff: noqa: F821


def plain(p, g):
    p = p - g
    return p


def adam(p, g, class_, decay, lr):
    """Called as a built-in rule is, and quite another."""
    class_ = class_ + 0.25 * (g - class_)
    p = p * decay - lr * sign(class_)
    return p, class_


def everything(p, g, double, unix, INFINITY, x0, new, float, w, lr, eps):
    """Four states, every function, and names that mean something in C++.\\"""
    β = abs(g) + eps
    double = double + w * (g - double)
    unix = maximum(unix * 0.9375, minimum(g * g, 1 / β))
    INFINITY = where(double * g < 0, -INFINITY * 0.5, INFINITY + double)
    x0 = where(x0 >= abs(p), new * x0, x0 + 3 * β)
    register = INFINITY / (sqrt(unix) + eps)
    p = p * float - lr * (register + 0.125 * sign(double) - x0 * eps) - -lr * (double / β)
    return p, double, unix, INFINITY, x0


class Plain(fusedopt.Optimizer):
    rule = fusedopt.rule_of(plain)

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 1.0}, **options)

    def scalars(self, group, step):
        return {}


class Signum(fusedopt.Optimizer):
    """By a method, as a class whose groups differ in their rules has it."""

    states = {"class_": "signed"}

    def __init__(self, params, lr=0.05, weight_decay=0.2, **options):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, **options)

    def rule(self, group):
        return fusedopt.rule_of(adam)

    def scalars(self, group, step):
        return {"decay": 1 - group["lr"] * group["weight_decay"], "lr": group["lr"]}


class Everything(fusedopt.Optimizer):
    rule = fusedopt.rule_of(everything)
    states = {"double": "signed", "unix": "unsigned", "INFINITY": "signed", "x0": "unsigned"}

    def __init__(self, params, lr=0.05, weight_decay=0.2, maximize=False, **options):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, **options)

    def scalars(self, group, step):
        lr = group["lr"] / step
        return {"new": 0.75, "float": 1 - lr * group["weight_decay"], "w": 0.3, "lr": lr, "eps": 0.01}


OWN: dict[str, Any] = {"Plain": Plain, "Signum": Signum, "Everything": Everything}
