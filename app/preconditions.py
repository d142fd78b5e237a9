"""ETag and If-Match of things that have a version: a change applies to what its sender has seen, or not at all."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Header

_TAGS = re.compile(r'(?:W/)?"[\x21\x23-\x7e]*"(?:[ \t]*,[ \t]*(?:W/)?"[\x21\x23-\x7e]*")*')
_VERSION = re.compile(r'(?<!W/)"([1-9][0-9]{0,8})"')


def etag(version: int) -> str:
    """The entity tag of a version."""
    return f'"{version}"'


def expected_versions(
    if_match: Annotated[
        str | None,
        Header(alias="If-Match", description="ETag of the version that is to be changed; another one answers 412."),
    ] = None,
) -> frozenset[int] | None:
    """The versions that `If-Match` names; None if any will do. What is no tag of ours, or weak, matches nothing."""
    text = "*" if if_match is None else if_match.strip()
    if text == "*":
        return None
    if not _TAGS.fullmatch(text):
        return frozenset()
    return frozenset(int(version) for version in _VERSION.findall(text))


IfMatch = Annotated[frozenset[int] | None, Depends(expected_versions)]
