"""Every kind of bad upload over HTTP: its status, its code, and nothing left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import uploads


def refused(server: Any, response: Any, status: int, code: str) -> dict[str, Any]:
    """The problem, after checking that it is one and that nothing of the upload is left."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    server.assert_nothing_left()
    return problem


def raw_header(document: str, tail: bytes = b"") -> bytes:
    text = document.encode()
    return len(text).to_bytes(8, "little") + text + tail


def _truncated(files: Any) -> bytes:
    data: bytes = files.weights()
    return data[:-5]


def _huge_header(files: Any) -> bytes:
    data: bytes = files.weights()
    return (2**63).to_bytes(8, "little") + data[8:]


def _with_offsets(offsets: list[int]) -> Callable[[Any], bytes]:
    def build(files: Any) -> bytes:
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        document = json.dumps({"a": entry, "b": {**entry, "data_offsets": offsets}})
        return raw_header(document, b"\0" * 16)

    return build


def _duplicate_keys(files: Any) -> bytes:
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    return raw_header(f'{{"a":{entry},"a":{entry}}}', b"\0" * 8)


def _unknown_dtype(files: Any) -> bytes:
    return raw_header('{"a":{"dtype":"C128","shape":[1],"data_offsets":[0,16]}}', b"\0" * 16)


