"""Attempts and their logs over HTTP: while they run, afterwards, and when something is away."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from app import job_logs as reading
from app.cli import run
from app.cli.client import Client
from app.cli.output import duration
from storage import claims, job_logs, log_text
from storage import database as clock
from storage.job_logs import Piece
from storage.tables import JobAttemptRow

Job = tuple[str, int]


@pytest.fixture
def job(server: Any, two_adapters: list[str]) -> str:
    response = server.client.post("/merge", json={"adapters": [{"id": key} for key in two_adapters]})
    assert response.status_code == 202, response.text
    identifier: str = response.json()["id"]
    return identifier


class Writer:
    """Does what a worker and its keeper do to the log of a job that runs."""

    def __init__(self, server: Any, key: Job) -> None:
        self.server, self.key = server, key
        self.offset = 0

    def write(self, text: str) -> None:
        piece = Piece(self.offset, text)
        with self.server.services.database.write() as session:
            assert job_logs.append_pieces(session, *self.key, [piece])
        self.offset = piece.end

    def keep(self, data: bytes) -> None:
        sha256 = self.server.services.blobs.put_bytes(data)
        with self.server.services.database.write() as session:
            claims.record_log(session, *self.key, sha256)
            job_logs.drop_pieces(session, *self.key)

    def age(self, seconds: float) -> None:
        """Let the end of the attempt lie so far back."""
        with self.server.services.database.write() as session:
            session.execute(
                update(JobAttemptRow)
                .where(JobAttemptRow.job_id == self.key[0], JobAttemptRow.attempt == self.key[1])
                .values(finished_at=clock.now(session) - timedelta(seconds=seconds))
            )


@pytest.fixture
def pool(server: Any, fake_pool: Any, job: str) -> Any:
    return fake_pool(server)


@pytest.fixture
def writer(server: Any, pool: Any) -> Writer:
    return Writer(server, pool.claim())


def test_a_job_that_has_not_run_has_no_log(server: Any, job: str) -> None:
    response = server.client.get(f"/jobs/{job}/logs")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert "has not run" in response.json()["detail"]
    assert server.client.get(f"/jobs/{job}/attempts").json() == {"items": []}
    for path in ("logs", "attempts"):
        assert server.client.get(f"/jobs/job_{'0' * 32}/{path}").status_code == 404


def test_bad_parameters(server: Any, job: str) -> None:
    for query, pointer in (("attempt=0", "/query/attempt"), ("follow=maybe", "/query/follow"), ("x=1", "/query/x")):
        response = server.client.get(f"/jobs/{job}/logs?{query}")
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, pointer)


def test_what_a_running_attempt_has_written_so_far(server: Any, job: str, writer: Writer) -> None:
    empty = server.client.get(f"/jobs/{job}/logs")
    assert (empty.status_code, empty.content) == (200, b"")
    for number in range(40):
        writer.write(f"zwölf {number}\n")
    response = server.client.get(f"/jobs/{job}/logs")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["x-attempt"] == "1"
    assert response.text == "".join(f"zwölf {number}\n" for number in range(40))


def test_a_log_of_a_running_attempt_with_a_gap(server: Any, job: str, writer: Writer) -> None:
    writer.write("head\n")
    writer.offset += 1000
    writer.write("tail\n")
    assert server.client.get(f"/jobs/{job}/logs").text == f"head\n{log_text.mark(1000)}tail\n"


def test_the_log_that_was_kept(server: Any, job: str, pool: Any, writer: Writer) -> None:
    writer.write("one\n")
    pool.succeed(writer.key)
    writer.keep(b"one\ntwo\n")
    for query in ("", "?attempt=1", "?follow=true"):
        response = server.client.get(f"/jobs/{job}/logs{query}")
        assert (response.text, response.headers["content-length"]) == ("one\ntwo\n", "8")
    assert server.client.get(f"/jobs/{job}/logs?attempt=2").status_code == 404


def test_each_attempt_has_its_log(server: Any, job: str, pool: Any, writer: Writer) -> None:
    with server.services.database.write() as session:
        error = {"code": "worker_crashed", "detail": "it did"}
        ended = {"code": None, "signal": 9, "peak_memory": 1000}
        claims.requeue(session, *writer.key, delay_seconds=0, error=error, exit=ended)
    writer.keep(b"first\n")
    second = Writer(server, pool.claim())
    second.write("second\n")
    newest = server.client.get(f"/jobs/{job}/logs")
    assert (newest.text, newest.headers["x-attempt"]) == ("second\n", "2")
    assert server.client.get(f"/jobs/{job}/logs?attempt=1").text == "first\n"
    one, two = server.client.get(f"/jobs/{job}/attempts").json()["items"]
    assert one.pop("started_at") <= one.pop("finished_at")
    assert one == {
        "attempt": 1, "server": "srv_fake", "slot": "cpu:0", "pid": None, "outcome": "lost", "has_log": True,
        "exit": {"code": None, "signal": 9, "peak_memory": 1000},
    }  # fmt: skip
    assert (two["attempt"], two["finished_at"], two["outcome"], two["has_log"]) == (2, None, None, False)


def follow(server: Any, job: str) -> Iterator[str]:
    with (
        httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client,
        client.stream("GET", f"/jobs/{job}/logs", params={"follow": "true"}) as stream,
    ):
        assert stream.status_code == 200
        yield from stream.iter_lines()


def test_following_a_log_to_its_end(server: Any, job: str, pool: Any, writer: Writer) -> None:
    writer.write("one\n")
    lines = follow(server, job)
    assert next(lines) == "one"
    writer.write("two\nthree")
    assert next(lines) == "two"
    pool.succeed(writer.key)
    writer.keep(b"one\ntwo\nthree and four\nfive\n")
    assert list(lines) == ["three and four", "five"]


def test_following_a_log_that_was_cut(server: Any, job: str, pool: Any, writer: Writer) -> None:
    """The follower has lines of the middle that nobody keeps, and goes on in the tail."""
    writer.write("head\n")
    lines = follow(server, job)
    assert next(lines) == "head"
    writer.offset = log_text.HEAD_BYTES + 40
    writer.write("middle\n")
    assert next(lines) == ""
    assert next(lines).startswith(f"[… {log_text.HEAD_BYTES + 35} bytes of the log are left out")
    assert next(lines) == "middle"
    tail = b"end\n".rjust(log_text.TAIL_BYTES, b"x")
    pool.succeed(writer.key)
    writer.keep(b"h" * log_text.HEAD_BYTES + log_text.mark(1000).encode() + tail)
    rest = list(lines)
    assert rest[:2] == ["", f"[… {1000 - 47} bytes of the log are left out …]"]
    assert "".join(rest[2:]) == tail.decode().rstrip("\n")


def test_a_follower_waits_for_the_last_pieces(server: Any, job: str, pool: Any, writer: Writer) -> None:
    writer.write("one\n")
    lines = follow(server, job)
    assert next(lines) == "one"
    pool.succeed(writer.key)
    keeping = threading.Timer(0.7, writer.keep, [b"one\ntwo\n"])
    keeping.start()
    assert list(lines) == ["two"]
    keeping.join()


def test_a_reader_right_after_the_end_gets_the_whole_log(
    server: Any, job: str, pool: Any, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "EMPTY_AFTER_SECONDS", 30.0)
    pool.succeed(writer.key)
    keeping = threading.Timer(0.5, writer.keep, [b"one\n"])
    keeping.start()
    assert server.client.get(f"/jobs/{job}/logs").text == "one\n"
    keeping.join()


@pytest.mark.parametrize("query", ["", "?follow=true"])
def test_a_log_whose_end_was_lost_with_its_host(server: Any, job: str, pool: Any, writer: Writer, query: str) -> None:
    writer.write("all that is known\n")
    pool.succeed(writer.key)
    writer.age(reading.KEPT_WITHIN_SECONDS)
    assert server.client.get(f"/jobs/{job}/logs{query}").text == "all that is known\n"


@pytest.mark.parametrize("query", ["", "?follow=true"])
def test_an_attempt_that_wrote_nothing(server: Any, job: str, pool: Any, writer: Writer, query: str) -> None:
    pool.succeed(writer.key)
    writer.age(reading.EMPTY_AFTER_SECONDS)
    response = server.client.get(f"/jobs/{job}/logs{query}")
    assert (response.status_code, response.content) == (200, b"")


def test_a_follower_outlasts_an_outage_of_the_database(server: Any, job: str, pool: Any, writer: Writer) -> None:
    writer.write("one\n")
    lines = follow(server, job)
    assert next(lines) == "one"
    path = server.services.database.path
    away = path.with_suffix(".away")
    path.rename(away)
    back = threading.Timer(0.6, away.rename, [path])
    back.start()
    back.join()
    writer.write("two\n")
    assert next(lines) == "two"
    pool.succeed(writer.key)
    writer.keep(b"one\ntwo\n")
    assert list(lines) == []


def test_a_follower_is_cut_off_by_a_long_outage(
    server: Any, job: str, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "OUTAGE_SECONDS", 0.2)
    writer.write("one\n")
    lines = follow(server, job)
    assert next(lines) == "one"
    path = server.services.database.path
    away = path.with_suffix(".away")
    path.rename(away)
    with pytest.raises(httpx.RemoteProtocolError):
        list(lines)
    away.rename(path)


def test_a_kept_log_whose_blob_is_missing(server: Any, job: str, pool: Any, writer: Writer) -> None:
    pool.succeed(writer.key)
    with server.services.database.write() as session:
        claims.record_log(session, *writer.key, "a" * 64)
    response = server.client.get(f"/jobs/{job}/logs")
    assert (response.status_code, response.json()["code"]) == (500, "blob_missing")


def test_what_lies_ahead_of_a_job(server: Any, job: str, two_adapters: list[str], fake_pool: Any) -> None:
    alone = server.client.get(f"/jobs/{job}").json()
    assert alone["position"] == 1
    assert alone["waiting"]["reason"] == "no_server"
    pool = fake_pool(server)
    second = server.client.post("/merge", json={"adapters": [{"id": two_adapters[0]}]}).json()
    assert (second["position"], second["waiting"], second["eta_seconds"]) == (2, None, None)
    claimed = pool.claim()
    waits = server.client.get(f"/jobs/{second['id']}").json()
    assert (waits["position"], waits["waiting"]["reason"]) == (1, "slots_busy")
    pool.progress(claimed, 0.5, "half")
    runs = server.client.get(f"/jobs/{job}").json()
    assert "position" not in runs
    assert runs["waiting"] is None
    assert 0 <= runs["eta_seconds"] < 30


def test_an_error_names_its_findings_and_the_last_lines(server: Any, job: str, pool: Any) -> None:
    key = pool.claim()
    error = {
        "code": "internal_error", "detail": "it broke", "hint": None, "log": ["Traceback", "KeyError"],
        "errors": [{"pointer": "/weight", "message": "negative"}],
    }  # fmt: skip
    with server.services.database.write() as session:
        claims.finish_failed(session, *key, error, {"code": 1, "signal": None})
    shown = server.client.get(f"/jobs/{job}").json()["error"]
    assert shown["errors"] == [{"pointer": "/weight", "message": "negative"}]
    assert shown["log"] == ["Traceback", "KeyError"]
    (listed,) = server.client.get("/jobs").json()["items"]
    assert (listed["error"]["errors"], listed["error"]["log"]) == (shown["errors"], None)


@pytest.fixture
def cli(server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that succeeds; gives what it printed."""
    monkeypatch.setenv("RANKWISE_SERVER", server.url)

    def call(*arguments: str) -> str:
        code = run(list(arguments))
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


