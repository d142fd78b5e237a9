from __future__ import annotations

from typing import Any

import pytest

from train.suitability import Candidates

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def reasons(*rows: dict[str, Any]) -> dict[str, str | None]:
    """Form → why the rows can not serve it; None if they can."""
    candidates = Candidates()
    for number, row in enumerate(rows, 1):
        candidates.add(number, row)
    for verdict in candidates.verdicts():
        assert verdict.usable == (verdict.reason is None)
    return {verdict.form: verdict.reason for verdict in candidates.verdicts()}


def test_each_form_is_found() -> None:
    assert reasons({"messages": CHAT})["chat"] is None
    assert reasons({"prompt": "", "completion": "b"})["prompt-completion"] is None
    found = reasons({"text": "a", "label": 0}, {"text": "b", "label": 1})
    assert (found["text"], found["text-label"]) == (None, None)
    found = reasons({"tokens": ["a", "b"], "tags": ["O", "X"]}, {"tokens": [], "tags": []})
    assert found["tokens-tags"] == "row 2: `tokens` is empty, not a list of text"
    assert reasons({"tokens": ["a", "b"], "tags": [0, 1]})["tokens-tags"] is None


def test_a_column_that_is_not_there_is_named() -> None:
    found = reasons({"text": "a"})
    assert found["chat"] == "there is no column `messages`"
    assert found["prompt-completion"] == "there is no column `prompt` and no column `completion`"
    assert found["text-label"] == "there is no column `label`"
    assert found["text"] is None


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("chat", {"messages": "hi"}, "`messages` is a string, not a list of messages"),
        ("chat", {"messages": None}, "`messages` is missing or null, not a list of messages"),
        ("chat", {"messages": [CHAT[0]]}, "no message is the assistant's: there is nothing to learn"),
        ("chat", {"messages": [{"role": "assistant", "content": ""}]}, "no message is the assistant's"),
        ("chat", {"messages": [*CHAT, {"role": "user"}]}, "message 3 is not an object of `role` and `content`"),
        ("chat", {"messages": [*CHAT, {"role": "user", "content": 1}]}, "message 3 is not an object"),
        ("prompt-completion", {"prompt": "a", "completion": ""}, "`completion` is empty"),
        ("prompt-completion", {"prompt": 1, "completion": "b"}, "`prompt` is an integer, not text"),
        ("text", {"text": ["a"]}, "`text` is a list<string>, not text"),
        ("text", {"text": ""}, "`text` is empty"),
        ("text-label", {"text": "a", "label": None}, "`label` is missing or null"),
        ("text-label", {"text": "a", "label": ""}, "`label` is empty"),
        ("text-label", {"text": "a", "label": True}, "`label` is a boolean"),
        ("text-label", {"text": "a", "label": 0.5}, "`label` is a number"),
        ("text-label", {"text": "a", "label": "x"}, "`label` is a string, but the first label is integer"),
        ("tokens-tags", {"tokens": ["a"], "tags": [1, 2]}, "there are 1 tokens and 2 tags"),
        ("tokens-tags", {"tokens": "a", "tags": [1]}, "`tokens` is a string, not a list of text"),
        ("tokens-tags", {"tokens": ["a"], "tags": [0.5]}, "`tags` is a list, not a list of text or of whole numbers"),
        ("tokens-tags", {"tokens": ["a"], "tags": ["O"]}, "`tags` is a list<string>, but the first row's"),
    ],
)
def test_the_first_bad_row_is_named_and_the_others_counted(form: str, row: dict[str, Any], reason: str) -> None:
    good: dict[str, Any] = {"messages": CHAT, "prompt": "a", "completion": "b", "text": "c", "label": 1}
    good |= {"tokens": ["a", "b"], "tags": [1, 2]}
    found = reasons(good, good | {"label": 2}, good | row)[form]
    assert found is not None
    assert found.startswith(f"row 3: {reason}")
    again = reasons(good, good | {"label": 2}, good | row, good | row)[form]
    assert again == f"{found} (rows like this: 2)"


def test_one_label_teaches_nothing_and_a_thousand_are_too_many() -> None:
    same = reasons({"text": "a", "label": "x"}, {"text": "b", "label": "x"})
    assert same["text-label"] == "all rows have the same `label`: there is nothing to tell apart"
    many = reasons(*({"text": "a", "label": number} for number in range(1001)))
    assert many["text-label"] == "`label` has more than 1000 different values"
    assert reasons(*({"text": "a", "label": number} for number in range(1000)))["text-label"] is None
    assert reasons({"tokens": ["a"], "tags": ["O"]})["tokens-tags"] == (
        "all tokens have the same tag: there is nothing to tell apart"
    )
