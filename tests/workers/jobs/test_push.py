"""The job kind "push": a stored adapter sent to a hub on loopback, and written to a bucket as an OCI layout."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from huggingface_hub import close_session, constants
from remote_servers import COMMIT, FakeHub
from safetensors.torch import load, load_file, save_file

from artifacts import intake
from artifacts.errors import AttemptCancelled, FileBroken, RemoteUnavailable, RequestInvalid
from storage import adapters
from storage.blobs import BlobStore
from storage.buckets import Bucket
from workers.pushed_files import card_of
from workers.remotes import Remotes
from workers.watched_work import watched

# huggingface_hub sends files in a way that its own HTTP library wants otherwise
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
REPO = {"repo": "acme/mine", "revision": "main", "private": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = FakeHub()
    yield server
    close_session()
    server.close()


@pytest.fixture
def push(run_here: Any) -> Callable[..., dict[str, Any]]:
    """Runs a push in this process; gives its report."""

    def do(remotes: Remotes, **params: Any) -> dict[str, Any]:
        report: dict[str, Any] = run_here("push", remotes=remotes, **params)["report"]
        return report

    return do


def remotes_of(server: FakeHub, **changes: Any) -> Remotes:
    values: dict[str, Any] = {"hub": server.url, "hub_tokens": {"default": server.token}, "namespaces": ("acme",)}
    return Remotes(**values | changes)


def stored(pool: Any, adapter_id: str) -> dict[str, str]:
    """Path → SHA-256 of the adapter's files."""
    with pool.database.read() as session:
        return {file.path: file.sha256 for file in adapters.get_adapter(session, adapter_id).files}


def test_the_stored_files_are_one_commit_of_a_private_repository(
    pool: Any, hub: FakeHub, push: Any, add_adapter: Any
) -> None:
    adapter_id = add_adapter("mine", 1)
    report = push(remotes_of(hub), adapter=adapter_id, hub={**REPO, "revision": "v1", "path": "lora"})
    files = hub.commits["acme/mine", "v1"]
    found = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    card = found.pop("lora/README.md")
    assert found == {f"lora/{path}": digest for path, digest in stored(pool, adapter_id).items()}
    assert b"library_name: peft" in files["lora/README.md"]
    assert adapter_id.encode() in files["lora/README.md"]
    assert hub.private == {"acme/mine": True}
    assert hub.branches == {("acme/mine", "v1")}
    assert report["hub"]["commit"] == COMMIT
    assert {file["path"]: file["sha256"] for file in report["files"]}["README.md"] == card
    assert hub.token not in json.dumps(report)


def test_another_format_and_dtype_is_one_file_with_its_error(hub: FakeHub, push: Any, add_adapter: Any) -> None:
    adapter_id = add_adapter("mine", 1)
    report = push(remotes_of(hub), adapter=adapter_id, hub=REPO, format="peft", dtype="bfloat16")
    assert 0 < report["relative_error"] < 0.01
    data = hub.commits["acme/mine", "main"]["adapter_model.safetensors"]
    assert b'"dtype":"BF16"' in data[:4096]


def test_a_public_repository_gets_nothing_that_was_to_be_private(hub: FakeHub, push: Any, add_adapter: Any) -> None:
    adapter_id = add_adapter("mine", 1)
    hub.private["acme/mine"] = False
    with pytest.raises(RequestInvalid, match="is public") as caught:
        push(remotes_of(hub), adapter=adapter_id, hub=REPO)
    assert caught.value.errors[0].pointer == "/hub/private"
    assert hub.commits == {}
    assert hub.objects == {}


@pytest.mark.parametrize(
    ("changes", "statuses", "error", "words"),
    [
        ({"hub_tokens": {"default": "wrong"}}, [], RequestInvalid, "answered 401"),
        ({}, [403], RequestInvalid, "answered 403"),
        ({}, [500], RemoteUnavailable, "500"),
        ({}, [520], RemoteUnavailable, "520"),
        ({"hub": "http://127.0.0.1:9"}, [], RemoteUnavailable, "failed: ConnectError"),
        ({"namespaces": ("other",)}, [], RequestInvalid, "RANKWISE|not sent"),
        ({"hub_tokens": {}}, [], RequestInvalid, "no token"),
    ],
)
def test_pushes_that_fail_say_why_and_whether_to_try_again(
    hub: FakeHub, push: Any, add_adapter: Any, changes: Any, statuses: Any, error: Any, words: str
) -> None:
    adapter_id = add_adapter("mine", 1)
    hub.statuses = statuses
    with pytest.raises(error, match=words) as caught:
        push(remotes_of(hub, **changes), adapter=adapter_id, hub=REPO)
    assert hub.token not in str(caught.value)


@pytest.mark.parametrize("repo", ["acme/a--b", "acme/a..b", "acme/a.git"])
def test_a_name_that_no_hub_has_is_refused_at_once(hub: FakeHub, push: Any, add_adapter: Any, repo: str) -> None:
    with pytest.raises(RequestInvalid, match=repo) as caught:
        push(remotes_of(hub), adapter=add_adapter("mine", 1), hub={**REPO, "repo": repo})
    assert [error.pointer for error in caught.value.errors] == ["/hub"]
    assert hub.paths == []


@pytest.mark.parametrize(
    ("base", "shown"),
    [("acme/base-1.5", True), ("gpt2", True), ("/home/me/base", False), ("../base", False), ("C:\\base", False)],
)
def test_a_card_names_no_path_of_a_machine(pool: Any, add_adapter: Any, base: str, shown: bool) -> None:
    with pool.database.read() as session:
        row = adapters.get_adapter(session, add_adapter("mine", 1))
        row.base_model = base
        card = card_of(row, "peft")
        session.expunge(row)
    assert (f"base_model: {base}\n" in card) == shown
    assert (base in card) == shown


