"""The calls of a Rankwise service that the plugin needs. No redirect is followed, since it would take the key along."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

TIMEOUT_SECONDS = 60
MAX_NAME = 200
MAX_PAGES = 5
"""Of a list of adapters, in search of a name."""
_PAGE = 200
_MAX_JSON = 64 * 1024 * 1024
_ID = re.compile(r"adp_[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Value = TypeVar("Value")


class RegistryError(Exception):
    """The service gave no usable answer; the message holds no key."""


class AmbiguousNameError(RegistryError):
    """Several adapters have the name."""


class _AbsentError(RegistryError):
    """There is nothing (404), or can be nothing (422)."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an adapter, of `size` bytes."""

    path: str
    sha256: str
    size: int

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> StoredFile:
        """Raises KeyError, TypeError, ValueError: it is of another shape."""
        path, digest, size = found["path"], found["sha256"], found["size"]
        if not isinstance(path, str) or not _SHA256.fullmatch(digest) or type(size) is not int or size < 0:
            raise ValueError("no file")
        return cls(path, digest, size)


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """What the service knows of an adapter."""

    id: str
    base_model: str | None
    files: tuple[StoredFile, ...]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> StoredAdapter:
        """Raises KeyError, TypeError, ValueError: it is of another shape."""
        base_model = found["base_model"]
        if base_model is not None and not isinstance(base_model, str):
            raise TypeError("no name")
        return cls(_adapter_id(found["id"]), base_model, tuple(StoredFile.of(item) for item in found["files"]))


@dataclass(frozen=True, slots=True)
class Compatibility:
    """Whether vLLM loads an adapter, and (level, message) of everything that was found."""

    loads: bool
    findings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Compatibility:
        """Raises KeyError, TypeError: it is of another shape."""
        findings = tuple((str(item["level"]), str(item["message"])) for item in found["findings"])
        return cls(found["loads"] is True, findings)


class Answer:
    """The bytes of an answer. What goes wrong with the connection is a RegistryError, and nothing else is."""

    def __init__(self, server: str, response: HTTPResponse) -> None:
        self._server, self._response = server, response

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises RegistryError."""
        with _no_answer(self._server):
            return self._response.read(size)


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the redirect is an error of its status."""


class Registry:
    """A Rankwise service."""

    def __init__(self, server: str, api_key: str = "") -> None:
        self._server = server
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._opener: OpenerDirector = build_opener(_NoRedirects, ProxyHandler({}))

    def find(self, name: str) -> StoredAdapter | None:
        """The adapter of that id, that an alias of that name points to, or of that name, in this order.

        Raises:
            AmbiguousNameError: several adapters are called so, or too many to look through have the name in theirs.
            RegistryError: no usable answer.
        """
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            return None
        if _ID.fullmatch(name):
            return self._adapter(name)
        if name not in (".", ".."):
            aliased = self._get(f"/aliases/{quote(name, safe='')}", lambda found: _adapter_id(found["adapter"]))
            if aliased is not None:
                return self._adapter(aliased)
        named = self._named(name)
        if len(named) > 1:
            raise AmbiguousNameError(
                f"several adapters are called {name!r}: {', '.join(named[:5])}; ask for one by its id"
            )
        return self._adapter(named[0]) if named else None

    def compatibility(self, adapter_id: str) -> Compatibility:
        """Whether vLLM loads it. Raises RegistryError."""
        found = self._get(f"/adapters/{adapter_id}/compatibility?engine=vllm", Compatibility.of)
        if found is None:
            raise RegistryError(f"{adapter_id} was deleted")
        return found

    @contextmanager
    def download(self, adapter_id: str) -> Iterator[Answer]:
        """The zip of its PEFT directory. Raises RegistryError."""
        with self._open(f"/adapters/{adapter_id}/download?format=peft") as answer:
            yield answer

    def _adapter(self, adapter_id: str) -> StoredAdapter | None:
        return self._get(f"/adapters/{adapter_id}", StoredAdapter.of)

    def _named(self, name: str) -> list[str]:
        """Ids of the adapters with exactly that name: one, or as many as show that it is not the only one.

        The service lists all that have it in their names.
        """
        found: list[str] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            query = {"name": name, "limit": str(_PAGE)} | ({"cursor": cursor} if cursor else {})
            page = self._get(f"/adapters?{urlencode(query)}", _page)
            if page is None:
                return found
            items, cursor = page
            found += [adapter for adapter, called in items if called == name]
            if cursor is None or len(found) > 1:
                return found
        raise AmbiguousNameError(
            f"more than {MAX_PAGES * _PAGE} adapters have {name!r} in their names; ask for one by an alias or its id"
        )

    def _get(self, path: str, make: Callable[[Any], Value]) -> Value | None:
        """What `make` makes of the JSON at `path`; None where there is none."""
        try:
            with self._open(path) as answer:
                body = answer.read(_MAX_JSON + 1)
        except _AbsentError:
            return None
        try:
            if len(body) > _MAX_JSON:
                raise ValueError("too long")
            return make(json.loads(body))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RegistryError(f"{self._server} did not answer as Rankwise does") from error

    @contextmanager
    def _open(self, path: str) -> Iterator[Answer]:
        request = Request(self._server + path, headers=self._headers)  # noqa: S310 (the scheme was checked)
        with _no_answer(self._server):
            response = self._opener.open(request, timeout=TIMEOUT_SECONDS)
        with response:
            yield Answer(self._server, response)


@contextmanager
def _no_answer(server: str) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        with error:
            kind = _AbsentError if error.code in (404, 422) else RegistryError
            raise kind(f"{server} answered {error.code}") from error
    except (URLError, HTTPException, OSError) as error:
        raise RegistryError(f"no answer from {server}: {type(error).__name__}") from error


def _adapter_id(text: Any) -> str:
    if not isinstance(text, str) or not _ID.fullmatch(text):
        raise ValueError("no id of an adapter")
    return text


def _page(found: Mapping[str, Any]) -> tuple[list[tuple[str, str]], str | None]:
    """(id, name) of the adapters, and where the next page begins."""
    cursor = found["next"]
    if cursor is not None and not isinstance(cursor, str):
        raise TypeError("no cursor")
    return [(_adapter_id(item["id"]), str(item["name"])) for item in found["items"]], cursor
