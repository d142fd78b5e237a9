"""GET /adapters/{id}/recipe: posted again it gives the same bytes, and it says when it would not."""

from __future__ import annotations

from typing import Any

import pytest

import app.recipes


@pytest.mark.timeout(240)
def test_a_recipe_posted_again_gives_the_same_bytes(
    serve: Any, adapter_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=180)
    ids = [server.upload(adapter_files(seed=seed).parts(), {"name": f"a{seed}"}).json()["id"] for seed in (1, 2)]

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = server.client.post(path, json=body, headers={"Prefer": "wait=180"}, timeout=200)
        assert response.status_code == 200, response.text
        assert response.json()["state"] == "succeeded", response.text
        found: dict[str, Any] = server.client.get(f"/adapters/{response.json()['result']['adapters'][0]}").json()
        return found

    def recipe(adapter: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = server.client.get(f"/adapters/{adapter['id']}/recipe").json()
        return found

    pool = [{"id": ids[0], "weight": 0.25}, {"id": ids[1]}]
    merged = post("/merge", {"adapters": pool, "method": "lego", "parameters": {"rank": 6, "seed": 3}, "name": "m"})
    candidates = [{"method": "svd", "parameters": {"rank": 2}}, {"method": "cat"}]
    won = post("/merge/compare", {"adapters": pool, "candidates": candidates, "publish": "best"})
    for made in (merged, won):
        found = recipe(made)
        assert (found["reproducible"], found["because"], found["call"]["path"]) == (True, [], "/merge")
        assert found["call"]["body"]["name"] == made["name"]
        assert found["versions"]["torch"]
        server.client.delete(f"/adapters/{made['id']}")
        again = post(found["call"]["path"], found["call"]["body"])
        assert again["id"] != made["id"]
        assert again["files"] == made["files"]  # with the digest of every file

    assert recipe(won)["call"]["body"]["parameters"]["output_dtype"] == "auto"  # a deleted adapter keeps its recipe
    monkeypatch.setattr(app.recipes, "version", lambda library: "0.0.0")
    changed = recipe(won)
    assert changed["reproducible"] is False
    assert len(changed["because"]) == len(changed["versions"]) >= 3
    assert "is 0.0.0 on this server" in changed["because"][0]
    monkeypatch.undo()
    server.client.delete(f"/adapters/{ids[0]}")
    assert recipe(won)["because"] == [f"the adapter {ids[0]} was deleted"]
    uploaded = recipe({"id": ids[1]})
    assert (uploaded["call"], uploaded["origin"], uploaded["reproducible"]) == (None, "upload", False)
    assert "uploaded" in uploaded["because"][0]
    assert server.client.get(f"/adapters/adp_{'f' * 32}/recipe").status_code == 404