def test_a_service_that_is_offline_says_so(
    hub: FakeHub, push: Any, add_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestInvalid, match="HF_HUB_OFFLINE"):
        push(remotes_of(hub), adapter=add_adapter("mine", 1), hub=REPO)


def test_a_hub_that_is_silent_is_not_waited_for() -> None:
    silence = threading.Event()
    with pytest.raises(RequestInvalid, match=r"within 0 s"):
        watched(silence.wait, 0.0, lambda: None, "sent")

    def stop() -> None:
        raise AttemptCancelled("stop")

    with pytest.raises(AttemptCancelled):
        watched(silence.wait, 100.0, stop, "sent")
    silence.set()
    assert watched(silence.wait, 100.0, lambda: None, "sent") is True


def test_a_bucket_that_is_silent_is_not_waited_for(
    push: Any, add_adapter: Any, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence = threading.Event()
    monkeypatch.setattr(Bucket, "put_file", lambda *_: silence.wait(60))
    remotes = Remotes(push_buckets=(f"s3://{s3_bucket}/oci",), timeout_seconds=0.1)
    place = {"s3": {"bucket": s3_bucket, "prefix": "oci/mine"}}
    try:
        with pytest.raises(RequestInvalid, match=r"sent within 0\.1 s"):
            push(remotes, adapter=add_adapter("mine", 1), oci=place)
    finally:
        silence.set()
        for thread in threading.enumerate():
            if thread.name.startswith("adapter "):
                thread.join(30)


def test_an_oci_layout_has_every_file_as_a_layer_and_keeps_other_tags(
    pool: Any, push: Any, add_adapter: Any, s3_bucket: str
) -> None:
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def read(key: str) -> bytes:
        return bytes(client.get_object(Bucket=s3_bucket, Key=f"oci/mine/{key}")["Body"].read())

    def blob(digest: str) -> bytes:
        data = read(f"blobs/sha256/{digest.removeprefix('sha256:')}")
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
        return data

    first, second = add_adapter("one", 1), add_adapter("two", 2)
    remotes = Remotes(push_buckets=(f"s3://{s3_bucket}/oci",))
    place = {"s3": {"bucket": s3_bucket, "prefix": "oci/mine"}}
    reports = {
        tag: push(remotes, adapter=adapter_id, oci={**place, "tag": tag})
        for tag, adapter_id in (("v1", first), ("latest", first), ("latest", second))
    }
    assert json.loads(read("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads(read("index.json"))
    tags = {item["annotations"]["org.opencontainers.image.ref.name"]: item for item in index["manifests"]}
    assert {tag: item["digest"] for tag, item in tags.items()} == {
        tag: report["oci"]["digest"] for tag, report in reports.items()
    }
    manifest = json.loads(blob(tags["v1"]["digest"]))
    assert len(blob(tags["v1"]["digest"])) == tags["v1"]["size"]
    config = json.loads(blob(manifest["config"]["digest"]))
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    layers = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in manifest["layers"]}
    assert {name: layers[name]["digest"].removeprefix("sha256:") for name in stored(pool, first)} == stored(pool, first)
    assert all(len(blob(layer["digest"])) == layer["size"] for layer in manifest["layers"])
    assert layers["adapter_model.safetensors"]["mediaType"] == "application/vnd.cncf.model.weight.v1.raw"
    again = push(remotes, adapter=first, oci={**place, "tag": "v1"})
    assert again["oci"]["digest"] == reports["v1"]["oci"]["digest"]

    client.put_object(Bucket=s3_bucket, Key="oci/mine/index.json", Body=b"[]")
    with pytest.raises(FileBroken):
        push(remotes, adapter=first, oci={**place, "tag": "v1"})
    with pytest.raises(RequestInvalid) as caught:
        push(remotes, adapter=first, oci={"s3": {"bucket": s3_bucket, "prefix": "elsewhere"}})
    assert caught.value.errors[0].pointer == "/oci/s3"
    client.close()


def test_no_pushed_file_names_a_folder_of_a_machine(
    pool: Any, hub: FakeHub, push: Any, write_adapter: Any, tmp_path: Path
) -> None:
    folder = "/srv/models/base"
    directory = write_adapter(tmp_path / "mine", 1, base_model=folder)
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    metadata = {"format": "pt", "lora_adapter_metadata": config.read_text()}
    save_file(load_file(weights), weights, metadata=metadata)
    (directory / "README.md").write_text(
        f"---\nbase_model: {folder}\ntags:\n- base_model:adapter:{folder}\n---\nmine\n"
    )
    blobs, manifest = BlobStore(pool.settings().blob_url), intake.inspect(directory)
    for entry in manifest.files:
        blobs.put_file(directory / entry.path, entry.sha256)
    with pool.database.write() as session:
        row, _ = adapters.add_adapter(session, manifest, name="mine", base_model="acme/base")
    report = push(remotes_of(hub), adapter=row.id, hub=REPO)
    files = hub.commits["acme/mine", "main"]
    assert all(folder.encode() not in data for data in files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "acme/base"
    assert b"base_model: acme/base\n" in files["README.md"]
    sent = {file["path"]: (file["sha256"], file["size"]) for file in report["files"]}
    assert sent == {path: (hashlib.sha256(data).hexdigest(), len(data)) for path, data in files.items()}
    renamed = load(files["adapter_model.safetensors"])
    assert all(torch.equal(renamed[name], value) for name, value in load_file(weights).items())
