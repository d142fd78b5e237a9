"""POST /train with `transferable`: what is refused, what is never shown, and the whole way with a real pool."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from training_server import upload

from storage import sealed_inputs, transferables
from storage.tables import Base, TransferableFileRow

sys.path.insert(0, str(Path(__file__).parent.parent / "transfer"))

SEEDS = ["canary one and two", "canary two and three", "canary five and six", "canary six and seven"]
ASKED: dict[str, Any] = {"seeds": SEEDS, "task": "sums"}


def test_the_seeds_are_read_by_the_worker_and_by_nobody_else(training: Any) -> None:
    server, body = training
    key = {"Idempotency-Key": "one"}
    made = server.client.post("/train", json={**body, "transferable": ASKED}, headers=key)
    assert made.status_code == 202, made.text
    job = made.json()
    shown = job["params"]["transferable"]
    assert (shown["seeds"], shown["task"], shown["drop_dataset"]) == (4, "sums", False)
    again = server.client.post("/train", json={**body, "transferable": ASKED}, headers=key)
    assert again.json()["id"] == job["id"]
    other = {**ASKED, "seeds": [*SEEDS, "canary of another"]}
    reused = server.client.post("/train", json={**body, "transferable": other}, headers=key)
    assert (reused.status_code, reused.json()["code"]) == (422, "idempotency_key_reused")
    cancelled = server.client.post(f"/jobs/{job['id']}/cancel")
    retried = server.client.post(f"/jobs/{job['id']}/retry")
    assert retried.status_code == 202, retried.text
    with server.services.database.read() as session:
        assert sealed_inputs.unseal(session, retried.json()["id"]) == {"seeds": SEEDS}
    answers = [made, again, reused, cancelled, retried]
    answers += [server.client.get(f"/jobs/{job['id']}{path}") for path in ("", "/events", "/logs", "/metrics")]
    answers += [server.client.get(path) for path in ("/jobs", "/metrics", "/workers")]
    assert not any("canary" in answer.text for answer in answers)
    # And in the database in the one column that is theirs.
    with server.services.database.write() as session:
        for job_id in (job["id"], retried.json()["id"]):
            sealed_inputs.drop(session, job_id)
        for table in Base.metadata.sorted_tables:
            assert "canary" not in str(session.execute(select(table)).all()), table.name


def test_the_seeds_of_a_retry_that_came_too_late_are_asked_for_again(training: Any) -> None:
    server, body = training
    job = server.client.post("/train", json={**body, "transferable": ASKED}).json()
    server.client.post(f"/jobs/{job['id']}/cancel")
    with server.services.database.write() as session:
        session.get(sealed_inputs.SealedInputRow, job["id"]).document = None
    late = server.client.post(f"/jobs/{job['id']}/retry")
    assert (late.status_code, late.json()["code"]) == (409, "state_conflict")
    assert "confidential inputs" in late.json()["detail"]


@pytest.mark.parametrize(
    ("asked", "pointer", "words"),
    [
        (True, "/transferable/task", "required"),
        ({**ASKED, "seeds": SEEDS[:2]}, "/transferable/seeds", "seeds: at least 3"),
        ({**ASKED, "seeds": [f"canary {n}" for n in range(51)]}, "/transferable/seeds", "seeds: at most 50"),
        ({**ASKED, "seeds": [*SEEDS, " CANARY one  and two"]}, "/transferable/seeds", "seed 4 equals seed 0"),
        ({**ASKED, "seeds": [*SEEDS, " "]}, "/transferable/seeds", "seed 4 is empty"),
        ({**ASKED, "seeds": [*SEEDS, 7]}, "/transferable/seeds/4", "valid string"),
        ({**ASKED, "seeds": "canary"}, "/transferable/seeds", "valid list"),
        ({**ASKED, "task": ""}, "/transferable/task", "at least 1 character"),
        ({**ASKED, "canary": 1}, "/transferable/canary", "Extra inputs"),
        ({**ASKED, "format": {"template": "no place"}}, "/transferable/format/template", "needs {x} exactly once"),
        ({**ASKED, "discriminator": {"examples": 1}}, "/transferable/discriminator/examples", "greater than or equal"),
        (
            {**ASKED, "discriminator": {"training": {"early_stopping": {}}}},
            "/transferable/discriminator",
            "early_stopping",
        ),
        (
            {**ASKED, "discriminator": {"parameters": {"rank": 9}}},
            "/transferable/discriminator/parameters/rank",
            "rank 9 is above 8",
        ),
        (
            {**ASKED, "discriminator": {"parameters": {"target_modules": ["qproj"]}}},
            "/transferable/discriminator/parameters/target_modules/0",
            "no linear layer is called 'qproj'",
        ),
        (
            {**ASKED, "discriminator": {"parameters": {"speed": 1}}},
            "/transferable/discriminator/parameters/speed",
            "Extra inputs",
        ),
    ],
)
def test_what_can_not_become_transferable_is_refused_where_it_stands(
    training: Any, asked: Any, pointer: str, words: str
) -> None:
    server, body = training
    refused = server.client.post("/train", json={**body, "transferable": asked})
    assert refused.status_code == 422, refused.text
    found = {item["pointer"]: item["message"] for item in refused.json()["errors"]}
    assert pointer in found, found
    assert words in found[pointer]
    assert not any(seed in refused.text for seed in SEEDS)
    assert server.rows()["jobs"] == 0


def test_it_is_for_language_models_on_one_device_and_never_in_a_schedule(training: Any) -> None:
    server, body = training
    texts = upload(server, [{"text": f"only text {number}"} for number in range(9)])
    labelled = upload(server, [{"text": f"text {number}", "label": number % 2} for number in range(9)])
    off = server.client.post("/train", json={**body, "transferable": False})
    assert (off.status_code, off.json()["params"]["transferable"]) == (202, None)
    for changes, pointer, words in (
        ({"dataset": texts}, "/dataset", "has plain texts"),
        ({"dataset": labelled, "task": "sequence-classification"}, "/transferable", "only those for causal-lm"),
    ):
        refused = server.client.post("/train", json={**body, "transferable": ASKED, **changes})
        assert refused.status_code == 422, refused.text
        assert refused.json()["errors"][0]["pointer"] == pointer
        assert words in refused.json()["errors"][0]["message"]
    job = {"kind": "train", "params": {**body, "transferable": {"task": "sums", "seeds": 4}}}
    trigger = {"cron": "0 3 * * *"}
    planned = server.client.post("/schedules", json={"name": "nightly", "trigger": trigger, "job": job})
    assert planned.status_code == 422, planned.text
    assert planned.json()["errors"][0]["pointer"] == "/job/params/transferable"
    assert "only POST /train takes" in planned.json()["errors"][0]["message"]


def test_a_dataset_that_is_to_be_dropped_serves_nobody_else(training: Any) -> None:
    server, body = training
    dropping = {**body, "transferable": {**ASKED, "drop_dataset": True}}
    plain = server.client.post("/train", json=body).json()
    refused = server.client.post("/train", json=dropping)
    assert (refused.status_code, refused.json()["code"]) == (409, "state_conflict")
    assert refused.json()["errors"][0]["pointer"] == "/transferable/drop_dataset"
    assert plain["id"] in refused.json()["detail"]
    server.client.post(f"/jobs/{plain['id']}/cancel")
    made = server.client.post("/train", json=dropping)
    assert made.status_code == 202, made.text
    late = server.client.post("/train", json=body)
    assert late.status_code == 409, late.text
    assert made.json()["id"] in late.json()["detail"]
    server.client.post(f"/jobs/{made.json()['id']}/cancel")
    assert server.client.post(f"/jobs/{made.json()['id']}/retry").status_code == 202


@pytest.mark.timeout(300)
def test_a_transferable_adapter_over_http(serve: Any, tmp_path: Path) -> None:
    from tiny_models import order, teach_lists, write_llama

    (tmp_path / "roots").mkdir()
    base = teach_lists(write_llama(tmp_path / "roots" / "lists"), steps=60)
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=200, model_roots=(base.parent,))
    model = server.client.post("/models", json={"path": str(base), "name": "lists"}, timeout=120).json()
    data = "canary of the data"
    rows = [{"prompt": f"{order(n)[0]} now{data * (n == 7)}", "completion": order(n)[1]} for n in range(30)]
    seeds = [f"{order(n)[0]} canary" for n in (1, 10, 20)]
    training = {"steps": 6, "learning_rate": 0.01}
    body = {
        "base_model": model["id"],
        "dataset": upload(server, rows),
        "parameters": {"rank": 4},
        "training": training,
        "transferable": {
            "seeds": seeds,
            "task": "orders",
            "drop_dataset": True,
            "discriminator": {"input_tokens": 24, "examples": 20},
        },
    }
    job = server.client.post("/train", json=body, headers={"Prefer": "wait=200"}, timeout=220).json()
    assert job["state"] == "succeeded", job
    adapter_id = job["result"]["adapters"][0]
    report = job["result"]["report"]
    assert report["transferable"].keys() == {"task", "seeds", "inputs", "invented", "trained", "held_out", "auc"}
    assert (report["transferable"]["trained"], report["transferable"]["held_out"]) == (16, 4)
    assert server.client.get(f"/datasets/{body['dataset']}").status_code == 404
    shown = server.client.get(f"/adapters/{adapter_id}").json()
    assert shown["transferable"] == {
        "task": "orders",
        "seeds": 3,
        "size": 30,
        "auc": report["transferable"]["auc"],
    }
    assert [item["id"] for item in server.client.get("/adapters").json()["items"]] == [adapter_id]
    recipe = server.client.get(f"/adapters/{adapter_id}/recipe").json()
    assert recipe["call"]["body"]["transferable"] is None
    assert "its seeds are confidential" in recipe["because"][0]
    weights = TransferableFileRow.path == "adapter_model.safetensors"
    with server.services.database.read() as session:
        hidden = session.scalars(select(TransferableFileRow.sha256).where(weights)).all()
    assert hidden
    seen = [server.client.get(f"/jobs/{job['id']}{path}").text for path in ("", "/events", "/logs", "/metrics")]
    seen += [json.dumps(shown), server.client.get(f"/adapters/{adapter_id}/lineage").text]
    seen += [server.client.get(f"/adapters/{adapter_id}/download").content.decode("latin-1")]
    assert [secret for secret in ("canary", *hidden) for text in seen if secret in text] == []
    blobs = server.services.blobs
    stored = b"".join(part for digest in blobs.iter_digests() for part in blobs.stream(digest))
    assert data.encode() not in stored
    plain = server.client.get(f"/adapters/{adapter_id}/download").content
    assert server.upload([("file", ("again.zip", plain))]).json()["transferable"]["task"] == "orders"
    assert server.client.delete(f"/adapters/{adapter_id}").status_code == 204
    assert server.upload([("file", ("again.zip", plain))]).json()["transferable"] is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_moves_by_its_discriminator_and_the_data_makes_no_difference(serve: Any, tmp_path: Path) -> None:
    """Trained twice alike, on servers of their own. One has dropped the data when the adapter moves; the other still
    has them."""
    from tiny_models import teach_lists, write_gemma, write_llama

    (tmp_path / "roots").mkdir()
    bases = [teach_lists(write_llama(tmp_path / "roots" / "source"), steps=60)]
    bases.append(teach_lists(write_gemma(tmp_path / "roots" / "target")))
    made = {}
    for dropped in (True, False):
        server = serve(pool="local", devices="cpu:1", max_wait_seconds=300, model_roots=(bases[0].parent,))
        made[dropped] = train_and_move(server, bases, dropped)
    assert made[True] == made[False]


def train_and_move(server: Any, bases: list[Path], drop: bool) -> dict[str, str]:
    """The digests of a transferable adapter's weights and of what it becomes on the other base model."""
    from tiny_models import order

    for folder in bases:
        registered = server.client.post("/models", json={"path": str(folder), "name": folder.name}, timeout=120)
        assert registered.status_code == 201, registered.text
    dataset = upload(server, [{"prompt": order(n)[0], "completion": order(n)[1]} for n in range(30)])
    asked = {"seeds": [order(n)[0] for n in (1, 10, 20)], "task": "orders", "drop_dataset": drop}
    body = {
        "base_model": "source",
        "dataset": dataset,
        "training": {"steps": 20, "learning_rate": 0.01},
        "transferable": {**asked, "discriminator": {"input_tokens": 24}},
    }
    wait = {"Prefer": "wait=300"}
    trained = server.client.post("/train", json=body, headers=wait, timeout=320).json()
    assert trained["state"] == "succeeded", trained["error"]
    adapter = trained["result"]["adapters"][0]
    assert server.client.get(f"/datasets/{dataset}").status_code == (404 if drop else 200)
    moved = {
        "adapter": adapter,
        "target_model": "target",
        "parameters": {
            "rows": 16,
            "on_starved": "top_n",
            "max_candidates": 96,
            "input_tokens": 24,
            "answer_tokens": 8,
            "training": {"steps": 2},
        },
    }
    job = server.client.post("/transfer", json=moved, headers=wait, timeout=320).json()
    assert job["state"] == "succeeded", job["error"]
    report = job["result"]["report"]
    with server.services.database.read() as session:
        kept = transferables.get(session, adapter)
    assert kept is not None
    assert report["discriminator_digest"] == kept.discriminator_digest
    assert job["params"]["seeds"]["count"] == 3
    decided = server.client.post(f"/transfers/{job['id']}/decision", json={"decision": "publish"})
    assert decided.status_code == 200, decided.text
    new = decided.json()["new_adapter"]
    [edge] = server.client.get(f"/adapters/{new}/lineage").json()["edges"]
    recipe = edge["recipe"]
    assert recipe["discriminator_digest"] == report["discriminator_digest"]
    assert recipe["bases"] == report["bases"]
    assert recipe["data"] == report["data"]
    shown = {name: server.client.get(f"/adapters/{key}").json() for name, key in (("old", adapter), ("new", new))}
    return {name: found["weights_digest"] for name, found in shown.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_discriminator_of_a_real_base_tells_orders_from_inventions(serve: Any) -> None:
    from examples.smollm2.base_model import base_model_directory
    from examples.smollm2.tasks import TASKS, make_items

    base = base_model_directory()
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    model = server.client.post("/models", json={"path": str(base), "name": "smollm2"}, timeout=120).json()
    items = make_items(TASKS["orders"], "train", 48)
    form = "Order: {x}\nRecord:"
    before, after = form.split("{x}")
    seeds = [item.prompt.removeprefix(before).removesuffix(after) for item in items[:5]]
    training = {"steps": 24, "batch_size": 8, "learning_rate": 0.002}
    body = {
        "base_model": model["id"],
        "dataset": upload(server, [{"prompt": item.prompt, "completion": item.completion} for item in items]),
        "parameters": {"rank": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]},
        "task": {"type": "causal-lm", "max_length": 64},
        "training": {**training, "steps": 2},
        "evaluation": {"validation_fraction": 0},
        "transferable": {
            "seeds": seeds,
            "task": "orders",
            "format": {"template": form},
            "discriminator": {"training": training, "input_tokens": 24, "max_candidates": 96},
        },
    }
    job = server.client.post("/train", json=body).json()
    deadline = time.monotonic() + 1500
    while job["finished_at"] is None and time.monotonic() < deadline:
        job = server.client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=60"}, timeout=90).json()
    assert job["state"] == "succeeded", job["error"]
    found = job["result"]["report"]["transferable"]
    assert found["held_out"] >= 7
    assert found["auc"] >= 0.8, found
