"""Several rows as one: joined up to the longest row, each with positions of its own, so that none sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from artifacts.errors import FieldError, RequestInvalid
from train.tasks.causal_rows import Example, collate
from train.tasks.rows import IGNORED
from train.tasks.text_batches import device_of, moved

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OPEN = 64
"""Packs that may still take rows at once: finding a place stays cheap however many rows there are."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows behind one another.

    Attributes:
        ids: (length,) token ids.
        labels: (length,) as in the rows, but that the first token of a row, which the row before must not predict, is
            never counted.
        positions: (length,) from 0 in each row: where they begin again, a new row begins.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32]

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> int:
        return int((self.positions == 0).sum())


def pack(examples: Sequence[Example], limit: int) -> tuple[Pack, ...]:
    """Every row once, each into the first of the open packs that has room."""
    done: list[list[Example]] = []
    opened: list[tuple[int, list[Example]]] = []
    for example in examples:
        for place, (room, rows) in enumerate(opened):
            if example.length <= room:
                rows.append(example)
                opened[place] = (room - example.length, rows)
                break
        else:
            if len(opened) == _OPEN:
                fullest = min(range(_OPEN), key=lambda place: opened[place][0])
                done.append(opened.pop(fullest)[1])
            opened.append((limit - example.length, [example]))
    return tuple(_joined(rows) for rows in [*done, *(rows for _, rows in opened)])


def _joined(rows: Sequence[Example]) -> Pack:
    labels = [row.labels.copy() for row in rows]
    for first in labels:
        first[:1] = IGNORED
    return Pack(
        np.concatenate([row.ids for row in rows]),
        np.concatenate(labels),
        np.concatenate([np.arange(row.length, dtype=np.int32) for row in rows]),
    )


def collate_packs(packs: Sequence[Pack], padding: int) -> dict[str, Tensor]:
    """input_ids, position_ids and labels, (packs, longest) each; what fills a pack up counts as a row of its own.

    There is no attention_mask: without one, transformers tells the rows apart by their positions.
    """
    shape = (len(packs), max(found.length for found in packs))
    ids, labels = np.full(shape, padding, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for row, found in enumerate(packs):
        length = found.length
        ids[row, :length], labels[row, :length], positions[row, :length] = found.ids, found.labels, found.positions
        positions[row, length:] = np.arange(shape[1] - length)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
    }


@torch.no_grad()
def check_separate(model: nn.Module, packs: Sequence[Pack], padding: int, tolerance: float) -> None:
    """Refuse a base model whose rows see one another in a pack.

    Args:
        tolerance: allowed difference of a logit, as a share of the largest.

    Raises:
        RequestInvalid: its attention does not go by the positions.
    """
    tried = next((found for found in packs if found.rows > 1), None)
    if tried is None:
        return
    device = device_of(model)
    batch = moved(collate_packs([tried], padding), device)
    del batch["labels"]
    together = model(**batch, use_cache=False).logits[0].float()
    second = int(np.flatnonzero(tried.positions == 0)[1])
    end = int(np.append(np.flatnonzero(tried.positions == 0), tried.length)[2])
    row = Example(tried.ids[second:end], tried.labels[second:end], 0)
    alone_batch = moved(collate([row], padding), device)
    del alone_batch["labels"]
    alone = model(**alone_batch, use_cache=False).logits[0].float()
    difference = float((together[second:end] - alone).abs().max())
    largest = max(1.0, float(alone.abs().max()))
    if not difference <= tolerance * largest:
        problem = (
            "the rows of a pack see one another in this base model: its logits differ by "
            f"{difference:.3g} from those of the row alone"
        )
        raise RequestInvalid(
            f"T{problem[1:]}.",
            hint="Leave task.packing out for this base model.",
            errors=[FieldError("/task/packing", problem)],
        )
