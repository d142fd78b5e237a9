"""What an adapter adds to its base, token by token: the filters that need no discriminator.

TiTok (arXiv:2510.04682): S(y_i) = log p(y_i) of base with adapter − log p(y_i) of the base. TuneShift-KD
(arXiv:2603.24518) compares the perplexities of the same answer: their logarithms differ by the mean of S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from train.tasks.text_batches import device_of, padding_of
from transfer.decoding import batches_by_length, left_padded
from transfer.span_alignment import ScoredSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Comparison = Literal["ratio", "difference"]


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer of the teacher, token by token.

    Attributes:
        spans: characters of each token of the answer with S; the end of the text is not among them.
        teacher, base: mean negative log likelihood of the answer's tokens, nats, with and without the adapter.
    """

    spans: tuple[ScoredSpan, ...]
    teacher: float
    base: float

    @property
    def excess(self) -> float:
        """The mean of S over the answer; −∞ for an answer without tokens, which teaches nothing."""
        return self.base - self.teacher if self.spans else -math.inf


def tuneshift_score(answer: ScoredAnswer, comparison: Comparison) -> float:
    """How much more the base is surprised by the answer than the teacher: perplexities over or minus one another."""
    if not answer.spans:
        return -math.inf
    if comparison == "ratio":
        return math.exp(min(answer.base - answer.teacher, 700.0))
    return math.exp(min(answer.base, 700.0)) - math.exp(min(answer.teacher, 700.0))


def score_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str],
    batch_size: int,
) -> list[ScoredAnswer]:
    """S of every token of the answers.

    Args:
        model: a PEFT model with the source adapter active; it is run with and without it.
        prompts: token ids.
        answers: their texts, as the teacher wrote them.
    """
    encoded = [tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True) for answer in answers]
    rows = [[*prompt, *answer["input_ids"]] for prompt, answer in zip(prompts, encoded, strict=True)]
    found: dict[int, ScoredAnswer] = {}
    for places in batches_by_length(rows, batch_size):
        lengths = [len(encoded[place]["input_ids"]) for place in places]
        if not any(lengths):
            found.update((place, ScoredAnswer((), 0.0, 0.0)) for place in places)
            continue
        teacher, base = _likelihoods(model, [rows[place] for place in places], lengths, padding_of(tokenizer))
        for place, own, plain in zip(places, teacher, base, strict=True):
            offsets = encoded[place]["offset_mapping"]
            spans = (
                ScoredSpan(int(start), int(end), score)
                for (start, end), score in zip(offsets, (own - plain).tolist(), strict=True)
            )
            counted = max(len(own), 1)
            found[place] = ScoredAnswer(tuple(spans), float(-own.sum() / counted), float(-plain.sum() / counted))
    return [found[place] for place in range(len(rows))]


@torch.inference_mode()
def _likelihoods(
    model: Any, rows: Sequence[Sequence[int]], lengths: Sequence[int], padding: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Log likelihoods of the last tokens of each row, (length,) float64, with and without the adapter."""
    batch = left_padded(rows, padding, device_of(model))
    longest = max(lengths)
    wanted = batch["input_ids"][:, -longest:]

    def run() -> list[Tensor]:
        logits = model(**batch, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()
        chosen = logits.log_softmax(dim=-1).gather(-1, wanted[:, :, None])[:, :, 0].double().cpu()
        return [row[longest - length :] for row, length in zip(chosen, lengths, strict=True)]

    teacher = run()
    with model.disable_adapter():
        return teacher, run()
