"""Generated inputs, one per index: which are screened out before a filter sees them. Imports no torch."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from transfer.seeds import folded

Finish = Literal["stop", "end", "length"]
"""How a generated text ended: at the mark of the next item, at the model's own end, or at the longest length."""
Screening = Literal["passed", "truncated", "malformed", "duplicate", "seed"]
_ALLOWED_CONTROLS = "\n\t"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the generator wrote under an index, which alone decides the random numbers that it was written with."""

    index: int
    text: str
    finish: Finish


@dataclass(frozen=True, slots=True)
class Screened:
    """A candidate with the verdict of the screening; `text` is clean."""

    index: int
    text: str
    verdict: Screening


def candidate_key(key: str, index: int) -> int:
    """128 bits that seed the random numbers of a candidate: SHA-256 of the job's key and the index."""
    return int.from_bytes(hashlib.sha256(f"{key}:{index}".encode()).digest()[:16], "little")


def clean(text: str) -> str:
    """The text in Unicode's composed form, without white space at its ends and at those of its lines."""
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


def is_malformed(text: str) -> bool:
    """Whether a clean text is nothing that could be an input: empty, or with characters that stand for no text."""
    if not any(character.isalnum() for character in text):
        return True
    return any(
        character == "\N{REPLACEMENT CHARACTER}"
        or (unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn") and character not in _ALLOWED_CONTROLS)
        for character in text
    )


def screen(candidates: Iterable[Candidate], seeds: Sequence[str]) -> list[Screened]:
    """The candidates in the order of their indices, each with its verdict.

    Of equal texts (but for case and white space) the one with the lowest index passes, in whatever order they arrive.

    Raises:
        ValueError: two candidates have one index, or an index below the largest is missing: what passes would depend on
            what has arrived.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.index)
    if [candidate.index for candidate in ordered] != list(range(len(ordered))):
        raise ValueError("the candidates are not numbered from 0 without gaps")
    known_seeds = {folded(seed) for seed in seeds}
    seen: set[str] = set()
    return [_screened(candidate, known_seeds, seen) for candidate in ordered]


def _screened(candidate: Candidate, seeds: set[str], seen: set[str]) -> Screened:
    text = clean(candidate.text)
    key = folded(text)
    verdict: Screening = "passed"
    if candidate.finish == "length":
        verdict = "truncated"
    elif is_malformed(text):
        verdict = "malformed"
    elif key in seeds:
        verdict = "seed"
    elif key in seen:
        verdict = "duplicate"
    else:
        seen.add(key)
    return Screened(candidate.index, text, verdict)


def first_accepted(screened: Sequence[Screened], accepted: set[int], wanted: int) -> list[Screened]:
    """The first `wanted` of the passed candidates whose index is accepted, by index."""
    kept = [item for item in screened if item.verdict == "passed" and item.index in accepted]
    return sorted(kept, key=lambda item: item.index)[:wanted]
