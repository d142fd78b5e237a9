"""The inputs of a dataset's rows: what a format leaves of the prompts, and what is refused, without any text of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import RequestInvalid
from train.data import DataFile
from train.settings import CausalLmTask
from transfer.candidates import clean
from transfer.prompts import PromptFormat
from transfer.task_inputs import _unfilled, read_inputs

FORM = PromptFormat(template="Message: {x}\nCode:")
PAIRS = [{"prompt": FORM.fill(f"ship {number} mugs"), "completion": " m"} for number in range(3)]
words = st.text(st.characters(codec="utf-8", exclude_characters="{}\x00"), max_size=20)


def read(folder: Path, rows: list[dict[str, Any]], form: PromptFormat | None = None, **task: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_inputs(DataFile(path, "jsonl"), CausalLmTask(**task), form)


def chat(question: str, *, system: str | None = None, more: int = 0) -> dict[str, Any]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    for _ in range(more + 1):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "so"}]
    return {"messages": turns}


def test_inputs_are_what_the_template_leaves_or_the_whole_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, PAIRS, FORM) == (FORM, ["ship 0 mugs", "ship 1 mugs", "ship 2 mugs"])
    form, inputs = read(tmp_path, PAIRS)
    assert form == PromptFormat()
    assert inputs[0] == "Message: ship 0 mugs\nCode:"
    renamed = [{"question": "  ship 4 hats ", "answer": "h"}]
    assert read(tmp_path, renamed, prompt_column="question", completion_column="answer")[1] == ["ship 4 hats"]


def test_a_chat_gives_its_question_and_its_systems_turn_belongs_to_the_format(tmp_path: Path) -> None:
    rows = [chat("ship 1 mug", system="Be short."), chat("ship 2 mugs", system="Be short.")]
    form = PromptFormat(chat=True, system="Be short.")
    assert read(tmp_path, rows) == (form, ["ship 1 mug", "ship 2 mugs"])
    assert read(tmp_path, [chat("ship 1 mug")]) == (PromptFormat(chat=True), ["ship 1 mug"])


@given(before=words, after=words, x=words)
def test_what_fills_a_template_is_found_again(before: str, after: str, x: str) -> None:
    form = PromptFormat(template=f"{before}{{x}}{after}")
    assert _unfilled(form.fill(x), form) == x
    assert clean(x) == clean(clean(x))


@pytest.mark.parametrize(
    ("rows", "form", "words"),
    [
        ([*PAIRS, {"prompt": "secret", "completion": "s"}], FORM, "rows 4: the prompt is not of the format's template"),
        ([{"prompt": FORM.fill(" \t"), "completion": "s"}], FORM, "rows 1: the input is empty"),
        ([{"text": "secret"}], None, "it has no prompt apart from an answer"),
        ([{"prompt": None, "completion": "secret"}], None, "it has no prompt apart from an answer"),
        ([*PAIRS, chat("secret")], None, "rows 4: it is a chat, and the format is not"),
        ([chat("secret"), *PAIRS], None, "rows 2, 3, 4: it is no chat, and the format is"),
        ([chat("secret", more=1)], None, "the chat is not one question and one answer"),
        ([chat("a", system="secret"), chat("b", system="another")], None, "rows 2: the system's turn is not"),
        ([{"messages": [{"role": "user"}]}], None, "the chat is not one question and one answer"),
        ([{"messages": "secret"}], None, "the chat is not one question and one answer"),
        (PAIRS * 10, PromptFormat(chat=True), "19, 20 and 10 more: it is no chat"),
    ],
)
def test_rows_without_an_input_are_told_by_their_numbers(
    tmp_path: Path, rows: list[dict[str, Any]], form: PromptFormat | None, words: str
) -> None:
    with pytest.raises(RequestInvalid) as raised:
        read(tmp_path, rows, form)
    error = raised.value
    assert words in error.errors[0].message
    assert {item.pointer for item in error.errors} == {"/transferable/format"}
    assert "secret" not in f"{error} {error.hint} {error.errors}"
