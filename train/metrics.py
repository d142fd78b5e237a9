"""The figures of an evaluation: their names, and which way each of them is better. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Metric = Literal[
    "loss",
    "perplexity",
    "exact_match",
    "accuracy",
    "sensitivity",
    "specificity",
    "precision",
    "f1",
    "macro_f1",
    "mcc",
    "auroc",
]
HIGHER_IS_BETTER: Mapping[Metric, bool] = {
    "loss": False,
    "perplexity": False,
    "exact_match": True,
    "accuracy": True,
    "sensitivity": True,
    "specificity": True,
    "precision": True,
    "f1": True,
    "macro_f1": True,
    "mcc": True,
    "auroc": True,
}
"""Of every metric that a task measures (`train.settings`: `metrics` of each task)."""
