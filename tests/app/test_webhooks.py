from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from patience import wait_for
from standardwebhooks import Webhook

from storage import keys

URL = "https://hooks.example.com/rankwise"
DEADLINE = 90.0


@pytest.fixture
def hook(server: Any) -> dict[str, Any]:
    """A webhook as the answer to its making shows it."""
    response = server.client.post("/webhooks", json={"url": URL, "events": ["job.failed"], "description": "ci"})
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/webhooks/{found['id']}"
    return found


def test_the_secret_is_shown_once(server: Any, hook: dict[str, Any]) -> None:
    secret = hook.pop("secret")
    assert secret.startswith("whsec_")
    assert (hook["url"], hook["events"], hook["description"], hook["enabled"]) == (URL, ["job.failed"], "ci", True)
    path = f"/webhooks/{hook['id']}"
    assert server.client.get(path).json() == hook
    assert server.client.get("/webhooks").json() == {"items": [hook], "next": None}
    changed = server.client.patch(path, json={"description": "other"}).json()
    assert changed == {**hook, "description": "other"}
    rotated = server.client.post(f"{path}/rotate-secret")
    assert rotated.status_code == 200
    assert rotated.json()["secret"] != secret


def test_every_event_is_the_default(server: Any) -> None:
    assert server.client.post("/webhooks", json={"url": URL}).json()["events"] == ["*"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": "http://hooks.example.com/"}, "/url"),
        ({"url": "ftp://hooks.example.com/"}, "/url"),
        ({"url": "https://user:pass@hooks.example.com/"}, "/url"),
        ({"url": "https://127.0.0.1/"}, "/url"),
        ({"url": "https://[::1]/"}, "/url"),
        ({"url": "https://169.254.169.254/latest/meta-data"}, "/url"),
        ({"url": "https://localhost:8000/"}, "/url"),
        ({"url": "https://2130706433/"}, "/url"),
        ({"url": f"https://hooks.example.com/{'x' * 2000}"}, "/url"),
        ({"url": URL, "events": []}, "/events"),
        ({"url": URL, "events": ["job.started"]}, "/events/0"),
        ({"url": URL, "secret": "whsec_own"}, "/secret"),
        ({"url": URL, "description": "x" * 1001}, "/description"),
    ],
)
def test_what_can_not_be_a_webhook(server: Any, body: dict[str, Any], pointer: str) -> None:
    response = server.client.post("/webhooks", json=body)
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert pointer in {item["pointer"] for item in response.json()["errors"]}, response.text
    assert server.client.get("/webhooks").json()["items"] == []


def test_a_change_of_the_url_is_checked_too(server: Any, hook: dict[str, Any]) -> None:
    path = f"/webhooks/{hook['id']}"
    assert server.client.patch(path, json={"url": "https://10.0.0.1/"}).status_code == 422
    assert server.client.get(path).json()["url"] == URL
    assert (
        server.client.patch(path, json={"url": "https://new.example.com/"}).json()["url"] == "https://new.example.com/"
    )


def test_settings_open_what_is_closed(serve: Any) -> None:
    server = serve(webhook_allow_http=True, webhook_allowed_networks="10.0.0.0/8, 127.0.0.1")
    allowed = ("http://10.1.2.3/", "https://127.0.0.1:9000/", "http://hooks.example.com/")
    for url in allowed:
        assert server.client.post("/webhooks", json={"url": url}).status_code == 201, url
    for url in ("http://127.0.0.2/", "http://192.168.0.1/"):
        assert server.client.post("/webhooks", json={"url": url}).status_code == 422, url


