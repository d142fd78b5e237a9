"""The synthetic set: inputs that a generator invented, with the answers of the source adapter. Text only, so that any
tokenizer can read it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.errors import FileBroken
from transfer.prompts import PromptFormat


@dataclass(frozen=True, slots=True)
class SyntheticRow:
    """An input of the index with which it was generated, and the answer to it."""

    index: int
    x: str
    answer: str


@dataclass(frozen=True, slots=True)
class SyntheticSet:
    """Rows in the order of their indices."""

    rows: tuple[SyntheticRow, ...]

    def to_bytes(self) -> bytes:
        """JSON Lines; equal sets give equal bytes."""
        lines = (
            json.dumps({"i": row.index, "x": row.x, "y": row.answer}, ensure_ascii=True, separators=(",", ":"))
            for row in self.rows
        )
        return "".join(f"{line}\n" for line in lines).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> SyntheticSet:
        """What `to_bytes` gave. Raises FileBroken for anything else."""
        try:
            found = [json.loads(line) for line in data.decode().splitlines()]
            rows = tuple(SyntheticRow(int(row["i"]), str(row["x"]), str(row["y"])) for row in found)
        except (ValueError, KeyError, TypeError) as error:
            raise FileBroken(f"The synthetic set can not be read: {type(error).__name__}.") from error
        return cls(rows)

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def training_rows(self, prompt_format: PromptFormat) -> bytes:
        """The rows of a dataset of the task causal-lm, as JSON Lines."""
        made = (prompt_format.row(row.x, row.answer) for row in self.rows)
        return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in made).encode()

    @property
    def distinct_answers(self) -> int:
        """How many different answers there are: few mean that the teacher's answers have collapsed."""
        return len({row.answer.strip() for row in self.rows})


def held_out(rows: Sequence[SyntheticRow], count: int) -> tuple[tuple[SyntheticRow, ...], tuple[SyntheticRow, ...]]:
    """(rows to train on, the last `count` rows by index, to measure fidelity with)."""
    ordered = sorted(rows, key=lambda row: row.index)
    cut = len(ordered) - count
    return tuple(ordered[:cut]), tuple(ordered[cut:])
