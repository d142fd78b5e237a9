"""The client where a well-behaved service does not lead it: broken streams, foreign servers, hostile names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.cli import client as client_module
from app.cli.client import RECONNECTS, Client, ProblemError
from app.cli.progress import require_success


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """An HTTP server on loopback whose every GET is given to `answer`; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_SECONDS", 0.0)


@pytest.mark.usefixtures("_no_pause")
def test_a_broken_stream_is_taken_up_where_it_broke() -> None:
    asked: list[str | None] = []
    parts = [
        b': hello\n\nid: 1\nevent: state\ndata: {"state": "running"}\n\nid: 2\nevent: progress\ndata: {"fraction"',
        b'id: 2\nevent: progress\ndata: {"fraction":\ndata: 0.5}\n\n',
        b'id: 3\nevent: state\ndata: {"state": "succeeded"}\n\n',
    ]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.headers.get("Last-Event-ID"))
        send(handler, parts[len(asked) - 1], content_type="text/event-stream")

    with serving(answer) as url, Client(url) as client:
        events = list(client.events("job_1"))
    assert events == [
        ("state", {"state": "running"}),
        ("progress", {"fraction": 0.5}),
        ("state", {"state": "succeeded"}),
    ]
    assert asked == [None, "1", "2"]


@pytest.mark.usefixtures("_no_pause")
def test_a_stream_that_never_gets_anywhere_is_given_up() -> None:
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        send(handler, b"")

    with serving(answer) as url, Client(url) as client, pytest.raises(ProblemError, match="ended before the job"):
        list(client.events("job_1"))
    assert len(asked) == RECONNECTS + 1


def test_no_more_events_ends_the_stream() -> None:
    with serving(lambda handler: send(handler, b"", 204)) as url, Client(url) as client:
        assert list(client.events("job_1")) == []


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b"[]", b""])
def test_a_server_that_is_something_else(body: bytes) -> None:
    with (
        serving(lambda handler: send(handler, body, 502)) as url,
        Client(url) as client,
        pytest.raises(ProblemError) as caught,
    ):
        client.get("/jobs")
    assert caught.value.problem["code"] == "not_rankwise"
    assert caught.value.problem["status"] == 502
    assert "RANKWISE_SERVER" in caught.value.problem["hint"]


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('attachment; filename="plain.zip"', "plain.zip"),
        ('attachment; filename="../../etc/passwd"', "passwd"),
        ('attachment; filename=".."', "adapter"),
        ("attachment; filename=bare.zip; x=y", "bare.zip"),
        ("attachment", "adapter"),
    ],
)
def test_a_download_stays_in_its_folder(tmp_path: Path, disposition: str, name: str) -> None:
    seen: list[tuple[int, int | None]] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        send(handler, b"bytes", content_disposition=disposition, content_length="5")

    with serving(answer) as url, Client(url) as client:
        found, file = client.download("/x", tmp_path, lambda count, total: seen.append((count, total)))
    assert found == name
    assert file == tmp_path / name
    assert file.read_bytes() == b"bytes"
    assert seen == [(5, 5)]


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_API_KEY", "rw_from_environment")
    seen: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("Authorization"))
        send(handler, b"{}")

    with serving(answer) as url:
        for key in (None, "rw_given"):
            with Client(url, key) as client:
                client.get("/jobs")
    assert seen == ["Bearer rw_from_environment", "Bearer rw_given"]


def test_a_failed_job_is_a_problem_with_its_own_code() -> None:
    job = {"id": "job_1", "state": "failed", "error": {"code": "worker_crashed", "detail": "gone", "hint": "look"}}
    with pytest.raises(ProblemError, match="gone") as caught:
        require_success(job)
    assert caught.value.problem["code"] == "worker_crashed"
    assert caught.value.problem["hint"] == "look"
    with pytest.raises(ProblemError, match="cancelled") as caught:
        require_success({"id": "job_2", "state": "cancelled", "error": None})
    assert caught.value.problem["code"] == "job_cancelled"
