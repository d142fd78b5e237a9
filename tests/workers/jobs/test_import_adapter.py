"""The job kind "import": adapters fetched from servers on loopback, and taken in like uploads."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import ipaddress
import json
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import httpx
import pytest
from remote_servers import COMMIT, FileServer, add_repository

from artifacts.base_model import BaseModelRef
from artifacts.errors import (
    AttemptCancelled,
    FileBroken,
    FormatUnknown,
    PickleRefused,
    RankwiseError,
    RemoteUnavailable,
    RequestInvalid,
    ShapeMismatch,
    TooLarge,
)
from storage import adapters, models
from storage.buckets import Bucket
from workers import remote_client
from workers.context import Interruption
from workers.egress import EgressPolicy
from workers.folder_choice import RemoteFile, choose
from workers.kinds import KINDS
from workers.remote_client import RemoteClient
from workers.remotes import Remotes

LOOPBACK = EgressPolicy(allow_http=True, allowed_networks=(ipaddress.ip_network("127.0.0.1/32"),))


def weights(seed: int = 1) -> bytes:
    """A LoRA of rank 2 on one layer of 4×3."""
    header, data = {}, b""
    for name, shape in (("lora_A", [2, 3]), ("lora_B", [4, 2])):
        values = [((index + seed) % 7) / 7 for index in range(shape[0] * shape[1])]
        begin, data = len(data), data + struct.pack(f"<{len(values)}f", *values)
        header[f"base_model.model.layer.{name}.weight"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


CONFIG = json.dumps(
    {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"], "base_model_name_or_path": "acme/tiny"}
).encode()
PEFT = {"adapter_config.json": CONFIG, "adapter_model.safetensors": weights(), "README.md": b"# mine"}


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FileServer]]:
    monkeypatch.setattr(remote_client, "_PAUSE_SECONDS", 0.0)
    made: list[FileServer] = []

    def make(**options: Any) -> FileServer:
        made.append(FileServer(**options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def import_(run_here: Any) -> Callable[..., dict[str, Any]]:
    """Runs an import in this process and publishes it; gives the job's result."""

    def do(remotes: Remotes, interruption: Interruption | None = None, **params: Any) -> dict[str, Any]:
        result: dict[str, Any] = run_here("import", remotes=remotes, interruption=interruption, **params)
        return result

    return do


def hub_of(server: FileServer, **changes: Any) -> Remotes:
    return dataclasses.replace(Remotes(hub=server.url, policy=LOOPBACK), **changes)


def hub_source(repo: str = "acme/mine", **fields: Any) -> dict[str, Any]:
    return {"hub": {"repo": repo, "revision": "main", **fields}}


def test_an_adapter_of_a_hub_is_pinned_to_its_commit(pool: Any, servers: Any) -> None:
    hub, store = servers(), servers()
    add_repository(hub, "acme/mine", {**PEFT, "optimizer.pt": b"never fetched", "checkpoint-1/a.safetensors": b"x"})
    store.files["/blob"] = hub.files.pop(f"/acme/mine/resolve/{COMMIT}/adapter_model.safetensors")
    hub.redirects[f"/acme/mine/resolve/{COMMIT}/adapter_model.safetensors"] = f"{store.url}/blob?signature=s"
    job_id = pool.submit("import", source=hub_source(), tags=["fetched"])
    pool.start(kinds=KINDS, remotes=hub_of(hub, hub_tokens={"default": "hf_secret"}))
    job = pool.ended(job_id)
    assert job.error is None
    (adapter_id,) = job.result["adapters"]
    with pool.database.read() as session:
        row = adapters.get_adapter(session, adapter_id)
        assert (row.name, row.origin, row.base_model, row.tags) == ("mine", "import", "acme/tiny", ["fetched"])
        assert {file.path for file in row.files} == set(PEFT)
        assert row.source is not None
        assert (row.source["revision"], row.source["asked"], row.source["repo"]) == (COMMIT, "main", "acme/mine")
        assert {file["path"]: file["sha256"] for file in row.source["files"]} == {
            name: hashlib.sha256(data).hexdigest() for name, data in PEFT.items()
        }
    assert job.result["report"]["used_keys"] == 2
    asked = {path.partition("?")[0]: headers for path, headers in hub.got}
    assert set(asked) == {"/api/models/acme/mine/revision/main", *(f"/acme/mine/resolve/{COMMIT}/{n}" for n in PEFT)}
    assert {headers["authorization"] for headers in asked.values()} == {"Bearer hf_secret"}
    ((_, headers),) = store.got
    assert "authorization" not in headers  # the token stays with the hub
    assert "hf_secret" not in json.dumps(job.params) + json.dumps(job.result)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in PEFT.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def hosts(*names: str, **changes: Any) -> Remotes:
    return dataclasses.replace(Remotes(hosts=names or ("127.0.0.1",), policy=LOOPBACK), **changes)


