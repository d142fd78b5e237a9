"""Stage label: what the source adapter answers to the inputs that were kept, greedily and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from artifacts.errors import FieldError, TransferRefused
from transfer.candidates import Finish, Screened
from transfer.decoding import Limits, answer_batch, batches_by_length, text_of
from transfer.prompts import PromptFormat
from transfer.synthetic import SyntheticRow, SyntheticSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Label:
    """The answer to the input of an index; `finish` length means that it never came to an end."""

    index: int
    x: str
    answer: str
    finish: Finish


class Labeller:
    """Answers with one model; a batch is the unit that is written, kept and redone, settled by the inputs alone."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        *,
        max_new_tokens: int,
        stop: str | None,
        batch_size: int,
    ) -> None:
        self._model, self._tokenizer, self._format = model, tokenizer, prompt_format
        self._limits = Limits.of(model, tokenizer, max_new_tokens, stop)
        self._batch_size = batch_size

    def batches(self, items: Sequence[Screened]) -> list[list[Screened]]:
        """The items in batches of prompts of similar length."""
        prompts = [self._format.encode(item.text, self._tokenizer) for item in items]
        return [[items[place] for place in places] for places in batches_by_length(prompts, self._batch_size)]

    def label(self, batch: Sequence[Screened]) -> list[Label]:
        """The answers of one batch of `batches`."""
        prompts = [self._format.encode(item.text, self._tokenizer) for item in batch]
        written = answer_batch(self._model, self._tokenizer, prompts, self._limits)
        return [
            Label(item.index, item.text, found.text, found.finish) for item, found in zip(batch, written, strict=True)
        ]

    def label_all(self, items: Sequence[Screened]) -> list[Label]:
        """The answers to all, by index."""
        found = [label for batch in self.batches(items) for label in self.label(batch)]
        return sorted(found, key=lambda label: label.index)


@dataclass(frozen=True, slots=True)
class LabelReport:
    """What became of the answers: counts only."""

    labelled: int
    endless: int
    empty: int
    unreadable: int
    kept: int
    distinct: int

    @property
    def end_rate(self) -> float:
        """The share of answers that came to an end."""
        return 1.0 - self.endless / self.labelled if self.labelled else 0.0


def synthetic_set(labels: Sequence[Label], target: PreTrainedTokenizerBase) -> tuple[SyntheticSet, LabelReport]:
    """The rows that can be learnt from.

    Left out are answers that did not end (they would teach the target not to end either), empty ones, and those whose
    text the target's tokenizer does not give back as it was.

    Raises:
        TransferRefused: no row is left.
    """
    ordered = sorted(labels, key=lambda label: label.index)
    ended = [label for label in ordered if label.finish != "length"]
    said = [label for label in ended if label.answer.strip()]
    readable = [label for label in said if is_readable(label.answer, target)]
    made = SyntheticSet(tuple(SyntheticRow(label.index, label.x, label.answer) for label in readable))
    report = LabelReport(
        labelled=len(ordered),
        endless=len(ordered) - len(ended),
        empty=len(ended) - len(said),
        unreadable=len(said) - len(readable),
        kept=len(readable),
        distinct=made.distinct_answers,
    )
    if not made.rows:
        raise TransferRefused(
            f"None of the {len(ordered)} answers of the source adapter can be learnt from: {report.endless} did not "
            f"end, {report.empty} were empty.",
            hint="Allow longer answers (answer_tokens), or name the text that ends one (answer_stop).",
            errors=[FieldError("/parameters/answer_tokens", "no answer came to an end")],
        )
    return made, report


def is_readable(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer gives the text back as it was."""
    return text_of(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]) == text
