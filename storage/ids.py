"""Identifiers: a prefix that names the kind of thing and a UUIDv7, which sorts by its time of creation."""

from __future__ import annotations

import re

import uuid_utils

_PREFIX = re.compile(r"[a-z]{3}")
_ID = re.compile(r"[a-z]{3}_[0-9a-f]{32}")


def new_id(prefix: str) -> str:
    """`prefix` + "_" + the 32 hex digits of a new UUIDv7; later ids of one process compare greater.

    Raises:
        ValueError: the prefix is not three lower-case letters.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"an id prefix has three lower-case letters, not {prefix!r}")
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def is_id(text: str, prefix: str | None = None) -> bool:
    """Whether `text` has the form of an id (of this prefix); says nothing of whether it exists."""
    return bool(_ID.fullmatch(text)) and (prefix is None or text.startswith(f"{prefix}_"))
