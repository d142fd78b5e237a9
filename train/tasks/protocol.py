"""What a task is: how the base model is loaded, rows become examples, batches a loss, and a model is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from train.base_files import BaseFiles
from train.data import DataFile, Examples
from train.evaluation import Scores
from train.settings import EvaluationSettings, TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of a logit, as a share of the largest logit (and at least of 1), by the precision of the base."""

Settings = TypeVar("Settings")
Loss = Callable[[Any, Any, "Tensor"], "Tensor"]
"""(the model's outputs, the batch's labels, counted items of the whole step) → Σ over the batch / items."""


@dataclass(frozen=True, slots=True)
class TaskContext:
    """Of one training: where it runs, and how; `folder` is its own, to write into."""

    base: BaseFiles
    training: TrainingSettings
    device: str
    seed: int
    folder: Path


class Task(ABC, Generic[Settings]):
    """The task of one training. `read` comes first: what the rows hold may decide what `load` makes of the base.

    An example is whatever `read` makes of a row; only the task looks into it.
    """

    peft_type: ClassVar[str | None] = None
    """PEFT's name of the task, if it has one."""
    checkpointing_by_trainer: ClassVar[bool] = True
    """Whether the Trainer switches gradient checkpointing on; else `before_training` does."""
    predicted: ClassVar[str] = "logits"
    """What `predict` gives, in a word."""

    def __init__(self, settings: Settings, context: TaskContext) -> None:
        self.settings = settings
        self.base, self.training = context.base, context.training
        self.device, self.seed, self.folder = context.device, context.seed, context.folder

    @abstractmethod
    def read(self, file: DataFile, evaluation: EvaluationSettings) -> Examples:
        """The rows as examples, split.

        Raises:
            FileBroken: rows that the task can not use, named.
            RequestInvalid: too few are left, or the base model does not serve the task.
        """

    @abstractmethod
    def load(self) -> nn.Module:
        """The part of the base model that is adapted, anew: frozen, for evaluation, the same values at every call."""

    def whole(self, model: nn.Module) -> Sequence[str]:
        """Paths of modules of `load`'s model that are trained as they are, such as a new classifier."""
        del model
        return ()

    def check(self, model: nn.Module, examples: Examples) -> None:
        """Raises RequestInvalid when the loaded model can not do what the settings ask for."""
        del model, examples

    def check_start(self, directory: Path) -> None:
        """Raises RequestInvalid when the adapter that the training goes on from is of another kind."""
        del directory

    def before_training(self, model: Any) -> None:
        """Called before the method changes the model; what only evaluation needs can go."""
        del model

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """A batch, on the CPU: what the model is called with, and `labels`, in which -100 is not counted."""

    def step_inputs(self, batch: dict[str, Any], epoch: int) -> dict[str, Any]:
        """The batch as the model takes it in a step, on its device: the place for random draws.

        They go by the seed, the epoch and the row, and by no generator that others use: then the training is the same
        on any number of ranks, whose rows are others.
        """
        del epoch
        return batch

    def loss(self) -> Loss | None:
        """How outputs and labels become the loss of a batch; None if the model computes it itself from `labels`."""
        return None

    def words(self, text: str) -> Sequence[int]:
        """The token ids of a text alone; none for a task without words."""
        del text
        return ()

    def tokens(self, example: Any) -> int:
        """Tokens of an example; 0 for what has none."""
        del example
        return 0

    @abstractmethod
    def score(
        self, model: nn.Module, examples: Sequence[Any], evaluation: EvaluationSettings, tick: Callable[[int], None]
    ) -> Scores:
        """Measure the model, which is put into evaluation mode.

        Args:
            tick: called with the number of rows measured so far, before each batch.
        """

    def measure_more(
        self, model: nn.Module, examples: Sequence[Any], evaluation: EvaluationSettings
    ) -> Mapping[str, Any]:
        """What else is measured of the trained model on the validation rows, by its name in the report's evaluation."""
        del model, examples, evaluation
        return {}

    def remarks(self, after: Scores | None) -> Sequence[str]:
        """What the user should know of the trained model's figures: whole sentences."""
        del after
        return ()

    @abstractmethod
    def scores_of(self, columns: Mapping[str, Any]) -> Scores:
        """What `Scores.to_lists` was made of."""

    @abstractmethod
    def predict(self, model: nn.Module, examples: Sequence[Any]) -> list[Tensor]:
        """What the model gives for each example (logits, say), on the CPU in float32: to compare two models by."""

    def reload(self, by_method: Callable[[nn.Module, Path], nn.Module], model: nn.Module, directory: Path) -> nn.Module:
        """`load`'s model with the written adapter, as users load it: as the method says, if `finish` left its form."""
        return by_method(model, directory)

    def finish(self, directory: Path) -> None:
        """Called when the method has written the adapter: the place for what the task adds to its folder."""
        del directory
