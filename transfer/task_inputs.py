"""The inputs of a task's training data: what its prompts have between the fixed parts that a format describes.

They are confidential: no message has any of their text, rows are told by their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from artifacts.errors import FieldError, RequestInvalid
from train.data import DataFile
from train.rows import iter_rows
from train.settings import CausalLmTask
from train.values import is_message
from transfer.candidates import clean
from transfer.prompts import PLACE, PromptFormat

POINTER = "/transferable/format"
_SHOWN = 20


def read_inputs(file: DataFile, task: CausalLmTask, wanted: PromptFormat | None) -> tuple[PromptFormat, list[str]]:
    """The format of the prompts, and the input of every row, cleaned as invented inputs are.

    Args:
        wanted: the format; None: the prompt is the input, or the user's turn of a chat.

    Raises:
        RequestInvalid: rows that have no prompt apart from an answer, or none of this format; they are numbered.
        FileBroken: a row is not valid after all.
    """
    form = wanted if wanted is not None else _found(iter_rows(file.path, file.format), task)
    problems: dict[str, list[int]] = {}
    inputs: list[str] = []
    for number, row in enumerate(iter_rows(file.path, file.format), 1):
        prompt, problem = _prompt(row, task, form)
        x = None if prompt is None else _unfilled(prompt, form)
        if problem is None and x is None:
            problem = "the prompt is not of the format's template"
        elif problem is None and not clean(x or ""):
            problem = "the input is empty"
        if problem is not None:
            problems.setdefault(problem, []).append(number)
        inputs.append(clean(x or ""))
    if problems:
        findings = [FieldError(POINTER, f"rows {_listed(numbers)}: {what}") for what, numbers in problems.items()]
        raise RequestInvalid(
            f"{sum(map(len, problems.values()))} of {len(inputs)} rows give no input of the task. "
            f"{findings[0].message[0].upper()}{findings[0].message[1:]}.",
            hint="A transferable adapter is trained on pairs of prompt and completion, or on chats of one question and "
            "one answer; transferable.format tells what of a prompt is not input.",
            errors=findings,
        )
    return form, inputs


def _found(rows: Iterable[Mapping[str, Any]], task: CausalLmTask) -> PromptFormat:
    """The plain format of the first row's kind, with its system's turn."""
    messages = next(iter(rows)).get(task.messages_column)
    if messages is None:
        return PromptFormat()
    turns = _turns(messages)
    return PromptFormat(chat=True, system=turns[0]["content"] if turns and turns[0]["role"] == "system" else None)


def _prompt(row: Mapping[str, Any], task: CausalLmTask, form: PromptFormat) -> tuple[str | None, str | None]:
    """(the prompt's own text, what is wrong with the row)."""
    messages = row.get(task.messages_column)
    if messages is not None:
        return _question(_turns(messages), form) if form.chat else (None, "it is a chat, and the format is not")
    if form.chat:
        return None, "it is no chat, and the format is"
    if row.get(task.completion_column) is None or not isinstance(row.get(task.prompt_column), str):
        return None, "it has no prompt apart from an answer"
    return str(row[task.prompt_column]), None


def _turns(messages: Any) -> list[Mapping[str, str]]:
    """The turns of a chat; none if it is no chat."""
    return list(messages) if isinstance(messages, list) and all(map(is_message, messages)) else []


def _question(turns: list[Mapping[str, str]], form: PromptFormat) -> tuple[str | None, str | None]:
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    if system != form.system:
        return None, "the system's turn is not the format's"
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        return None, "the chat is not one question and one answer"
    return turns[0]["content"], None


def _unfilled(prompt: str, form: PromptFormat) -> str | None:
    """The input that fills the template to this prompt; None if none does."""
    before, after = form.template.split(PLACE)
    if len(prompt) < len(before) + len(after) or not (prompt.startswith(before) and prompt.endswith(after)):
        return None
    return prompt[len(before) : len(prompt) - len(after)]


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more
