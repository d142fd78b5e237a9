"""The few examples that the owner of an adapter has approved: all that a transfer sees of the task's inputs.

They may be private, so no message holds their text. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from artifacts.errors import FieldError, RequestInvalid

MIN_SEEDS, MAX_SEEDS = 3, 50
MAX_SEED_CHARACTERS = 8000
_POINTER = "/seeds"


def folded(text: str) -> str:
    """What two texts have in common that differ in case and white space only."""
    return " ".join(text.split()).casefold()


def parse_seeds(seeds: Sequence[str]) -> tuple[str, ...]:
    """The seeds without surrounding white space.

    Raises:
        RequestInvalid: fewer than 3 or more than 50, an empty or overlong one, or one that equals another but for case
            and white space.
    """
    if len(seeds) < MIN_SEEDS:
        raise _invalid(f"at least {MIN_SEEDS}", f"Only {len(seeds)} seeds were given.")
    if len(seeds) > MAX_SEEDS:
        raise _invalid(f"at most {MAX_SEEDS}", f"{len(seeds)} seeds were given.")
    problems: list[FieldError] = []
    first: dict[str, int] = {}
    for position, seed in enumerate(seeds):
        key = folded(seed)
        if not key:
            problems.append(FieldError(f"{_POINTER}/{position}", "is empty"))
        elif len(seed) > MAX_SEED_CHARACTERS:
            problems.append(FieldError(f"{_POINTER}/{position}", f"has more than {MAX_SEED_CHARACTERS} characters"))
        elif key in first:
            problems.append(FieldError(f"{_POINTER}/{position}", f"equals seed {first[key]}"))
        first.setdefault(key, position)
    if problems:
        raise RequestInvalid(
            f"{len(problems)} of the {len(seeds)} seeds can not be used.",
            hint="Give 3 to 50 different examples of the task's inputs, without their answers.",
            errors=problems,
        )
    return tuple(seed.strip() for seed in seeds)


def grown_seeds(seeds: Sequence[str], accepted: Sequence[str], key: str, batch: int) -> tuple[str, ...]:
    """As many as the owner gave, drawn from those and from accepted inputs.

    The key, the number of the batch and which texts there are decide what is drawn, and not their order.
    """
    pool = {folded(text): text for text in [*accepted, *seeds]}
    drawn = sorted(pool, key=lambda name: hashlib.sha256(f"{key}:seeds:{batch}:{name}".encode()).digest())
    return tuple(pool[name] for name in drawn[: len(seeds)])


def seeds_digest(seeds: Sequence[str]) -> str:
    """SHA-256 of the seeds in their order, which the generator's prompt keeps."""
    return hashlib.sha256(json.dumps(list(seeds), ensure_ascii=True).encode()).hexdigest()


def _invalid(rule: str, detail: str) -> RequestInvalid:
    return RequestInvalid(
        f"{detail[:-1]}; a transfer takes {rule}.",
        hint="Five are usual; more help where the task is hard to guess from examples.",
        errors=[FieldError(_POINTER, f"seeds: {rule}")],
    )
