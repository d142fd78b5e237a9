"""Files of other servers: every hop of a redirect is checked, every byte counted, a broken transfer taken up again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from artifacts.errors import FieldError, FileBroken, RemoteUnavailable, RequestInvalid, TooLarge
from artifacts.pointers import pointers_below
from workers.egress import EgressPolicy, Resolver
from workers.pinned_transport import PinnedTransport, resolve, tls_context

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
MAX_REDIRECTS = 5
MAX_INTERRUPTIONS = 8
MAX_JSON_BYTES = 16 * 1024**2
USER_AGENT = "Rankwise-Import/1"
_PAUSE_SECONDS = 0.5
_BUSY = (408, 429)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a file is.

    Attributes:
        place: of the request that names it, a JSON pointer.
        check: refuses a hop; given each URL, the first one too.
        token: sent to the first URL's own origin, and never along with a redirect.
    """

    url: str
    place: str
    check: Callable[[str], None]
    token: str | None = None


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file that is here: the name that its server gives it, if any, its SHA-256 (hex), size and ETag."""

    path: Path
    sha256: str
    size: int
    name: str | None
    etag: str | None


def is_passing(status: int) -> bool:
    """Whether a server that answers with this status may answer otherwise later."""
    return status >= 500 or status in _BUSY


class _GrowingFile:
    """A file and the digest of what it holds so far."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.restart()

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)

    def close(self) -> None:
        self._file.close()


