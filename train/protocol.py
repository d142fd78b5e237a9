"""What a training method is: how it changes the model, what it does around a step, what it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from train.options import TrainOptions

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from train.settings import TrainingSettings

Options = TypeVar("Options", bound=TrainOptions)


@dataclass(frozen=True, slots=True)
class MethodContext:
    """What a method may look at when it prepares the model.

    Attributes:
        targets: paths of the linear layers to adapt, sorted.
        total_steps: optimiser steps of the whole training.
        batches: gives an iterator over the training batches, on the model's device, in an order of its own.
        seed: of the training.
        checkpoint: what `save` wrote, if the training goes on from there: for a method whose preparation costs much,
            or would not give the same values on another machine.
    """

    targets: Sequence[str]
    total_steps: int
    batches: Callable[[], Iterator[Mapping[str, Tensor]]]
    seed: int = 0
    checkpoint: Path | None = None


class TrainMethod(ABC, Generic[Options]):
    """One training. The loop calls the parts in the order in which they stand here.

    A checkpoint holds what `save` writes, the optimiser, the schedule, the generators of random numbers and `state`;
    after `prepare` with the same seed, `load` and `load_state`, training goes on as if it had not stopped.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        """The trainable model. Random numbers come from torch's generator, which the loop has seeded."""

    def optimizer(self, model: nn.Module, settings: TrainingSettings) -> Optimizer | None:
        """The optimiser; None leaves it to the loop: AdamW on all that is trainable."""
        del model, settings
        return None

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called before the forward pass of optimiser step `step`, which counts from 0."""

    def before_update(self, model: nn.Module, step: int) -> None:
        """Called when the gradients of the step are complete and clipped, before the optimiser uses them."""

    def after_update(self, model: nn.Module, step: int) -> None:
        """Called after the optimiser's step, while the gradients are still there."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the method's own for the series of the job."""
        return {}

    @abstractmethod
    def save(self, model: nn.Module, directory: Path) -> None:
        """Write what is trained into `directory`, for `load`."""

    @abstractmethod
    def load(self, model: nn.Module, directory: Path) -> None:
        """Put back what `save` wrote, exactly."""

    def state(self) -> dict[str, Any]:
        """Whatever else the method needs to go on: JSON values only."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        del state

    @abstractmethod
    def export(self, model: nn.Module, directory: Path) -> None:
        """Write the adapter that a user gets: a folder that PEFT loads onto the untouched base model."""
