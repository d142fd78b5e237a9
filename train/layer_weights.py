"""The weights of a model's layers, learnt by Adam on a loss, and the choice among them (arXiv:2408.10774)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import TrainingDiverged


@dataclass(frozen=True, slots=True)
class Choice:
    """Numbers of the chosen layers, in order, and the rule that chose them."""

    layers: tuple[int, ...]
    rule: str


class LayerWeights:
    """w = N·softmax(a) for N layers; a begins at 0, so every weight at 1, and the sum of w is N at all times.

    In float64 on the CPU: N numbers cost nothing, and w is exactly 1 in float32 at the start whatever N is.
    """

    def __init__(self, count: int, rate: float) -> None:
        self.a = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self._adam = torch.optim.Adam([self.a], lr=rate)

    @property
    def weights(self) -> Tensor:
        """w, (N,) float64, with the graph to a."""
        return len(self.a) * torch.softmax(self.a, dim=0)

    def gradient(self, of_weights: Tensor) -> Tensor:
        """∂L/∂a for ∂L/∂w: Σ over the layers is 0, whatever the loss, for adding to all a changes nothing."""
        (found,) = torch.autograd.grad(self.weights, self.a, of_weights.to("cpu", torch.float64))
        return found

    def step(self, of_weights: Tensor) -> None:
        """One step of Adam.

        Raises:
            TrainingDiverged: ∂L/∂w is not finite.
        """
        if not bool(of_weights.isfinite().all()):
            raise TrainingDiverged(
                "The gradient of the layers' weights is NaN or infinite.",
                hint="Take a lower learning rate or a higher precision.",
            )
        self.a.grad = self.gradient(of_weights)
        self._adam.step()
        self.a.grad = None

    def entropy(self) -> float:
        """Of w/N, nats: ln N while all are alike, 0 when one layer has all the weight."""
        shares = self.weights.detach() / len(self.a)
        return float(torch.special.entr(shares).sum())

    def choose(self, rule: str, count: int | None = None) -> Choice:
        """The layers that are kept; see `choose`."""
        return choose(self.a.tolist(), rule, count)

    def state(self) -> dict[str, Any]:
        """JSON values; they keep every bit."""
        kept = self._adam.state.get(self.a, {})
        moments = {name: value.tolist() for name, value in kept.items()}
        return {"a": self.a.tolist(), "adam": moments}

    def load_state(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.a.copy_(torch.tensor(state["a"], dtype=torch.float64))
        self._adam.state.clear()
        if state["adam"]:
            dtypes = {"step": torch.float32}
            self._adam.state[self.a] = {
                name: torch.tensor(value, dtype=dtypes.get(name, torch.float64))
                for name, value in state["adam"].items()
            }


def choose(a: Sequence[float], rule: str, count: int | None = None) -> Choice:
    """Which layers are kept.

    Args:
        a: (N,) of the layers.
        rule: positive (a > 0; above_mean if no layer has that, for Adam lets the sum of a drift), above_mean (w > 1,
            that is a above the logarithm of the mean of e^a), or top_k (the `count` largest, the first of equal ones).

    Raises:
        TrainingDiverged: all a are the same, so none is above the mean: the loss did not depend on them.
    """
    if rule == "top_k":
        assert count is not None
        order = sorted(range(len(a)), key=lambda layer: (-a[layer], layer))
        return Choice(tuple(sorted(order[:count])), rule)
    if rule == "positive":
        positive = tuple(layer for layer, value in enumerate(a) if value > 0)
        if positive:
            return Choice(positive, rule)
    largest = max(a)
    mean = largest + math.log(sum(math.exp(value - largest) for value in a) / len(a))
    above = tuple(layer for layer, value in enumerate(a) if value > mean) if min(a) < largest else ()
    if not above:
        raise TrainingDiverged(
            "The first stage has given all layers the same weight: the loss on the held-out rows did not depend on "
            "them.",
            hint="Hold out other rows, give it more steps, or choose with top_k.",
        )
    return Choice(above, "above_mean")
