"""The filter of Trans-LoRA (arXiv:2405.17258, eq. 1): an adapter on the source base that tells whether an input looks
like those of the task.

Its scores tell whether an input was in the training data, by construction: they stay inside the transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from artifacts.errors import FieldError, TransferRefused
from train.tasks.text_batches import padding_of
from transfer.decoding import batches_by_length, last_logits
from transfer.prompts import PromptFormat, TaskName, discriminator_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DiscriminatorRecipe(BaseModel):
    """How a discriminator is asked: stored beside it, for another question would wreck it silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: TaskName = Field(description="Name of the task in the question.")
    chat: StrictBool = Field(False, description="The question is a user's turn in the source base's chat template.")

    @property
    def answers(self) -> tuple[str, str]:
        """(yes, no) as they stand after the prompt."""
        return ("yes", "no") if self.chat else (" yes", " no")

    def encode(self, x: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The question about an input as token ids."""
        return PromptFormat(chat=self.chat).encode(discriminator_prompt(x, self.task), tokenizer)

    def answer_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
        """The token ids of yes and no.

        Raises:
            TransferRefused: one of them is not exactly one token, or both are the same.
        """
        found = [list(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in self.answers]
        for answer, ids in zip(self.answers, found, strict=True):
            if len(ids) != 1:
                raise TransferRefused(
                    f"The answer {answer!r} is {len(ids)} tokens of the source base's tokenizer; the discriminator "
                    "compares single ones.",
                    hint="Take the filter excess, tuneshift_kd or none.",
                    errors=[FieldError("/parameters/filter", f"{answer!r} is no single token")],
                )
        yes, no = found[0][0], found[1][0]
        if yes == no:
            raise TransferRefused("The source base's tokenizer has one token for both yes and no.")
        return yes, no


class Discriminator:
    """A model with the discriminator's adapter active."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, recipe: DiscriminatorRecipe) -> None:
        """Raises TransferRefused as `DiscriminatorRecipe.answer_ids`."""
        self._model, self._tokenizer, self._recipe = model, tokenizer, recipe
        self._yes, self._no = recipe.answer_ids(tokenizer)

    @torch.inference_mode()
    def scores(self, texts: Sequence[str], batch_size: int) -> list[float]:
        """Logit of yes minus logit of no for each text: above 0 where the input looks like the task's."""
        prompts = [self._recipe.encode(text, self._tokenizer) for text in texts]
        padding = padding_of(self._tokenizer)
        found = [0.0] * len(texts)
        for places in batches_by_length(prompts, batch_size):
            logits = last_logits(self._model, [prompts[place] for place in places], padding)
            for place, score in zip(places, (logits[:, self._yes] - logits[:, self._no]).tolist(), strict=True):
                found[place] = score
        return found
