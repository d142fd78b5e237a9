"""Adapters over HTTP: what goes well."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from typing import Any

import httpx

from merge.plan import MergeInput
from storage import adapters


def test_upload_of_a_peft_directory_is_201_and_shows_everything(server: Any, adapter_files: Any) -> None:
    files = adapter_files()
    response = server.upload(
        files.parts(), {"name": "first", "description": "two\nlines", "tags": ["a, b", "c"], "base_model": "acme/other"}
    )
    assert response.status_code == 201, response.text
    body = response.json()
    assert response.headers["location"] == f"/adapters/{body['id']}"
    assert body["name"] == "first"
    assert body["tags"] == ["a", "b", "c"]
    assert body["base_model"] == "acme/other"
    assert (body["rank"], body["alpha"], body["method"], body["mergeable"]) == (4, 8.0, "lora", True)
    assert [module["path"] for module in body["modules"]] == list(files.modules)
    assert body["modules"][0]["scaling"] == 2.0
    assert body["config"]["r"] == 4
    assert {file["path"]: file["sha256"] for file in body["files"]} == {
        "adapter_model.safetensors": hashlib.sha256(files.weights()).hexdigest(),
        "adapter_config.json": hashlib.sha256(files.config_json()).hexdigest(),
    }
    assert server.client.get(response.headers["location"]).json() == body
    assert server.staged() == []
    assert server.blob_count() == 2


def test_the_same_content_again_is_200_with_the_first_id(server: Any, adapter_files: Any) -> None:
    first = server.upload(adapter_files().parts(), {"name": "one"})
    again = server.upload(adapter_files().parts(), {"name": "two"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.json()["name"] == "one"
    assert again.headers["location"] == first.headers["location"]
    assert server.rows()["adapters"] == 1


def test_two_identical_uploads_at_once_make_one_adapter(server: Any, adapter_files: Any) -> None:
    together = threading.Barrier(4)
    answers: list[httpx.Response] = []

    def upload() -> None:
        with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
            together.wait()
            answers.append(client.post("/adapters", files=adapter_files().parts()))

    threads = [threading.Thread(target=upload) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert server.rows()["adapters"] == 1
    assert server.staged() == []


def test_a_zip_and_a_single_file_are_accepted_and_named_after_the_file(server: Any, adapter_files: Any) -> None:
    files = adapter_files(seed=5)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("run/adapter_model.safetensors", files.weights())
        archive.writestr("run/adapter_config.json", files.config_json())
    zipped = server.upload([("file", ("my adapter.zip", buffer.getvalue()))])
    assert zipped.status_code == 201, zipped.text
    assert zipped.json()["name"] == "my adapter"

    single = adapter_files(seed=6)
    data = single.weights({"lora_adapter_metadata": single.config_json().decode()})
    response = server.upload([("file", ("lone.safetensors", data))])
    assert response.status_code == 201, response.text
    assert response.json()["name"] == "lone"
    assert response.json()["format"] == "safetensors-metadata"


def test_peft_download_is_a_zip_that_uploads_to_the_same_adapter(server: Any, adapter_files: Any) -> None:
    files = adapter_files()
    created = server.upload(files.parts(), {"name": "mine"}).json()
    response = server.client.get(f"/adapters/{created['id']}/download")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == 'attachment; filename="mine.zip"'
    assert int(response.headers["content-length"]) == len(response.content)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]
        assert archive.read("adapter_model.safetensors") == files.weights()
        assert archive.read("adapter_config.json") == files.config_json()
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    again = server.upload([("file", ("mine.zip", response.content))])
    assert (again.status_code, again.json()["id"]) == (200, created["id"])


def test_safetensors_download_carries_its_configuration(server: Any, adapter_files: Any) -> None:
    files = adapter_files()
    created = server.upload(files.parts()).json()
    response = server.client.get(f"/adapters/{created['id']}/download", params={"format": "safetensors"})
    assert response.status_code == 200
    length = int.from_bytes(response.content[:8], "little")
    header = json.loads(response.content[8 : 8 + length])
    assert json.loads(header["__metadata__"]["lora_adapter_metadata"])["r"] == 4
    again = server.upload([("file", ("mine.safetensors", response.content))])
    assert again.status_code == 200, again.text
    assert again.json()["id"] == created["id"]


def test_a_single_file_downloads_as_itself_and_as_a_peft_directory(server: Any, adapter_files: Any) -> None:
    files = adapter_files()
    data = files.weights({"lora_adapter_metadata": files.config_json().decode()})
    created = server.upload([("file", ("lone.safetensors", data))]).json()
    url = f"/adapters/{created['id']}/download"
    single = server.client.get(url, params={"format": "safetensors"})
    assert single.content == data
    assert single.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    with zipfile.ZipFile(io.BytesIO(server.client.get(url).content)) as archive:
        assert json.loads(archive.read("adapter_config.json"))["r"] == 4
        assert archive.read("adapter_model.safetensors") == data


def test_component_files_have_no_peft_directory(server: Any, adapter_files: Any, make_safetensors: Any) -> None:
    files = adapter_files()
    tensors = {name.replace("base_model.model.", "unet."): value for name, value in files.tensors().items()}
    config = {f"unet.{name}": value for name, value in json.loads(files.config_json()).items()}
    data = make_safetensors(tensors, {"lora_adapter_metadata": json.dumps(config)})
    created = server.upload([("file", ("diffusers.safetensors", data))])
    assert created.status_code == 201, created.text
    url = f"/adapters/{created.json()['id']}/download"
    refused = server.client.get(url)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/query/format"
    assert server.client.get(url, params={"format": "safetensors"}).content == data


def test_download_ranges_join_to_the_whole(server: Any, adapter_files: Any) -> None:
    created = server.upload(adapter_files().parts()).json()
    url = f"/adapters/{created['id']}/download"
    whole = server.client.get(url)
    total = len(whole.content)
    pieces = b""
    for start in range(0, total, 97):
        stop = min(start + 97, total)
        part = server.client.get(url, headers={"Range": f"bytes={start}-{stop - 1}", "If-Range": whole.headers["etag"]})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{total}"
        pieces += part.content
    assert pieces == whole.content
    tail = server.client.get(url, headers={"Range": "bytes=-22"})
    assert tail.content == whole.content[-22:]
    stale = server.client.get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (stale.status_code, len(stale.content)) == (200, total)


def test_download_conditional_requests_and_head(server: Any, adapter_files: Any) -> None:
    created = server.upload(adapter_files().parts()).json()
    url = f"/adapters/{created['id']}/download"
    whole = server.client.get(url)
    etag = whole.headers["etag"]
    assert server.client.get(url, headers={"If-None-Match": f'"x", W/{etag}'}).status_code == 304
    assert server.client.get(url, headers={"If-None-Match": "*"}).status_code == 304
    assert server.client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    outside = server.client.get(url, headers={"Range": f"bytes={len(whole.content)}-"})
    assert outside.status_code == 416
    assert outside.headers["content-range"] == f"bytes */{len(whole.content)}"
    assert outside.json()["code"] == "range_invalid"
    head = server.client.head(url)
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == str(len(whole.content))
    assert head.headers["etag"] == etag


def test_list_filters_and_pages(server: Any, adapter_files: Any) -> None:
    ids = []
    for seed in range(5):
        fields = {"name": f"Adapter {seed}", "tags": "even" if seed % 2 == 0 else "odd"}
        ids.append(server.upload(adapter_files(seed=seed).parts(), fields).json()["id"])
    newest_first = ids[::-1]
    first = server.client.get("/adapters", params={"limit": 2}).json()
    assert [item["id"] for item in first["items"]] == newest_first[:2]
    # What arrives between two pages shifts nothing.
    server.upload(adapter_files(seed=99).parts())
    second = server.client.get("/adapters", params={"limit": 2, "cursor": first["next"]}).json()
    third = server.client.get("/adapters", params={"limit": 2, "cursor": second["next"]}).json()
    assert [item["id"] for item in second["items"] + third["items"]] == newest_first[2:]
    assert third["next"] is None
    assert len(server.client.get("/adapters", params={"tag": "even"}).json()["items"]) == 3
    assert len(server.client.get("/adapters", params={"name": "adapter 3"}).json()["items"]) == 1
    assert len(server.client.get("/adapters", params={"base_model": "acme/tiny-llm"}).json()["items"]) == 6
    assert server.client.get("/adapters", params={"method": "dora"}).json()["items"] == []
    other = server.client.get("/adapters", params={"limit": 2, "cursor": first["next"], "tag": "odd"})
    assert (other.status_code, other.json()["code"]) == (422, "invalid_request")


def test_delete_is_a_tombstone_and_frees_the_content(server: Any, adapter_files: Any) -> None:
    created = server.upload(adapter_files().parts()).json()
    url = f"/adapters/{created['id']}"
    assert server.client.delete(url).status_code == 204
    assert server.client.get(url).status_code == 404
    assert server.client.get(f"{url}/download").status_code == 404
    assert server.client.delete(url).status_code == 404
    assert server.client.get("/adapters").json()["items"] == []
    assert [node["deleted"] for node in server.client.get(f"{url}/lineage").json()["nodes"]] == [True]
    again = server.upload(adapter_files().parts())
    assert again.status_code == 201
    assert again.json()["id"] != created["id"]


def test_nan_is_accepted_and_reported(server: Any, adapter_files: Any) -> None:
    response = server.upload(adapter_files(value=float("nan")).parts())
    assert response.status_code == 201, response.text
    nonfinite = response.json()["report"]["nonfinite"]
    assert len(nonfinite) == 4
    assert set(nonfinite.values()) == {4 * 8, 6 * 4}


def test_a_registered_base_model_is_linked_by_name_or_id(server: Any, adapter_files: Any) -> None:
    model = server.client.post("/models", json={"hub_id": "acme/tiny-llm", "revision": "a" * 40, "name": "tiny"}).json()
    for seed, named in enumerate(("tiny", model["id"], "acme/tiny-llm")):
        body = server.upload(adapter_files(seed=seed).parts(), {"base_model": named}).json()
        assert body["model_id"] == model["id"]
        assert body["base_model"] == "acme/tiny-llm"
    by_id = server.client.get("/adapters", params={"base_model": model["id"]}).json()
    assert len(by_id["items"]) == 3


def test_factors_that_peft_would_not_load_are_named_in_every_answer_and_to_a_merge(
    server: Any, adapter_files: Any
) -> None:
    files = adapter_files(config={"target_modules": ["q_proj"]})
    body = server.upload(files.parts()).json()
    (told,) = (text for text in body["report"]["warnings"] if "target_modules" in text)
    assert "'model.layers.0.self_attn.v_proj'" in told
    assert told in server.client.get(f"/adapters/{body['id']}").json()["report"]["warnings"]
    with server.services.database.read() as session:
        stored = adapters.manifest_of(adapters.get_adapter(session, body["id"]))
    assert MergeInput.of(stored, body["id"], "one", None).doubts == (told,)
