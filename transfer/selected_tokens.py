"""The task of TiTok (arXiv:2510.04682): as causal-lm, but a step learns only the tokens of its batch with the highest
scores, and the end of every answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from train.settings import CausalLmTask
from train.tasks.causal_lm import CausalLm
from train.tasks.causal_rows import Example, encode_row
from train.tasks.packing import Pack
from train.tasks.protocol import TaskContext
from train.tasks.rows import IGNORED
from transfer.span_alignment import ScoredSpan, align, keep_highest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPANS = "spans"
"""Column with [start, end, score] of the answer's characters, as the source base's tokenizer cut them."""
ALWAYS = math.inf


@dataclass(frozen=True, slots=True)
class ScoredExample(Example):
    """A row with a score for each token that the loss counts, in their order; the end of the answer has `ALWAYS`."""

    scores: tuple[float, ...] = ()

    def cut(self, limit: int) -> Example:
        """The first `limit` tokens."""
        shorter = Example.cut(self, limit)
        return ScoredExample(shorter.ids, shorter.labels, shorter.answer_start, self.scores[: shorter.counted])


class SelectedTokens(CausalLm):
    """Rows without the column `spans` are learnt whole."""

    def __init__(self, settings: CausalLmTask, context: TaskContext, share: float) -> None:
        super().__init__(settings, context)
        self._share = share

    def encode(self, row: Mapping[str, Any], cut: int | None) -> Example:
        example = encode_row(row, self.tokenizer, self.settings)
        scores = token_scores(row, example, self.tokenizer)
        scored = ScoredExample(example.ids, example.labels, example.answer_start, scores)
        return scored if cut is None else scored.cut(cut)

    def collate(self, examples: Sequence[Example | Pack]) -> dict[str, torch.Tensor]:
        batch = super().collate(examples)
        scored = [
            (place, score)
            for place, score in enumerate(score for example in examples for score in _scores(example))
            if score != ALWAYS
        ]
        kept = keep_highest([score for _, score in scored], self._share)
        left_out = {place for number, (place, _) in enumerate(scored) if number not in kept}
        counted = (batch["labels"] != IGNORED).nonzero()
        for place in left_out:
            row, column = counted[place].tolist()
            batch["labels"][row, column] = IGNORED
        return batch


def _scores(example: Example | Pack) -> tuple[float, ...]:
    assert isinstance(example, ScoredExample)
    return example.scores


def token_scores(row: Mapping[str, Any], example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[float, ...]:
    """A score for each counted token of the row."""
    spans = row.get(SPANS)
    if not spans:
        return (ALWAYS,) * int((example.labels != IGNORED).sum())
    answer, start = _answer(row, tokenizer)
    if start is None:
        offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        places = [(int(first), int(last)) for first, last in offsets]
    else:
        text, begin = start
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        counted = (example.labels != IGNORED).nonzero()[0].tolist()
        places = [(int(encoded[place][0]) - begin, int(encoded[place][1]) - begin) for place in counted]
    inside = [place for place in places if place[1] <= len(answer)]
    aligned = align([ScoredSpan(int(first), int(last), float(score)) for first, last, score in spans], inside)
    more = int((example.labels != IGNORED).sum()) - len(inside)
    return (*aligned, *(ALWAYS,) * more)


def _answer(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[str, int] | None]:
    """The answer's text; of a chat also the whole text, and where the answer begins in it."""
    messages = row.get("messages")
    if messages is None:
        return str(row["completion"]), None
    text = str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    before = str(tokenizer.apply_chat_template(list(messages)[:-1], tokenize=False, add_generation_prompt=True))
    return str(messages[-1]["content"]), (text, len(before))
