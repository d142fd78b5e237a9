"""IncreLoRA (arXiv:2308.12043): every layer begins at rank 1, and those that matter most grow to a total budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

from artifacts.heat_map import by_layer
from train.adapted_layers import AdaptedLinear, LowRank
from train.growing_layers import GrowingLinear, finite_importance
from train.methods.own_adapter import OwnMethod
from train.options.increlora import IncreloraOptions
from train.protocol import MethodContext
from train.rank_growth import Importance
from train.row_groups import RestartSchedule, RowGroups, Rows

if TYPE_CHECKING:
    from train.settings import TrainingSettings


class Increlora(OwnMethod[IncreloraOptions]):
    """Scores the layers from the gradients of each step, and lets the best ones grow every `interval` steps.

    What grows joins the optimiser as a group of its own, with a warm-up of its own. The history of the growth is all
    that a checkpoint needs beside the tensors and the running means: ranks and groups follow from it.
    """

    growing: dict[str, GrowingLinear]

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        options = self.options
        self.plan = options.plan(len(context.targets), context.settings, context.total_steps)
        self.importance = Importance(options.beta1, options.beta2)
        self.history: list[tuple[int, dict[str, int]]] = []
        self.groups: RowGroups | None = None
        self.growing = {}
        self._generator = torch.Generator().manual_seed(context.seed)
        prepared = super().prepare(model, context)
        self._silence_if_spent()
        return prepared

    def layer(self, path: str, base: nn.Module) -> AdaptedLinear:
        weight = base.weight
        assert isinstance(weight, Tensor)
        d_out, d_in = weight.shape  # or the other way round, which is the same here
        made = GrowingLinear(
            base,
            rank=self.options.initial_rank,
            largest=self.plan.largest_rank(d_out, d_in),
            reserve=self.options.step_up,
            reserve_weight=self.options.reserve_weight,
            alpha=self.options.alpha,
            dropout=self.options.dropout,
            generator=self._generator,
        )
        self.growing[path] = made
        return made

    def optimizer(self, model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
        whole = [
            (f"{path}.{name}", parameter)
            for path in self.context.whole
            for name, parameter in model.get_submodule(path).named_parameters()
        ]
        self._begin()
        self.groups = RowGroups(settings, [rows for layer in self.growing.values() for rows in layer.starting()], whole)
        for step, gains in self.history:
            self.groups.join(step, self._advance(gains))
        return self.groups.optimizer

    def schedule(
        self, optimizer: torch.optim.Optimizer, settings: TrainingSettings, total_steps: int
    ) -> RestartSchedule:
        return RestartSchedule(optimizer, settings, total_steps)

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        if self.options.orthogonality == 0:
            return None
        distances = [layer.orthogonality() for layer in self.growing.values()]
        return torch.stack(distances).sum() * (self.options.orthogonality / (2 * len(distances)))

    def before_step(self, model: nn.Module, step: int) -> None:
        scoring = not self.spent and self.plan.scores_at(step, self.options.score_steps)
        for layer in self.growing.values():
            layer.forget_gradients()
            layer.scored = self.options.score if scoring else None

    def before_update(self, model: nn.Module, step: int) -> None:
        assert self.groups is not None
        self.groups.attach()
        if self.spent:
            return
        if next(iter(self.growing.values())).scored is not None:
            found = finite_importance(self.growing)
            if found is not None:
                self.importance.update({path: value / self._norm(path) for path, value in found.items()})
        if self.plan.grows_at(step):
            self._grow(step)

    def after_update(self, model: nn.Module, step: int) -> None:
        assert self.groups is not None
        self.groups.detach()
        for layer in self.growing.values():
            layer.forget_gradients()

    @property
    def spent(self) -> bool:
        """Whether the ranks have reached the budget."""
        return sum(layer.rank for layer in self.growing.values()) >= self.plan.total_rank

    def metrics(self) -> dict[str, float]:
        ranks = [layer.rank for layer in self.growing.values()]
        return {"total_rank": float(sum(ranks)), "largest_rank": float(max(ranks))}

    def state(self) -> dict[str, Any]:
        return {"history": self.history, "importance": self.importance.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.history = [(int(step), dict(gains)) for step, gains in state["history"]]
        self.importance.load_state(state["importance"])
        self._begin()
        for _, gains in self.history:
            self._advance(gains)

    def settle(self, model: nn.Module) -> None:
        """Of a training that ended before the budget was spent, the components in advance are dropped too."""
        for layer in self.growing.values():
            layer.silence_reserve()

    def trained_parameters(self, model: nn.Module) -> int:
        """Without the room for components that never came."""
        room = sum(parameter.numel() for layer in self.growing.values() for _, parameter in layer.own_tensors())
        used = sum(layer.live * (layer.d_in + layer.d_out) + layer.rank for layer in self.growing.values())
        return super().trained_parameters(model) - room + used

    def report(self, model: nn.Module) -> dict[str, Any]:
        ranks = {path: layer.rank for path, layer in self.growing.items()}
        spent = f"{sum(ranks.values())} of a budget of {self.plan.total_rank} ranks"
        picture = by_layer(
            "ranks",
            "Rank of every adapted layer",
            ranks,
            unit="ranks",
            note=f"{spent}; all layers began with {self.options.initial_rank}. What mattered more has gained more.",
        )
        return {
            "ranks": ranks,
            "total_rank": sum(ranks.values()),
            "budget": self.plan.total_rank,
            "growth": [{"step": step, "gains": gains} for step, gains in self.history],
            "pictures": [picture.to_dict()],
        }

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        grown = self.growing[path]
        a, b = grown.counted()
        if self.options.export == "patterns":
            return LowRank(a, b, grown.alpha / grown.rank)
        more = max(other.rank for other in self.growing.values()) - grown.rank
        return LowRank(functional.pad(a, (0, 0, 0, more)), functional.pad(b * grown.scaling, (0, more)), 1.0)

    def plain_config(self, found: Mapping[str, LowRank]) -> LoraConfig:
        config = super().plain_config(found)
        if self.options.export == "patterns":
            # PEFT takes the first key that matches the end of a path: these match one path, as a whole.
            config.rank_pattern = {_exactly(path): factors.rank for path, factors in found.items()}
        return config

    def choose(self) -> dict[str, int]:
        """What the layers gain in this round."""
        ranks = {path: layer.rank for path, layer in self.growing.items()}
        largest = {path: layer.largest for path, layer in self.growing.items()}
        return self.plan.shares(self.importance.order(list(self.growing)), ranks, largest)

    def _grow(self, step: int) -> None:
        assert self.groups is not None
        gains = self.choose()
        self.groups.join(step, self._advance(gains))
        if self.options.on_growth == "rescale":
            for path, gain in gains.items():
                self.growing[path].rescale(gain)
        self.history.append((step, gains))
        self._silence_if_spent()

    def _begin(self) -> None:
        """The ranks of step 0."""
        for layer in self.growing.values():
            layer.rank = self.options.initial_rank

    def _advance(self, gains: Mapping[str, int]) -> list[Rows]:
        """The ranks after a round; returns what joins the training."""
        return [rows for path, gain in gains.items() for rows in self.growing[path].grow(gain)]

    def _silence_if_spent(self) -> None:
        if self.spent:
            for layer in self.growing.values():
                layer.silence_reserve()

    def _norm(self, path: str) -> float:
        layer = self.growing[path]
        entries = layer.d_out * layer.d_in
        return float(entries) if self.options.score_norm == "mean" else math.sqrt(entries)


def _exactly(path: str) -> str:
    """An expression that matches this path alone."""
    return "^" + path.replace(".", r"\.")
