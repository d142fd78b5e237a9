"""Scores of the tokens of one tokenizer, carried over to those of another by the text that they stand for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ScoredSpan(NamedTuple):
    """A token's characters in a text, from `start` to before `end`, and its score."""

    start: int
    end: int
    score: float


def align(source: Sequence[ScoredSpan], target: Sequence[tuple[int, int]]) -> list[float]:
    """The score of every target span (arXiv:2510.04682, section 3.3).

    Two pointers run over both cuts of the text; where both have a border, a group ends. In a group of one source span
    its score is copied, in one of several their mean is taken, for every target span of the group.

    Args:
        source: in the order of the text; tokens of one character's bytes may share its span.
        target: (start, end) likewise.

    Returns:
        As many scores as there are target spans; 0 where the source has no text.
    """
    scores: list[float] = []
    i = j = 0
    while j < len(target):
        first_i, first_j = i, j
        end = target[j][1]
        j += 1
        grown = True
        while grown:
            grown = False
            while i < len(source) and source[i].start < end:
                end, i, grown = max(end, source[i].end), i + 1, True
            while j < len(target) and target[j][0] < end:
                end, j, grown = max(end, target[j][1]), j + 1, True
        group = [span.score for span in source[first_i:i]]
        mean = sum(group) / len(group) if group else 0.0
        scores.extend([mean] * (j - first_j))
    return scores


def keep_highest(scores: Sequence[float], share: float) -> set[int]:
    """Places of the given share of the highest scores, rounded up; of equal scores the earlier one."""
    wanted = -int(-len(scores) * share // 1)
    return set(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:wanted])
