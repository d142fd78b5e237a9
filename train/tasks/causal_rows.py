"""Rows of the task causal-lm: token ids with labels on what the model has to say, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from train.settings import CausalLmTask
from train.tasks.rows import IGNORED, RowProblemError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens.

    Attributes:
        ids: (length,) token ids.
        labels: (length,) the same ids where the loss counts, `IGNORED` elsewhere.
        answer_start: where the last answer begins: what a greedy answer starts from.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    answer_start: int

    @property
    def counted(self) -> int:
        """Tokens that the loss counts; the first of a row is never predicted."""
        return int((self.labels[1:] != IGNORED).sum())

    @property
    def length(self) -> int:
        return len(self.ids)

    def cut(self, limit: int) -> Example:
        """The first `limit` tokens."""
        return Example(self.ids[:limit], self.labels[:limit], min(self.answer_start, limit))


def encode_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, task: CausalLmTask, limit: int | None = None
) -> Example:
    """Encode one row by the columns that it has, cut at the limit. Raises RowProblemError."""
    example = _encode(row, tokenizer, task)
    return example if limit is None else example.cut(limit)


def _encode(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, task: CausalLmTask) -> Example:
    if row.get(task.messages_column) is not None:
        return _encode_chat(row[task.messages_column], tokenizer)
    if row.get(task.completion_column) is not None:
        return _encode_pair(row.get(task.prompt_column), row[task.completion_column], tokenizer)
    if row.get(task.text_column) is not None:
        text = row[task.text_column]
        if not isinstance(text, str):
            raise RowProblemError(f"{task.text_column} is no text")
        ids = [*tokenizer(text)["input_ids"], *_end(tokenizer)]
        return _example(ids, list(ids), 0)
    raise RowProblemError(
        f"has none of the columns {task.messages_column}, {task.completion_column} and {task.text_column}"
    )


def _encode_pair(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Prompt and completion are tokenised apart, so that the same prompt has the same tokens when it is answered."""
    if not isinstance(completion, str) or not isinstance(prompt, str | None):
        raise RowProblemError("prompt and completion are texts")
    given = list(tokenizer(prompt or "")["input_ids"])
    said = [*tokenizer(completion, add_special_tokens=False)["input_ids"], *_end(tokenizer)]
    return _example([*given, *said], [*[IGNORED] * len(given), *said], len(given))


def _encode_chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The whole chat through the tokenizer's template; labels on what stands in the assistant's turns."""
    if tokenizer.chat_template is None:
        raise RowProblemError("is a chat, and the base model's tokenizer has no chat template")
    if not isinstance(messages, Sequence) or not messages or not all(_is_message(item) for item in messages):
        raise RowProblemError("messages is a list of {role, content}, both texts")
    text = _rendered(messages, tokenizer)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:number], tokenizer, opened=True) if number else ""
        through = _rendered(messages[: number + 1], tokenizer)
        if not text.startswith(through.rstrip()) or not through.startswith(before):
            raise RowProblemError("the chat template writes a turn in another way when others follow it")
        spans.append((len(before), len(through)))
    if not spans:
        raise RowProblemError("the chat has no turn of the assistant")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels, answer_start = list(encoded["input_ids"]), [], len(encoded["input_ids"])
    for position, (token, (start, end)) in enumerate(zip(ids, encoded["offset_mapping"], strict=True)):
        inside = end > start and any(first <= start and end <= last for first, last in spans)
        labels.append(token if inside else IGNORED)
        if inside and start >= spans[-1][0]:
            answer_start = min(answer_start, position)
    return _example(ids, labels, answer_start)


def _rendered(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, opened: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened))
    except (TemplateError, ValueError, TypeError) as error:
        raise RowProblemError(f"the chat template refuses it: {error}") from error


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _example(ids: Sequence[int], labels: Sequence[int], answer_start: int) -> Example:
    return Example(np.array(ids, np.int32), np.array(labels, np.int32), answer_start)


def collate(examples: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """A batch, padded at the end: input_ids, attention_mask and labels, each (rows, longest)."""
    longest = max(len(example.ids) for example in examples)
    ids = np.full((len(examples), longest), padding, np.int64)
    labels = np.full((len(examples), longest), IGNORED, np.int64)
    mask = np.zeros((len(examples), longest), np.int64)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length], labels[row, :length], mask[row, :length] = example.ids, example.labels, 1
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }
