"""Logs: one JSON object a line, with the request's id and without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from app.logs import REDACTED, configure_logging, redact

SECRET = "rw_0123456789ab_" + "A" * 43


@pytest.fixture
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_redaction() -> None:
    assert redact(f"key {SECRET} here") == f"key {REDACTED} here"
    assert redact("sign with whsec_QUJD+/xyz=, now") == f"sign with {REDACTED}, now"
    assert redact("postgresql://user:hunter2@host/db") == f"postgresql://user:{REDACTED}@host/db"
    assert redact("sqlite:////data/rankwise.db") == "sqlite:////data/rankwise.db"
    assert redact({"Authorization": "x", "api_key": "y", "X-API-Key": "z", "password": None, "path": "/a"}) == {
        "Authorization": REDACTED,
        "api_key": REDACTED,
        "X-API-Key": REDACTED,
        "password": None,
        "path": "/a",
    }
    assert redact({"nested": [{"token": "t"}, (SECRET, 1)]}) == {"nested": [{"token": REDACTED}, [REDACTED, 1]]}


def test_lines_are_json(logging_restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    configure_logging("info", "json")  # twice must not print twice
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        structlog.stdlib.get_logger("app.test").info("started", url=f"x {SECRET}", count=3)
    logging.getLogger("elsewhere").warning("plain %s", "words")
    logging.getLogger("elsewhere").debug("not shown")
    try:
        raise ValueError(f"broke with {SECRET}")
    except ValueError:
        structlog.stdlib.get_logger("app.test").exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["started", "plain words", "failed"]
    assert lines[0] | {"timestamp": ""} == {
        "event": "started",
        "url": f"x {REDACTED}",
        "count": 3,
        "request_id": "r-1",
        "level": "info",
        "logger": "app.test",
        "timestamp": "",
    }
    assert "ValueError" in lines[2]["exception"]
    assert SECRET not in json.dumps(lines)


def test_requests_are_logged_without_their_secrets(
    logging_restored: None, capfd: pytest.CaptureFixture[str], serve: Any
) -> None:
    server = serve(log_level="info")
    server.client.get("/adapters", headers={"X-Request-ID": "mine", "Authorization": f"Bearer {SECRET}"})
    server.client.get("/healthz")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    (line,) = [item for item in requests if item.get("request_id") == "mine"]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/adapters", 200)
    assert line["milliseconds"] > 0
    assert "/healthz" not in [item["route"] for item in requests]
    assert SECRET not in json.dumps(lines)
