"""Options of Flexora. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, StrictInt

from artifacts.errors import FieldError
from artifacts.menu import Number
from train.layer_groups import group_of
from train.options.common import Circumstances, LowRankOptions
from train.targets import EMBEDDINGS

AUTHORS_STEPS = 600
_SHARE_OF_STEPS = 4
_NAMED = 20
Count = Annotated[StrictInt, Field(ge=1, le=10_000_000)]
Rate = Annotated[Number, Field(gt=0, le=10)]


class FlexoraOptions(LowRankOptions):
    """Flexora, arXiv:2408.10774: a first stage weighs the transformer layers by the loss on rows held out of it, a
    second one trains a new LoRA in the chosen layers alone.
    """

    selection_steps: Count | None = Field(
        None,
        description="Optimiser steps of the first stage, of those of training.steps or epochs; unset, a quarter of "
        "them, at most 600 (the authors: about 600).",
    )
    selection: Literal["positive", "above_mean", "top_k"] = Field(
        "positive",
        description="Which layers are chosen by a, their learnt parameter: positive, a > 0, as in the authors' code "
        "(above_mean if there is none); above_mean, weight > 1, which is the same whatever is added to all a; top_k, "
        "the top_k largest.",
    )
    top_k: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = Field(
        None, description="How many layers are chosen, with selection=top_k; at most all (the authors: 6 to 24 of 32)."
    )
    weight_rate: Rate = Field(0.01, description="Learning rate of a, by Adam (the authors: 0.01).")
    validation_rows: Count = Field(
        200,
        description="Training rows that the first stage holds out to learn a from; fewer than there are (the authors: "
        "200). The second stage trains on them too.",
    )
    validation_batches: Annotated[StrictInt, Field(ge=1, le=10_000)] = Field(
        8, description="Batches of held-out rows in each step of a, over which the gradient is averaged (authors: 8)."
    )
    validation_batch_size: Annotated[StrictInt, Field(ge=1, le=65536)] = Field(
        1, description="Rows of such a batch; 1 batch of 8 rows is faster on a GPU than 8 of 1 (the authors: 1)."
    )
    ud_steps: Annotated[StrictInt, Field(ge=0, le=64)] = Field(
        0,
        description="Steps of plain descent on training rows through which the gradient of a is unrolled; 0 takes the "
        "direct gradient, as the authors' code does. Each costs a graph of second derivatives.",
    )
    ud_rate: Rate | None = Field(
        None, description="Learning rate of the unrolled steps; unset, training.learning_rate. Needs ud_steps."
    )

    def steps_of_selection(self, steps: int) -> int:
        """Of the first stage, in a training of so many steps."""
        if self.selection_steps is not None:
            return self.selection_steps
        return min(max(steps // _SHARE_OF_STEPS, 1), AUTHORS_STEPS)

    def problems(self, known: Circumstances) -> list[FieldError]:
        return [*self._layer_problems(known), *self._count_problems(known), *self._setting_problems(known)]

    def warnings(self, known: Circumstances) -> list[str]:
        if self.rows_in_a_step <= self.validation_rows:
            return []
        taken, held = self.rows_in_a_step, self.validation_rows
        return [f"A step of the layers' weights takes {taken} rows, of which {held} are held out: some come twice."]

    @property
    def rows_in_a_step(self) -> int:
        """Held-out rows that one step of a takes."""
        return self.validation_batches * self.validation_batch_size

    def _layer_problems(self, known: Circumstances) -> Iterator[FieldError]:
        pointer = "/parameters/target_modules"
        paths = [target.path for target in known.targets if target.path.rpartition(".")[2] not in EMBEDDINGS]
        groups = {path: group_of(path) for path in paths}
        lost = [path for path, group in groups.items() if group is None]
        for path in lost[:_NAMED]:
            yield FieldError(
                pointer, f"{path} lies in no numbered layer, so it could get no weight: name the modules without it"
            )
        layers = len(set(groups.values()))
        if lost or not groups:
            return
        if layers < 2:
            yield FieldError(pointer, f"all of them lie in {next(iter(groups.values()))}: one layer leaves no choice")
        if self.top_k is not None and self.top_k > layers:
            yield FieldError("/parameters/top_k", f"{self.top_k} is more than the {layers} layers that are adapted")

    def _count_problems(self, known: Circumstances) -> Iterator[FieldError]:
        if known.steps is not None:
            first = self.steps_of_selection(known.steps)
            if first >= known.steps:
                yield FieldError(
                    "/parameters/selection_steps",
                    f"a first stage of {first} steps leaves none of the {known.steps} for the second",
                )
        if known.rows is not None and self.validation_rows >= known.rows:
            yield FieldError(
                "/parameters/validation_rows",
                f"{self.validation_rows} rows can not be held out of {known.rows}: some have to be left to train on",
            )

    def _setting_problems(self, known: Circumstances) -> Iterator[FieldError]:
        training = known.training
        if (self.selection == "top_k") != (self.top_k is not None):
            yield FieldError("/parameters/top_k", "goes with selection=top_k, and selection=top_k with it")
        if self.ud_rate is not None and not self.ud_steps:
            yield FieldError("/parameters/ud_rate", "is of the unrolled steps, and ud_steps is 0")
        if self.ud_steps and training.gradient_checkpointing:
            yield FieldError(
                "/parameters/ud_steps", "second derivatives can not go through training.gradient_checkpointing"
            )
        if self.ud_steps and training.precision == "float16":
            yield FieldError("/parameters/ud_steps", "second derivatives vanish in float16: take bfloat16 or float32")
        if training.early_stopping is not None:
            yield FieldError(
                "/training/early_stopping",
                "the best step could be one of the first stage, whose adapter is thrown away: leave it out",
            )