@pytest.mark.parametrize("etags", [True, False])
def test_a_broken_transfer_goes_on_where_it_broke_or_begins_again(import_: Any, servers: Any, etags: bool) -> None:
    data = zipped()
    server = servers(files={"/a/lora.zip": data}, breaks=[100, 50], etags=etags)
    source = {"url": f"{server.url}/a/lora.zip?key=s3cret", "sha256": hashlib.sha256(data).hexdigest()}
    result = import_(hosts(host_tokens={server.url: "t0ken"}), source=source)
    ranges = [headers.get("range") for _, headers in server.got]
    assert ranges == ([None, "bytes=100-", "bytes=150-"] if etags else [None, None, None])
    assert {headers["authorization"] for _, headers in server.got} == {"Bearer t0ken"}
    assert result["report"]["source"]["query"] is True
    assert "s3cret" not in json.dumps(result)
    assert "t0ken" not in json.dumps(result)


def test_a_file_that_changed_between_two_parts_begins_again(import_: Any, servers: Any) -> None:
    new = zipped()
    server = servers(files={"/lora.zip": b"PK\x03\x04 and something else" + bytes(100)}, breaks=[100])
    plain = server.send

    def send_and_change(request: Any, status: int, headers: Any, data: bytes) -> None:
        plain(request, status, headers, data)
        server.files["/lora.zip"] = new

    server.send = send_and_change
    result = import_(hosts(), source={"url": f"{server.url}/lora.zip"})
    assert [headers.get("range") for _, headers in server.got] == [None, "bytes=100-"]
    assert result["report"]["source"]["files"][0]["sha256"] == hashlib.sha256(new).hexdigest()


def test_a_server_that_breaks_off_again_and_again_is_tried_later(import_: Any, servers: Any) -> None:
    server = servers(files={"/lora.zip": zipped()}, breaks=[10] * 8)
    with pytest.raises(RemoteUnavailable, match="can not be reached"):
        import_(hosts(), source={"url": f"{server.url}/lora.zip"})


def test_a_hosts_token_goes_over_https_and_to_the_usual_port_alone(import_: Any, servers: Any) -> None:
    server = servers(files={"/lora.zip": zipped()})
    import_(hosts(host_tokens={"127.0.0.1": "t0ken"}), source={"url": f"{server.url}/lora.zip"})
    ((_, headers),) = server.got
    assert "authorization" not in headers
    client = RemoteClient(LOOPBACK, tokens={"files.org": "t0ken", "http://files.org:81": "other"})
    urls = ("https://files.org/a", "https://files.org:444/a", "http://files.org/a", "http://files.org:81/a")
    assert [client._token_of(httpx.URL(url)) for url in urls] == ["t0ken", None, None, "other"]


@pytest.mark.parametrize("disposition", ["attachment; filename*=idna''abc", "attachment; filename*=undefined''a"])
def test_a_name_in_no_known_charset_is_none(import_: Any, servers: Any, disposition: str) -> None:
    server = servers(files={"/lora.zip": zipped()}, headers={"content-disposition": disposition})
    result = import_(hosts(), source={"url": f"{server.url}/lora.zip"})
    assert [file["path"] for file in result["report"]["source"]["files"]] == ["lora.zip"]


def test_redirects_are_checked_hop_by_hop(import_: Any, servers: Any) -> None:
    inside = servers(host="127.0.0.2", files={"/secret.zip": zipped()})
    server = servers()
    server.redirects = {
        "/inside": f"{inside.url}/secret.zip",
        "/name": "http://localhost:1/x.zip",
        "/scheme": "file:///etc/passwd",
        "/loop": f"{server.url}/loop",
    }
    any_host = hosts("*", "127.0.0.1")
    for path, reason in (("/inside", "127.0.0.2"), ("/scheme", "must begin with")):
        with pytest.raises(RequestInvalid, match=reason) as caught:
            import_(any_host, source={"url": server.url + path})
        assert caught.value.errors[0].pointer == "/source/url"
    with pytest.raises(RequestInvalid, match="are not fetched from localhost"):
        import_(hosts(), source={"url": f"{server.url}/name"})
    with pytest.raises(RemoteUnavailable, match="redirects more than"):
        import_(any_host, source={"url": f"{server.url}/loop"})
    assert inside.got == []


