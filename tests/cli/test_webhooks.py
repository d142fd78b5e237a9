"""`rankwise webhooks` against a real service, whose courier refuses what is not public."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("remote")
URL = "https://192.0.2.7/in"  # an address for documentation: nothing is ever sent there
NAME = "https://hooks.invalid/in"


@pytest.fixture
def webhook(cli: Callable[..., Any]) -> dict[str, Any]:
    made = cli("webhooks", "create", NAME, "--event", "job.failed", "--description", "ci", "--json")
    assert made.code == 0, made.err
    found: dict[str, Any] = made.json
    return found


def test_the_secret_alone_is_on_standard_output(cli: Callable[..., Any]) -> None:
    made = cli("webhooks", "create", NAME)
    assert made.code == 0, made.err
    assert made.out.startswith("whsec_")
    assert made.out.count("\n") == 1
    assert "not shown again" in made.err


def test_an_address_that_is_not_public(cli: Callable[..., Any]) -> None:
    refused = cli("webhooks", "create", URL, "--json")
    assert refused.code == 1
    assert refused.json["code"] == "invalid_request"
    assert refused.json["errors"][0]["pointer"] == "/url"
    assert cli("webhooks", "create", NAME, "--event", "job.started").code == 1


def test_list_get_and_delete(cli: Callable[..., Any], webhook: dict[str, Any]) -> None:
    listed = cli("webhooks", "list", "--limit", "1", "--json").json["items"]
    assert listed == [{key: value for key, value in webhook.items() if key != "secret"}]
    shown = cli("webhooks", "get", webhook["id"])
    assert NAME in shown.out
    assert webhook["secret"] not in shown.out + cli("webhooks", "list").out
    assert cli("webhooks", "delete", webhook["id"]).code == 0
    assert cli("webhooks", "get", webhook["id"], "--json").json["code"] == "not_found"


def test_a_test_message_and_its_fate(cli: Callable[..., Any], webhook: dict[str, Any]) -> None:
    sent = cli("webhooks", "test", webhook["id"], "--json").json
    pause, deadline = threading.Event(), time.monotonic() + 60
    while True:
        (item,) = cli("webhooks", "deliveries", webhook["id"], "--json").json["items"]
        if item["last_error"] is not None:
            break
        assert time.monotonic() < deadline, "it was not tried"
        pause.wait(0.1)
    assert item["id"] == sent["id"]
    assert item["state"] == "pending"
    shown = cli("webhooks", "deliveries", webhook["id"], "--state", "pending")
    assert sent["id"] in shown.out
    assert cli("webhooks", "replay", webhook["id"], sent["id"], "--json").json["code"] == "state_conflict"
    assert cli("webhooks", "disable", webhook["id"], "--json").json["enabled"] is False
    assert cli("webhooks", "deliveries", webhook["id"], "--state", "pending", "--json").json["items"] == []
    assert cli("webhooks", "test", webhook["id"], "--json").json["code"] == "state_conflict"
    assert cli("webhooks", "enable", webhook["id"]).code == 0
    assert cli("webhooks", "replay", webhook["id"], sent["id"]).out.startswith(sent["id"])


def test_a_new_secret(cli: Callable[..., Any], webhook: dict[str, Any]) -> None:
    rotated = cli("webhooks", "rotate", webhook["id"])
    assert rotated.out.startswith("whsec_")
    assert rotated.out.strip() != webhook["secret"]
