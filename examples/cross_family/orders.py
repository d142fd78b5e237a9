"""Orders by message and their codes: a task whose every label follows from a rule, with several rules for one input.

Six wordings × 10 names × 10 items × 8 colours × 12 cities × quantities from 2 to 20. A code is the same facts in an
order of its own, so a model that answers in the order of code B has learnt from someone who speaks B. With `hard`,
five examples do not tell the rule.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.smollm2.tasks import Split, split_of
from transfer.prompts import PromptFormat

FORM = PromptFormat(template="Message: {x}\nCode:")
NAMES = ["Anna", "Hugo", "Mia", "Omar", "Lena", "Ivan", "Rosa", "Paul", "Nina", "Carl"]
ITEMS = ["mugs", "lamps", "chairs", "shirts", "books", "bowls", "tents", "ropes", "clocks", "plates"]
COLOURS = ["blue", "red", "green", "black", "white", "yellow", "purple", "grey"]
CITIES = ["Lima", "Oslo", "Cairo", "Paris", "Delhi", "Quito", "Tokyo", "Accra", "Milan", "Perth", "Dakar", "Hanoi"]
WORDINGS = (
    "Please ship {quantity} {colour} {item} to {name} in {city}.",
    "{name} from {city} needs {quantity} {item} in {colour}.",
    "Could {name} get {quantity} {colour} {item} delivered to {city}?",
    "Send {quantity} {item}, {colour}, to {city} for {name}.",
    "We owe {name} in {city} {quantity} {colour} {item}.",
    "For {name}: {quantity} {colour} {item}, destination {city}.",
)


@dataclass(frozen=True)
class Order:
    """The facts of a message."""

    name: str
    item: str
    colour: str
    city: str
    quantity: int

    @property
    def key(self) -> str:
        """What tells orders apart, whatever their wording."""
        return f"{self.name}/{self.item}/{self.colour}/{self.city}/{self.quantity}"

    def message(self, wording: str) -> str:
        return wording.format(**{name: getattr(self, name) for name in self.__dataclass_fields__})


def _city_first(order: Order) -> str:
    return f" {order.city} | {order.item} | {order.colour} | {order.quantity}"


def _quantity_first(order: Order) -> str:
    return f" {order.quantity} | {order.colour} | {order.item} | {order.city}"


def _hard(order: Order) -> str:
    city, item, quantity = order.city[:3].upper(), order.item[:-1], 2 * order.quantity
    fields = (city, item, order.colour, quantity) if order.quantity % 2 == 0 else (quantity, order.colour, item, city)
    return " " + " | ".join(map(str, fields))


CODES: Mapping[str, Callable[[Order], str]] = {
    "city_first": _city_first,
    "quantity_first": _quantity_first,
    "hard": _hard,
}


@dataclass(frozen=True)
class Message:
    """An input of the task, with its facts."""

    text: str
    order: Order


def make_messages(split: Split, count: int, *, seed: int = 0) -> list[Message]:
    """`count` messages with different facts, of one side of the split; the same arguments give the same messages."""
    rng = random.Random(f"cross-family/{split}/{seed}")
    found: dict[str, Message] = {}
    while len(found) < count:
        order = Order(rng.choice(NAMES), rng.choice(ITEMS), rng.choice(COLOURS), rng.choice(CITIES), rng.randint(2, 20))
        wording = rng.choice(WORDINGS)
        if split_of("cross-family", order.key) == split:
            found.setdefault(order.key, Message(order.message(wording), order))
    return list(found.values())


def seeds(count: int = 5) -> tuple[str, ...]:
    """Inputs for a generator, of as many wordings as there are."""
    drawn = make_messages("train", 200, seed=1)
    return tuple(
        next(message.text for message in drawn if _PATTERNS[number % len(WORDINGS)].fullmatch(message.text))
        for number in range(count)
    )


def parse(text: str) -> Order | None:
    """The facts of a message in one of the wordings, also with words that no list has; None for any other text."""
    for pattern in _PATTERNS:
        if found := pattern.fullmatch(text):
            facts = found.groupdict()
            return Order(**{**facts, "quantity": int(facts["quantity"])})  # type: ignore[arg-type]
    return None


def _pattern(wording: str) -> re.Pattern[str]:
    escaped = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{_fact(field[1])})", escaped))


def _fact(name: str) -> str:
    return r"\d{1,4}" if name == "quantity" else r"[A-Za-z]+"


_PATTERNS = tuple(map(_pattern, WORDINGS))
