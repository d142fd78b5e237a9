"""Downloads of one rank out of an adapter that serves several: exact, resumable, and refused where there is none."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from typing import Any

import pytest

MARK = {"rankwise_dylora": '{"ranks":[1,2,4],"scale_mode":"constant"}'}


def parts(files: Any) -> list[Any]:
    return [
        ("file", ("adapter_model.safetensors", files.weights(MARK))),
        ("file", ("adapter_config.json", files.config_json())),
        ("file", ("README.md", b"# What it is")),
    ]


@pytest.fixture
def url(server: Any, adapter_files: Any) -> str:
    created = server.upload(parts(adapter_files()), {"name": "nested"})
    assert created.status_code == 201, created.text
    assert (created.json()["method"], created.json()["ranks"]) == ("dylora", [1, 2, 4])
    return f"/adapters/{created.json()['id']}/download"


def matrices(data: bytes) -> dict[str, list[list[float]]]:
    """Name → rows, of a file of float32 tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            numbers = struct.unpack(f"<{(stop - start) // 4}f", data[start:stop])
            rows, columns = entry["shape"]
            found[name] = [list(numbers[row * columns : (row + 1) * columns]) for row in range(rows)]
    return found


def test_a_rank_is_a_whole_peft_directory_that_uploads_as_what_it_is(server: Any, adapter_files: Any, url: str) -> None:
    files = adapter_files()
    original = matrices(files.weights())
    for rank in (1, 2, 4):
        response = server.client.get(url, params={"rank": rank})
        assert response.status_code == 200, response.text
        assert response.headers["content-disposition"] == f'attachment; filename="nested-rank-{rank}.zip"'
        assert int(response.headers["content-length"]) == len(response.content)
        with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            assert archive.testzip() is None
            assert archive.namelist() == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
            assert archive.read("README.md") == b"# What it is"
            config = json.loads(archive.read("adapter_config.json"))
            cut = matrices(archive.read("adapter_model.safetensors"))
        # The scaling is 2 at rank 4 and, as the mark says, at every other.
        assert config == json.loads(files.config_json()) | {"r": rank, "lora_alpha": 2 * rank}
        for name, rows in original.items():
            assert cut[name] == (rows[:rank] if ".lora_A." in name else [row[:rank] for row in rows])
        again = server.upload([("file", ("cut.zip", response.content))])
        assert again.status_code == (200 if rank == 4 else 201), again.text
        assert again.json()["ranks"] == [item for item in (1, 2, 4) if item <= rank]
        assert again.json()["rank"] == rank


def test_the_whole_keeps_its_mark_through_download_and_upload(server: Any, url: str) -> None:
    shown = server.client.get(url.removesuffix("/download")).json()
    for layout in ("peft", "safetensors"):
        content = server.client.get(url, params={"format": layout}).content
        name = "again.zip" if layout == "peft" else "again.safetensors"
        again = server.upload([("file", (name, content))])
        assert (again.status_code, again.json()["id"]) == (200, shown["id"])
    assert [item["id"] for item in server.client.get("/adapters?method=dylora").json()["items"]] == [shown["id"]]


def test_one_file_carries_the_configuration_of_the_rank(server: Any, adapter_files: Any, url: str) -> None:
    single = server.client.get(url, params={"rank": 2, "format": "safetensors"})
    assert single.headers["content-disposition"] == 'attachment; filename="nested-rank-2.safetensors"'
    assert {len(rows) for name, rows in matrices(single.content).items() if "lora_A" in name} == {2}
    uploaded = server.upload([("file", ("one.safetensors", single.content))]).json()
    packed = server.client.get(url, params={"rank": 2}).content
    assert server.upload([("file", ("two.zip", packed))]).json()["id"] == uploaded["id"]
    assert (uploaded["rank"], uploaded["alpha"]) == (2, 4.0)


def test_ranges_and_tags_hold_for_a_rank(server: Any, url: str) -> None:
    for layout in ("peft", "safetensors"):
        query = {"rank": 2, "format": layout}
        whole = server.client.get(url, params=query)
        total, etag = len(whole.content), whole.headers["etag"]
        pieces = b""
        for start in range(0, total, 89):
            stop = min(start + 89, total)
            headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": etag}
            part = server.client.get(url, params=query, headers=headers)
            assert part.status_code == 206
            pieces += part.content
        assert pieces == whole.content
        assert server.client.get(url, params=query, headers={"If-None-Match": etag}).status_code == 304
        outside = server.client.get(url, params=query, headers={"Range": f"bytes={total}-"})
        assert outside.status_code == 416
        head = server.client.head(url, params=query)
        assert (head.headers["etag"], head.headers["content-length"]) == (etag, str(total))
        others = {server.client.head(url, params=query | {"rank": rank}).headers["etag"] for rank in (1, 2, 4)}
        assert len(others) == 3
        assert server.client.get(url, params={"format": layout}).headers["etag"] not in others


def test_a_rank_that_was_not_trained_is_refused(server: Any, url: str) -> None:
    refused = server.client.get(url, params={"rank": 3})
    assert refused.status_code == 422
    (finding,) = refused.json()["errors"]
    assert finding["pointer"] == "/query/rank"
    assert "1, 2, 4" in finding["message"]
    for wrong in ("0", "x", "70000"):
        assert server.client.get(url, params={"rank": wrong}).status_code == 422


def test_a_mark_that_does_not_fit_is_refused_by_its_name(server: Any, adapter_files: Any) -> None:
    files = adapter_files()
    mark = {"rankwise_dylora": '{"ranks":[1,8],"scale_mode":"constant"}'}
    answer = server.upload(
        [
            ("file", ("adapter_model.safetensors", files.weights(mark))),
            ("file", ("adapter_config.json", files.config_json())),
        ]
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "file_broken")
    assert "rankwise_dylora" in answer.json()["detail"]