BROKEN = {
    "truncated": _truncated,
    "header of 2^63 bytes": _huge_header,
    "overlapping offsets": _with_offsets([4, 12]),
    "offsets out of range": _with_offsets([8, 2**40]),
    "duplicate JSON keys": _duplicate_keys,
    "unknown dtype": _unknown_dtype,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors(untouched_server: Any, adapter_files: Any, name: str) -> None:
    files = adapter_files()
    parts = [("file", ("adapter_model.safetensors", BROKEN[name](files))), files.parts()[1]]
    refused(untouched_server, untouched_server.upload(parts), 422, "file_broken")


def test_missing_adapter_config(untouched_server: Any, adapter_files: Any) -> None:
    refused(untouched_server, untouched_server.upload(adapter_files().parts()[:1]), 422, "config_refused")


def test_config_rank_differs_from_the_tensors(untouched_server: Any, adapter_files: Any) -> None:
    problem = refused(
        untouched_server, untouched_server.upload(adapter_files(config={"r": 8}).parts()), 422, "file_broken"
    )
    assert "rank" in problem["detail"]


def test_alpha_of_zero(untouched_server: Any, adapter_files: Any) -> None:
    refused(untouched_server, untouched_server.upload(adapter_files(alpha=0.0).parts()), 422, "config_refused")


def archive_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _bomb(files: Any) -> bytes:
    return archive_of({"adapter_model.safetensors": b"\0" * 20_000_000}, zipfile.ZIP_DEFLATED)


def _escaping(name: str) -> Callable[[Any], bytes]:
    return lambda files: archive_of({name: files.weights(), "adapter_config.json": files.config_json()})


def _symlink(files: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("adapter_model.safetensors")
        link.create_system = 3
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("adapter_config.json", files.config_json())
    return buffer.getvalue()


def _tar_symlink(files: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("adapter_model.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def _nested(files: Any) -> bytes:
    inner = archive_of({"adapter_model.safetensors": files.weights()})
    return archive_of({"adapter_model.safetensors": inner, "adapter_config.json": files.config_json()})


ARCHIVES = {
    "bomb": _bomb,
    "dot dot": _escaping("../adapter_model.safetensors"),
    "absolute path": _escaping("/tmp/adapter_model.safetensors"),
    "symlink in a zip": _symlink,
    "symlink in a tar": _tar_symlink,
    "nested": _nested,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archives(untouched_server: Any, adapter_files: Any, name: str) -> None:
    response = untouched_server.upload([("file", ("adapter.zip", ARCHIVES[name](adapter_files())))])
    refused(untouched_server, response, 422, "archive_refused")


def test_pickles(untouched_server: Any, adapter_files: Any) -> None:
    config = adapter_files().parts()[1]
    legacy = pickle.dumps({"weight": 1})
    checkpoint = archive_of({"archive/data.pkl": legacy, "archive/version": b"3"})
    for name, data in (
        ("adapter_model.bin", legacy),
        ("renamed.safetensors", legacy),
        ("adapter_model.bin", checkpoint),
    ):
        refused(untouched_server, untouched_server.upload([("file", (name, data))]), 415, "pickle_refused")
    refused(
        untouched_server,
        untouched_server.upload([("file", ("adapter_model.bin", legacy)), config]),
        415,
        "pickle_refused",
    )


def test_body_over_the_limit_by_its_length(serve: Any, adapter_files: Any) -> None:
    server = serve(max_upload_bytes=1000)
    big = b"\0" * (3 * 1024**2)
    problem = refused(server, server.upload([("file", ("a.safetensors", big))]), 413, "too_large")
    assert "limit" in problem["detail"]


def test_body_over_the_limit_without_a_length(serve: Any) -> None:
    server = serve(max_upload_bytes=1000)

    def chunks() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.safetensors"\r\n\r\n'
        for _ in range(48):
            yield b"\0" * 65536
        yield b"\r\n--x--\r\n"

    response = server.client.post(
        "/adapters", content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    refused(server, response, 413, "too_large")


def test_files_over_the_limit_in_a_body_within_it(serve: Any, adapter_files: Any) -> None:
    server = serve(max_upload_bytes=200)
    refused(server, server.upload(adapter_files().parts()), 413, "too_large")


def test_client_that_disconnects_mid_upload(untouched_server: Any, adapter_files: Any) -> None:
    head = (
        b"POST /adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.safetensors"\r\n\r\n'
    )
    created, removed = threading.Event(), threading.Event()
    make, remove = uploads.make_folder, uploads.shutil.rmtree

    def watch_make(staging: Path) -> Path:
        folder = make(staging)
        created.set()
        return folder

    def watch_remove(folder: Path) -> None:
        remove(folder)
        removed.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "make_folder", watch_make)
        patch.setattr(uploads.shutil, "rmtree", watch_remove)
        with socket.create_connection(("127.0.0.1", untouched_server.port)) as connection:
            connection.sendall(head + b"\0" * 5_000_000)
            assert created.wait(20)
            assert len(untouched_server.staged()) >= 1
        assert removed.wait(20)
    untouched_server.assert_nothing_left()


def test_disk_full_while_writing(untouched_server: Any, adapter_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(uploads, "write_some", full)
    refused(untouched_server, untouched_server.upload(adapter_files().parts()), 507, "disk_full")


def test_disk_full_in_the_middle_of_a_large_file(untouched_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [3 * 1024**2]

    def nearly_full(descriptor: int, data: memoryview) -> int:
        if room[0] <= 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        written = os.write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(uploads, "write_some", nearly_full)
    response = untouched_server.upload([("file", ("a.safetensors", b"\0" * (9 * 1024**2)))])
    refused(untouched_server, response, 507, "disk_full")


LIMITED = """
import resource, sys, uvicorn
from app.main import create_app
from app.settings import Settings
app = create_app(Settings(data_dir=sys.argv[1], pool="off", log_level="error"))
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
uvicorn.run(app, fd=int(sys.argv[2]), log_config=None, access_log=False)
"""


def test_the_kernel_refuses_to_write_more(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        command = [sys.executable, "-c", LIMITED, str(tmp_path / "data"), str(listener.fileno())]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                response = client.post("/adapters", files={"file": ("a.safetensors", b"\0" * (9 << 20))})
                assert (response.status_code, response.json()["code"]) == (507, "disk_full")
                assert list((tmp_path / "data" / "blobs" / "staging").iterdir()) == []
                assert client.get("/adapters").json()["items"] == []
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_database_gone(serve: Any, adapter_files: Any) -> None:
    server = serve()
    created = server.upload(adapter_files().parts()).json()
    path = server.services.database.path
    path.rename(path.with_suffix(".away"))
    try:
        for response in (
            server.upload(adapter_files(seed=3).parts()),
            server.client.get("/adapters"),
            server.client.get(f"/adapters/{created['id']}/download"),
            server.client.post("/merge", json={"adapters": [{"id": created["id"]}]}),
        ):
            assert response.status_code == 503, response.text
            assert response.json()["code"] == "database_unavailable"
            assert response.headers["retry-after"] == "5"
        ready = server.client.get("/readyz")
        assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
        assert ready.json()["errors"][0]["pointer"] == "/checks/database"
        assert server.client.get("/healthz").status_code == 200
        assert "rankwise_database_up 0.0" in server.client.get("/metrics").text
        assert server.staged() == []
    finally:
        path.with_suffix(".away").rename(path)
    assert server.rows()["adapters"] == 1
    assert server.blob_count() == 2
    assert server.client.get("/readyz").status_code == 200


def test_blob_missing(server: Any, adapter_files: Any) -> None:
    created = server.upload(adapter_files().parts()).json()
    weights = next(item for item in created["files"] if item["path"].endswith(".safetensors"))
    server.services.blobs.delete(weights["sha256"])
    for layout in ("peft", "safetensors"):
        response = server.client.get(f"/adapters/{created['id']}/download", params={"format": layout})
        assert response.status_code == 500
        assert response.json()["code"] == "blob_missing"
        assert weights["sha256"] in response.json()["detail"]
    # Uploading it again puts the bytes back.
    assert server.upload(adapter_files().parts()).status_code == 200
    assert server.client.get(f"/adapters/{created['id']}/download").status_code == 200


MULTIPART = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
MALFORMED = {
    "no boundary": ("multipart/form-data", b"--x--\r\n", 400, "malformed_request"),
    "not multipart": ("application/json", b"{}", 415, "unsupported_media"),
    "no content type": ("", b"{}", 415, "unsupported_media"),
    "empty": (MULTIPART, b"", 400, "malformed_request"),
    "other boundary": (MULTIPART, b"--y\r\n\r\n--y--\r\n", 400, "malformed_request"),
    "stops early": (MULTIPART, PART + b"data", 400, "malformed_request"),
    "part without a name": (MULTIPART, b"--x\r\nX-Other: 1\r\n\r\ndata\r\n--x--\r\n", 400, "malformed_request"),
    "no part": (MULTIPART, b"--x--\r\n", 422, "invalid_request"),
    "empty file": (MULTIPART, PART + b"\r\n--x--\r\n", 422, "format_unknown"),
    "unknown field": (
        MULTIPART,
        b'--x\r\nContent-Disposition: form-data; name="colour"\r\n\r\nred\r\n--x--\r\n',
        422,
        "invalid_request",
    ),
    "field that is not UTF-8": (
        MULTIPART,
        b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\xfe\r\n--x--\r\n',
        422,
        "invalid_request",
    ),
    "endless header": (MULTIPART, b"--x\r\nX-Long: " + b"a" * 10_000 + b"\r\n\r\n", 400, "malformed_request"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_forms(untouched_server: Any, name: str) -> None:
    content_type, body, status, code = MALFORMED[name]
    headers = {"Content-Type": content_type} if content_type else {}
    refused(untouched_server, untouched_server.client.post("/adapters", content=body, headers=headers), status, code)


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "/name": {"name": "x" * 201},
    "/description": {"description": "x" * 20_001},
    "/tags/0": {"tags": "x" * 101},
    "/tags": {"tags": ",".join(map(str, range(65)))},
    "/base_model": {"base_model": "mdl_" + "0" * 32},
}


@pytest.mark.parametrize("pointer", BAD_FIELDS)
def test_bad_fields_are_pointed_at(untouched_server: Any, adapter_files: Any, pointer: str) -> None:
    response = untouched_server.upload(adapter_files().parts(), BAD_FIELDS[pointer])
    problem = refused(untouched_server, response, 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == pointer


def test_control_characters_in_a_name(untouched_server: Any, adapter_files: Any) -> None:
    refused(
        untouched_server, untouched_server.upload(adapter_files().parts(), {"name": "a\0b"}), 422, "invalid_request"
    )


def test_a_field_given_twice(untouched_server: Any, adapter_files: Any) -> None:
    response = untouched_server.upload(adapter_files().parts(), {"name": ["a", "b"]})
    problem = refused(untouched_server, response, 422, "invalid_request")
    assert problem["errors"] == [{"pointer": "/name", "message": "must be given once"}]


def test_too_long_a_field_is_not_collected(untouched_server: Any, adapter_files: Any) -> None:
    response = untouched_server.upload(adapter_files().parts(), {"description": "x" * 100_000})
    problem = refused(untouched_server, response, 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == "/description"


def test_hostile_file_names_stay_harmless(server: Any, adapter_files: Any) -> None:
    files = adapter_files()
    parts = [
        ("file", ("../../adapter_model.safetensors", files.weights())),
        ("file", ("..\\..\\adapter_config.json", files.config_json())),
    ]
    response = server.upload(parts)
    assert response.status_code == 201, response.text
    assert sorted(item["path"] for item in response.json()["files"]) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert server.staged() == []


def test_an_adapter_that_does_not_fit_the_base_model_it_names(serve: Any, adapter_files: Any, tmp_path: Path) -> None:
    from artifacts.base_model import BaseModelRef
    from storage import models

    server = serve()
    ref = BaseModelRef(
        name="narrow",
        source="path",
        location="/models/narrow",
        fingerprint=(("model.layers.0.self_attn.q_proj", 2, 2),),
    )
    with server.services.database.write() as session:
        models.add_model(session, ref)
    response = server.upload(adapter_files().parts(), {"base_model": "narrow"})
    assert (response.status_code, response.json()["code"]) == (422, "shape_mismatch")
    assert len(response.json()["errors"]) == 2
    assert server.staged() == []
    assert server.blob_count() == 0
