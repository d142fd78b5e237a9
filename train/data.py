"""The rows of a dataset as examples: split by the hash of each row, encoded for the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.causal_lm import Example, check_enough, encode_rows
from train.rows import Format, iter_rows
from train.settings import CausalLmTask, EvaluationSettings
from train.splits import split_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class DataFile:
    """A dataset's file."""

    path: Path
    format: Format


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on, what is measured on, and what the report says of both."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    report: dict[str, Any]


def read_examples(
    file: DataFile,
    tokenizer: PreTrainedTokenizerBase,
    task: CausalLmTask,
    evaluation: EvaluationSettings,
    limit: int,
) -> Examples:
    """Read, split and encode all rows.

    Raises:
        FileBroken: rows that the task can not use (`train.causal_lm.encode_rows`).
        RequestInvalid: no row is left to train on, or none to measure with although a fraction was asked for.
    """

    fraction = evaluation.validation_fraction
    held_out: set[int] = set()

    def rows() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, row in enumerate(iter_rows(file.path, file.format), 1):
            if split_of(row, fraction) == "validation":
                held_out.add(number)
            yield number, row

    encoded = encode_rows(rows(), tokenizer, task, limit)
    pairs = list(zip(encoded.numbers, encoded.examples, strict=True))
    train = tuple(example for number, example in pairs if number not in held_out)
    validation = tuple(example for number, example in pairs if number in held_out)
    check_enough(train, "training")
    if fraction:
        check_enough(validation, "validation")
    report = {
        "training_rows": len(train),
        "validation_rows": len(validation),
        "measured_rows": min(len(validation), evaluation.max_rows),
        "training_tokens": sum(len(example.ids) for example in train),
        "counted_tokens": sum(example.counted for example in train),
        "longest_row": max(len(example.ids) for example in train),
        "row_limit": limit,
        "dropped_rows": _listed(encoded.dropped),
        "cut_rows": _listed(encoded.cut),
    }
    return Examples(train, validation[: evaluation.max_rows], report)


def _listed(numbers: Sequence[int]) -> dict[str, Any]:
    return {"count": len(numbers), "first": list(numbers[:20])}
