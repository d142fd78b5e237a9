"""When layers grow, by how much, and which of them: the budget of IncreLoRA (arXiv:2308.12043). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class GrowthPlan:
    """The rounds of a training, in optimiser steps that count from 0.

    Attributes:
        layers: how many are adapted.
        initial_rank: of each of them.
        total_rank: sum of the ranks at the end.
        increment: ranks that a layer gains in a round.
        layers_per_round: how many gain.
        interval: steps between two rounds.
        wait: the first round is at the first multiple of `interval` above this.
    """

    layers: int
    initial_rank: int
    total_rank: int
    increment: int
    layers_per_round: int
    interval: int
    wait: int

    @property
    def rounds(self) -> int:
        """How many it takes to spend the budget, unless layers reach the smaller side of their weight."""
        return -(-(self.total_rank - self.layers * self.initial_rank) // (self.layers_per_round * self.increment))

    @property
    def first(self) -> int:
        """Step of the first round."""
        return (self.wait // self.interval + 1) * self.interval

    @property
    def last(self) -> int | None:
        """Step of the last round; None if nothing grows."""
        return self.first + (self.rounds - 1) * self.interval if self.rounds > 0 else None

    def largest_rank(self, d_out: int, d_in: int) -> int:
        """What a layer can have in the end: it gains in every round, up to the smaller side of its weight."""
        return min(self.initial_rank + self.increment * self.rounds, d_out, d_in)

    def grows_at(self, step: int) -> bool:
        return step >= self.first and step % self.interval == 0

    def scores_at(self, step: int, window: int | None) -> bool:
        """Whether step is among the `window` last ones up to a round, that of the round included; None: always."""
        next_round = max(self.first, -(-step // self.interval) * self.interval)
        return window is None or next_round - step < window

    def shares(self, order: Sequence[str], ranks: Mapping[str, int], largest: Mapping[str, int]) -> dict[str, int]:
        """What the layers gain in a round: the first in order that have room, as far as the budget goes.

        Args:
            order: all layers, the most important one first.
            ranks, largest: by layer: what it has, and what it can have.
        """
        left = self.total_rank - sum(ranks.values())
        gains: dict[str, int] = {}
        for layer in order:
            gain = min(self.increment, left, largest[layer] - ranks[layer])
            if len(gains) == self.layers_per_round or left == 0:
                break
            if gain > 0:
                gains[layer] = gain
                left -= gain
        return gains


@dataclass(slots=True)
class Importance:
    """Exponential means of a layer's score S and of how far it strays; both begin at 0 and are not corrected for it.

    I ← β₁I + (1−β₁)S, U ← β₂U + (1−β₂)|S − I| with the new I; a layer is as important as I·U.
    """

    beta1: float
    beta2: float
    mean: dict[str, float] = field(default_factory=dict)
    deviation: dict[str, float] = field(default_factory=dict)

    def update(self, scores: Mapping[str, float]) -> None:
        for layer, score in scores.items():
            mean = self.beta1 * self.mean.get(layer, 0.0) + (1 - self.beta1) * score
            strayed = self.beta2 * self.deviation.get(layer, 0.0) + (1 - self.beta2) * abs(score - mean)
            self.mean[layer], self.deviation[layer] = mean, strayed

    def of(self, layer: str) -> float:
        return self.mean.get(layer, 0.0) * self.deviation.get(layer, 0.0)

    def order(self, layers: Sequence[str]) -> list[str]:
        """The most important one first; of equal ones, the first by name."""
        return sorted(layers, key=lambda layer: (-self.of(layer), layer))

    def state(self) -> dict[str, Any]:
        """JSON values; they keep every bit."""
        return {"mean": dict(self.mean), "deviation": dict(self.deviation)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.mean, self.deviation = dict(state["mean"]), dict(state["deviation"])