def test_a_hub_can_not_lead_inside(import_: Any, servers: Any) -> None:
    inside = servers(host="127.0.0.2", files={"/metadata": b"credentials"})
    hub = servers()
    add_repository(hub, "acme/mine", PEFT)
    hub.redirects[f"/acme/mine/resolve/{COMMIT}/adapter_config.json"] = f"{inside.url}/metadata"
    del hub.files[f"/acme/mine/resolve/{COMMIT}/adapter_config.json"]
    with pytest.raises(RequestInvalid, match=r"leads to 127\.0\.0\.2") as caught:
        import_(hub_of(hub), source=hub_source())
    assert [error.pointer for error in caught.value.errors] == ["/source/hub"]
    assert inside.got == []


def test_what_is_too_large_is_refused_before_or_while_it_comes(import_: Any, servers: Any) -> None:
    hub = servers()
    add_repository(hub, "acme/mine", PEFT)
    with pytest.raises(TooLarge):
        import_(hub_of(hub, max_bytes=100), source=hub_source())
    assert len(hub.got) == 1  # by what the hub says of the sizes
    server = servers(files={"/lora.zip": zipped()})
    with pytest.raises(TooLarge) as caught:
        import_(hosts(max_bytes=100), source={"url": f"{server.url}/lora.zip"})
    assert caught.value.errors[0].pointer == "/source/url"


@pytest.mark.parametrize(
    ("files", "path", "error", "hint"),
    [
        ({"a/x.safetensors": b"", "b/y.safetensors": b""}, None, FormatUnknown, "lie in: a, b"),
        ({"x.safetensors": b"", "y.safetensors": b""}, None, FormatUnknown, "x.safetensors, y.safetensors"),
        ({"adapter_model.bin": b""}, None, FormatUnknown, None),
        ({"x.gguf": b"GGUF"}, None, RankwiseError, None),
        ({"adapter_model.bin": b"\x80\x02}"}, "adapter_model.bin", PickleRefused, None),
        ({"adapter_model.safetensors": b"\x08"}, None, RankwiseError, None),
    ],
)
def test_what_is_no_adapter_is_refused(
    import_: Any, servers: Any, files: Any, path: Any, error: Any, hint: str | None
) -> None:
    hub = servers()
    add_repository(hub, "acme/mine", files)
    with pytest.raises(error) as caught:
        import_(hub_of(hub), source=hub_source(path=path))
    assert hint is None or hint in caught.value.hint


def test_bytes_with_another_digest_than_the_hub_says_or_the_request_are_refused(import_: Any, servers: Any) -> None:
    hub = servers()
    add_repository(hub, "acme/mine", PEFT)
    with pytest.raises(RequestInvalid, match="there are 3"):
        import_(hub_of(hub), source={**hub_source(), "sha256": "0" * 64})
    with pytest.raises(FileBroken) as caught:
        import_(hub_of(hub), source={**hub_source(path="README.md"), "sha256": "0" * 64})
    assert caught.value.errors[0].pointer == "/source/sha256"
    hub.files[f"/acme/mine/resolve/{COMMIT}/adapter_model.safetensors"] = weights(seed=2)
    with pytest.raises(FileBroken, match=r"adapter_model\.safetensors has the SHA-256"):
        import_(hub_of(hub), source=hub_source())


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, RequestInvalid),
        (404, RequestInvalid),
        (429, RemoteUnavailable),
        (520, RemoteUnavailable),
        (503, RemoteUnavailable),
    ],
)
def test_what_a_server_answers_decides_whether_to_try_again(
    import_: Any, servers: Any, status: int, error: type[RankwiseError]
) -> None:
    hub = servers(statuses=[status])
    with pytest.raises(error, match=str(status)):
        import_(hub_of(hub), source=hub_source())


def test_hostile_answers_of_a_hub(import_: Any, servers: Any) -> None:
    hub = servers()
    odd = [
        {"size": "12"},
        {"size": -1},
        {"size": True},
        {"size": 1.5},
        {"lfs": {"sha256": 1}},
        {"lfs": {"sha256": "0" * 63}},
    ]
    listed = [
        json.dumps({"sha": COMMIT, "siblings": [{"rfilename": "a.safetensors", **item}, {"rfilename": "b.json"}]})
        for item in odd
    ]
    for answer in (
        *map(str.encode, listed),
        b"[" * 100_000,
        b"{}",
        b'{"sha": "../..", "siblings": []}',
        b'{"sha": 1, "siblings": [1]}',
        b"null",
    ):
        hub.files["/api/models/acme/mine/revision/main"] = answer
        with pytest.raises(RemoteUnavailable):
            import_(hub_of(hub), source=hub_source())


def test_a_silent_server_ends_with_the_time_limit_and_with_a_cancel(import_: Any, servers: Any) -> None:
    server, silence, interruption = servers(), threading.Event(), Interruption()

    def wait(request: Any) -> None:
        interruption.wanted = True
        silence.wait(30)
        request.close_connection = True

    server.answer = wait
    try:
        with pytest.raises(RequestInvalid, match=r"within 0\.1 s"):
            import_(hosts(timeout_seconds=0.1), source={"url": f"{server.url}/lora.zip"})
        with pytest.raises(AttemptCancelled):
            import_(hosts(), interruption, source={"url": f"{server.url}/lora.zip"})
    finally:
        silence.set()


