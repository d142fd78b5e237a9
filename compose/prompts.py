"""The words: one prompt per branch, and where each concept's tokens stand in it. Imports no torch.

Positions are computed by tokenising (arXiv:2403.19776 has them written by hand): the pieces of a word are looked
for in the pieces of the prompt, so that words of several pieces count with all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.errors import ComposeRefused, FieldError
from compose.request import Concept


@dataclass(frozen=True, slots=True)
class ScenePrompts:
    """The request's prompt in the forms that methods need.

    Attributes:
        plain: with no trigger.
        full: with every trigger before its noun.
        single: for each concept, with its own trigger only.
    """

    plain: str
    full: str
    single: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Token positions, 0 being the start token.

    Attributes:
        groups: [concept][branch] → the concept's tokens; branch 0 is the base, branch i has concept i's trigger.
        mask_tokens: [branch] → the tokens whose maps make the branch's mask; none for the base.
    """

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    mask_tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Characters of the prompt that a concept takes: from its trigger, if that is there, to its noun."""

    concept: int
    start: int
    noun: int


def scene_prompts(prompt: str, concepts: Sequence[Concept]) -> ScenePrompts:
    """Put triggers before nouns, or take them away.

    Two concepts may have one noun only if the prompt has it as often: the first concept is the first of them.

    Raises:
        ComposeRefused: a noun is not in the prompt, or a trigger is, but not before its noun.
    """
    places = _places(prompt, concepts)
    everyone = set(range(len(concepts)))
    plain = _written(prompt, places, concepts, set())
    _check_triggers(plain, concepts)
    return ScenePrompts(
        plain,
        _written(prompt, places, concepts, everyone),
        tuple(_written(prompt, places, concepts, {index}) for index in sorted(everyone)),
    )


def _occurrences(text: str, words: str) -> list[re.Match[str]]:
    pieces = [re.escape(word) for word in words.split()]
    return list(re.finditer(r"(?<!\w)" + r"\s+".join(pieces) + r"(?!\w)", text, re.IGNORECASE)) if pieces else []


def _places(prompt: str, concepts: Sequence[Concept]) -> list[_Place]:
    """In the order of the prompt. Longer nouns choose first, so that "hot dog" is no dog."""
    taken: list[tuple[int, int]] = []
    found = []
    order = sorted(range(len(concepts)), key=lambda index: (-len(concepts[index].noun), index))
    for index in order:
        noun, trigger = concepts[index].noun, concepts[index].trigger
        free = [
            match
            for match in _occurrences(prompt, noun)
            if all(match.end() <= start or match.start() >= stop for start, stop in taken)
        ]
        # where the prompt says which one it is, by the trigger before it, that is the one
        own = [match for match in free if _trigger_before(prompt, match.start(), trigger) is not None]
        if not free:
            raise _noun_missing(prompt, concepts, index)
        match = (own or free)[0]
        before = _trigger_before(prompt, match.start(), trigger)
        start = match.start() if before is None else before
        taken.append((match.start(), match.end()))
        found.append(_Place(index, start, match.start()))
    return sorted(found, key=lambda place: place.noun)


def _trigger_before(prompt: str, position: int, trigger: str) -> int | None:
    """Where the trigger starts that ends right before a position."""
    for match in _occurrences(prompt[:position], trigger):
        if not prompt[match.end() : position].strip():
            return match.start()
    return None


def _noun_missing(prompt: str, concepts: Sequence[Concept], index: int) -> ComposeRefused:
    noun = concepts[index].noun
    twins = [other for other, concept in enumerate(concepts) if concept.noun.lower() == noun.lower() and other != index]
    if twins and _occurrences(prompt, noun):
        message = (
            f"{len(twins) + 1} concepts have the noun {noun!r}, but the prompt does not have it as often: "
            "their words could not be told apart"
        )
    else:
        message = f"the noun {noun!r} is not in the prompt {prompt[:200]!r}"
    return ComposeRefused(
        f"Concept {index + 1}: {message}.",
        hint="Write every concept's noun in the prompt, each its own.",
        errors=[FieldError(f"/concepts/{index}/noun", message)],
    )


def _check_triggers(plain: str, concepts: Sequence[Concept]) -> None:
    """What is left of a trigger in the plain prompt stands somewhere else."""
    for index, concept in enumerate(concepts):
        if concept.trigger and _occurrences(plain, concept.trigger):
            message = f"the trigger {concept.trigger!r} is in the prompt, but not before its noun {concept.noun!r}"
            raise ComposeRefused(
                f"Concept {index + 1}: {message}.",
                hint="Write it directly before the noun, or leave it out: it is put there.",
                errors=[FieldError(f"/concepts/{index}/trigger", message)],
            )


def _written(prompt: str, places: Sequence[_Place], concepts: Sequence[Concept], having: set[int]) -> str:
    text, end = "", 0
    for place in places:
        text += prompt[end : place.start]
        trigger = concepts[place.concept].trigger
        text += f"{trigger} " if place.concept in having and trigger else ""
        end = place.noun
    return text + prompt[end:]


def prompt_ids(tokenizer: Any, prompt: str, pointer: str, limit: int | None = None) -> list[int]:
    """The prompt's tokens with start and end.

    Raises:
        ComposeRefused: they are more than the tokenizer or the text encoder takes, so that the end would be lost.
    """
    ids: list[int] = list(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    most = min(int(tokenizer.model_max_length), limit or int(tokenizer.model_max_length))
    if len(ids) > most:
        lost = tokenizer.decode(ids[most - 1 : -1]).strip()
        raise ComposeRefused(
            f"The prompt {prompt[:80]!r} has {len(ids)} tokens with start and end; the text encoder takes {most}.",
            hint=f"Shorten it: {lost[:80]!r} would be cut off.",
            errors=[FieldError(pointer, f"{len(ids)} tokens, more than {most}; {lost[:80]!r} would be cut off")],
        )
    return ids


def token_table(
    tokenizer: Any,
    prompts: Sequence[str],
    concepts: Sequence[Concept],
    pointers: Sequence[str],
    limit: int | None = None,
) -> TokenTable:
    """Where each concept's tokens are in each branch's prompt.

    Args:
        prompts: of the base branch, then of each concept's own branch.
        pointers: where each of them stands in the request.

    Raises:
        ComposeRefused: a noun, or in its own branch a trigger, is not in a prompt, or a prompt is too long.
    """
    ids = [prompt_ids(tokenizer, prompt, pointer, limit) for prompt, pointer in zip(prompts, pointers, strict=True)]
    groups: list[list[tuple[int, ...]]] = []
    for index, concept in enumerate(concepts):
        row = []
        for branch, prompt in enumerate(prompts):
            own = concept.trigger if branch == index + 1 else ""
            # which of several equal nouns: as many as precede it among the concepts, in the prompt's order
            order = sum(other.noun.lower() == concept.noun.lower() for other in concepts[:index])
            found = _positions(tokenizer, ids[branch], concept.noun, own, order)
            if found is None:
                raise _not_found(index, concept, own, prompt, pointers[branch])
            row.append(found)
        groups.append(row)
    masks = ((), *(groups[index][index + 1] for index in range(len(concepts))))
    return TokenTable(tuple(map(tuple, groups)), masks)


def full_tokens(
    tokenizer: Any, prompt: str, concepts: Sequence[Concept], pointer: str, limit: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """For each concept the tokens of trigger and noun in the prompt that has all triggers. Raises as `token_table`."""
    ids = prompt_ids(tokenizer, prompt, pointer, limit)
    rows = []
    for index, concept in enumerate(concepts):
        alike = [other for other in concepts[:index] if other.noun.lower() == concept.noun.lower()]
        same = sum(other.trigger.lower() == concept.trigger.lower() for other in alike)
        found = _positions(tokenizer, ids, concept.noun, concept.trigger, len(alike), same)
        if found is None:
            raise _not_found(index, concept, concept.trigger, prompt, pointer)
        rows.append(found)
    return tuple(rows)


def _positions(
    tokenizer: Any, ids: list[int], noun: str, trigger: str, order: int, same: int = 0
) -> tuple[int, ...] | None:
    """The noun's tokens, and the trigger's before them where there is one; None if they are not there.

    Args:
        order: how many concepts before have this noun; same: how many of them its trigger too.
    """
    nouns = _find(ids, _pieces(tokenizer, noun))
    if not trigger:
        return nouns[min(order, len(nouns) - 1)] if nouns else None
    together = _find(ids, _pieces(tokenizer, f"{trigger} {noun}"))
    if together:
        return together[min(same, len(together) - 1)]
    triggers = _find(ids, _pieces(tokenizer, trigger))
    if not triggers or not nouns:
        return None
    return (*triggers[0], *nouns[min(order, len(nouns) - 1)])


def _pieces(tokenizer: Any, words: str) -> list[int]:
    return list(tokenizer(words, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _find(ids: list[int], wanted: list[int]) -> list[tuple[int, ...]]:
    """Every place of a sub-sequence, start and end token left out."""
    size = len(wanted)
    return [
        tuple(range(start, start + size))
        for start in range(1, len(ids) - size)
        if wanted and ids[start : start + size] == wanted
    ]


def _not_found(index: int, concept: Concept, trigger: str, prompt: str, pointer: str) -> ComposeRefused:
    words = f"{trigger!r} and {concept.noun!r}" if trigger else repr(concept.noun)
    return ComposeRefused(
        f"Concept {index + 1}: the tokens of {words} are not in its branch's prompt {prompt[:200]!r}.",
        hint="Every branch's prompt has every noun, and its own concept's trigger.",
        errors=[FieldError(pointer, f"does not have {words}")],
    )
