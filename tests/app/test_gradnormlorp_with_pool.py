"""GradNormLoRP over HTTP: whole weights trained in the backward pass, and the DoRA that comes out as a plain LoRA."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_train_with_pool import register, stock_losses, train, unpacked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def converted(server: Any, adapter: str, **wanted: Any) -> dict[str, Any]:
    """The job, when it has ended."""
    path, headers = f"/adapters/{adapter}/convert", {"Prefer": "wait=60"}
    response = server.client.post(path, json={"to": "lora", **wanted}, headers=headers, timeout=90)
    job: dict[str, Any] = response.json()
    assert job["finished_at"] is not None, job
    return job


def test_whole_weights_in_the_backward_pass_and_the_fold_with_a_stated_error(serve: Any, tmp_path: Path) -> None:
    from tiny_base import sums, write_tiny_base

    base = write_tiny_base(tmp_path / "roots" / "tiny")
    server = serve(pool="local", devices="cpu:2", max_wait_seconds=60, model_roots=(base.parent,))
    training = {"steps": 12, "learning_rate": 0.01, "max_grad_norm": 0}
    body: dict[str, Any] = {
        **register(server, base, sums()),
        "method": "gradnormlorp",
        "parameters": {"mode": "full", "proj_rank": 4, "update_in_backward": True},
        "training": training,
    }
    for changes, pointer in (
        ({"training": {**training, "max_grad_norm": 1}}, "/training/max_grad_norm"),
        ({"training": {**training, "gradient_accumulation": 2}}, "/training/gradient_accumulation"),
        ({"resources": {"devices": 2}}, "/resources/devices"),
    ):
        refused = server.client.post("/train", json=body | changes)
        assert (refused.status_code, [error["pointer"] for error in refused.json()["errors"]]) == (422, [pointer])

    job = train(server, body, 600)
    report, (adapter,) = job["result"]["report"], job["result"]["adapters"]
    assert report["evaluation"]["after"]["loss"] < report["evaluation"]["before"]["loss"]
    assert report["estimate"]["gradient_bytes"] < report["estimate"]["adapter_bytes"] / 4
    assert report["own"]["optimizer"]["bytes"] < report["own"]["optimizer"]["adamw_bytes"]
    series = server.client.get(f"/jobs/{job['id']}/metrics").json()["items"]
    assert all(item["numbers"]["gradient_norm"] > 0 for item in series)

    folder, _ = unpacked(server, adapter, tmp_path / "dora")
    expected = stock_losses(base, folder, sums()[5])
    assert expected["trained"] < expected["plain"]

    small = converted(server, adapter, rank=2, max_error=0.01)
    assert (small["state"], small["error"]["code"]) == ("failed", "merge_refused")
    assert "rank 2 loses" in small["error"]["detail"]
    whole = converted(server, adapter, rank=64, max_error=0.01)
    assert whole["state"] == "succeeded", whole
    found, (lora,) = whole["result"]["report"], whole["result"]["adapters"]
    assert (found["from"], found["exact"]) == ("dora", True)
    assert found["relative_error"] < 1e-4
    plain, _ = unpacked(server, lora, tmp_path / "lora")
    assert stock_losses(base, plain, sums()[5])["trained"] == pytest.approx(expected["trained"], abs=1e-4)
    merge = {"adapters": [{"id": lora}], "method": "cat"}
    merged = server.client.post("/merge", json=merge, headers={"Prefer": "wait=60"}, timeout=90).json()
    assert merged["state"] == "succeeded", merged
