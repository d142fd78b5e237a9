"""The task sequence-classification: one label for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from train.settings import SequenceClassificationTask
from train.tasks.classification import ClassExample, RowClassification
from train.tasks.labels import Label, label_of
from train.tasks.rows import RowProblemError

PAIR_COLUMN = "text_pair"
"""The second text of the rows that have one, if the task names no column."""


class SequenceClassification(RowClassification[SequenceClassificationTask]):
    """AutoModelForSequenceClassification. A causal model gives the text's last token to the head."""

    peft_type: ClassVar[str | None] = "SEQ_CLS"

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def labels_in(self, row: Mapping[str, Any]) -> Sequence[Label]:
        return [label_of(row.get(self.settings.label_column), self.settings.label_column)]

    def encode(self, row: Mapping[str, Any], limit: int | None) -> ClassExample:
        first = self._text(row, self.settings.text_column)
        pair = self.settings.text_pair_column
        second = self._text(row, pair) if pair is not None else row.get(PAIR_COLUMN) or None
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        encoded = self.tokenizer(first, second, **cut)
        kinds = encoded.get("token_type_ids")
        label = self.labels.place(label_of(row.get(self.settings.label_column), self.settings.label_column))
        return ClassExample(
            np.array(encoded["input_ids"], np.int32),
            None if kinds is None else np.array(kinds, np.int32),
            np.array([label], np.int32),
        )

    def _text(self, row: Mapping[str, Any], column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str):
            raise RowProblemError(f"`{column}` is no text")
        if not value:
            raise RowProblemError(f"`{column}` is empty")
        return value

    def collate_labels(self, examples: Sequence[ClassExample], shape: tuple[int, int]) -> Tensor:
        return torch.from_numpy(np.concatenate([example.labels for example in examples]).astype(np.int64))
