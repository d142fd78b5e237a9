"""The calls of a Rankwise service that the plugin needs. No redirect is followed, since it would take the key along."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

TIMEOUT_SECONDS = 60
MAX_NAME = 200
_MAX_JSON = 64 * 1024 * 1024
_ID = re.compile(r"adp_[0-9a-f]{32}")


class RegistryError(Exception):
    """The service gave no usable answer; the message holds no key."""


class AmbiguousNameError(RegistryError):
    """Several adapters have the name."""


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the redirect is an error of its status."""


class Registry:
    """A Rankwise service."""

    def __init__(self, server: str, api_key: str = "") -> None:
        self._server = server
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._opener: OpenerDirector = build_opener(_NoRedirects, ProxyHandler({}))

    def find(self, name: str) -> dict[str, Any] | None:
        """The adapter of that id, that an alias of that name points to, or of that name, in this order.

        Raises:
            AmbiguousNameError: several adapters are called so.
            RegistryError: no usable answer.
        """
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            return None
        if _ID.fullmatch(name):
            return self._get(f"/adapters/{name}")
        alias = None if name in (".", "..") else self._get(f"/aliases/{quote(name, safe='')}")
        if alias is not None:
            return self._get(f"/adapters/{alias['adapter']}")
        found = self._named(name)
        if len(found) > 1:
            raise AmbiguousNameError(
                f"several adapters are called {name!r}: {', '.join(found[:5])}; ask for one by its id"
            )
        return self._get(f"/adapters/{found[0]}") if found else None

    def compatibility(self, adapter_id: str) -> dict[str, Any]:
        """Whether vLLM loads it. Raises RegistryError."""
        found = self._get(f"/adapters/{adapter_id}/compatibility?engine=vllm")
        if found is None:
            raise RegistryError(f"{adapter_id} was deleted")
        return found

    @contextmanager
    def download(self, adapter_id: str) -> Iterator[HTTPResponse]:
        """The zip of its PEFT directory. Raises RegistryError."""
        with self._open(f"/adapters/{adapter_id}/download?format=peft") as answer:
            yield answer

    def _named(self, name: str) -> list[str]:
        """Ids of the adapters with exactly that name: one, or as many as show that it is not the only one."""
        found: list[str] = []
        cursor: str | None = None
        while len(found) < 2:
            query = {"name": name, "limit": "200"} | ({"cursor": cursor} if cursor else {})
            page = self._get(f"/adapters?{urlencode(query)}")
            if page is None:
                break
            found += [item["id"] for item in page["items"] if item["name"] == name]
            cursor = page["next"]
            if cursor is None:
                break
        return found

    def _get(self, path: str) -> dict[str, Any] | None:
        """The JSON at `path`; None where there is nothing (404), or can be nothing (422)."""
        try:
            with self._open(path) as answer:
                body = answer.read(_MAX_JSON + 1)
        except RegistryError as error:
            cause = error.__cause__
            if isinstance(cause, HTTPError) and cause.code in (404, 422):
                return None
            raise
        try:
            found = json.loads(body)
        except ValueError as error:
            raise RegistryError(f"{self._server} did not answer as Rankwise does") from error
        if len(body) > _MAX_JSON or not isinstance(found, dict):
            raise RegistryError(f"{self._server} did not answer as Rankwise does")
        return found

    @contextmanager
    def _open(self, path: str) -> Iterator[HTTPResponse]:
        request = Request(self._server + path, headers=self._headers)  # noqa: S310 (the scheme was checked)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                yield answer
        except HTTPError as error:
            with error:
                raise RegistryError(f"{self._server} answered {error.code}") from error
        except (URLError, HTTPException, OSError) as error:
            raise RegistryError(f"no answer from {self._server}: {type(error).__name__}") from error
