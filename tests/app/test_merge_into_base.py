"""POST /merge with output base: what is refused when it is submitted; models that jobs made, shown and downloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifacts.base_model import BaseModelRef
from artifacts.content import file_sha256
from artifacts.manifest import FileEntry
from storage import adapters, made_models, models
from storage.made_models import add_made_model

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
BASE = BaseModelRef(
    name="acme/tiny-llm",
    source="path",
    location="/models/tiny",
    architecture="LlamaForCausalLM",
    weights_digest="ab" * 32,
    fingerprint=tuple((path, 6, 8) for path in LAYERS),
)


def register(server: Any, **changes: Any) -> str:
    with server.services.database.write() as session:
        return models.add_model(session, replace(BASE, **changes))[0].id


def body(ids: list[str], **changes: Any) -> dict[str, Any]:
    return {"adapters": [{"id": key} for key in ids], "method": "cat", "output": "base", **changes}


def test_the_model_of_the_adapters_is_taken_unless_one_is_named(server: Any, two_adapters: list[str]) -> None:
    refused = server.client.post("/merge", json=body(two_adapters))
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/base_model")
    model = register(server)
    job = server.client.post("/merge", json=body(two_adapters))
    assert job.status_code == 202, job.text
    assert job.json()["params"]["base_model"] == model
    named = server.client.post(
        "/merge", json=body(two_adapters, base_model="acme/tiny-llm", dtype="float32", force=True)
    )
    assert (named.json()["params"]["base_model"], named.json()["params"]["dtype"]) == (model, "float32")


def test_the_files_of_a_hub_model_are_the_workers_affair(server: Any, two_adapters: list[str]) -> None:
    model = register(server, source="hub", location="acme/tiny-llm", weights_digest=None, fingerprint=None)
    job = server.client.post("/merge", json=body(two_adapters))
    assert job.status_code == 202, job.text
    assert job.json()["params"]["base_model"] == model


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a quantised model": ({"quantisation": {"quant_method": "gptq"}}, {}, "merge_refused", "/base_model"),
    "a pipeline": ({"pipeline": "StableDiffusionPipeline"}, {}, "merge_refused", "/base_model"),
    "another model": ({"name": "acme/other"}, {"base_model": "acme/other"}, "base_model_mismatch", "/adapters/0/id"),
    "other shapes": (
        {"fingerprint": tuple((path, 6, 9) for path in LAYERS)},
        {"base_model": "acme/tiny-llm"},
        "merge_refused",
        "/adapters/0/id",
    ),
    "an unknown model": ({}, {"base_model": "nobody/knows"}, "invalid_request", "/base_model"),
    "an unknown dtype": ({}, {"dtype": "int4"}, "invalid_request", "/dtype"),
    "force for an adapter": ({}, {"output": "adapter", "force": True}, "invalid_request", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_merged_into_is_refused_at_once(server: Any, two_adapters: list[str], name: str) -> None:
    model, changes, code, pointer = REFUSED[name]
    register(server, **model)
    response = server.client.post("/merge", json=body(two_adapters, **changes))
    assert (response.status_code, response.json()["code"]) == (422, code), response.text
    assert pointer in [item["pointer"] for item in response.json()["errors"]]
    assert server.rows()["jobs"] == 0


def test_a_made_model_is_shown_and_its_files_downloaded(
    server: Any, two_adapters: list[str], tmp_path: Path, fake_pool: Any
) -> None:
    register(server)
    job_id = server.client.post("/merge", json=body(two_adapters)).json()["id"]
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama"}')
    entry = FileEntry(path.name, file_sha256(path), path.stat().st_size, "application/json")
    with server.services.database.write() as session:
        adapters.reserve_blobs(session, [entry])
    server.services.blobs.put_file(path, entry.sha256)
    ref = replace(BASE, source="files", location="cd" * 32, weights_digest="cd" * 32)
    with server.services.database.write() as session:
        row = add_made_model(session, ref, [entry], recipe={"method": "cat"}, job_id=job_id)
        again = add_made_model(session, ref, [entry], recipe={"method": "cat"}, job_id=job_id)
        assert again.id == row.id
        assert row.name == "acme/tiny-llm (2)"  # the first of this name has other weights
    shown = server.client.get(f"/models/{row.id}").json()
    assert (shown["source"], shown["made"]["recipe"], shown["made"]["job_id"]) == ("files", {"method": "cat"}, job_id)
    (file,) = shown["made"]["files"]
    assert (file["name"], file["sha256"]) == ("config.json", entry.sha256)
    got = server.client.get(file["link"])
    assert (got.content, got.headers["etag"]) == (path.read_bytes(), f'"{entry.sha256}"')
    assert server.client.get(file["link"], headers={"Range": "bytes=0-3"}).content == path.read_bytes()[:4]
    assert server.client.head(file["link"]).headers["content-length"] == str(entry.size)
    missing = server.client.get(f"/models/{row.id}/files/weights.bin")
    assert (missing.status_code, missing.json()["hint"]) == (404, "It has config.json.")
    registered = models_of(server, "acme/tiny-llm")
    assert server.client.get(f"/models/{registered}").json()["made"] is None
    for key, words in ((row.id, f"it was made by the job {job_id}"), (registered, "it was registered by its place")):
        told = server.client.get(f"/models/{key}/recipe").json()
        assert (told["model"], told["call"], told["reproducible"]) == (key, None, False)
        assert told["because"][0].startswith(words)
    assert server.client.get(f"/models/mdl_{'f' * 32}/recipe").status_code == 404
    assert server.client.get(f"/models/{registered}/files/config.json").status_code == 404


def models_of(server: Any, name: str) -> str:
    with server.services.database.read() as session:
        return models.get_model(session, name).id


def test_files_of_a_removed_model_are_swept(server: Any, two_adapters: list[str], tmp_path: Path) -> None:
    from datetime import timedelta

    from storage import database, retirement
    from storage.sweep import sweep_blobs

    register(server)
    job_id = server.client.post("/merge", json=body(two_adapters)).json()["id"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    entry = FileEntry(path.name, file_sha256(path), 7, "application/octet-stream")
    server.services.blobs.put_file(path, entry.sha256)
    ref = replace(BASE, name="made", source="files", location="cd" * 32, weights_digest="cd" * 32)
    store = server.services.database
    with store.write() as session:
        model_id = add_made_model(session, ref, [entry], recipe={}, job_id=job_id).id
    now = timedelta(seconds=-5)
    sweep_blobs(store, server.services.blobs, older_than=now)
    assert server.services.blobs.exists(entry.sha256)
    with store.write() as session:
        retirement.update_model(session, model_id, removed_at=database.now(session) - timedelta(days=2))
    for _ in range(2):  # the first gives the files up, the second takes their bytes
        sweep_blobs(store, server.services.blobs, older_than=now)
    assert not server.services.blobs.exists(entry.sha256)
    with store.read() as session:
        assert made_models.made_model(session, model_id) is None
        assert models.get_model(session, model_id).removed_at is not None
