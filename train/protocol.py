"""What a training method is: how it changes the model, what it does around a step, what it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from train.options.common import TrainOptions

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from train.continuation import Start
    from train.settings import TrainingSettings

Options = TypeVar("Options", bound=TrainOptions)


def loss_of_model(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the model itself makes of the labels."""
    loss: Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True, slots=True)
class Withheld:
    """Training rows on which the first steps do not train.

    Attributes:
        rows: their numbers.
        steps: how many of the first optimiser steps leave them out; other rows take their places in the batches.
    """

    rows: frozenset[int]
    steps: int


def _no_rows(numbers: Sequence[int]) -> Mapping[str, Tensor]:
    raise IndexError(f"there are no training rows, not the rows {list(numbers)}")


@dataclass(frozen=True, slots=True)
class MethodContext:
    """What a method may look at when it prepares the model.

    Attributes:
        targets: paths of the linear layers to adapt, sorted.
        total_steps: optimiser steps of the whole training.
        batches: gives an iterator over the training batches, on the model's device, in an order of its own.
        settings: of the loop.
        seed: of the training.
        checkpoint: what `save` wrote, if the training goes on from there: for a method whose preparation costs much,
            or would not give the same values on another machine.
        task_type: PEFT's name of the task, for the adapter's configuration; None where PEFT has none.
        whole: paths of modules that are trained as they are and stored with the adapter, such as a new classifier.
        start: the adapter that the training goes on from, with its layers placed; of a kind that the method's
            `capabilities.continues` names. After `prepare` the model computes what that adapter does.
        loss: the task's mean loss of a model on a batch.
        rows: how many training rows there are.
        batch_of: gives a batch of the training rows of these numbers, from 0 on, on the model's device.
        base_location: the folder of the base model, or its repository on the hub.
        groups: of every training row, as `evaluation.group_column` tells them; empty without it, or if rows are packed.
        words: gives the token ids of a text, without any that only begin or end one; none where there are no words.
    """

    targets: Sequence[str]
    total_steps: int
    batches: Callable[[], Iterator[Mapping[str, Tensor]]]
    settings: TrainingSettings
    seed: int = 0
    checkpoint: Path | None = None
    task_type: str | None = "CAUSAL_LM"
    whole: Sequence[str] = ()
    start: Start | None = None
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = loss_of_model
    rows: int = 0
    batch_of: Callable[[Sequence[int]], Mapping[str, Tensor]] = _no_rows
    words: Callable[[str], Sequence[int]] = lambda text: ()
    base_location: str = ""
    groups: Sequence[str] = ()


class Measure(Protocol):
    """Gives the figures of the evaluation (loss, perplexity, accuracy …) on the validation rows; slow."""

    def __call__(self, model: nn.Module, group: str | None = None) -> dict[str, float]:
        """On the rows of one group alone, if it is named; empty when it has none."""
        ...


@dataclass(frozen=True, slots=True)
class Beside:
    """An adapter that a training gives beside its own; `name` tells it from that one."""

    name: str
    directory: Path
    description: str


class TrainMethod(ABC, Generic[Options]):
    """One training. The loop calls the parts in the order in which they stand here.

    A checkpoint holds what `save` writes, the optimiser, the schedule, the generators of random numbers and `state`;
    after `prepare` with the same seed, `load` and `load_state`, training goes on as if it had not stopped.
    """

    begins_prepared: ClassVar[bool] = False
    """Whether the training begins at the prepared model and not at the base model as it is loaded: then that is what
    is measured before it."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        """The trainable model. Random numbers come from torch's generator, which the loop has seeded."""

    def withheld(self) -> Withheld | None:
        """Training rows that the first steps leave out, for a method that needs rows the model has not learnt from;
        the same on every rank and after a resumption.
        """
        return None

    def optimizer(self, model: nn.Module, settings: TrainingSettings) -> Optimizer | None:
        """The optimiser; None leaves it to the loop: AdamW on all that is trainable."""
        del model, settings
        return None

    def schedule(self, optimizer: Optimizer, settings: TrainingSettings, total_steps: int) -> LRScheduler | None:
        """The learning rates, stepped once after each update; None leaves them to the loop: `settings.schedule`."""
        del optimizer, settings, total_steps
        return None

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """A term of the loss that depends on the parameters alone; it counts once in a step."""
        del model
        return None

    def before_step(self, model: nn.Module, step: int) -> None:
        """Called before the forward pass of optimiser step `step`, which counts from 0."""

    def forward_pass(self, batch: Mapping[str, Any], *, idle: bool = False) -> AbstractContextManager[None]:
        """Entered around every forward pass of the training; activations that are computed again with the gradients
        are outside of it.

        Args:
            batch: what the model is given.
            idle: this rank has no rows left, and the pass counts nothing.
        """
        del batch, idle
        return nullcontext()

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

    def settle(self, model: nn.Module) -> None:
        """Called when the training has ended. A method whose adapter is meant to lose something of what was trained
        makes the model what the adapter will be: all that follows, the check of the written files too, is about that.
        """

    def trained_parameters(self, model: nn.Module) -> int:
        """How many numbers the training has changed, for the report."""
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def evaluate(self, model: nn.Module, measure: Measure) -> dict[str, Any]:
        """What only this method can measure on the trained model, for the report; `model` is left as it was."""
        del model, measure
        return {}

    def report(self, model: nn.Module) -> dict[str, Any]:
        """What the method has to tell of the trained model: JSON values; a `artifacts.heat_map.HeatMap` as its dict
        under "pictures", a list, becomes a picture of the job."""
        del model
        return {}

    @abstractmethod
    def export(self, model: nn.Module, directory: Path) -> None:
        """Write the adapter that a user gets: a folder that `reload` loads onto the untouched base model."""

    def export_beside(self, model: nn.Module, folder: Path) -> Sequence[Beside]:
        """Write what else a user gets, each adapter into a folder of its own below `folder`; after `evaluate`.

        For methods whose options say so (`TrainOptions.gives_beside`).
        """
        del model, folder
        return ()

    def reload(self, base: nn.Module, directory: Path) -> nn.Module:
        """The untouched base model with the adapter that `export` wrote, loaded as its users load it: by PEFT.

        A method whose adapter is of a type of our own (`train.declared`) names that loader here. Nothing but the files
        may be used: what comes out is compared with the trained model.
        """
        from peft import PeftModel

        from train.quiet import peft_deprecations_ignored

        with peft_deprecations_ignored():
            loaded: nn.Module = PeftModel.from_pretrained(base, str(directory))
        return loaded
