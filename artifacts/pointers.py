"""Where in a request a finding is: pointers of a part become those of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from artifacts.errors import FieldError, RankwiseError


def pointer_token(name: str) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


@contextmanager
def pointers_below(prefix: str, instead_of: str = "") -> Iterator[None]:
    """Errors from inside point to below `prefix`: for `/a` of a value, `{prefix}/a` of the body that holds it.

    Args:
        instead_of: taken off first; pointers that do not begin with it stay as they are.
    """
    try:
        yield
    except RankwiseError as error:
        # A finding may also be at a module or a file, whose name is no pointer.
        error.errors = tuple(
            FieldError(prefix + item.pointer.removeprefix(instead_of), item.message)
            if item.pointer == instead_of or item.pointer.startswith(f"{instead_of}/")
            else item
            for item in error.errors
        )
        raise
