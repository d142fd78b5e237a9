from __future__ import annotations

import datetime
import hashlib
import os
import re
import subprocess
import sys

import pytest

from examples.smollm2.tasks import TASKS, Item, Task, make_items, split_of

TASK_NAMES = sorted(TASKS)
COUNT = 400

_ONES = "one two three four five six seven eight nine ten eleven twelve"
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMERALS = {word: number for number, word in enumerate(f"{_ONES} {_TEENS}".split(), 1)}
NUMERALS |= {word: 10 * number for number, word in enumerate(_TENS.split(), 2)}

_DIGEST_PROGRAM = """
import hashlib
from examples.smollm2.tasks import TASKS, make_items
text = "".join(i.prompt + i.completion for t in sorted(TASKS) for i in make_items(TASKS[t], "train", 50, seed=3))
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.parametrize("name", TASK_NAMES)
def test_held_out_facts_never_occur_in_training_data(name: str) -> None:
    task = TASKS[name]
    trained = {item.key for seed in range(4) for item in make_items(task, "train", COUNT, seed=seed)}
    held_out = {item.key for seed in range(4) for item in make_items(task, "held_out", COUNT, seed=seed)}
    assert len(trained) > 300
    assert len(held_out) > 300
    assert not trained & held_out


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_completion_is_decided_by_the_key(name: str) -> None:
    # So distinct keys on the two sides of the split mean distinct completions as well.
    items = make_items(TASKS[name], "train", COUNT) + make_items(TASKS[name], "held_out", COUNT)
    assert len({item.key for item in items}) == len({item.completion for item in items})
    assert len({(item.key, item.completion) for item in items}) == len({item.key for item in items})


@pytest.mark.parametrize("name", TASK_NAMES)
def test_items_have_distinct_prompts_and_one_line_answers(name: str) -> None:
    items = make_items(TASKS[name], "train", COUNT, seed=7)
    assert len(items) == COUNT == len({item.prompt for item in items})
    for item in items:
        assert item.prompt.endswith(":")
        assert item.completion == f" {item.completion.strip()}"
        assert "\n" not in item.completion
        assert item.completion.strip() not in item.prompt


def test_prompts_tell_the_tasks_apart() -> None:
    starts = {name: {i.prompt.split(":")[0] for i in make_items(TASKS[name], "train", 100)} for name in TASK_NAMES}
    assert all(len(words) == 1 for words in starts.values())
    assert len(set.union(*starts.values())) == len(TASKS)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_same_arguments_give_the_same_items(name: str) -> None:
    task = TASKS[name]
    assert make_items(task, "train", 60, seed=3) == make_items(task, "train", 60, seed=3)
    assert make_items(task, "train", 60, seed=3)[:20] == make_items(task, "train", 20, seed=3)
    assert make_items(task, "train", 60, seed=3) != make_items(task, "train", 60, seed=4)


def test_items_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    here = "".join(i.prompt + i.completion for t in TASK_NAMES for i in make_items(TASKS[t], "train", 50, seed=3))
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        printed = subprocess.run(
            [sys.executable, "-c", _DIGEST_PROGRAM], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert printed.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_split_is_about_a_quarter_and_differs_between_tasks() -> None:
    keys = [str(number) for number in range(4000)]
    share = sum(split_of("numbers", key) == "held_out" for key in keys) / len(keys)
    assert 0.22 < share < 0.28
    assert any(split_of("numbers", key) != split_of("dates", key) for key in keys)


def test_too_many_items_are_refused() -> None:
    task = Task("coin", "heads or tails", 2, lambda rng: Item(face := rng.choice("ht"), f"{face}:", f" {face}"))
    with pytest.raises(ValueError, match="task 'coin' gave only"):
        make_items(task, "train", 5)


def test_dates_say_what_the_calendar_says() -> None:
    for item in make_items(TASKS["dates"], "train", COUNT):
        text = re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", item.prompt.removeprefix("When: ").removesuffix("\nISO:"))
        text = text.removeprefix("the ").replace(" of ", " ").replace(",", "")
        formats = ("%B %d %Y", "%d %B %Y", "%d %b %Y")
        read = {d.date().isoformat() for f in formats if (d := _strptime(text, f)) is not None}
        assert read == {item.completion.strip()}


def test_numbers_in_words_say_their_digits() -> None:
    for item in make_items(TASKS["numbers"], "train", COUNT):
        words = re.findall(r"[a-z]+", item.prompt.removeprefix("Amount: ").removesuffix("\nFigures:"))
        total = current = 0
        for word in words:
            if word == "thousand":
                total, current = total + 1000 * current, 0
            elif word == "hundred":
                current *= 100
            elif word != "and":
                current += NUMERALS[word]
        assert item.completion == f" {total + current:05d}"


def test_orders_and_logs_state_every_field() -> None:
    for item in make_items(TASKS["orders"], "train", COUNT):
        thing, quantity, colour = re.fullmatch(r" item=(\w+); qty=(\d+); colour=(\w+)", item.completion).groups()
        assert re.search(rf"\b{thing}s\b", item.prompt)
        assert re.findall(r"\d+", item.prompt) == [quantity]
        assert re.search(rf"\b{colour}\b", item.prompt)
    for item in make_items(TASKS["logs"], "train", COUNT):
        component, severity, code = item.completion.strip().split(" | ")
        assert component in item.prompt
        assert severity in item.prompt.lower()
        assert re.findall(r"\d+", item.prompt) == [code]


def _strptime(text: str, pattern: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(text, pattern).replace(tzinfo=datetime.UTC)
    except ValueError:
        return None
