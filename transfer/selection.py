"""From scores to the inputs that are kept: by a threshold, or the best ones. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from artifacts.errors import FieldError, TransferStarved
from transfer.candidates import Screened, Screening
from transfer.statistics import wilson

OnStarved = Literal["fail", "top_n"]


@dataclass(frozen=True, slots=True)
class Selection:
    """The inputs that are kept, by index, and how that came about.

    Attributes:
        accepted: inputs above the threshold among those that were scored.
        starved: fewer than wanted; the rest are the next best.
    """

    kept: tuple[Screened, ...]
    scored: int
    accepted: int
    accepted_at_zero: int
    verdicts: Mapping[Screening, int]
    starved: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Counts only: neither texts nor scores leave the transfer."""
        rates = {
            name: None if rate is None else rate.to_dict()
            for name, rate in (
                ("acceptance", wilson(self.accepted, self.scored)),
                ("acceptance_at_zero", wilson(self.accepted_at_zero, self.scored)),
            )
        }
        candidates = sum(self.verdicts.values())
        return {
            "candidates": candidates,
            "screening": dict(self.verdicts),
            "unique_rate": self.verdicts["passed"] / candidates if candidates else None,
            "scored": self.scored,
            "accepted": self.accepted,
            "kept": len(self.kept),
            "starved": self.starved,
            **rates,
        }


def select(
    screened: Sequence[Screened],
    scores: Mapping[int, float],
    wanted: int,
    *,
    threshold: float,
    on_starved: OnStarved,
) -> Selection:
    """The first `wanted` inputs by index whose score is above the threshold; a score equal to it is not.

    Args:
        scores: by index, of every candidate that passed the screening.

    Raises:
        TransferStarved: there are fewer, and `on_starved` is fail; or fewer passed the screening at all.
    """
    passed = [item for item in screened if item.verdict == "passed"]
    accepted = [item for item in passed if scores[item.index] > threshold]
    if len(accepted) >= wanted:
        return _selection(screened, scores, accepted[:wanted], len(accepted))
    if on_starved == "fail" or len(passed) < wanted:
        raise _starved(len(screened), len(passed), len(accepted), wanted)
    return _selection(screened, scores, _best(passed, scores, wanted), len(accepted), starved=True)


def select_best(screened: Sequence[Screened], scores: Mapping[int, float], wanted: int) -> Selection:
    """The `wanted` inputs with the largest scores, by index; of equal scores the lower index.

    Raises:
        TransferStarved: fewer passed the screening.
    """
    passed = [item for item in screened if item.verdict == "passed"]
    if len(passed) < wanted:
        raise _starved(len(screened), len(passed), len(passed), wanted)
    return _selection(screened, scores, _best(passed, scores, wanted), len(passed))


def _best(passed: Sequence[Screened], scores: Mapping[int, float], wanted: int) -> list[Screened]:
    best = sorted(passed, key=lambda item: (-scores[item.index], item.index))[:wanted]
    return sorted(best, key=lambda item: item.index)


def _selection(
    screened: Sequence[Screened],
    scores: Mapping[int, float],
    kept: Sequence[Screened],
    accepted: int,
    starved: bool = False,
) -> Selection:
    verdicts: dict[Screening, int] = dict.fromkeys(("passed", "truncated", "malformed", "duplicate", "seed"), 0)
    for item in screened:
        verdicts[item.verdict] += 1
    at_zero = sum(scores[item.index] > 0 for item in screened if item.verdict == "passed")
    return Selection(tuple(kept), verdicts["passed"], accepted, at_zero, verdicts, starved)


def _starved(candidates: int, passed: int, accepted: int, wanted: int) -> TransferStarved:
    return TransferStarved(
        f"Of {candidates} generated inputs {passed} could be used and {accepted} were accepted; {wanted} are wanted.",
        hint="Give more or more typical seeds, raise max_candidates, or set on_starved to top_n, which takes the best "
        "ones and marks the adapter.",
        errors=[FieldError("/parameters/max_candidates", f"gave {accepted} of {wanted} inputs")],
    )
