"""The gate: a transfer that makes things worse is not published. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transfer.gate_settings import GateSettings
from transfer.statistics import Rate, bootstrap_lead, wilson

__all__ = ["BASE", "SOURCE", "TRANSFERRED", "ArmScore", "GateReport", "GateSettings", "Verdict", "judge"]

Verdict = Literal["pass", "hold", "fail"]
SOURCE, BASE, TRANSFERRED = "source", "target_base", "transferred"
"""Names of the arms that the gate compares."""


@dataclass(frozen=True, slots=True)
class ArmScore:
    """One model on the measured items: 1.0 for each that it answered rightly, else 0.0.

    Attributes:
        ended: answers that came to an end.
        distinct: different answers.
    """

    outcomes: tuple[float, ...]
    ended: int
    distinct: int

    @property
    def score(self) -> float:
        """The share of right answers."""
        return sum(self.outcomes) / len(self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        found = wilson(round(sum(self.outcomes)), len(self.outcomes))
        assert isinstance(found, Rate)
        return {
            "score": found.to_dict(),
            "items": len(self.outcomes),
            "outcomes": [int(outcome) for outcome in self.outcomes],
            "end_rate": self.ended / len(self.outcomes),
            "distinct_answers": self.distinct,
        }


@dataclass(frozen=True, slots=True)
class GateReport:
    """The verdict and what it rests on.

    Attributes:
        lead: S_t − max(S_source, S_target_base), with the 95 % interval.
        negative_flips: items that the source answered rightly and the transferred adapter did not.
        reason: a sentence.
    """

    verdict: Verdict
    lead: float
    low: float
    high: float
    epsilon: float
    items: int
    negative_flips: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(arms: Mapping[str, ArmScore], settings: GateSettings, seed: int) -> GateReport:
    """Three zones: the interval of the lead lies above −ε (pass), below it (fail), or on both sides (hold).

    A gate of two zones decides wrongly far too often on a few hundred items (UpgradeBench, arXiv:2608.20918).

    Args:
        arms: `SOURCE`, `BASE` and `TRANSFERRED` at least, on the same items.
    """
    own, source, base = arms[TRANSFERRED].outcomes, arms[SOURCE].outcomes, arms[BASE].outcomes
    lead, low, high = bootstrap_lead(own, [source, base], settings.resamples, seed)
    flips = sum(1 for before, after in zip(source, own, strict=True) if before > after)
    border = -settings.epsilon
    if len(own) < settings.minimum_items:
        verdict: Verdict = "hold"
        reason = f"{len(own)} items are fewer than the {settings.minimum_items} that may decide."
    elif low >= border:
        verdict, reason = "pass", "The whole interval is at or above −ε."
    elif high < border:
        verdict, reason = "fail", "The whole interval is below −ε."
    else:
        verdict, reason = "hold", "The interval has −ε in it: measure more items, or decide by hand."
    return GateReport(verdict, lead, low, high, settings.epsilon, len(own), flips, reason)