class RemoteClient:
    """An asynchronous context manager.

    Args:
        policy: which addresses requests may go to.
        tokens: by host, for https and the usual port; or by origin ("http://files.internal:8080").
        trusted: an origin ("https://hub.example.org") that the operator named, whatever its address is.
        resolver: how names become addresses; this machine's own way unless given.
    """

    def __init__(
        self,
        policy: EgressPolicy,
        *,
        trusted: str | None = None,
        tokens: Mapping[str, str] | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self._tokens = tokens or {}
        tls, found = tls_context(), resolver or resolve
        mounts = {}
        if trusted is not None:
            mounts[origin_of(trusted)] = PinnedTransport(EgressPolicy.everywhere(), tls, found)
        self._client = httpx.AsyncClient(
            transport=PinnedTransport(policy, tls, found),
            mounts=mounts,
            trust_env=False,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            headers={"user-agent": USER_AGENT, "accept-encoding": "identity"},
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def json(self, address: Address) -> Any:
        """The JSON document there.

        Raises:
            RequestInvalid: it is not there, or not for us; see `Address.check`.
            RemoteUnavailable: no answer, or none that is JSON.
        """
        try:
            async with self._opened(address) as response:
                _check_status(response, address)
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > MAX_JSON_BYTES:
                        raise RemoteUnavailable(f"{_shown(address.url)} answered more than {MAX_JSON_BYTES} bytes.")
            return json.loads(data)
        except httpx.TransportError as error:
            raise _unreachable(address, error) from error
        except (ValueError, RecursionError) as error:
            raise RemoteUnavailable(f"{_shown(address.url)} did not answer with JSON.") from error

    async def download(
        self, address: Address, path: Path, limit: int, tell: Callable[[int, int | None], None]
    ) -> ReceivedFile:
        """Write the file there to `path`, which is made anew.

        A transfer that breaks is taken up where it broke when the server names the version (a strong ETag) and can
        send a part; otherwise it begins again.

        Args:
            limit: bytes.
            tell: given the bytes that are here, and all of them if they are known; may raise to stop.

        Raises:
            RequestInvalid: it is not there, or not for us; see `Address.check`.
            TooLarge: more than `limit`.
            RemoteUnavailable: no answer, or one that broke off too often.
        """
        file = _GrowingFile(path)
        try:
            tag: str | None = None
            for interruption in range(MAX_INTERRUPTIONS):
                part = {"range": f"bytes={file.size}-", "if-range": tag} if tag is not None and file.size else {}
                try:
                    async with self._opened(address, part) as response:
                        _check_status(response, address)
                        if response.status_code != httpx.codes.PARTIAL_CONTENT or not _continues(response, file.size):
                            file.restart()
                        tag = _strong_tag(response)
                        await _receive(response, address, file, limit, tell)
                        name = _file_name(response.headers.get("content-disposition", ""))
                        return ReceivedFile(path, file.sha256.hexdigest(), file.size, name, tag)
                except httpx.TransportError as error:
                    if interruption == MAX_INTERRUPTIONS - 1:
                        raise _unreachable(address, error) from error
                    await asyncio.sleep(_PAUSE_SECONDS * interruption)
            raise AssertionError("the last interruption is raised")
        finally:
            file.close()

    @asynccontextmanager
    async def _opened(
        self, address: Address, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The answer at the end of the redirects, its body unread."""
        # The policy points at "/url", whatever part of the request led to the URL that it refuses.
        with pointers_below(address.place, instead_of="/url"):
            async with self._followed(address, headers or {}) as response:
                yield response

    @asynccontextmanager
    async def _followed(self, address: Address, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        url = httpx.URL(address.url)
        first = origin_of(address.url)
        for _ in range(MAX_REDIRECTS + 1):
            address.check(str(url))
            token = address.token if origin_of(str(url)) == first else None
            token = token or self._token_of(url)
            sent = {**headers, **({} if token is None else {"authorization": f"Bearer {token}"})}
            async with self._client.stream("GET", url, headers=sent) as response:
                location = response.headers.get("location")
                if not response.has_redirect_location or location is None:
                    yield response
                    return
            try:
                url = url.join(location)
            except (httpx.InvalidURL, UnicodeError) as error:
                raise RemoteUnavailable(f"{_shown(address.url)} redirects to something that is no URL.") from error
        raise RemoteUnavailable(f"{_shown(address.url)} redirects more than {MAX_REDIRECTS} times.")

    def _token_of(self, url: httpx.URL) -> str | None:
        """A host's token goes over https to the usual port alone: what else listens there may be somebody else's."""
        usual = url.scheme == "https" and url.port is None
        return self._tokens.get(origin_of(str(url))) or (self._tokens.get(url.host.lower()) if usual else None)


def origin_of(url: str) -> str:
    """Scheme, host and port, the latter only if it is not the usual one."""
    parsed = httpx.URL(url)
    return f"{parsed.scheme}://{parsed.netloc.decode('ascii')}"


async def _receive(
    response: httpx.Response,
    address: Address,
    file: _GrowingFile,
    limit: int,
    tell: Callable[[int, int | None], None],
) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RemoteUnavailable(f"{_shown(address.url)} answers in an encoding that was not asked for.")
    length = response.headers.get("content-length", "")
    total = file.size + int(length[:18]) if length.isdecimal() else None
    if total is not None and total > limit:
        raise too_large(address.place, total, limit)
    async for chunk in response.aiter_raw():
        file.write(chunk)
        if file.size > limit:
            raise too_large(address.place, file.size, limit)
        tell(file.size, total)


def too_large(place: str, size: int, limit: int) -> TooLarge:
    """What to say of files that are larger than they may be."""
    return TooLarge(
        f"What is to be fetched has {size} bytes or more; at most {limit} are accepted.",
        hint="Whoever runs the service can set RANKWISE_MAX_UPLOAD_BYTES.",
        errors=[FieldError(place, f"has more than {limit} bytes")],
    )


def check_digest(place: str, name: str, found: str, expected: str | None) -> None:
    """Raises FileBroken unless the SHA-256 is the expected one, if one is."""
    if expected is not None and found != expected:
        raise FileBroken(
            f"{name} has the SHA-256 {found}, and not {expected}.",
            hint="It was changed where it lies, or on the way.",
            errors=[FieldError(place, f"the file's is {found}")],
        )


def _check_status(response: httpx.Response, address: Address) -> None:
    status = response.status_code
    if response.is_success:
        return
    shown = _shown(address.url)
    if is_passing(status):
        raise RemoteUnavailable(f"{shown} answered {status}.")
    problem = {401: "wants a token", 403: "is not for this server", 404: "is not there", 410: "is gone"}.get(status)
    raise RequestInvalid(
        f"{shown} {problem or 'can not be had'}: its server answered {status}.",
        hint="Tokens are the operator's: RANKWISE_HUB_TOKENS, RANKWISE_IMPORT_TOKENS."
        if status in (401, 403)
        else None,
        errors=[FieldError(address.place, f"the server answered {status}")],
    )


def _continues(response: httpx.Response, size: int) -> bool:
    return re.match(rf"bytes {size}-", response.headers.get("content-range", "")) is not None


def _strong_tag(response: httpx.Response) -> str | None:
    tag: str = response.headers.get("etag", "")
    return tag if tag.startswith('"') and len(tag) <= 300 else None


def _file_name(disposition: str) -> str | None:
    """The file's name by a Content-Disposition header. It is used for nothing but what a person reads."""
    message = Message()
    message["content-disposition"] = disposition.encode("latin-1", "replace").decode("ascii", "replace")
    try:
        return message.get_filename() or None
    except (UnicodeError, LookupError):  # a charset that is none, or that the bytes are not in
        return None


def _shown(url: str) -> str:
    """A URL without its query, which may hold a secret."""
    return url.partition("?")[0][:300]


def _unreachable(address: Address, error: Exception) -> RemoteUnavailable:
    what = str(error) or type(error).__name__
    return RemoteUnavailable(f"{_shown(address.url)} can not be reached: {what}")