def test_names_that_no_database_holds_end_the_import_and_not_the_pool(pool: Any, servers: Any) -> None:
    """U+0000 in the path of a URL, and in the files' names of a hub."""
    server, hub = servers(files={"/a\0b.zip": zipped(), "/c.zip": zipped()}), servers()
    add_repository(hub, "acme/mine", {"a\0b/x.safetensors": b"", "c/y.safetensors": b""})
    sources = [
        {"url": f"{server.url}/a%00b.zip", "sha256": "0" * 64},
        hub_source(),
        {"url": f"{server.url}/c.zip"},
    ]
    ids = [pool.submit("import", source=source) for source in sources]
    pool.start(kinds=KINDS, remotes=hub_of(hub, hosts=("127.0.0.1",)))
    url, folder, good = [pool.ended(job_id) for job_id in ids]
    assert (url.state, folder.state, good.state) == ("failed", "failed", "succeeded")
    assert url.error["code"] == "file_broken"
    assert url.error["detail"].startswith("a?b.zip has the SHA-256")
    assert folder.error["hint"].endswith("lie in: a?b, c.")


def test_a_silent_bucket_ends_with_the_time_limit_and_with_a_cancel(
    import_: Any, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence, interruption = threading.Event(), Interruption()

    def wait(*_: object) -> None:
        interruption.wanted = True
        silence.wait(60)

    monkeypatch.setattr(Bucket, "find", wait)
    source = {"s3": {"bucket": s3_bucket, "key": "loras/mine.zip"}}
    remotes = Remotes(buckets=(f"s3://{s3_bucket}/loras",))
    try:
        with pytest.raises(RequestInvalid, match=r"fetched within 0\.1 s"):
            import_(dataclasses.replace(remotes, timeout_seconds=0.1), source=source)
        with pytest.raises(AttemptCancelled):
            import_(remotes, interruption, source=source)
    finally:
        silence.set()
        for thread in threading.enumerate():
            if thread.name.startswith("adapter "):
                thread.join(30)


def test_an_adapter_that_does_not_fit_the_model_that_is_named_is_refused(pool: Any, import_: Any, servers: Any) -> None:
    ref = BaseModelRef("other", "path", "/other", fingerprint=(("layer", 9, 9),))
    with pool.database.write() as session:
        models.add_model(session, ref)
    hub = servers()
    add_repository(hub, "acme/mine", PEFT)
    with pytest.raises(ShapeMismatch):
        import_(hub_of(hub), source=hub_source(), base_model="other")


def test_a_folders_weights_are_told_by_their_whole_name() -> None:
    names = ("adapter_config.json", "adapter_model.safetensors", "my_adapter_model.safetensors")
    found = choose([RemoteFile(name) for name in names], None, "/hub/path")
    assert [file.path for file in found] == list(names[:2])


def test_a_folder_and_an_object_of_a_bucket(pool: Any, import_: Any, s3_bucket: str) -> None:
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name, data in {**PEFT, "notes.txt": b"mine", "checkpoint-1/adapter_model.safetensors": b"x"}.items():
        client.put_object(Bucket=s3_bucket, Key=f"loras/mine/{name}", Body=data)
    client.put_object(Bucket=s3_bucket, Key="loras/mine.zip", Body=zipped())
    client.close()
    remotes = Remotes(buckets=(f"s3://{s3_bucket}/loras",))
    result = import_(remotes, source={"s3": {"bucket": s3_bucket, "prefix": "loras/mine"}})
    source = result["report"]["source"]
    assert [file["path"] for file in source["files"]] == [f"loras/mine/{name}" for name in sorted(PEFT, key=str)]
    digest = hashlib.sha256(zipped()).hexdigest()
    again = import_(remotes, source={"s3": {"bucket": s3_bucket, "key": "loras/mine.zip"}, "sha256": digest})
    assert again["adapters"] == result["adapters"]  # the same content
    with pytest.raises(TooLarge):
        import_(
            dataclasses.replace(remotes, max_bytes=10), source={"s3": {"bucket": s3_bucket, "key": "loras/mine.zip"}}
        )
    with pytest.raises(FormatUnknown) as caught:
        import_(remotes, source={"s3": {"bucket": s3_bucket, "prefix": "loras"}})
    assert caught.value.errors[0].pointer == "/source/s3/prefix"
    with pytest.raises(RequestInvalid):
        import_(remotes, source={"s3": {"bucket": s3_bucket, "key": "elsewhere/mine.zip"}})
