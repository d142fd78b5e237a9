"""The figures of an evaluation: their names, and which way each of them is better. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Metric = Literal["loss", "perplexity", "exact_match", "accuracy", "macro_f1", "mcc"]
HIGHER_IS_BETTER: Mapping[Metric, bool] = {
    "loss": False,
    "perplexity": False,
    "exact_match": True,
    "accuracy": True,
    "macro_f1": True,
    "mcc": True,
}
"""Of every metric that a task measures (`train.settings`: `metrics` of each task)."""
