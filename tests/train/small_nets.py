"""Nets of two linear layers with a loss, and the context in which a method prepares them: for tests of the maths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from train.catalog import find_method, parse_parameters
from train.protocol import MethodContext
from train.settings import TrainingSettings

Batches = Callable[[], Iterator[Mapping[str, Tensor]]]


class Net(nn.Module):
    """inputs (rows, 10) → outputs (rows, 9); the loss is the mean squared difference from labels."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.aside = nn.Linear(10, 14), nn.Linear(14, 9), nn.Linear(10, 9)
        self.dropout = nn.Dropout(dropout)

    def outputs(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.dropout(self.first(inputs))))
        return found

    def forward(self, inputs: Tensor, labels: Tensor, factor: float = 1.0) -> SimpleNamespace:
        outputs = self.outputs(inputs)
        return SimpleNamespace(loss=factor * (outputs - labels).square().mean(), outputs=outputs)


def regression_rows(count: int = 24, seed: int = 1) -> dict[str, Tensor]:
    """inputs and labels."""
    drawn = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, size, generator=drawn) for name, size in (("inputs", 10), ("labels", 9))}


def loss_of(model: nn.Module, rows: Mapping[str, Tensor]) -> float:
    """On all rows at once."""
    with torch.no_grad():
        return float(model(**rows).loss)


def in_batches(rows: Mapping[str, Tensor], size: int = 5) -> Batches:
    def batches() -> Iterator[Mapping[str, Tensor]]:
        for start in range(0, len(rows["inputs"]), size):
            yield {name: value[start : start + size] for name, value in rows.items()}

    return batches


def prepare(
    name: str,
    parameters: Mapping[str, Any],
    model: nn.Module,
    batches: Batches,
    *,
    targets: tuple[str, ...] = ("first", "second"),
    seed: int = 5,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Any:
    """The method, after it has prepared `model`."""
    method = find_method(name).load(parse_parameters(name, parameters))
    context = MethodContext(
        targets=targets,
        total_steps=10,
        batches=batches,
        settings=TrainingSettings(**{"steps": 10, "learning_rate": 0.01, **settings}),
        seed=seed,
        checkpoint=checkpoint,
    )
    method.prepare(model, context)
    return method
