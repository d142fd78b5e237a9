"""Tasks other than the first over HTTP with a real pool: the adapter's head and labels, loaded by PEFT elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from test_train_with_pool import register, train, unpacked

from train.splits import split_of

# In a process of its own: nothing but transformers and PEFT. Prints the mean loss and the accuracy on the rows.
STOCK = """
import json, sys
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, adapter, rows = sys.argv[1:]
with safe_open(adapter + "/adapter_model.safetensors", "pt") as file:
    labels = json.loads(file.metadata()["labels"])
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
losses, right = [], []
with torch.no_grad():
    for row in json.loads(rows):
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double()
        place = labels.index(row["label"])
        losses.append(float(torch.logsumexp(logits, 0) - logits[place]))
        right.append(int(logits.argmax()) == place)
print(json.dumps({"loss": sum(losses) / len(losses), "accuracy": sum(right) / len(right)}))
"""


PRAISE = ("lovely", "well made", "a delight", "I like it a lot", "excellent")
BLAME = ("awful", "it broke at once", "a waste of money", "I hate it", "terrible")
THINGS = ("kettle", "coat", "film", "radio", "chair", "novel", "lamp", "tent")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_minilm_learns_to_tell_praise_from_blame_over_http(serve: Any, tmp_path: Path) -> None:
    from examples.minilm.base_model import base_model_directory

    base = base_model_directory()
    rows = [
        {"text": f"The {thing}: {said}.", "label": label}
        for label, words in (("praise", PRAISE), ("blame", BLAME))
        for said in words
        for thing in THINGS
    ]
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    inputs = register(server, base, rows)
    body = {
        **inputs,
        "parameters": {"rank": 4, "target_modules": ["query", "value"]},
        "training": {"steps": 25, "batch_size": 8, "learning_rate": 0.002, "schedule": "constant"},
        "task": {"type": "sequence-classification", "max_length": 64},
        "evaluation": {"validation_fraction": 0.25},
    }
    report = train(server, body, 600)["result"]["report"]
    adapter_id = server.client.get("/adapters").json()["items"][0]["id"]
    after, difference = report["evaluation"]["after"], report["evaluation"]["difference"]
    assert after["accuracy"] >= 0.9
    assert difference["loss"]["high"] < 0 < difference["accuracy"]["low"]
    assert report["reload"]["largest_difference"] <= 1e-4
    assert report["data"]["labels"] == ["blame", "praise"]

    folder, archive = unpacked(server, adapter_id, tmp_path / "downloaded")
    held_out = [row for row in rows if split_of(row, 0.25) == "validation"]
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(base), str(folder), json.dumps(held_out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] == pytest.approx(after["loss"], abs=1e-4)
    assert found["accuracy"] == pytest.approx(after["accuracy"])

    again = server.upload([("file", ("trained.zip", archive))])
    assert (again.status_code, again.json()["id"]) == (200, adapter_id)
    other = train(server, {**body, "training": {"steps": 1}, "seed": 1}, 600)["result"]["adapters"][0]
    merge = server.client.post("/merge", json={"adapters": [{"id": adapter_id}, {"id": other}], "method": "cat"})
    assert (merge.status_code, merge.json()["code"]) == (422, "not_mergeable")
    assert "modules_to_save" in merge.text


# In a process of its own: nothing but diffusers. Prints how far the UNet's prediction moves.
STOCK_IMAGES = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline

base, adapter = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
torch.manual_seed(1)
inputs = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 16, 16)
with torch.no_grad():
    plain = pipeline.unet(*inputs).sample
    pipeline.load_lora_weights(adapter)
    print(json.dumps(float((plain - pipeline.unet(*inputs).sample).abs().max())))
"""


def stock_effect(base: Path, adapter: Path) -> float:
    command = [sys.executable, "-W", "ignore", "-c", STOCK_IMAGES, str(base), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_unet_is_trained_on_images_over_http(serve: Any, tmp_path: Path) -> None:
    from tiny_pipeline import write_images, write_tiny_pipeline

    base = write_tiny_pipeline(tmp_path / "roots" / "pipeline")
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    model = server.client.post("/models", json={"path": str(base)})
    assert (model.status_code, model.json()["architecture"]) == (201, "UNet2DConditionModel"), model.text
    archive = write_images(tmp_path / "images.zip").read_bytes()
    dataset = server.client.post("/datasets", files=[("file", ("squares.zip", archive))])
    assert (dataset.status_code, dataset.json()["format"]) == (201, "images"), dataset.text
    dataset_id = dataset.json()["id"]
    rows = server.client.get(f"/datasets/{dataset_id}/rows", params={"offset": 1, "limit": 1}).json()
    assert rows["items"] == [{"row": 2, "values": {"file_name": "pictures/01.png", "text": "a blue square"}}]
    sent = server.client.get(f"/datasets/{dataset_id}/download")
    assert (sent.content, sent.headers["content-type"]) == (archive, "application/zip")
    bad = write_images(tmp_path / "bad.zip", extra={"pictures/03.png": b"no image"}).read_bytes()
    refused = server.client.post("/datasets", files=[("file", ("bad.zip", bad))])
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "row 4")

    body: dict[str, Any] = {
        "base_model": model.json()["id"],
        "dataset": dataset_id,
        "task": {"type": "text-to-image", "resolution": 32},
        "parameters": {"rank": 4},
        "training": {"steps": 10, "batch_size": 4, "learning_rate": 0.01},
        "evaluation": {"validation_fraction": 0.3},
    }
    wrong = server.client.post("/train", json={**body, "task": "causal-lm"})
    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/base_model")
    estimate = server.client.post("/train/estimate", json=body).json()
    jobs = [train(server, {**body, "seed": seed}, 600) for seed in (0, 1)]
    report = jobs[0]["result"]["report"]
    assert estimate["trainable_parameters"] == report["trainable_parameters"]
    assert report["evaluation"]["difference"]["loss"]["high"] < 0
    first, second = (job["result"]["adapters"][0] for job in jobs)

    weights = server.client.get(f"/adapters/{first}/download", params={"format": "safetensors"}).content
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(weights)
    assert stock_effect(base, folder) > 1e-3
    again = server.upload([("file", ("trained.safetensors", weights))])
    assert (again.status_code, again.json()["id"]) == (200, first)
    merge = {"adapters": [{"id": first}, {"id": second}], "method": "cat"}
    merged = server.client.post("/merge", json=merge, headers={"Prefer": "wait=200"}, timeout=220).json()
    assert merged["state"] == "succeeded", merged