def test_the_command_line_prints_logs_and_attempts(
    server: Any, job: str, pool: Any, writer: Writer, cli: Callable[..., str]
) -> None:
    writer.write("zwölf\n")
    assert cli("jobs", "logs", job) == "zwölf\n"
    assert "running" in cli("jobs", "attempts", job)
    with server.services.database.write() as session:
        error = {"code": "worker_crashed", "detail": "it did"}
        claims.requeue(session, *writer.key, delay_seconds=0, error=error, exit={"code": None, "signal": 9})
    writer.keep(b"first\n")
    assert cli("jobs", "logs", job, "--attempt", "1", "--follow") == "first\n"
    listed = cli("jobs", "attempts", job)
    assert "signal 9" in listed
    assert "lost" in listed
    (item,) = json.loads(cli("jobs", "attempts", job, "--json"))["items"]
    assert item["has_log"] is True


def test_the_command_line_follows_a_job_through_its_attempts(
    server: Any, job: str, pool: Any, cli: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started before the job runs, and ends with the job, not with its first attempt."""
    asked = threading.Event()
    events = Client.events

    def noted(client: Client, job_id: str) -> Any:
        asked.set()
        return events(client, job_id)

    monkeypatch.setattr(Client, "events", noted)

    def live() -> None:
        assert asked.wait(60)
        first = Writer(server, pool.claim())
        first.write("one\n")
        with server.services.database.write() as session:
            error = {"code": "worker_crashed", "detail": "it did"}
            claims.requeue(session, *first.key, delay_seconds=0, error=error, exit=None)
        first.keep(b"one\nlost\n")
        second = Writer(server, pool.claim())
        second.write("two\n")
        pool.succeed(second.key)
        second.keep(b"two\nend\n")

    alive = threading.Thread(target=live)
    alive.start()
    assert cli("jobs", "logs", job, "--follow") == "one\nlost\ntwo\nend\n"
    alive.join()


def test_the_command_line_shows_what_a_job_waits_for(job: str, cli: Callable[..., str]) -> None:
    shown = cli("jobs", "get", job)
    assert "[no_server]" in shown
    assert "waits for" in shown


def test_the_command_line_shows_when_a_job_will_be_done(
    server: Any, job: str, pool: Any, cli: Callable[..., str]
) -> None:
    pool.progress(pool.claim(), 0.5, "half")
    assert "done in about" in cli("jobs", "get", job)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (42.4, "42 s"), (60, "1 min"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (356400, "4 d 3 h")],
)
def test_time_spans_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
