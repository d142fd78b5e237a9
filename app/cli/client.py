"""The HTTP side of the command line: one client, whose errors are the service's problem documents."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import httpx

DEFAULT_SERVER = "http://127.0.0.1:8000"
CHUNK_BYTES = 1 << 20
RECONNECTS = 5
RECONNECT_SECONDS = 0.5
TERMINAL_STATES = ("succeeded", "failed", "cancelled")


class ProblemError(Exception):
    """An answer that is not a success, or none at all; `problem` is an RFC 9457 document."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title")))
        self.problem = dict(problem)


class _CountedFile:
    """A file that tells how much of it was read: what an upload's progress bar counts."""

    def __init__(self, stream: IO[bytes], advance: Callable[[int], None]) -> None:
        self._stream = stream
        self._advance = advance

    def read(self, count: int = -1) -> bytes:
        data = self._stream.read(count)
        self._advance(len(data))
        return data

    def __iter__(self) -> Iterator[bytes]:
        while data := self.read(CHUNK_BYTES):
            yield data

    def fileno(self) -> int:
        return self._stream.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


class Client:
    """Calls one service. A context manager; every method raises `ProblemError`.

    Args:
        silence: seconds after which a service that says nothing counts as not there; by default it may take its time,
            since a job's answer may be waited for.
    """

    def __init__(self, server: str | None = None, api_key: str | None = None, silence: float | None = None) -> None:
        # Here and not at the top: `rankwise --help` does without it.
        import httpx

        self.server = (server or os.environ.get("RANKWISE_SERVER") or DEFAULT_SERVER).rstrip("/")
        key = api_key or os.environ.get("RANKWISE_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(silence, connect=10.0)
        try:
            self._http = httpx.Client(base_url=self.server, headers=headers, timeout=timeout, trust_env=False)
        except httpx.InvalidURL as error:
            raise ProblemError(
                {"code": "invalid_server", "detail": f"{self.server!r} is no address: {error}"}
            ) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        return self._json("GET", path, params={name: value for name, value in params.items() if value is not None})

    def post(self, path: str, document: Any = None) -> Any:
        return self._json("POST", path, json=document)

    def put(self, path: str, document: Any, headers: Mapping[str, str] | None = None) -> Any:
        return self._json("PUT", path, json=document, headers=headers)

    def patch(self, path: str, document: Any, headers: Mapping[str, str] | None = None) -> Any:
        return self._json("PATCH", path, json=document, headers=headers)

    def delete(self, path: str, headers: Mapping[str, str] | None = None) -> None:
        self._json("DELETE", path, headers=headers)

    def upload(
        self,
        files: Sequence[Path],
        form: Mapping[str, Any],
        advance: Callable[[int], None],
        *,
        to: str = "/adapters",
        method: str = "POST",
    ) -> tuple[dict[str, Any], bool]:
        """Send files. Returns what was made of them, and whether it is new; `advance` gets the bytes of each read."""
        with ExitStack() as stack:
            parts = [
                ("file", (path.name, cast("IO[bytes]", _CountedFile(stack.enter_context(path.open("rb")), advance))))
                for path in files
            ]
            with self._connected():
                answer = self._http.request(method, to, files=parts, data=dict(form))
        return self._checked(answer).json(), answer.status_code == 201

    def download(
        self, path: str, folder: Path, advance: Callable[[int, int | None], None], **params: Any
    ) -> tuple[str, Path]:
        """Stream an answer's body into `folder`. Returns the name that the service gave it, and the file.

        `advance` is given the bytes of each chunk and the size of the whole, if the service says it.
        """
        with self._connected(), self._http.stream("GET", path, params=params) as answer:
            if answer.is_error:
                answer.read()
            self._checked(answer)
            name = _file_name(answer.headers.get("content-disposition", ""))
            total = answer.headers.get("content-length")
            target = folder / name
            with target.open("wb") as stream:
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    stream.write(chunk)
                    advance(len(chunk), int(total) if total else None)
        return name, target

    def text(self, path: str, accept: str = "*/*", **params: Any) -> Iterator[str]:
        """The text of an answer, piece by piece as it comes."""
        given = {name: value for name, value in params.items() if value is not None}
        with self._connected(), self._http.stream("GET", path, params=given, headers={"Accept": accept}) as answer:
            if answer.is_error:
                answer.read()
            yield from self._checked(answer).iter_text()

    def events(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The job's events as (type, data) until it has ended; a broken stream is taken up where it broke.

        Raises:
            ProblemError: no such job, or the stream broke `RECONNECTS` times without an event between.
        """
        import httpx

        last: str | None = None
        broken = 0
        while True:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
            reason: Exception | str = "the stream of events ended before the job did"
            try:
                with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
                    if answer.is_error:
                        answer.read()
                    if self._checked(answer).status_code == 204:
                        return
                    for identifier, kind, data in _parse_events(answer.iter_lines()):
                        last, broken = identifier or last, 0
                        yield kind, data
                        if data.get("state") in TERMINAL_STATES:
                            return
            except httpx.TransportError as error:
                reason = error
            broken += 1
            if broken > RECONNECTS:
                raise self._unreachable(reason)
            time.sleep(RECONNECT_SECONDS * broken)

    def send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """The answer to one request, which is a success."""
        with self._connected():
            answer = self._http.request(method, path, **kwargs)
        return self._checked(answer)

    def _json(self, method: str, path: str, **kwargs: Any) -> Any:
        body = self.send(method, path, **kwargs)
        return body.json() if body.content else None

    @contextmanager
    def _connected(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception | str) -> ProblemError:
        return ProblemError(
            {
                "code": "unreachable",
                "detail": f"no answer from {self.server}: {error or type(error).__name__}",
                "hint": "start the service with `rankwise serve`, or point RANKWISE_SERVER at one",
            }
        )

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        if answer.is_success:
            return answer
        try:
            problem = answer.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            problem = {
                "code": "not_rankwise",
                "detail": f"{self.server} answered {answer.status_code} {answer.reason_phrase}, not as Rankwise does",
                "hint": "is RANKWISE_SERVER the address of a Rankwise service?",
            }
        raise ProblemError({"status": answer.status_code, **problem})


def _file_name(disposition: str) -> str:
    """The last part of the file name in a Content-Disposition header; never a path."""
    match = re.search(r'filename="([^"]+)"', disposition) or re.search(r"filename=([^;\s]+)", disposition)
    name = Path(match[1]).name if match else ""
    return name if name not in {"", ".", ".."} else "adapter"


def _parse_events(lines: Iterator[str]) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
    """Server-sent events as (id, type, data); comments and events without data are passed over."""
    identifier: str | None = None
    kind, data = "message", list[str]()
    for line in lines:
        if not line:
            if data:
                yield identifier, kind, json.loads("\n".join(data))
            kind, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "id":
            identifier = value
        elif field == "event":
            kind = value
        elif field == "data":
            data.append(value)
