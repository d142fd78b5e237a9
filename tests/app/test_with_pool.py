"""The whole way over HTTP with a real pool: two uploads in, one merged adapter out, and it downloads."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import pytest


@pytest.mark.timeout(240)
def test_a_merge_from_upload_to_download(serve: Any, adapter_files: Any) -> None:
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=180)
    assert server.client.get("/readyz").json()["checks"]["pool"] == "ok"
    ids = [server.upload(adapter_files(seed=seed).parts(), {"name": f"a{seed}"}).json()["id"] for seed in (1, 2)]
    body = {
        "adapters": [{"id": ids[0]}, {"id": ids[1], "weight": 0.5}],
        "method": "lego",
        "parameters": {"rank": 6, "seed": 3},
        "name": "merged",
    }
    response = server.client.post("/merge", json=body, headers={"Prefer": "wait=180"}, timeout=200)
    job = response.json()
    assert response.status_code == 200, job
    assert job["state"] == "succeeded", job
    (slots,) = [item["slots"] for item in server.client.get("/workers").json()["items"]]
    assert [slot["name"] for slot in slots] == ["cpu:0"]

    merged = server.client.get(f"/adapters/{job['result']['adapters'][0]}").json()
    assert (merged["name"], merged["rank"], merged["origin"], merged["job_id"]) == ("merged", 6, "merge", job["id"])
    lineage = server.client.get(f"/adapters/{merged['id']}/lineage").json()
    assert {edge["parent"] for edge in lineage["edges"]} == set(ids)
    assert {edge["child"] for edge in lineage["edges"]} == {merged["id"]}
    assert [node["id"] for node in lineage["nodes"]] == [*ids, merged["id"]]

    archive = server.client.get(f"/adapters/{merged['id']}/download")
    with zipfile.ZipFile(io.BytesIO(archive.content)) as files:
        assert files.testzip() is None
        assert json.loads(files.read("adapter_config.json"))["r"] == 6
    again = server.upload([("file", ("merged.zip", archive.content))])
    assert (again.status_code, again.json()["id"]) == (200, merged["id"])

    events = server.client.get(f"/jobs/{job['id']}/events").text
    assert '"state":"succeeded"' in events
