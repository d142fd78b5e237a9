"""What is handed out calls its base model by a name that others know, and never by a folder of somebody's machine."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import pytest
from safetensors import safe_open

FOLDER = "/srv/models/tiny-llm"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def upload(server: Any, files: Any, **form: str) -> str:
    found = server.client.post("/adapters", files=files.parts(), data=form)
    assert found.status_code == 201, found.text
    return str(found.json()["id"])


def download(server: Any, adapter_id: str, **query: Any) -> bytes:
    path = f"/adapters/{adapter_id}/download"
    found = server.client.get(path, params=query)
    assert found.status_code == 200, found.text
    head = server.client.head(path, params=query)
    assert (int(head.headers["content-length"]), head.headers["etag"]) == (len(found.content), found.headers["etag"])
    return bytes(found.content)


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def told_in(content: bytes, folder: Any) -> dict[str, Any]:
    """The configuration in the header of a safetensors file."""
    path = folder / "found.safetensors"
    path.write_bytes(content)
    with safe_open(path, "np") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lora_adapter_metadata"])
    return found


@pytest.mark.parametrize(
    ("form", "name"), [({}, None), ({"base_model": "acme/tiny"}, "acme/tiny"), ({"base_model": "../tiny"}, None)]
)
def test_a_folder_is_named_in_no_download(
    server: Any, adapter_files: Any, tmp_path: Any, form: dict[str, str], name: str | None
) -> None:
    files = adapter_files(base_model=FOLDER, config={"lora_dropout": 0.05})
    adapter_id = upload(server, files, **form)
    found = members(download(server, adapter_id))
    assert found[WEIGHTS] == files.weights()
    assert json.loads(found[CONFIG]) == json.loads(files.config_json()) | {"base_model_name_or_path": name}
    recast = members(download(server, adapter_id, dtype="bfloat16"))
    assert json.loads(recast[CONFIG])["base_model_name_or_path"] == name
    cut = members(download(server, adapter_id, rank=2))
    assert json.loads(cut[CONFIG])["base_model_name_or_path"] == name
    one = download(server, adapter_id, format="safetensors")
    assert told_in(one, tmp_path)["base_model_name_or_path"] == name
    again = server.client.post("/adapters", files=[("file", ("again.safetensors", one))])
    assert (again.status_code, again.json()["id"]) == (200, adapter_id), "it is the same adapter still"


def test_a_folder_in_the_header_of_a_single_file_is_named_in_no_download(
    server: Any, adapter_files: Any, tmp_path: Any
) -> None:
    files = adapter_files(base_model=FOLDER)
    content = files.weights({"lora_adapter_metadata": files.config_json().decode(), "note": "mine"})
    made = server.client.post("/adapters", files=[("file", ("one.safetensors", content))]).json()
    found = download(server, made["id"], format="safetensors")
    assert FOLDER.encode() not in found
    assert b'"note":"mine"' in found
    assert found[-64:] == content[-64:]
    assert told_in(found, tmp_path)["base_model_name_or_path"] is None
    assert json.loads(members(download(server, made["id"]))[CONFIG])["base_model_name_or_path"] is None


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, '{"a": 1, "a": 2}'])
def test_what_is_no_configuration_stays_in_a_header_as_it_is(server: Any, adapter_files: Any, text: str) -> None:
    files = adapter_files(base_model=FOLDER)
    content = files.weights({"lora_adapter_metadata": text})
    parts = [("file", (WEIGHTS, content)), ("file", (CONFIG, files.config_json()))]
    made = server.client.post("/adapters", files=parts).json()
    assert download(server, made["id"], format="safetensors") == content


@pytest.mark.parametrize("name", ["acme/tiny-llm", "gpt2"])
def test_a_name_of_a_hub_stays_with_all_bytes(server: Any, adapter_files: Any, name: str) -> None:
    files = adapter_files(base_model=name)
    found = members(download(server, upload(server, files)))
    assert found == {CONFIG: files.config_json(), WEIGHTS: files.weights()}
