"""Which tasks a dataset can serve, by the names and values of its columns, and why it can not serve the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from train.records import Row, Suitability
from train.values import is_message, type_of

MAX_LABELS = 1000

Check = Callable[[Row], str | None]
"""What is wrong with a row for one task, if anything."""


def _text(name: str) -> Check:
    def check(row: Row) -> str | None:
        value = row.get(name)
        if not isinstance(value, str):
            return f"`{name}` is {_described(value)}, not text"
        return None if value else f"`{name}` is empty"

    return check


def _prompt_and_completion(row: Row) -> str | None:
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return f"`prompt` is {_described(prompt)}, not text"
    return _text("completion")(row)


def _chat(row: Row) -> str | None:
    messages = row.get("messages")
    if not isinstance(messages, list):
        return f"`messages` is {_described(messages)}, not a list of messages"
    for position, message in enumerate(messages, 1):
        if not is_message(message):
            return f"message {position} is not an object of `role` and `content`, both text"
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        return "no message is the assistant's: there is nothing to learn"
    return None


class _Labels:
    """Rows of one text and one label; the labels are all text or all whole numbers."""

    def __init__(self) -> None:
        self._labels: set[str | int] = set()
        self._type = ""

    def check(self, row: Row) -> str | None:
        fault = _text("text")(row)
        if fault is not None:
            return fault
        label = row.get("label")
        if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
            return f"`label` is {_described(label)}, not text or a whole number"
        self._type = self._type or type_of(label)
        if type_of(label) != self._type:
            return f"`label` is {_described(label)}, but the first label is {self._type}"
        if len(self._labels) <= MAX_LABELS:
            self._labels.add(label)
        return None

    def conclude(self) -> str | None:
        if len(self._labels) > MAX_LABELS:
            return f"`label` has more than {MAX_LABELS} different values"
        return None if len(self._labels) > 1 else "all rows have the same `label`: there is nothing to tell apart"


class _Transcripts:
    """Rows of one sequence and the biotype of its transcript."""

    def __init__(self) -> None:
        self._labels: set[str | int] = set()

    def check(self, row: Row) -> str | None:
        fault = _text("sequence")(row)
        if fault is not None:
            return fault
        label = row.get("label")
        if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
            return f"`label` is {_described(label)}, not the biotype of a transcript"
        if len(self._labels) < 2:
            self._labels.add(label)
        return None

    def conclude(self) -> str | None:
        return None if len(self._labels) > 1 else "all rows have the same `label`: there is nothing to tell apart"


class _Tags:
    """Rows of tokens with one tag each; the tags are all text or all whole numbers."""

    def __init__(self) -> None:
        self._tags: set[str | int] = set()
        self._type = ""

    def check(self, row: Row) -> str | None:
        tokens, tags = row.get("tokens"), row.get("tags")
        if type_of(tokens) != "list<string>":
            return f"`tokens` is {_described(tokens)}, not a list of text"
        if type_of(tags) not in {"list<string>", "list<integer>"}:
            return f"`tags` is {_described(tags)}, not a list of text or of whole numbers"
        assert isinstance(tokens, list)
        assert isinstance(tags, list)
        if len(tokens) != len(tags):
            return f"there are {len(tokens)} tokens and {len(tags)} tags"
        self._type = self._type or type_of(tags)
        if type_of(tags) != self._type:
            return f"`tags` is a {type_of(tags)}, but the first row's is a {self._type}"
        if len(self._tags) <= MAX_LABELS:
            self._tags.update(tags)
        return None

    def conclude(self) -> str | None:
        if len(self._tags) > MAX_LABELS:
            return f"`tags` has more than {MAX_LABELS} different values"
        return None if len(self._tags) > 1 else "all tokens have the same tag: there is nothing to tell apart"


def _described(value: Any) -> str:
    if value is None:
        return "missing or null"
    if value == "" or value == []:
        return "empty"
    kind = type_of(value)
    article = "an" if kind[0] in "aeiou" else "a"
    return f"{article} {kind}"


@dataclass(slots=True)
class _Candidate:
    """One task and form, while the rows go by."""

    task: str
    form: str
    columns: tuple[str, ...]
    check: Check
    conclude: Callable[[], str | None] = lambda: None
    seen: set[str] = field(default_factory=set)
    faults: int = 0
    first: str = ""

    def add(self, number: int, row: Row) -> None:
        present = [name for name in self.columns if name in row]
        if not present:
            fault: str | None = f"`{self.columns[0]}` is missing"
        else:
            self.seen.update(present)
            fault = self.check(row)
        if fault is not None:
            self.faults += 1
            self.first = self.first or f"row {number}: {fault}"

    def verdict(self) -> Suitability:
        reason = self._reason()
        return Suitability(self.task, self.form, self.columns, reason is None, reason)

    def _reason(self) -> str | None:
        absent = [f"`{name}`" for name in self.columns if name not in self.seen]
        if absent:
            return f"there is no column {' and no column '.join(absent)}"
        if self.faults:
            return self.first if self.faults == 1 else f"{self.first} (rows like this: {self.faults})"
        return self.conclude()


class Candidates:
    """All tasks, while the rows of a dataset go by."""

    def __init__(self) -> None:
        labels, tags, transcripts = _Labels(), _Tags(), _Transcripts()
        self._all = (
            _Candidate("causal-lm", "chat", ("messages",), _chat),
            _Candidate("causal-lm", "prompt-completion", ("prompt", "completion"), _prompt_and_completion),
            _Candidate("causal-lm", "text", ("text",), _text("text")),
            _Candidate("sequence-classification", "text-label", ("text", "label"), labels.check, labels.conclude),
            _Candidate("token-classification", "tokens-tags", ("tokens", "tags"), tags.check, tags.conclude),
            _Candidate(
                "transcript-classification",
                "sequence-label",
                ("sequence", "label"),
                transcripts.check,
                transcripts.conclude,
            ),
        )

    def add(self, number: int, row: Row) -> None:
        for candidate in self._all:
            candidate.add(number, row)

    def verdicts(self) -> tuple[Suitability, ...]:
        return tuple(candidate.verdict() for candidate in self._all)
