"""SMoRA over HTTP on two devices: each task's plain LoRA with what it loses, the pictures, and going on from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_train_with_pool import register, train, unpacked
from test_training_methods import STOCK

from train.splits import split_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HELD_OUT = 0.3
ROWS = [
    {"prompt": f"{kind} {number} is ", "completion": str(number + (1 if kind == "after" else -1)), "task": kind}
    for number in range(10, 40)
    for kind in ("after", "before")
]


def stock_loss(base: Path, adapter: Path, task: str) -> float:
    """On the held-out rows of the task; by transformers and PEFT alone, in a new process."""
    rows = [row for row in ROWS if row["task"] == task and split_of(row, HELD_OUT) == "validation"]
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(base), json.dumps(rows)]
    done = subprocess.run(command, input=f"{adapter}\n", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(json.loads(done.stdout.splitlines()[-1]))


def test_two_tasks_get_a_plain_lora_each_and_the_training_goes_on(serve: Any, tmp_path: Path) -> None:
    from tiny_base import write_tiny_base

    base = write_tiny_base(tmp_path / "roots" / "tiny")
    server = serve(pool="local", devices="cpu:2", max_wait_seconds=60, model_roots=(base.parent,))
    body = {
        **register(server, base, ROWS),
        "method": "smora",
        "parameters": {"rank": 8, "active_rank": 2, "fold": "per_task"},
        "training": {"steps": 12, "learning_rate": 0.01, "batch_size": 8},
        "evaluation": {"validation_fraction": HELD_OUT, "group_column": "task"},
        "name": "mixed",
    }
    job = train(server, body | {"resources": {"devices": 2}}, 600)
    report, (own, *folded) = job["result"]["report"], job["result"]["adapters"]
    assert report["devices"] == 2
    assert report["evaluation"]["after"]["loss"] < report["evaluation"]["before"]["loss"]

    folds = report["own"]["evaluation"]["folds"]
    assert [fold["task"] for fold in folds] == ["after", "before"]
    for fold, adapter in zip(folds, folded, strict=True):
        folder, _ = unpacked(server, adapter, tmp_path / adapter)
        assert fold["figures"]["loss"] == pytest.approx(stock_loss(base, folder, fold["task"]), abs=1e-4)
        measured = report["evaluation"]["groups"][fold["task"]]["after"]["loss"]
        assert fold["loss_gap"] == pytest.approx(fold["figures"]["loss"] - measured, abs=1e-4)
        shown = server.client.get(f"/adapters/{adapter}").json()
        assert (shown["method"], shown["name"]) == ("lora", f"mixed ({fold['task']})")
        assert f"loss {fold['figures']['loss']:.4g}" in shown["description"]
    merge = {"adapters": [{"id": adapter} for adapter in folded], "method": "cat"}
    merged = server.client.post("/merge", json=merge, headers={"Prefer": "wait=60"}, timeout=90).json()
    assert merged["state"] == "succeeded", merged

    pictures = server.client.get(f"/jobs/{job['id']}/pictures").json()["items"]
    assert {picture["name"] for picture in pictures} >= {"rank-usage", "task-distance"}
    for picture in pictures:
        image = server.client.get(f"/jobs/{job['id']}/pictures/{picture['name']}")
        assert image.status_code == 200, image.text

    again = {key: value for key, value in body.items() if key != "parameters"} | {"continue_from": own}
    refused = server.client.post("/train", json=again | {"parameters": {"active_rank": 4}})
    assert refused.status_code == 422, refused.text
    (error,) = refused.json()["errors"]
    assert (error["pointer"], error["message"]) == (
        "/parameters/active_rank",
        "active_rank is 4, but the adapter has 2",
    )
    longer = train(server, again, 600)["result"]["report"]
    assert longer["continued_from"] == {"adapter": own, "method": "smora", "compatibility": "weights"}
    assert longer["evaluation"]["before"]["loss"] == pytest.approx(report["evaluation"]["after"]["loss"], abs=1e-4)
    assert longer["evaluation"]["after"]["loss"] < longer["evaluation"]["before"]["loss"]
