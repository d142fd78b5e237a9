"""The rows of a dataset as examples: split by the hash of each row, encoded for the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.causal_lm import Encoded, Example, check_enough, encode_rows
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

    def rows() -> Iterator[tuple[int, Mapping[str, Any]]]:
        yield from enumerate(iter_rows(file.path, file.format), 1)

    fraction = evaluation.validation_fraction
    held_out = (
        {number for number, row in rows() if split_of(dict(row), fraction) == "validation"} if fraction else set()
    )
    encoded = encode_rows(((number, row) for number, row in rows() if number not in held_out), tokenizer, task, limit)
    check_enough(encoded, "training")
    measured = encode_rows(((number, row) for number, row in rows() if number in held_out), tokenizer, task, limit)
    if fraction:
        check_enough(measured, "validation")
    report = {
        "training_rows": len(encoded.examples),
        "validation_rows": len(measured.examples),
        "measured_rows": min(len(measured.examples), evaluation.max_rows),
        "training_tokens": sum(len(example.ids) for example in encoded.examples),
        "counted_tokens": sum(example.counted for example in encoded.examples),
        "longest_row": max(len(example.ids) for example in encoded.examples),
        "row_limit": limit,
        "dropped_rows": _listed(encoded, measured, "dropped"),
        "cut_rows": _listed(encoded, measured, "cut"),
    }
    return Examples(encoded.examples, measured.examples[: evaluation.max_rows], report)


def _listed(first: Encoded, second: Encoded, what: str) -> dict[str, Any]:
    numbers = sorted((*getattr(first, what), *getattr(second, what)))
    return {"count": len(numbers), "first": numbers[:20]}
