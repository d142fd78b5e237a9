"""What the routers of SMoRA (arXiv:2501.15103) choose for the tokens of each task, and how far the tasks differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.heat_map import HeatMap, by_layer
from train.smora_layer import SmoraLinear, Tally

_MOST_COLUMNS = 128


@dataclass(frozen=True, slots=True)
class Usage:
    """What one layer does with the tokens of one task.

    Attributes:
        shares: (experts,) of the tokens, those that chose each expert; their sum is k/p.
        gates: (experts,) mean gate over the tokens, 0 where an expert was off.
    """

    shares: Tensor
    gates: Tensor


@dataclass(frozen=True, slots=True)
class TaskUsage:
    """One task: how many tokens went through the model, and what each layer did with them."""

    tokens: int
    layers: Mapping[str, Usage]


@torch.no_grad()
def usage_of(
    model: nn.Module,
    layers: Mapping[str, SmoraLinear],
    tally: Tally,
    batches: Iterable[Mapping[str, Any]],
    forward: Callable[[nn.Module, Mapping[str, Any]], Any],
) -> TaskUsage:
    """Put the batches through the model and count, without padding."""
    for layer in layers.values():
        layer.clear()
    tally.counting, tally.gates = True, True
    try:
        for batch in batches:
            tally.mask = batch.get("attention_mask")
            forward(model, batch)
    finally:
        tally.counting, tally.gates, tally.mask = False, False, None
    found = {
        path: Usage((layer.counts.double() / layer.tokens).cpu(), (layer.gate_sums / layer.tokens).cpu())
        for path, layer in layers.items()
    }
    tokens = max(layer.tokens for layer in layers.values())
    for layer in layers.values():
        layer.clear()
    return TaskUsage(tokens, found)


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation of two histograms: 0 if equal, 1 if nothing is shared."""
    return float((one / one.sum() - other / other.sum()).abs().sum() / 2)


def distances(tasks: Mapping[str, TaskUsage]) -> dict[str, float]:
    """Path → the mean distance of two tasks."""
    pairs = list(combinations(sorted(tasks), 2))
    paths = next(iter(tasks.values())).layers
    return {
        path: sum(distance(tasks[a].layers[path].shares, tasks[b].layers[path].shares) for a, b in pairs) / len(pairs)
        for path in paths
    }


def told(tasks: Mapping[str, TaskUsage]) -> dict[str, Any]:
    """For the report: the tokens of each task, how far each two differ, and the pictures; nothing of no task."""
    if not tasks:
        return {}
    found: dict[str, Any] = {"tokens": {name: usage.tokens for name, usage in tasks.items()}}
    paths = sorted(next(iter(tasks.values())).layers)
    shown, pictures = paths[0], []
    if len(tasks) > 1:
        apart = distances(tasks)
        shown = max(paths, key=lambda path: apart[path])
        found |= {
            "mean_distance": sum(apart.values()) / len(apart),
            "largest_distance": apart[shown],
            "largest_in": shown,
            "between": [_between(tasks, pair) for pair in combinations(sorted(tasks), 2)],
        }
        pictures.append(
            by_layer(
                "task-distance",
                "How differently the tasks use the ranks of each layer",
                apart,
                note="Total variation of what two tasks choose, the mean over all pairs: 0 is alike, 1 shares nothing.",
            )
        )
    pictures.insert(0, _map(tasks, shown))
    return {"usage": found, "pictures": [picture.to_dict() for picture in pictures]}


def _between(tasks: Mapping[str, TaskUsage], pair: Sequence[str]) -> dict[str, Any]:
    one, other = (tasks[name].layers for name in pair)
    mean = sum(distance(one[path].shares, other[path].shares) for path in one) / len(one)
    return {"tasks": list(pair), "distance": mean}


def _map(tasks: Mapping[str, TaskUsage], path: str) -> HeatMap:
    """Which experts the tasks use in one layer, those that are used alike beside one another."""
    names = sorted(tasks)
    table = torch.stack([tasks[name].layers[path].shares for name in names])
    # By the task that uses it most, and there the most used first.
    order = sorted(range(table.shape[1]), key=lambda expert: (int(table[:, expert].argmax()), -table[:, expert].max()))
    order = order[:_MOST_COLUMNS]
    return HeatMap(
        "rank-usage",
        f"Which ranks the tasks use in {path}",
        names,
        [str(expert) for expert in order],
        [[round(100 * float(value), 1) for value in row[order]] for row in table],
        "% of tokens",
        "Of the layer in which the tasks differ most. Columns are ordered by the task that uses them most.",
    )
