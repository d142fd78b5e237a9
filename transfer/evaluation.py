"""Stage evaluate: how models answer the items of a holdout, and how near the kept inputs are to real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from train.tasks.text_batches import device_of, padding_of
from transfer.decoding import Limits, answers, batches_by_length, left_padded
from transfer.gate import ArmScore
from transfer.prompts import PromptFormat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Item:
    """An input with the answer that counts as right."""

    x: str
    answer: str


@dataclass(frozen=True, slots=True)
class Exam:
    """How items are put: the same to every model.

    Attributes:
        stop: text that ends an answer, if any.
    """

    items: tuple[Item, ...]
    prompt_format: PromptFormat
    max_new_tokens: int
    stop: str | None
    batch_size: int

    def take(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> ArmScore:
        """Greedy answers; one is right if it equals the item's but for white space at its ends."""
        prompts = [self.prompt_format.encode(item.x, tokenizer) for item in self.items]
        limits = Limits.of(model, tokenizer, self.max_new_tokens, self.stop)
        written = answers(model, tokenizer, prompts, limits, self.batch_size)
        return ArmScore(
            tuple(
                float(found.text.strip() == item.answer.strip())
                for found, item in zip(written, self.items, strict=True)
            ),
            ended=sum(found.finish != "length" for found in written),
            distinct=len({found.text.strip() for found in written}),
        )


def mean_states(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int
) -> NDArray[np.float64]:
    """(texts, width) mean over the tokens of the model's last hidden states: the features of MMD²."""
    return layer_states(model, tokenizer, texts, batch_size)[-1]


@torch.inference_mode()
def layer_states(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int
) -> list[NDArray[np.float64]]:
    """For every layer (texts, width): the mean over the tokens of what it gives."""
    prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
    rows: dict[int, list[torch.Tensor]] = {}
    for places in batches_by_length(prompts, batch_size):
        batch = left_padded([prompts[place] for place in places], padding_of(tokenizer), device_of(model))
        output = model(**batch, use_cache=False, logits_to_keep=1, output_hidden_states=True)
        mask = batch["attention_mask"][:, :, None].double()
        pooled = [(state.double() * mask).sum(dim=1) / mask.sum(dim=1) for state in output.hidden_states[1:]]
        for row, place in enumerate(places):
            rows[place] = [state[row].cpu() for state in pooled]
    return [torch.stack([rows[place][layer] for place in range(len(prompts))]).numpy() for layer in range(len(rows[0]))]
