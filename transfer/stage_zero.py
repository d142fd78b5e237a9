"""Stage 0 of Trans-LoRA (arXiv:2405.17258, section 3), beside the training of the source adapter: inputs that the
source base invents after the seeds, and a discriminator that learns to tell the data's inputs from them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from artifacts.errors import FieldError, TransferRefused
from artifacts.pointers import pointers_below
from train.base_files import BaseFiles
from train.engine import TrainObserver
from transfer.candidates import Candidate, screen
from transfer.discriminator_training import (
    LEAST_HELD_OUT,
    DiscriminatorReport,
    LabelledInputs,
    train_discriminator,
)
from transfer.distillation import Distillation
from transfer.filters.discriminator import DiscriminatorRecipe
from transfer.generation import GenerationSettings, InputGenerator
from transfer.identity import canonical_digest
from transfer.prompts import PromptFormat
from transfer.sampling import Sampling
from transfer.seeds import folded, seeds_digest
from transfer.source_model import load_base
from transfer.stage_files import StageFiles
from transfer.transferable import DiscriminatorSettings

LEAST_RATE = 0.05
"""A round invents as if at least this share were of use."""


class InventionObserver(Protocol):
    """Who follows the inventing of inputs."""

    def unit(self, done: int, most: int) -> None:
        """A batch begins; those before are kept, `done` inputs of at most `most`. Raises to stop."""


@dataclass(frozen=True, slots=True)
class StageZero:
    """Everything that decides the discriminator.

    Attributes:
        inputs: of the training data, cleaned (`transfer.task_inputs`): all that is read of it.
        how: the training of the discriminator.
    """

    base: BaseFiles
    seeds: tuple[str, ...]
    inputs: Sequence[str]
    recipe: DiscriminatorRecipe
    settings: DiscriminatorSettings
    how: Distillation

    def check(self, prompt_format: PromptFormat) -> None:
        """Refuse what would only fail after the adapter's training.

        Raises:
            TransferRefused: yes or no is no single token of the tokenizer; too few different inputs.
            RequestInvalid: a chat, and the base model's tokenizer has no template for one.
        """
        if self._wanted(len(set(map(folded, self.inputs)))) <= LEAST_HELD_OUT:
            raise TransferRefused(
                "The dataset has too few different inputs to train a discriminator on.",
                hint="Train with more rows, or without transferable.",
                errors=[FieldError("/dataset", "too few different inputs")],
            )
        tokenizer = self.base.tokenizer()
        with pointers_below("/transferable"):
            prompt_format.encode(self.seeds[0], tokenizer)
            self.recipe.encode(self.seeds[0], tokenizer)
        try:
            self.recipe.answer_ids(tokenizer)
        except TransferRefused as error:
            error.hint = "Train without transferable: the filters excess, tuneshift_kd and none need no discriminator."
            error.errors = tuple(FieldError("/transferable", item.message) for item in error.errors)
            raise

    def invent(self, files: StageFiles, observer: InventionObserver) -> list[str]:
        """Inputs that the base model invents after the seeds and that are not in the data, as many as the data's.

        They are fewer where the most candidates do not give as many. A batch is a unit of `files`.

        Raises:
            TransferRefused: the seeds leave no room for an input.
            Whatever the observer raises.
        """
        known = set(map(folded, self.inputs))
        wanted, size = self._wanted(len(known)), self.settings.generation_batch
        most = self.settings.candidates(wanted)
        limit = -(-most // size)
        generation = GenerationSettings(
            Sampling(self.settings.temperature, self.settings.top_p), self.settings.input_tokens, size
        )
        key = canonical_digest(["stage-0", self.how.seed, seeds_digest(self.seeds), self.recipe.model_dump()])
        generator: InputGenerator | None = None

        def make(number: int) -> list[list[Any]]:
            nonlocal generator
            if generator is None:
                model = load_base(self.base, dtype=self.how.training.precision, device=self.how.device)
                generator = InputGenerator(model, self.base.tokenizer(), self.seeds, generation)
            return [[item.index, item.text, item.finish] for item in generator.batch(key, number)]

        given = [key, self.settings.temperature, self.settings.top_p, self.settings.input_tokens, size]
        candidates: list[Candidate] = []
        found: list[str] = []
        shards, more = 0, -(-wanted // size)
        while more and shards < limit:
            for number in range(shards, min(shards + more, limit)):
                observer.unit(number * size, most)
                rows = files.json_unit(f"invent-{number:05d}", [given, number], partial(make, number))
                candidates += [Candidate(*row) for row in rows]
                shards += 1
            passed = [item.text for item in screen(candidates[:most], self.seeds) if item.verdict == "passed"]
            found = [text for text in passed if folded(text) not in known]
            rate = max(len(found) / len(candidates), LEAST_RATE)
            more = math.ceil((wanted - len(found)) / rate / size) if len(found) < wanted else 0
        del generator
        gc.collect()  # a training is going to load a base model of its own
        return found[:wanted]

    def train(
        self,
        invented: Sequence[str],
        folder: Path,
        output: Path,
        observer: TrainObserver,
        resume: Path | None = None,
    ) -> DiscriminatorReport:
        """Train the discriminator and measure it; see `train_discriminator`."""
        real = self.inputs if self.settings.examples is None else _chosen(self.inputs, self.settings.examples)
        labelled = LabelledInputs.of(real, invented)
        return train_discriminator(labelled, self.recipe, self.how, self.base, folder, output, observer, resume)

    def _wanted(self, different: int) -> int:
        return different if self.settings.examples is None else min(different, self.settings.examples)


def _chosen(inputs: Sequence[str], most: int) -> Sequence[str]:
    """So many different ones, spread over the data."""
    different = list({folded(text): text for text in inputs}.values())
    return [different[place * len(different) // most] for place in range(most)] if most < len(different) else different
