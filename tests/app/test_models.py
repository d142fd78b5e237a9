"""Base models: registration by hub id and by folder, idempotency, deprecation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.model_registration import resolve_under
from artifacts.errors import RequestInvalid


@pytest.fixture
def model_folder(tmp_path: Path, make_safetensors: Any) -> Path:
    """A tiny transformers folder under a model root."""
    folder = tmp_path / "roots" / "tiny"
    folder.mkdir(parents=True)
    weights = {"model.layers.0.self_attn.q_proj.weight": ("F32", [6, 8], b"\1" * 192)}
    (folder / "model.safetensors").write_bytes(make_safetensors(weights))
    (folder / "config.json").write_text(json.dumps({"architectures": ["TinyForCausalLM"], "model_type": "tiny"}))
    return folder


def test_hub_ids_need_no_network_and_are_idempotent(server: Any) -> None:
    body = {"hub_id": "acme/tiny-llm", "revision": "a" * 40}
    first = server.client.post("/models", json=body)
    assert first.status_code == 201, first.text
    model = first.json()
    assert first.headers["location"] == f"/models/{model['id']}"
    assert (model["name"], model["source"], model["revision"]) == ("acme/tiny-llm", "hub", "a" * 40)
    again = server.client.post("/models", json=body)
    assert (again.status_code, again.json()) == (200, model)
    assert server.client.get(first.headers["location"]).json() == model
    assert server.client.get("/models").json() == {"items": [model], "next": None}
    other = server.client.post("/models", json={**body, "revision": "b" * 40})
    assert (other.status_code, other.json()["code"]) == (409, "conflict")
    named = server.client.post("/models", json={**body, "revision": "b" * 40, "name": "tiny at b"})
    assert named.status_code == 201


def test_a_folder_under_a_root_is_read_and_hashed(serve: Any, model_folder: Path) -> None:
    server = serve(model_roots=(model_folder.parent,))
    response = server.client.post("/models", json={"path": str(model_folder), "name": "tiny"})
    assert response.status_code == 201, response.text
    model = response.json()
    assert (model["name"], model["source"], model["architecture"]) == ("tiny", "path", "TinyForCausalLM")
    assert model["location"] == str(model_folder)
    assert len(model["weights_digest"]) == len(model["fingerprint_digest"]) == 64
    assert server.client.post("/models", json={"path": f"{model_folder}/../tiny"}).status_code == 200


def test_paths_outside_of_the_roots_are_refused(serve: Any, model_folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (model_folder.parent / "link").symlink_to(outside)
    server = serve(model_roots=(model_folder.parent,))
    details = set()
    for path in (outside, model_folder.parent / "link", f"{model_folder}/../../outside", tmp_path / "absent", "tiny"):
        response = server.client.post("/models", json={"path": str(path)})
        assert response.status_code == 422, path
        assert response.json()["errors"] == [{"pointer": "/path", "message": "is not a folder under an allowed root"}]
        details.add(response.json()["detail"].replace(repr(str(path)), "…"))
    assert len(details) == 1, "what exists and what does not must look the same"
    server.assert_nothing_left()


def test_without_roots_no_path_is_allowed(server: Any, model_folder: Path) -> None:
    response = server.client.post("/models", json={"path": str(model_folder)})
    assert response.status_code == 422
    assert "RANKWISE_MODEL_ROOTS" in response.json()["hint"]


def test_a_root_may_be_a_link_itself(model_folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "models"
    link.symlink_to(model_folder.parent)
    assert resolve_under(str(link / "tiny"), [link]) == model_folder
    with pytest.raises(RequestInvalid):
        resolve_under(str(tmp_path), [link])
    with pytest.raises(RequestInvalid):
        resolve_under("/tmp/\0", [link])


def test_a_folder_that_holds_no_model(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "roots" / "empty").mkdir(parents=True)
    server = serve(model_roots=(tmp_path / "roots",))
    body = {"path": str(tmp_path / "roots" / "empty")}
    for _ in range(2):  # a failed request leaves its idempotency key free
        response = server.client.post("/models", json=body, headers={"Idempotency-Key": "k"})
        assert (response.status_code, response.json()["code"]) == (422, "format_unknown")
    server.assert_nothing_left()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"hub_id": "a/b", "path": "/x"},
        {"path": "/x", "revision": "main"},
        {"hub_id": "a/b/c"},
        {"hub_id": "../b"},
        {"hub_id": "a/b", "colour": 1},
        {"hub_id": 7},
        [],
        "a/b",
    ],
)
def test_bad_registrations(untouched_server: Any, body: Any) -> None:
    response = untouched_server.client.post("/models", json=body)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    untouched_server.assert_nothing_left()


def test_patch_sets_clears_and_leaves_alone(server: Any) -> None:
    url = server.client.post("/models", json={"hub_id": "acme/tiny"}).headers["location"]
    patched = server.client.patch(url, json={"deprecated_at": "2026-01-02T03:04:05+01:00"})
    assert patched.status_code == 200, patched.text
    assert patched.json()["deprecated_at"] == "2026-01-02T02:04:05Z"
    removed = server.client.patch(url, json={"removed_at": "2040-01-01T00:00:00Z"}).json()
    assert (removed["deprecated_at"], removed["remove_at"]) == ("2026-01-02T02:04:05Z", "2040-01-01T00:00:00Z")
    assert removed["removed_at"] is None, "a date that lies ahead is a plan"
    cleared = server.client.patch(url, json={"deprecated_at": None}).json()
    assert (cleared["deprecated_at"], cleared["remove_at"]) == (None, "2040-01-01T00:00:00Z")
    assert server.client.patch(url, json={}).json() == cleared
    for wrong in (
        {"removed_at": 0},
        {"removed_at": "2027-01-01T00:00:00"},
        {"removed_at": "0001-01-01T00:00:00+10:00"},
        {"removed_at": "9999-12-31T23:59:59-10:00"},
        {"name": "x"},
    ):
        assert server.client.patch(url, json=wrong).status_code == 422
    assert server.client.patch(f"/models/mdl_{'0' * 32}", json={}).status_code == 404


def test_idempotency_key_covers_the_registration(server: Any) -> None:
    headers = {"Idempotency-Key": "register"}
    first = server.client.post("/models", json={"hub_id": "acme/tiny"}, headers=headers)
    again = server.client.post("/models", json={"hub_id": "acme/tiny"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.headers["idempotency-replayed"] == "true"
    other = server.client.post("/models", json={"hub_id": "acme/other"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_model_goes_out_of_use(server: Any, adapter_files: Any) -> None:
    client = server.client
    model = client.post("/models", json={"hub_id": "acme/tiny-llm"}).json()["id"]
    successor = client.post("/models", json={"hub_id": "acme/next"}).json()["id"]
    adapter = server.upload(adapter_files().parts()).json()["id"]
    plan = {"remove_at": "2040-01-01T00:00:00Z", "successor": "acme/next", "reason": "old"}
    headers = {"Idempotency-Key": "retire"}
    shown = client.post(f"/models/{model}/deprecate", json=plan, headers=headers)
    assert shown.status_code == 200, shown.text
    assert shown.json()["successor"] == successor
    assert shown.json()["deprecated_at"] < shown.json()["remove_at"] == "2040-01-01T00:00:00Z"
    assert shown.json()["removal"] == {"blocked_by": {"adapters": 1}}
    assert "to be removed on 2040-01-01: old. Use 'acme/next' instead." in shown.json()["warnings"][0]
    assert client.post(f"/models/{model}/deprecate", json=plan, headers=headers).json() == shown.json()
    assert client.get(f"/models/{model}").json() == shown.json()
    assert [item["removal"] for item in client.get("/models").json()["items"]] == [None, None]
    refused = client.delete(f"/models/{model}")
    assert (refused.status_code, refused.json()["code"]) == (409, "state_conflict")
    assert [item["pointer"] for item in refused.json()["errors"]] == [f"/adapters/{adapter}"]
    assert client.patch(f"/models/{model}", json={"removed_at": "2020-01-01T00:00:00Z"}).status_code == 409
    waived = client.put(f"/adapters/{adapter}/waiver", json={"reason": "nobody calls it"})
    assert (waived.status_code, waived.json()["created_by"]) == (200, None)
    assert client.get(f"/adapters/{adapter}").json()["waiver"] == waived.json()
    assert client.get(f"/models/{model}").json()["removal"] == {"blocked_by": {}}
    assert client.delete(f"/models/{model}").status_code == 204
    gone = client.get(f"/models/{model}").json()
    assert (gone["removed_at"] is not None, gone["removal"]) == (True, None)
    assert client.post(f"/models/{model}/deprecate", json={}).status_code == 409
    assert client.delete(f"/adapters/{adapter}/waiver").status_code == 204
    assert client.delete(f"/adapters/{adapter}/waiver").status_code == 404
    for wrong in ({"deprecate_at": 1}, {"successor": "nobody"}, {"reason": ""}, {"removed_at": None}):
        assert client.post(f"/models/{successor}/deprecate", json=wrong).status_code == 422
    for wrong in ({}, {"reason": ""}, {"reason": "x", "until": "y"}):
        assert client.put(f"/adapters/{adapter}/waiver", json=wrong).status_code == 422


def test_a_job_on_a_deprecated_model_carries_a_warning(server: Any) -> None:
    from storage import jobs

    model = server.client.post("/models", json={"hub_id": "acme/tiny-llm"}).json()["id"]
    with server.services.database.write() as session:
        job = jobs.create_job(session, "train", {}, affinity=model).id
    assert server.client.get(f"/jobs/{job}").json()["warnings"] == []
    server.client.post(f"/models/{model}/deprecate", json={"reason": "slow"})
    (told,) = server.client.get(f"/jobs/{job}").json()["warnings"]
    assert "'acme/tiny-llm' is deprecated since" in told
    assert told.endswith(": slow.")
    assert server.client.post(f"/jobs/{job}/cancel").json()["warnings"] == [told]


def test_dates_of_models_are_a_chore_of_every_server(server: Any) -> None:
    from app.chores import chores
    from storage import database as clock
    from storage.tables import ModelRow

    model = server.client.post("/models", json={"hub_id": "acme/tiny-llm"}).json()["id"]
    server.client.post(f"/models/{model}/deprecate", json={"remove_at": "2040-01-01T00:00:00Z"})
    services = server.services
    services.clockwork.stop()
    with services.database.write() as session:
        row = session.get_one(ModelRow, model)
        row.remove_at = clock.now(session)
    found = {chore.name: chore for chore in chores(services.settings, services.database, services.blobs)}
    found["retirement"].run()
    assert server.client.get(f"/models/{model}").json()["removed_at"] is not None
