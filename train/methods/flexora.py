"""Flexora (arXiv:2408.10774): which transformer layers get a LoRA is learnt first, on rows held out of the training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from artifacts.heat_map import HeatMap
from train.adapted_layers import AdaptedLinear, LowRank
from train.batches import EndlessRows
from train.bilevel import HyperGradient, Loss, hypergradient
from train.layer_groups import grouped_by_layer
from train.layer_weights import Choice, LayerWeights
from train.methods.own_adapter import OwnMethod, write_plain_lora
from train.options.flexora import FlexoraOptions
from train.protocol import MethodContext, Withheld
from train.staged_schedule import StagedSchedule
from train.weighted_layers import Dial, WeightedLinear

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from train.settings import TrainingSettings

METADATA = "rankwise_flexora"
"""The key in the header of the safetensors file under which the layers' weights and the choice stand."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT16_SCALE = 2.0**10
_SHOWN = 10
"""Columns of the picture."""


class Flexora(OwnMethod[FlexoraOptions]):
    """Two stages in one loop. After each step of the first one the layers' weights take a step of their own.

    Where the published code and the paper part, this follows the paper: a layer's branch is scaled by w once (not by
    w³), Adam keeps its moments from step to step, and the gradient over the held-out batches is their mean.
    """

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        options = self.options
        self.groups = grouped_by_layer(context.targets)
        self._number = {path: number for number, paths in enumerate(self.groups.values()) for path in paths}
        self._dial = Dial()
        self.learnt = LayerWeights(len(self.groups), options.weight_rate)
        self.first_steps = options.steps_of_selection(context.total_steps)
        self.choice: Choice | None = None
        self.history: list[tuple[int, list[float]]] = []
        self._losses: list[float] = []
        self._optimizer: Optimizer | None = None
        self._told: dict[str, float] = {}
        order = torch.randperm(context.rows, generator=torch.Generator().manual_seed(context.seed)).tolist()
        held, kept = order[: options.validation_rows], order[options.validation_rows :]
        self.held, self.kept = EndlessRows(held, context.seed), EndlessRows(kept, context.seed + 1)
        prepared = super().prepare(model, context)
        self._device = next(iter(self.layers.values())).weight.device
        self._whole = {name: value.clone() for name, value in self.whole_tensors(model).items()}
        self._begin(0)
        self._use_weights()
        return prepared

    def layer(self, path: str, base: nn.Module) -> WeightedLinear:
        return WeightedLinear(
            base,
            rank=self.options.rank,
            scaling=self.options.numerator / self.options.rank,
            dropout=self.options.dropout,
            dial=self._dial,
            number=self._number[path],
        )

    def withheld(self) -> Withheld:
        return Withheld(frozenset(self.held.rows), self.first_steps)

    def schedule(self, optimizer: Optimizer, settings: TrainingSettings, total_steps: int) -> StagedSchedule:
        self._optimizer = optimizer
        return StagedSchedule(optimizer, settings, self.first_steps, total_steps)

    def before_step(self, model: nn.Module, step: int) -> None:
        if step == self.first_steps:
            self._begin_second(model)
        # A training that is taken up in its second stage makes its optimiser before this, with all parameters in it.
        if self.choice is not None:
            self._freeze()

    def after_update(self, model: nn.Module, step: int) -> None:
        if self.choice is not None:
            self._told = {"stage": 2.0, "chosen_layers": float(len(self.choice.layers))}
            return
        found = self.weight_gradient(model, step)
        self.learnt.step(found.weights)
        self._use_weights()
        self._losses = [*self._losses[:1], found.loss]
        weights = self.learnt.weights.tolist()
        self._told = {
            "stage": 1.0,
            "selection_loss": found.loss,
            "largest_weight": max(weights),
            "weight_entropy": self.learnt.entropy(),
        }
        if self._is_shown(step + 1):
            self.history.append((step + 1, weights))

    def weight_gradient(self, model: nn.Module, step: int) -> HyperGradient:
        """For w, from the held-out rows that are the turn of this step; with the model in evaluation mode.

        Under `torch.distributed` every rank takes its share of them, and all get the same gradient.
        """
        options, size = self.options, self.options.validation_batch_size
        count, first = options.validation_batches, step * options.rows_in_a_step
        validation = [self._loss(model, self.held.take(first + number * size, size)) for number in range(count)]
        batch = self.context.settings.batch_size
        training = [
            self._loss(model, self.kept.take((step * options.ud_steps + number) * batch, batch))
            for number in range(options.ud_steps)
        ]
        rate = options.ud_rate or self.context.settings.learning_rate
        scale = _FLOAT16_SCALE if self.context.settings.precision == "float16" else 1.0
        assert self._dial.weights is not None
        with self._measuring(model):
            given = (self._dial.weights, self._factors(), training)
            return _of_all_ranks(
                lambda losses: hypergradient(*given, losses, rate, scale=scale), validation, self._dial.weights
            )

    def metrics(self) -> dict[str, float]:
        return self._told

    def state(self) -> dict[str, Any]:
        chosen = None if self.choice is None else {"layers": list(self.choice.layers), "rule": self.choice.rule}
        return {"weights": self.learnt.state(), "choice": chosen, "history": self.history, "losses": self._losses}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.learnt.load_state(state["weights"])
        self.history = [(int(step), list(weights)) for step, weights in state["history"]]
        self._losses = list(state["losses"])
        chosen = state["choice"]
        self.choice = None if chosen is None else Choice(tuple(chosen["layers"]), chosen["rule"])
        self._use_weights()

    def trained_parameters(self, model: nn.Module) -> int:
        """In the second stage, whose adapter is the result."""
        whole = sum(value.numel() for value in self._whole.values())
        return whole + sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in self._chosen().values())

    def report(self, model: nn.Module) -> dict[str, Any]:
        assert self.choice is not None
        a, weights = self.learnt.a.tolist(), self.learnt.weights.tolist()
        chosen = set(self.choice.layers)
        layers = [
            {"layer": name, "a": a[number], "weight": weights[number], "chosen": number in chosen}
            for number, name in enumerate(self.groups)
        ]
        return {
            "layers": layers,
            "chosen_layers": len(chosen),
            "rule": self.choice.rule,
            "asked_rule": self.options.selection,
            "first_stage": {
                "steps": self.first_steps,
                "held_out_rows": len(self.held.rows),
                "ud_steps": self.options.ud_steps,
                "loss_at_start": self._losses[0],
                "loss_at_end": self._losses[-1],
                "weight_entropy": self.learnt.entropy(),
            },
            "notes": self._notes(max(weights)),
            "pictures": [self._picture().to_dict()],
        }

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        assert isinstance(layer, WeightedLinear)
        return LowRank(layer.lora_A, layer.lora_B, layer.scaling)

    def export(self, model: nn.Module, directory: Path) -> None:
        """A plain LoRA of the chosen layers, which alone have keys; how they were chosen stands in the header."""
        assert self.choice is not None
        found = {path: self.factors(path, layer) for path, layer in self._chosen().items()}
        told = {
            "layers": list(self.groups),
            "a": self.learnt.a.tolist(),
            "weights": self.learnt.weights.tolist(),
            "chosen": list(self.choice.layers),
            "rule": self.choice.rule,
        }
        metadata = {METADATA: json.dumps(told, separators=(",", ":"))}
        write_plain_lora(directory, found, self.whole_tensors(model), self.plain_config(found), metadata)

    def folded(self, path: str) -> LowRank:
        """What a layer of the first stage computes, as a plain LoRA: w goes into B, exactly and at the same rank."""
        layer, weights = self.layers[path], self._dial.weights
        assert isinstance(layer, WeightedLinear)
        factor = 1.0 if weights is None else weights[self._number[path]]
        return LowRank(layer.lora_A.detach(), layer.lora_B.detach() * factor, layer.scaling)

    def _begin(self, stage: int) -> None:
        """New factors, drawn on the CPU, so that they are the same on every device."""
        generator = torch.Generator().manual_seed(self.context.seed + stage)
        for layer in self._own():
            layer.begin(generator)

    def _begin_second(self, model: nn.Module) -> None:
        """What the first stage has trained is gone, but for the choice."""
        assert self._optimizer is not None
        self.choice = self.learnt.choose(self.options.selection, self.options.top_k)
        self._optimizer.state.clear()
        self._begin(1)
        with torch.no_grad():
            for name, value in self.whole_tensors(model).items():
                value.copy_(self._whole[name])
        self._use_weights()

    def _use_weights(self) -> None:
        """Let the layers work as the stage wants it."""
        if self.choice is None:
            self._dial.weights = self.learnt.weights.detach().to(self._device, torch.float32)
            return
        self._dial.weights = None
        kept = set(self.choice.layers)
        for path, layer in self.layers.items():
            assert isinstance(layer, WeightedLinear)
            layer.chosen = self._number[path] in kept

    def _freeze(self) -> None:
        for layer in self._own():
            if not layer.chosen:
                layer.lora_A.requires_grad_(False)
                layer.lora_B.requires_grad_(False)

    def _own(self) -> Iterator[WeightedLinear]:
        for layer in self.layers.values():
            assert isinstance(layer, WeightedLinear)
            yield layer

    def _chosen(self) -> dict[str, WeightedLinear]:
        return {path: layer for path, layer in zip(self.layers, self._own(), strict=True) if layer.chosen}

    def _factors(self) -> list[Tensor]:
        return [factor for layer in self._own() for factor in (layer.lora_A, layer.lora_B)]

    def _loss(self, model: nn.Module, rows: Sequence[int]) -> Loss:
        """The mean loss of these training rows for any factors and weights."""

        def loss(theta: Sequence[Tensor], weights: Tensor) -> Tensor:
            kept, self._dial.weights = self._dial.weights, weights
            for number, layer in enumerate(self._own()):
                layer.shown = (theta[2 * number], theta[2 * number + 1])
            try:
                return self.context.loss(model, self.context.batch_of(rows))
            finally:
                self._dial.weights = kept
                for layer in self._own():
                    layer.shown = None

        return loss

    @contextmanager
    def _measuring(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode, the precision of the training, and no gradient for what the model trains."""
        modes = [(module, module.training) for module in model.modules()]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind = _DTYPES.get(self.context.settings.precision)
        cast = nullcontext() if kind is None else torch.autocast(self._device.type, kind)
        # Only this kernel of attention has second derivatives.
        kernel = sdpa_kernel(SDPBackend.MATH) if self.options.ud_steps else nullcontext()
        try:
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.enable_grad(), cast, kernel:
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode

    def _is_shown(self, step: int) -> bool:
        every = -(-self.first_steps // _SHOWN)
        return step == 1 or step == self.first_steps or step % every == 0

    def _notes(self, largest: float) -> list[str]:
        assert self.choice is not None
        count, chosen = len(self.groups), len(self.choice.layers)
        found = []
        if self.choice.rule != self.options.selection:
            found.append(f"No a was above 0, so the layers were chosen by {self.choice.rule}.")
        if chosen == count:
            found.append("All layers were chosen: above_mean or top_k would leave some out.")
        if largest > count / 2:
            found.append(
                f"One layer has a weight of {largest:.3g} of {count} in all: the first stage may have been too long, "
                "or weight_rate too large."
            )
        return found

    def _picture(self) -> HeatMap:
        assert self.choice is not None
        chosen = set(self.choice.layers)
        return HeatMap(
            "layer-weights",
            "Weight of every layer, by the step of the first stage",
            [f"{name} {'✓' if number in chosen else ' '}" for number, name in enumerate(self.groups)],
            [str(step) for step, _ in self.history],
            [[weights[number] for _, weights in self.history] for number in range(len(self.groups))],
            note=f"{len(chosen)} of {len(self.groups)} layers were chosen (✓) by {self.choice.rule}; all began at 1.",
        )


def _of_all_ranks(
    gradient: Callable[[Sequence[Loss]], HyperGradient], losses: Sequence[Loss], like: Tensor
) -> HyperGradient:
    """The gradient of the mean of all losses, each of which one rank alone computes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return gradient(losses)
    mine = losses[distributed.get_rank() :: distributed.get_world_size()]
    total = torch.zeros(len(like) + 1, dtype=torch.float32, device=like.device)
    if mine:
        found = gradient(mine)
        share = len(mine) / len(losses)
        total[:-1], total[-1] = found.weights * share, found.loss * share
    distributed.all_reduce(total)
    return HyperGradient(float(total[-1]), total[:-1])
