"""DyLoRA (arXiv:2210.07558): in every step the components up to a drawn rank b are an adapter of rank b."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from artifacts.manifest import NestedRanks
from artifacts.nested_ranks import NESTED_KEY, mark_of
from train.adapted_layers import AdaptedLinear, LowRank
from train.methods.own_adapter import OwnMethod, write_plain_lora
from train.options.dylora import DyloraOptions
from train.protocol import MethodContext

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from train.settings import TrainingSettings

ACCURACIES = ("accuracy", "exact_match")


@dataclass(slots=True)
class Dial:
    """The ranks at which all layers work.

    Attributes:
        drawn: of a step of the training.
        still: how many of the first components the step does not train.
        shown: of a forward pass in evaluation mode, whatever was drawn.
    """

    drawn: int
    still: int
    shown: int


class DyloraLinear(AdaptedLinear):
    """y = W x + scaling(b)·B[:, :b]·A[:b]·x (equation 7), with lora_A (r×d_in) and lora_B (d_out×r)."""

    def __init__(self, base: nn.Module, options: DyloraOptions, dial: Dial) -> None:
        super().__init__(base)
        self._options, self._dial = options, dial
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(options.rank, self.d_in, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, options.rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(options.dropout)

    def adapter(self, x: Tensor) -> Tensor:
        dial = self._dial
        rank, still = (dial.drawn, dial.still) if self.training else (dial.shown, 0)
        a, b = first_components(self.lora_A, 0, rank, still), first_components(self.lora_B, 1, rank, still)
        return functional.linear(functional.linear(self.dropout(x), a), b) * self._options.scaling(rank)


def first_components(factor: Tensor, dimension: int, rank: int, still: int) -> Tensor:
    """A view of the first `rank` components along `dimension`; no gradient reaches the first `still` of them."""
    if still == 0:
        return factor.narrow(dimension, 0, rank)
    found: Tensor = _PartlyStill.apply(factor, dimension, rank, still)  # type: ignore[no-untyped-call]
    return found


class _PartlyStill(torch.autograd.Function):
    """The same view and half the work of joining a detached part with the other: nothing is copied on the way."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, dimension: int, rank: int, still: int) -> Tensor:
        ctx.shape, ctx.cut = factor.shape, (dimension, still, rank - still)
        return factor.narrow(dimension, 0, rank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole = gradient.new_zeros(ctx.shape)
        whole.narrow(*ctx.cut).copy_(gradient.narrow(*ctx.cut))
        return whole, None, None, None


class Dylora(OwnMethod[DyloraOptions]):
    """One rank is drawn for each step of the optimiser, for all layers and all forward passes of the step.

    The draws come from a generator of their own, so that they are the same on every device and after a resumption.
    """

    def __init__(self, options: DyloraOptions) -> None:
        super().__init__(options)
        self._ranks = tuple(options.weights)
        self._shares = torch.tensor(list(options.weights.values()), dtype=torch.float64)
        self._before = dict(zip(self._ranks, (0, *self._ranks), strict=False))
        self._counts = dict.fromkeys(self._ranks, 0)
        self._dial = Dial(options.rank, 0, options.rank)
        self._generator = torch.Generator()
        self._optimizer: Optimizer | None = None
        self._kept: list[tuple[Tensor, Tensor, int]] = []

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        self._generator.manual_seed(context.seed)
        return super().prepare(model, context)

    def layer(self, path: str, base: nn.Module) -> DyloraLinear:
        del path
        return DyloraLinear(base, self.options, self._dial)

    def schedule(self, optimizer: Optimizer, settings: TrainingSettings, total_steps: int) -> LRScheduler | None:
        """The loop's own; `update_scope` strict needs to know the optimiser."""
        del settings, total_steps
        self._optimizer = optimizer
        return None

    def before_step(self, model: nn.Module, step: int) -> None:
        del model, step
        rank = self._ranks[int(torch.multinomial(self._shares, 1, generator=self._generator))]
        self._counts[rank] += 1
        self._dial.drawn = rank
        self._dial.still = self._before[rank] if self.options.frozen else 0

    def before_update(self, model: nn.Module, step: int) -> None:
        """Strict: remember the components that stand still, and let the optimiser count this rank's updates alone."""
        del model, step
        if self.options.update_scope == "dense":
            return
        assert self._optimizer is not None
        updates = self._counts[self._dial.drawn] - 1
        for layer in self.layers.values():
            for dimension, factor in enumerate((layer.lora_A, layer.lora_B)):
                assert isinstance(factor, Tensor)
                state = self._optimizer.state.get(factor, {})
                if "step" in state:
                    state["step"].fill_(updates)
                moments = [value for value in state.values() if value.shape == factor.shape]
                self._kept += [(value, value.detach().clone(), dimension) for value in (factor.data, *moments)]

    def after_update(self, model: nn.Module, step: int) -> None:
        del model, step
        low, high = self._dial.still, self._dial.drawn
        for value, kept, dimension in self._kept:
            value.narrow(dimension, 0, low).copy_(kept.narrow(dimension, 0, low))
            above = value.shape[dimension] - high
            value.narrow(dimension, high, above).copy_(kept.narrow(dimension, high, above))
        self._kept = []

    def metrics(self) -> dict[str, float]:
        return {"rank": float(self._dial.drawn)}

    def state(self) -> dict[str, Any]:
        counts = {str(rank): count for rank, count in self._counts.items()}
        return {"generator": bytes(self._generator.get_state().tolist()).hex(), "counts": counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(torch.tensor(list(bytes.fromhex(state["generator"])), dtype=torch.uint8))
        self._counts = {int(rank): count for rank, count in state["counts"].items()}

    @contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """Within, evaluation mode means the adapter of this rank."""
        before, self._dial.shown = self._dial.shown, rank
        try:
            yield
        finally:
            self._dial.shown = before

    def evaluate(self, model: nn.Module, measure: Callable[[nn.Module], dict[str, float]]) -> dict[str, Any]:
        """The figures at every trained rank, and the area under each accuracy over log₂ of the rank."""
        rows = []
        for rank in self._ranks:
            with self.at_rank(rank):
                rows.append({"rank": rank, **measure(model)})
        areas = {name: area(self._ranks, [row[name] for row in rows]) for name in ACCURACIES if name in rows[0]}
        return {"ranks": rows} | ({"area": areas} if areas else {})

    def report(self, model: nn.Module) -> dict[str, Any]:
        del model
        return {"drawn": {str(rank): count for rank, count in self._counts.items()}}

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        del path
        assert isinstance(layer, DyloraLinear)
        return LowRank(layer.lora_A, layer.lora_B, self.options.scaling(self.options.rank))

    def export(self, model: nn.Module, directory: Path) -> None:
        """The plain LoRA of the largest rank, with the mark that tells which ranks can be cut out of it."""
        found = {path: self.factors(path, layer) for path, layer in self.layers.items()}
        config = self.plain_config(found)
        alpha = self.options.alpha  # as it was given, not as it comes out of scaling × rank
        config.lora_alpha = int(alpha) if alpha == int(alpha) else alpha
        config.alpha_pattern = {}
        mark = mark_of(NestedRanks(self._ranks, self.options.scale_mode))
        write_plain_lora(directory, found, self.whole_tensors(model), config, {NESTED_KEY: mark})


def area(ranks: tuple[int, ...], values: list[float]) -> float:
    """The mean of `values` over log₂ of the rank, with straight lines in between (AURAC, arXiv:2605.07850)."""
    places = [math.log2(rank) for rank in ranks]
    if len(places) == 1:
        return values[0]
    parts = ((places[i + 1] - places[i]) * (values[i + 1] + values[i]) / 2 for i in range(len(places) - 1))
    return sum(parts) / (places[-1] - places[0])