def test_deleting_hides_it(server: Any, hook: dict[str, Any]) -> None:
    path = f"/webhooks/{hook['id']}"
    assert server.client.delete(path).status_code == 204
    for method, sub in (
        ("GET", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("POST", "/test"),
        ("POST", "/rotate-secret"),
        ("GET", "/deliveries"),
        ("POST", f"/deliveries/msg_{'0' * 32}/replay"),
    ):
        options = {"json": {}} if method == "PATCH" else {}
        assert server.client.request(method, path + sub, **options).status_code == 404, (method, sub)


def test_a_repeated_request_makes_one(server: Any) -> None:
    headers = {"Idempotency-Key": "once"}
    first, second = (server.client.post("/webhooks", json={"url": URL}, headers=headers) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["idempotency-replayed"] == "true"
    path = f"/webhooks/{first.json()['id']}"
    tests = [server.client.post(f"{path}/test", headers={"Idempotency-Key": "test"}).json()["id"] for _ in range(2)]
    assert len(set(tests)) == 1
    assert len(server.client.get("/webhooks").json()["items"]) == 1


def test_a_disabled_webhook_is_not_tested(server: Any, hook: dict[str, Any]) -> None:
    path = f"/webhooks/{hook['id']}"
    sent = server.client.post(f"{path}/test")
    assert sent.status_code == 202
    assert sent.json()["state"] == "pending"
    server.client.patch(path, json={"enabled": False})
    assert server.client.post(f"{path}/test").status_code == 409
    (given_up,) = server.client.get(f"{path}/deliveries", params={"state": "failed"}).json()["items"]
    assert given_up["id"] == sent.json()["id"]
    assert given_up["next_attempt_at"] is None
    assert "disabled" in given_up["last_error"]


def test_keys_see_their_own_webhooks_and_need_the_scopes(serve: Any) -> None:
    server = serve(api_keys=True)

    def bearer(*scopes: str) -> dict[str, str]:
        with server.services.database.write() as session:
            return {"Authorization": f"Bearer {keys.create_key(session, 'k', scopes)[1]}"}

    reader, writer, other = bearer("read"), bearer("read", "write"), bearer("admin")
    assert server.client.post("/webhooks", json={"url": URL}, headers=reader).status_code == 403
    made = server.client.post("/webhooks", json={"url": URL}, headers=writer)
    assert made.status_code == 201
    path = made.headers["location"]
    assert server.client.get(path, headers=writer).status_code == 200
    assert server.client.get(path, headers=other).status_code == 404
    assert server.client.get("/webhooks", headers=reader).json()["items"] == []
    assert server.client.delete(path, headers=other).status_code == 404


class Receiver(http.server.ThreadingHTTPServer):
    """Keeps what it gets; answers `status`."""

    def __init__(self) -> None:
        self.status = 204
        self.got: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({key.lower(): value for key, value in self.headers.items()}, body))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                return

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(DEADLINE)


def test_the_end_of_a_job_reaches_its_receiver(
    serve: Any, receiver: Receiver, adapter_files: Any, fake_pool: Callable[..., Any]
) -> None:
    server = serve(webhook_allow_http=True, webhook_allowed_networks="127.0.0.1")
    url = f"http://127.0.0.1:{receiver.server_port}/in"
    hook = server.client.post("/webhooks", json={"url": url, "events": ["job.succeeded"]}).json()
    adapter = server.upload(adapter_files().parts()).json()["id"]
    pool = fake_pool(server)
    for end in (pool.fail, pool.succeed):
        job = server.client.post("/merge", json={"adapters": [{"id": adapter}], "method": "cat"}).json()["id"]
        end(pool.claim())
    wait_for(lambda: len(receiver.got) == 1)
    content = Webhook(hook["secret"]).verify(receiver.got[0][1], receiver.got[0][0])
    assert (content["type"], content["data"]["job"]) == ("job.succeeded", job)
    assert server.client.get(content["data"]["links"]["job"]).status_code == 200
    path = f"/webhooks/{hook['id']}/deliveries"

    def delivery() -> dict[str, Any]:
        (item,) = server.client.get(path).json()["items"]
        found: dict[str, Any] = item
        return found

    wait_for(lambda: delivery()["state"] == "delivered")
    assert (delivery()["job_id"], delivery()["attempts"], delivery()["last_status"]) == (job, 1, 204)
    replayed = server.client.post(f"{path}/{delivery()['id']}/replay")
    assert replayed.status_code == 202
    assert replayed.json()["state"] == "pending"
    wait_for(lambda: len(receiver.got) == 2)
    assert receiver.got[1][0]["webhook-id"] == receiver.got[0][0]["webhook-id"]
    assert receiver.got[1][1] == receiver.got[0][1]
    wait_for(lambda: delivery()["state"] == "delivered")
    receiver.status = 410
    server.client.post(f"/webhooks/{hook['id']}/test")
    wait_for(lambda: not server.client.get(f"/webhooks/{hook['id']}").json()["enabled"])
    assert server.client.post(f"{path}/{delivery_of(server, path, 'failed')}/replay").status_code == 409


def delivery_of(server: Any, path: str, state: str) -> str:
    (item,) = server.client.get(path, params={"state": state}).json()["items"]
    return str(item["id"])


def test_deliveries_are_pages(server: Any, hook: dict[str, Any]) -> None:
    path = f"/webhooks/{hook['id']}"
    sent = [server.client.post(f"{path}/test").json()["id"] for _ in range(3)]
    first = server.client.get(f"{path}/deliveries", params={"limit": 2}).json()
    second = server.client.get(f"{path}/deliveries", params={"limit": 2, "cursor": first["next"]}).json()
    assert [item["id"] for item in first["items"] + second["items"]] == sent[::-1]
    assert server.client.get(f"{path}/deliveries", params={"state": "lost"}).status_code == 422
