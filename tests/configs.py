"""For each optimizer class the hyperparameters it is tested with. One row here buys a class all tests.

No value is neutral: every option differs from the class's default in some row, so that a test of all rows notices a
missing term. Averages are short, to make ten steps a good part of their memory, and eps is large enough to be seen.
"""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1, "weight_decay": 0.2},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.2},
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ],
    "Adagrad": [
        {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.2, "initial_accumulator_value": 0.3, "eps": 0.01},
        {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 0.02, "maximize": True},
    ],
    "RMSprop": [
        {"lr": 0.05, "alpha": 0.9, "eps": 0.01, "weight_decay": 0.2},
        {"lr": 0.05, "alpha": 0.8, "eps": 0.02, "weight_decay": 0.1, "momentum": 0.7, "maximize": True},
        {"lr": 0.05, "alpha": 0.9, "eps": 0.02, "weight_decay": 0.2, "centered": True},
        {"lr": 0.03, "alpha": 0.8, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.6, "centered": True},
    ],
    "Lion": [
        {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3},
        {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.2, "maximize": True},
    ],
    "Adam": [
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.2},
        {"lr": 0.05, "betas": (0.9, 0.999), "eps": 0.001, "weight_decay": 0.1, "amsgrad": True},
        {"lr": 0.04, "betas": (0.7, 0.9), "eps": 0.02, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.2, "amsgrad": True, "maximize": True},
    ],
    "AdamW": [
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.3},
        {"lr": 0.05, "betas": (0.9, 0.999), "eps": 0.001, "weight_decay": 0.2, "maximize": True},
        {"lr": 0.04, "betas": (0.7, 0.9), "eps": 0.02, "weight_decay": 0.1, "amsgrad": True},
    ],
    "Adamax": [
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.2},
        {"lr": 0.03, "betas": (0.9, 0.7), "eps": 0.1, "weight_decay": 0.1, "maximize": True},
    ],
    "NAdam": [
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.2, "momentum_decay": 0.3},
        {
            "lr": 0.04,
            "betas": (0.9, 0.999),
            "eps": 0.001,
            "weight_decay": 0.3,
            "momentum_decay": 0.1,
            "decoupled_weight_decay": True,
            "maximize": True,
        },
    ],
    # The step is rectified from the sixth on; with beta2 = 0.5 never.
    "RAdam": [
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.2},
        {"lr": 0.04, "betas": (0.9, 0.999), "eps": 0.001, "weight_decay": 0.3, "decoupled_weight_decay": True},
        {"lr": 0.05, "betas": (0.7, 0.5), "eps": 0.02, "weight_decay": 0.1, "maximize": True},
    ],
    # Both schedules end within ten steps, one after the other.
    "AdEMAMix": [
        {"lr": 0.05, "betas": (0.8, 0.95, 0.97), "alpha": 2.0, "eps": 0.01, "weight_decay": 0.3},
        {
            "lr": 0.03,
            "betas": (0.7, 0.9, 0.99),
            "alpha": 3.0,
            "eps": 0.02,
            "weight_decay": 0.2,
            "t_alpha": 5,
            "t_beta3": 8,
            "maximize": True,
        },
        {"lr": 0.03, "betas": (0.9, 0.999, 0.9999), "alpha": 8.0, "eps": 0.001, "weight_decay": 0.1, "t_alpha": 7},
    ],
}

STEPS = 10
"""Enough for every schedule above to run out."""


def rows() -> list[tuple[str, dict[str, Any]]]:
    """Every class's name with each of its rows."""
    return [(name, row) for name, table in CONFIGS.items() for row in table]


def row_id(name: str, row: dict[str, Any]) -> str:
    return f"{name}{CONFIGS[name].index(row)}"
