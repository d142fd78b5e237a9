"""The whole way over HTTP with a real pool: two uploads in, one merged adapter out, and it downloads."""

from __future__ import annotations

import io
import json
import socket
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
    assert [(slot["name"], slot["warm"], slot["problem"]) for slot in slots] == [("cpu:0", [], None)]
    assert slots[0]["host"] == socket.gethostname()

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

    (attempt,) = server.client.get(f"/jobs/{job['id']}/attempts").json()["items"]
    assert (attempt["outcome"], attempt["slot"]) == ("succeeded", "cpu:0")
    assert server.client.get(f"/jobs/{job['id']}/logs").headers["x-attempt"] == "1"
    metrics = server.client.get("/metrics").text.splitlines()
    for expected in (
        'rankwise_job_run_seconds_count{kind="merge",outcome="succeeded"} 1.0',
        'rankwise_job_wait_seconds_count{kind="merge"} 1.0',
        'rankwise_jobs{state="queued"} 0.0',
        "rankwise_servers 1.0",
    ):
        assert expected in metrics
    assert any(line.startswith('rankwise_slot_busy_seconds_total{device="cpu",server="srv_') for line in metrics)

    events = server.client.get(f"/jobs/{job['id']}/events").text
    assert '"state":"succeeded"' in events
