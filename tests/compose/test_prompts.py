"""Prompts of branches, and where the words stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import ComposeRefused
from compose.prompts import scene_prompts, token_table
from compose.request import Concept

HERE = Path("adapter")


def concept(trigger: str, noun: str) -> Concept:
    return Concept(HERE, noun, trigger, noun)


CIRCLE, SQUARE = concept("sks", "circle"), concept("zwx", "square")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from toy_pipelines import make_tokenizer

    return make_tokenizer()


@pytest.mark.parametrize(
    "prompt",
    [
        "a circle and a square",
        "a sks circle and a square",
        "a sks circle and a zwx square",
        "a circle and a zwx  square",
    ],
)
def test_triggers_are_put_before_nouns_or_taken_away(prompt: str) -> None:
    found = scene_prompts(prompt, (CIRCLE, SQUARE))
    assert found.plain == "a circle and a square"
    assert found.full == "a sks circle and a zwx square"
    assert found.single == ("a sks circle and a square", "a circle and a zwx square")


def test_order_case_punctuation_and_words_within_words() -> None:
    found = scene_prompts("Two squares? No: a square, a Circle.", (CIRCLE, SQUARE))
    assert found.plain == "Two squares? No: a square, a Circle."
    assert found.full == "Two squares? No: a zwx square, a sks Circle."
    dogs = (concept("aa", "dog"), concept("bb", "hot dog"))
    assert scene_prompts("a hot dog and a dog", dogs).full == "a bb hot dog and a aa dog"


def test_equal_nouns_need_a_place_each() -> None:
    twins = (concept("sks", "circle"), concept("zwx", "circle"))
    assert scene_prompts("a circle and a circle", twins).full == "a sks circle and a zwx circle"
    assert scene_prompts("a zwx circle and a sks circle", twins).single == (
        "a circle and a sks circle",
        "a zwx circle and a circle",
    )
    with pytest.raises(ComposeRefused, match="could not be told apart") as refused:
        scene_prompts("a circle", twins)
    assert refused.value.errors[0].pointer == "/concepts/1/noun"


def test_missing_words_are_refused_by_pointer() -> None:
    with pytest.raises(ComposeRefused, match="'square' is not in the prompt") as refused:
        scene_prompts("a circle and squares", (CIRCLE, SQUARE))
    assert refused.value.errors[0].pointer == "/concepts/1/noun"
    with pytest.raises(ComposeRefused, match="not before its noun") as refused:
        scene_prompts("sks, a circle and a square", (CIRCLE, SQUARE))
    assert refused.value.errors[0].pointer == "/concepts/0/trigger"


def table(tokenizer: Any, prompts: list[str], *concepts: Concept, limit: int | None = None) -> Any:
    return token_table(tokenizer, prompts, concepts, [f"/p/{index}" for index in range(len(prompts))], limit)


def test_positions_are_computed_with_the_start_token_counted(tokenizer: Any) -> None:
    """The authors' notebook has 6 for the base's second noun, which is the end token."""
    prompts = scene_prompts("a circle and a square", (CIRCLE, SQUARE))
    found = table(tokenizer, [prompts.plain, *prompts.single], CIRCLE, SQUARE)
    assert found.groups == (((2,), (2, 3), (2,)), ((5,), (6,), (5, 6)))
    assert found.mask_tokens == ((), (2, 3), (5, 6))
    assert len(tokenizer(prompts.plain).input_ids) == 7


def test_other_orders_and_words_of_several_pieces(tokenizer: Any) -> None:
    cat = concept("xyz", "cat")
    ids = tokenizer("cat", add_special_tokens=False).input_ids
    assert len(ids) == 3
    found = table(tokenizer, ["a cat and a circle", "a xyz cat and a circle", "a sks circle and a cat"], cat, CIRCLE)
    assert found.groups == (((2, 3, 4), (2, 3, 4, 5, 6, 7), (6, 7, 8)), ((7,), (10,), (2, 3)))


def test_equal_nouns_keep_their_places(tokenizer: Any) -> None:
    twins = (concept("sks", "circle"), concept("zwx", "circle"))
    prompts = scene_prompts("a circle and a circle", twins)
    found = table(tokenizer, [prompts.plain, *prompts.single], *twins)
    assert found.groups == (((2,), (2, 3), (2,)), ((5,), (6,), (5, 6)))


def test_a_trigger_may_stand_elsewhere_in_a_given_prompt(tokenizer: Any) -> None:
    found = table(tokenizer, ["a circle", "a circle, sks"], CIRCLE)
    assert found.groups == (((2,), (4, 2)),)


def test_prompts_that_would_be_cut_off_are_refused(tokenizer: Any) -> None:
    long = "a circle " + "and a circle " * 4
    with pytest.raises(ComposeRefused, match="takes 16") as refused:
        table(tokenizer, [f"{long} square"], SQUARE)
    assert refused.value.errors[0].pointer == "/p/0"
    assert "square" in refused.value.hint
    with pytest.raises(ComposeRefused, match="takes 5"):
        table(tokenizer, ["a circle and a square"], CIRCLE, limit=5)
    with pytest.raises(ComposeRefused, match="'zwx' and 'square'"):
        table(tokenizer, ["a square", "a square"], SQUARE)
