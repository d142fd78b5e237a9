"""LoRA-BERT on real transcripts over HTTP: all weights on mRNA of five species, then an adapter on human windows."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_train_with_pool import train, unpacked

from examples.lncrna.sequences import (
    LNCRNA_VARIABLE,
    SPECIES,
    coding,
    coding_and_untranslated,
    fasta,
    human_lncrna,
    of_one_length,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TASK = {"type": "transcript-classification", "views": "full", "stride": 3, "max_length": 128}
TRAINING = {"batch_size": 32, "warmup_steps": 20}
EVALUATION = {"validation_fraction": 0.2, "max_rows": 2000}

# In a process of its own: nothing but transformers and PEFT. Prints the log-odds of each window.
STOCK = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, adapter, windows = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter).eval()
for window in json.loads(windows):
    words = " ".join(window[at : at + 3] for at in range(0, len(window) - 2, 3))
    with torch.no_grad():
        logits = model(**tokenizer(words, return_tensors="pt")).logits[0]
    print(json.dumps(float(logits[1] - logits[0])))
"""


@dataclass
class Stage:
    """The service, and the model that the first stage made, whose files are downloaded."""

    server: Any
    report: dict[str, Any]
    model: str
    folder: Path


def dataset_of(server: Any, records: Any, name: str = "windows.fa.gz") -> str:
    response = server.client.post("/datasets", files=[("file", (name, gzip.compress(fasta(records))))])
    assert response.status_code == 201, response.text
    assert response.json()["format"] == "fasta"
    found: str = response.json()["id"]
    return found


@pytest.fixture(scope="module")
def stage(module_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("lncrna")
    sizes = "--layers 2 --width 64 --heads 4 --inner 128 --positions 128"
    command = [sys.executable, "-m", "app.cli", "models", "kmers", str(folder / "base"), *sizes.split()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    server = module_servers(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(folder,))
    model = server.client.post("/models", json={"path": str(folder / "base"), "name": "kmers"})
    assert model.status_code == 201, model.text
    windows = coding_and_untranslated([name for name in SPECIES if name != "human"], 150, 6)
    body = {
        "method": "lora-bert",
        "base_model": model.json()["id"],
        "dataset": dataset_of(server, windows),
        "task": TASK,
        "parameters": {"mode": "full"},
        "training": TRAINING | {"steps": 250, "learning_rate": 0.001},
        "evaluation": EVALUATION,
        "name": "five species",
    }
    refused = server.client.post("/train", json=body | {"parameters": {"mode": "full", "rank": 4}})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/parameters/rank")
    refused = server.client.post("/train", json=body | {"task": {"type": "causal-lm", "text_column": "sequence"}})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/task/type")
    result = train(server, body, 600)["result"]
    assert result["adapters"] == []
    (made,) = result["models"]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / "made").mkdir(exist_ok=True)
        (folder / "made" / name).write_bytes(server.client.get(f"/models/{made}/files/{name}").content)
    yield Stage(server, result["report"], made, folder / "made")


def test_all_weights_learn_coding_from_untranslated_windows_whose_length_says_nothing(stage: Stage) -> None:
    report = stage.report
    after, controls = report["evaluation"]["after"], report["data"]["controls"]
    assert controls["length"]["auroc"] == pytest.approx(0.5)
    assert after["auroc"] > 0.75
    assert report["evaluation"]["difference"]["auroc"]["low"] > 0.1
    # With the dinucleotides alone it knows less: part of what it learned is order.
    assert report["evaluation"]["shuffled"]["auroc"] < after["auroc"]
    # Seconds of training do not reach what 3-mer counts alone do, and the report says so.
    assert controls["kmer_counts"]["auroc"] > after["auroc"]
    assert any("3-mer counts" in warning for warning in report["warnings"])
    assert report["reload"]["largest_difference"] <= 1e-4
    shown = stage.server.client.get(f"/models/{stage.model}").json()
    assert (shown["name"], shown["architecture"]) == ("five species", "BertForSequenceClassification")


def test_an_adapter_learns_human_lncrna_from_mrna_on_windows_of_one_length(stage: Stage, tmp_path: Path) -> None:
    lncrna = human_lncrna()
    if lncrna is None:
        pytest.skip(f"no human lncRNA beside the checkout; {LNCRNA_VARIABLE} names a FASTA of them")
    server = stage.server
    windows = list(of_one_length(lncrna, coding("human"), 200, 1000))
    body: dict[str, Any] = {
        "method": "lora-bert",
        "base_model": stage.model,
        "dataset": dataset_of(server, windows),
        "task": TASK,
        "training": TRAINING | {"steps": 200, "learning_rate": 0.003},
        "evaluation": EVALUATION,
    }
    result = train(server, body, 600)["result"]
    (adapter,), report = result["adapters"], result["report"]
    after, controls = report["evaluation"]["after"], report["data"]["controls"]
    assert len(lncrna) == 2686
    assert controls["length"]["auroc"] == pytest.approx(0.5)
    assert after["auroc"] > 0.56  # of 356 windows, whose standard error is 0.03
    assert report["data"]["transcripts"]["validation"] == report["data"]["measured_rows"]

    folder, archive = unpacked(server, adapter, tmp_path / "adapter")
    again = server.upload([("file", ("trained.zip", archive))])
    assert (again.status_code, again.json()["id"]) == (200, adapter)
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(stage.folder), str(folder)]
    some = [text for _, text in windows[:40] + windows[-40:]]
    done = subprocess.run([*command, json.dumps(some)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    odds = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(odds[:40]) > sum(odds[40:])

    labels = [header.rpartition("=")[2] for header, _ in windows]
    random.Random(0).shuffle(labels)
    shuffled = [
        (f"{header.rpartition('=')[0]}={label}", text) for (header, text), label in zip(windows, labels, strict=True)
    ]
    training = TRAINING | {"steps": 60, "learning_rate": 0.003}
    job = train(server, body | {"dataset": dataset_of(server, shuffled), "training": training}, 600)
    chance = job["result"]["report"]
    rows = chance["data"]["measured_rows"]
    assert abs(chance["evaluation"]["after"]["accuracy"] - 0.5) < 3 * 0.5 / rows**0.5
    merge = {"adapters": [{"id": adapter}, {"id": job["result"]["adapters"][0]}], "method": "cat"}
    refused = server.client.post("/merge", json=merge)
    assert (refused.status_code, refused.json()["code"]) == (422, "not_mergeable")
    assert "modules_to_save" in refused.text
