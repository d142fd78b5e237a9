"""Four small tasks whose data is made by rule, so that any amount of it can be made again from a seed.

Every item has a key (the facts that the text states). A hash of the key alone decides whether the item is training or
held-out material, so no fact of a held-out item occurs in training data under any wording, whatever the seeds.
"""

from __future__ import annotations

import calendar
import datetime
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

_HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Item:
    """One prompt with the only completion that counts as right (it starts with a space and has one line)."""

    key: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """A rule that makes items, with what a reader must know about it."""

    name: str
    rule: str
    max_new_tokens: int
    make: Callable[[random.Random], Item]


def split_of(task: str, key: str) -> Split:
    """The side of the split that a key belongs to, by a hash of task and key."""
    digest = hashlib.sha256(f"{task}/{key}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32 else "train"


def make_items(task: Task, split: Split, count: int, *, seed: int = 0) -> list[Item]:
    """`count` items of one side of the split with distinct prompts; the same arguments give the same items.

    Raises ValueError when the task has too few distinct prompts for `count`.
    """
    rng = random.Random(f"{task.name}/{split}/{seed}")
    items: dict[str, Item] = {}
    for _ in range(200 + 50 * count):
        if len(items) == count:
            break
        item = task.make(rng)
        if split_of(task.name, item.key) == split:
            items.setdefault(item.prompt, item)
    if len(items) < count:
        raise ValueError(f"task {task.name!r} gave only {len(items)} distinct {split} prompts of {count} wanted")
    return list(items.values())


def _ordinal(day: int) -> str:
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def _make_date(rng: random.Random) -> Item:
    first, last = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
    date = first + datetime.timedelta(days=rng.randrange((last - first).days + 1))
    month, short, day, year = calendar.month_name[date.month], calendar.month_abbr[date.month], date.day, date.year
    wording = rng.choice(
        [
            f"{month} {day}, {year}",
            f"{day} {month} {year}",
            f"{month} {_ordinal(day)}, {year}",
            f"the {_ordinal(day)} of {month} {year}",
            f"{day} {short} {year}",
        ]
    )
    return Item(date.isoformat(), f"When: {wording}\nISO:", f" {date.isoformat()}")


def _vocabulary(words: str) -> list[str]:
    return words.split()


_THINGS = _vocabulary("mug lamp chair shirt book bowl tent rope clock plate hat bag pen scarf rug desk")
_COLOURS = _vocabulary("red blue green black white yellow brown purple orange grey")


def _make_order(rng: random.Random) -> Item:
    thing, colour, quantity = rng.choice(_THINGS), rng.choice(_COLOURS), rng.randint(2, 60)
    wording = rng.choice(
        [
            f"Please send me {quantity} {colour} {thing}s.",
            f"We need {quantity} {thing}s in {colour}.",
            f"I would like {quantity} {colour} {thing}s, thanks.",
            f"Can I have {thing}s, {colour}, {quantity} of them?",
            f"{quantity} {thing}s please, the {colour} ones.",
        ]
    )
    return Item(
        f"{thing}/{colour}/{quantity}", f"Order: {wording}\nRecord:", f" item={thing}; qty={quantity}; colour={colour}"
    )


_COMPONENTS = _vocabulary("auth cache disk mail proxy queue search storage billing network scheduler gateway")
_SEVERITIES = _vocabulary("debug info warning error critical")
_EVENTS = [
    "request timed out",
    "connection refused",
    "retry scheduled",
    "limit reached",
    "file not found",
    "restart complete",
]


def _make_log(rng: random.Random) -> Item:
    component, severity = rng.choice(_COMPONENTS), rng.choice(_SEVERITIES)
    code, event = rng.randint(100, 599), rng.choice(_EVENTS)
    wording = rng.choice(
        [
            f"{severity.upper()} [{component}] {event} (code {code})",
            f"{component}: {severity.upper()}: {event}, code={code}",
            f"[{severity}] {code} {event} in {component}",
            f"{component}/{code} {event} ({severity})",
        ]
    )
    return Item(f"{component}/{severity}/{code}", f"Log: {wording}\nEvent:", f" {component} | {severity} | {code}")


_UNITS = _vocabulary(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = _vocabulary("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def _words(number: int) -> str:
    """British wording of 1 ≤ number < 10,000."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_UNITS[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = f"{_UNITS[number // size]} {name}", number % size
    if not rest:
        return head
    return f"{head} and {_words(rest)}" if rest < 100 else f"{head} {_words(rest)}"


def _make_number(rng: random.Random) -> Item:
    number = rng.randint(1, 9999) if rng.random() < 0.6 else rng.randint(1, 999)
    return Item(str(number), f"Amount: {_words(number)}\nFigures:", f" {number:05d}")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("dates", "an English date (1950 to 2049, five wordings) becomes ISO 8601", 13, _make_date),
        Task(
            "orders",
            "an order (five wordings) becomes `item=…; qty=…; colour=…`, item in the singular",
            18,
            _make_order,
        ),
        Task("logs", "a log line (four layouts) becomes `component | severity | code`", 14, _make_log),
        Task("numbers", "a number in words (1 to 9,999) becomes five digits with leading zeros", 8, _make_number),
    )
}
