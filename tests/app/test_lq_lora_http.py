"""LQ-LoRA over HTTP on a real model: quantised within a budget, trained on, loaded by another process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from train.splits import split_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HELD_OUT = 0.2
ROWS = [{"prompt": f"Code of item {n}:", "completion": f" <{n * 7 % 97:02d}-ok>"} for n in range(24)]
QUANTISATION = {
    "rank": 8,
    "budget_bits": 3.5,
    "grid": {"bits": [3, 4], "scale_bits": [4], "blocks": [64], "scales": [16]},
    "num_iterations": 4,
    "cost_iterations": 1,
    "target_modules": ["q_proj", "v_proj"],
}
OURS = """
import json, sys
from pathlib import Path
import torch
import train.quantised.loading
from train.declared import load
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(base)
model = load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), Path(adapter)).eval()
"""
MEASURE = """
total, counted = 0.0, 0
for row in rows:
    given = tokenizer(row["prompt"]).input_ids
    said = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([given + said])).logits[0, -len(said) - 1 : -1]
    total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum"))
    counted += len(said)
print(json.dumps(total / counted))
"""


STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
model = model.float().eval()
"""
"""Stock programs, that know nothing of Rankwise."""


def loss_of(program: str, base: Path, adapter: Path | str) -> float:
    """Mean loss of a token on the held-out rows, in a process of its own."""
    held_out = [row for row in ROWS if split_of(row, HELD_OUT) == "validation"]
    command = [sys.executable, "-W", "ignore", "-c", program + MEASURE, str(base), str(adapter), json.dumps(held_out)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def fetch_model(client: Any, model: str, folder: Path) -> Path:
    folder.mkdir()
    for file in client.get(f"/models/{model}").json()["made"]["files"]:
        (folder / file["name"]).write_bytes(client.get(file["link"]).content)
    return folder


def fetch_adapter(client: Any, adapter: str, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(client.get(f"/adapters/{adapter}/download").content)) as files:
        files.extractall(folder)
    return folder


def ended(client: Any, response: Any) -> dict[str, Any]:
    job: dict[str, Any] = response.json()
    assert response.status_code == 202, job
    deadline = time.monotonic() + 600
    while job["finished_at"] is None and time.monotonic() < deadline:
        job = client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=60"}, timeout=90).json()
    assert job["state"] == "succeeded", job["error"]
    return job


def test_from_a_base_model_to_an_adapter_of_its_quantised_form(module_servers: Any, tmp_path: Path) -> None:
    from examples.smollm2.base_model import base_model_directory

    base = base_model_directory()
    running = module_servers(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    client = running.client
    original = client.post("/models", json={"path": str(base), "name": "base"}, timeout=120).json()["id"]
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    dataset = client.post("/datasets", files=[("file", ("rows.jsonl", text.encode()))]).json()["id"]

    made = ended(client, client.post(f"/models/{original}/quantize", json={"parameters": QUANTISATION}))
    report = made["result"]["report"]
    assert 3.4 < report["bits_per_weight"] <= 3.5
    assert report["relative_error"] < 0.95 * report["relative_error_of_quantising_alone"]
    (packed,) = made["result"]["models"]
    shown = client.get(f"/models/{packed}").json()
    assert (shown["source"], shown["quantisation"]["rank"], shown["quantisation"]["layers"]) == ("files", 8, 60)

    training = {
        "method": "lq-lora",
        "base_model": packed,
        "dataset": dataset,
        "training": {"steps": 4, "batch_size": 4, "learning_rate": 0.002, "schedule": "constant"},
        "task": {"type": "causal-lm", "max_length": 32},
        "evaluation": {"validation_fraction": HELD_OUT},
    }
    for body, pointer in (
        (training | {"base_model": original}, "/base_model"),
        (training | {"method": "lora"}, "/base_model"),
        (training | {"parameters": {"rank": 9}}, "/parameters/rank"),
    ):
        refused = client.post("/train", json=body)
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, pointer), refused.text
    estimate = client.post("/train/estimate", json=training).json()
    assert estimate["trainable_parameters"] == 8 * sum(sum(item["shape"]) for item in report["modules"])

    job = ended(client, client.post("/train", json=training))
    trained, adapter = job["result"]["report"], job["result"]["adapters"][0]
    assert trained["trainable_parameters"] == estimate["trainable_parameters"]
    assert trained["reload"]["largest_difference"] <= trained["reload"]["tolerance"]
    assert trained["evaluation"]["after"]["loss"] < trained["evaluation"]["before"]["loss"]
    assert trained["own"]["quantisation"]["resident_bytes"] <= 1.05 * report["weights"] * report["bits_per_weight"] / 8

    original_files = fetch_adapter(client, adapter, tmp_path / "adapter")
    loss = loss_of(OURS, fetch_model(client, packed, tmp_path / "base"), original_files)
    assert trained["evaluation"]["after"]["loss"] == pytest.approx(loss, abs=1e-4)

    merge = {"adapters": [{"id": adapter}], "method": "cat"}
    problem = client.post("/merge", json=merge).json()
    assert (problem["code"], "/convert" in problem["hint"]) == ("not_mergeable", True)
    assert "RANKWISE_LQ_LORA" in problem["errors"][0]["message"]

    changed = ended(client, client.post(f"/adapters/{adapter}/convert", json={"to": "lora"}))["result"]
    plain = client.get(f"/adapters/{changed['adapters'][0]}").json()
    assert (plain["model_id"], plain["rank"], plain["mergeable"]) == (original, 16, True)
    assert changed["report"]["quantisation_error"] == pytest.approx(report["relative_error"])
    merged = ended(client, client.post("/merge", json={"adapters": [{"id": plain["id"]}], "method": "cat"}))
    assert merged["result"]["report"]["total"]["relative_error"] < 1e-6

    path = f"/adapters/{adapter}/convert"
    unpacked = ended(client, client.post(path, json={"to": "unpacked_lora"}))["result"]
    (dense,), (lora,) = unpacked["models"], unpacked["adapters"]
    told = client.get(f"/adapters/{lora}").json()
    assert (told["model_id"], told["rank"], told["mergeable"]) == (dense, 8, True)
    assert (unpacked["report"]["exact"], unpacked["report"]["base"]["rounding"]) == (True, 0.0)
    base_files = fetch_model(client, dense, tmp_path / "unpacked")
    assert client.get(f"/models/{dense}").json()["quantisation"] is None
    stock_loss = loss_of(STOCK, base_files, fetch_adapter(client, lora, tmp_path / "lora"))
    assert stock_loss == pytest.approx(loss, abs=1e-4)
    again = ended(client, client.post(path, json={"to": "unpacked_lora", "name": "again"}))["result"]
    assert (again["models"], again["adapters"]) == ([dense], [lora])

    for dtype, difference in (("float32", 1e-4), ("bfloat16", 0.03)):
        one = ended(client, client.post(path, json={"to": "merged", "dtype": dtype}))["result"]
        assert one["adapters"] == []
        (merged_id,) = one["models"]
        files = fetch_model(client, merged_id, tmp_path / dtype)
        assert loss_of(STOCK, files, "") == pytest.approx(loss, abs=difference)
    quick = {"rank": 8, "preset": "nf3", "num_iterations": 1, "target_modules": ["q_proj", "v_proj"]}
    other = ended(client, client.post(f"/models/{original}/quantize", json={"parameters": quick}))
    refused = client.post(path, json={"to": "merged", "base_model": other["result"]["models"][0]}).json()
    failed = client.get(f"/jobs/{refused['id']}", headers={"Prefer": "wait=60"}, timeout=90).json()
    assert failed["state"] == "failed"
    assert "not the one that the adapter was trained on" in failed["error"]["detail"]
