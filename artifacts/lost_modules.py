"""Modules that an adapter's file seems to have lost, by the names of those that are there."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\.(\d+)\.")


def missing_modules(paths: Iterable[str]) -> tuple[str, ...]:
    """What seems to be lost: layers between others, and modules that nearly all layers have.

    Of models whose layers are of several kinds some modules are in many layers and not in all, and the first layers may
    differ from the rest; neither counts.
    """
    layers: dict[str, dict[str, set[int]]] = {}
    for path in paths:
        found = _NUMBER.search(path)
        if found is not None and len(found[1]) < 6:
            layers.setdefault(path[: found.start()], {}).setdefault(path[found.end() :], set()).add(int(found[1]))
    absent: list[str] = []
    for start, modules in layers.items():
        numbers = set().union(*modules.values())
        first, last = min(numbers), max(numbers)
        between = set(range(first, last)) - numbers if 2 * (last - first + 1) < 3 * len(numbers) else set()
        for rest, has in modules.items():
            # every one of these has most of the numbers, so that they are few
            lost = numbers - has if 8 * len(has) >= 7 * len(numbers) else set()
            start_of_these = min(has)
            lost = {number for number in lost if number > start_of_these}
            lost |= between if 2 * len(has) > len(numbers) else set()
            absent += [f"{start}.{number}.{rest}" for number in sorted(lost)]
    return tuple(absent)
