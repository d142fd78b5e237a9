"""The task token-classification: a tag for every token of a text that comes in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from train.settings import TokenClassificationTask
from train.tasks.classification import ClassExample, RowClassification
from train.tasks.labels import Label, label_of
from train.tasks.rows import IGNORED, RowProblemError


class TokenClassification(RowClassification[TokenClassificationTask]):
    """AutoModelForTokenClassification. A token's tag counts at the first of the pieces that it is cut into."""

    peft_type: ClassVar[str | None] = "TOKEN_CLS"

    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def labels_in(self, row: Mapping[str, Any]) -> Sequence[Label]:
        name = self.settings.tags_column
        tags = row.get(name)
        if not isinstance(tags, list):
            raise RowProblemError(f"`{name}` is no list")
        return [label_of(tag, name) for tag in tags]

    def encode(self, row: Mapping[str, Any], limit: int | None) -> ClassExample:
        tokens, tags = self._tokens(row), self.labels_in(row)
        if len(tokens) != len(tags):
            raise RowProblemError(f"there are {len(tokens)} tokens and {len(tags)} tags")
        places = [self.labels.place(tag) for tag in tags]
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        encoded = self.tokenizer(tokens, is_split_into_words=True, **cut)
        kinds = encoded.get("token_type_ids")
        labels, last = [], None
        for word in encoded.word_ids():
            labels.append(IGNORED if word is None or word == last else places[word])
            last = word
        if limit is None:
            self._check_all(tokens, encoded.word_ids())
        return ClassExample(
            np.array(encoded["input_ids"], np.int32),
            None if kinds is None else np.array(kinds, np.int32),
            np.array(labels, np.int32),
        )

    def _tokens(self, row: Mapping[str, Any]) -> list[str]:
        name = self.settings.tokens_column
        tokens = row.get(name)
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise RowProblemError(f"`{name}` is no list of text")
        if not tokens:
            raise RowProblemError(f"`{name}` is empty")
        return tokens

    def _check_all(self, tokens: Sequence[str], words: Sequence[int | None]) -> None:
        """A token of which the tokenizer leaves nothing would silently lose its tag."""
        lost = sorted(set(range(len(tokens))) - set(words))
        if lost:
            raise RowProblemError(f"token {lost[0] + 1}, {tokens[lost[0]][:40]!r}, is nothing to the base's tokenizer")

    def collate_labels(self, examples: Sequence[ClassExample], shape: tuple[int, int]) -> Tensor:
        labels = np.full(shape, IGNORED, np.int64)
        for row, example in enumerate(examples):
            labels[row, : example.length] = example.labels
        return torch.from_numpy(labels)
