"""What an adapter is called that nobody gave a name."""

from __future__ import annotations

from collections.abc import Sequence

NAME_LIMIT = 200


def default_name(names: Sequence[str], method: str, made: str = "merge") -> str:
    """ "merge of a + b (lego)", shortened in the middle to what a name may have."""
    name, tail = f"{made} of " + " + ".join(names), f" ({method})"
    if len(name) + len(tail) > NAME_LIMIT:
        name = name[: NAME_LIMIT - len(tail) - 1] + "…"
    return name + tail
