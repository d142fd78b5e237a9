"""Every training method over HTTP on a real model: trained, loaded by stock PEFT elsewhere, uploaded again, merged."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from train.catalog import METHODS
from train.splits import split_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HELD_OUT = 0.2
ROWS = [{"prompt": f"Code of item {n}:", "completion": f" <{n * 7 % 97:02d}-ok>"} for n in range(24)]
TARGETS = ["q_proj", "v_proj"]
USUAL = {"rank": 4}
PARAMETERS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "flexora": {"rank": 4, "selection_steps": 1, "validation_rows": 4, "validation_batches": 4},
    "increlora": {"initial_rank": 1, "target_rank": 2, "increment": 1, "layers_per_round": 60, "interval": 1},
    "inttune": {"rank": 4, "residual": True},  # else the model is another one before the first step
    "prompt-tuning": {"virtual_tokens": 8},
    "smora": {"rank": 8, "active_rank": 4},
    "vera": {"rank": 16},
}


@dataclass(frozen=True)
class Case:
    """A training, and what is known of its adapter.

    Attributes:
        declared: no loader but ours (`train.declared.load`) gives it the meaning that it was trained with.
        refused: what the merge calls it that takes no such adapter; None if it is merged.
    """

    method: str
    parameters: dict[str, Any]
    declared: bool = False
    refused: str | None = None


REFUSED = {
    "dora": "use_dora is set",
    "gradnormlorp": "use_dora is set",
    "loftq": "Rankwise's type RANKWISE_LOFTQ",
    "prompt-tuning": "PEFT type PROMPT_TUNING",
    "smora": "Rankwise's type RANKWISE_SMORA",
    "vera": "PEFT type VERA",
}
CASES = {
    name: Case(
        name,
        PARAMETERS.get(name, USUAL),
        declared=name in ("loftq", "smora"),
        refused=None if row.capabilities.mergeable else REFUSED[name],
    )
    for name, row in METHODS.items()
    if name != "lq-lora"  # which needs a base model of its own: test_lq_lora_http.py
    and "causal-lm" in row.capabilities.tasks
} | {
    "gradnormlorp-full": Case("gradnormlorp", {"mode": "full", "proj_rank": 4}, refused="use_dora is set"),
    "bone-mini": Case("bone", {"variant": "mini", "rank": 4, "mini_r": 2}),
    "bone-bat-col": Case("bone", {"variant": "bat_col", "rank": 4}, refused="the form bat of MiSS"),
    "bone-bat-row": Case(
        "bone", {"variant": "bat_row", "rank": 4}, declared=True, refused="Rankwise's type RANKWISE_BAT_ROW"
    ),
}

# A process that knows transformers and PEFT, and nothing of Rankwise but, where it is asked for, its loader of declared
# types: one adapter's folder a line in, one loss out.
STOCK = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if sys.argv[3:] == ["declared"]:
    from train.declared import load
else:
    from peft import PeftModel
    load = PeftModel.from_pretrained
base, rows = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(base)
for line in sys.stdin:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if line.strip():
        model = load(model, Path(line.strip()))
    model.eval()
    total, counted = 0.0, 0
    for row in rows:
        given = tokenizer(row["prompt"]).input_ids
        said = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([given + said])).logits[0, -len(said) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum"))
        counted += len(said)
    print(json.dumps(total / counted), flush=True)
"""


class Stock:
    """The process that knows nothing of Rankwise."""

    def __init__(self, base: Path, *mode: str) -> None:
        rows = [row for row in ROWS if split_of(row, HELD_OUT) == "validation"]
        command = [sys.executable, "-W", "ignore", "-c", STOCK, str(base), json.dumps(rows), *mode]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def loss(self, adapter: Path | None) -> float:
        """On the rows that are held out; of the base alone without an adapter."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{adapter or ''}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process with stock PEFT has ended: see its messages above"
        return float(json.loads(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        with self.process:  # closes the pipes and waits
            self.process.stdin.close()


@dataclass
class Service:
    """A service with the base model, the dataset and a plain LoRA to merge with."""

    running: Any
    stock: Stock
    declared: Stock
    inputs: dict[str, str]
    folder: Path
    other: str = ""

    def train(self, case: Case, seed: int = 0) -> dict[str, Any]:
        targets = {"target_modules": TARGETS} if METHODS[case.method].options.adapts_layers else {}
        body = {
            **self.inputs,
            "method": case.method,
            "parameters": targets | dict(case.parameters),
            "training": {
                "steps": 4,
                "batch_size": 4,
                "learning_rate": 0.002,
                "schedule": "constant",
            },
            "task": {"type": "causal-lm", "max_length": 32},
            "evaluation": {"validation_fraction": HELD_OUT},
            "seed": seed,
        }
        response = self.running.client.post("/train", json=body)
        job: dict[str, Any] = response.json()
        assert response.status_code == 202, job
        deadline = time.monotonic() + 600
        while job["finished_at"] is None and time.monotonic() < deadline:
            job = self.running.client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=60"}, timeout=90).json()
        assert job["state"] == "succeeded", job["error"]
        return job


@pytest.fixture(scope="module")
def service(module_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from examples.smollm2.base_model import base_model_directory

    base = base_model_directory()
    running = module_servers(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    model = running.client.post("/models", json={"path": str(base), "name": "base"}, timeout=120)
    assert model.status_code == 201, model.text
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    dataset = running.client.post("/datasets", files=[("file", ("rows.jsonl", text.encode()))])
    assert dataset.status_code == 201, dataset.text
    inputs = {"base_model": model.json()["id"], "dataset": dataset.json()["id"]}
    made = Service(running, Stock(base), Stock(base, "declared"), inputs, tmp_path_factory.mktemp("adapters"))
    made.other = made.train(CASES["lora"], seed=1)["result"]["adapters"][0]
    yield made
    made.stock.close()
    made.declared.close()


@pytest.mark.parametrize("name", CASES)
def test_a_method_from_training_to_merge(service: Service, name: str) -> None:
    client, case = service.running.client, CASES[name]
    job = service.train(case)
    report, adapter_id = job["result"]["report"], job["result"]["adapters"][0]
    assert report["reload"]["largest_difference"] <= report["reload"]["tolerance"]
    assert report["evaluation"]["after"]["loss"] < report["evaluation"]["before"]["loss"]

    archive = client.get(f"/adapters/{adapter_id}/download").content
    folder = service.folder / adapter_id
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        files.extractall(folder)
    reader = service.declared if case.declared else service.stock
    assert report["evaluation"]["before"]["loss"] == pytest.approx(reader.loss(None), abs=1e-4)
    assert report["evaluation"]["after"]["loss"] == pytest.approx(reader.loss(folder), abs=1e-4)

    again = service.running.upload([("file", ("trained.zip", archive))])
    assert (again.status_code, again.json()["id"]) == (200, adapter_id), again.text

    merge = {"adapters": [{"id": adapter_id}, {"id": service.other, "weight": 0.5}], "method": "cat"}
    answer = client.post("/merge", json=merge, headers={"Prefer": "wait=60"}, timeout=90)
    if case.refused is not None:
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (422, "not_mergeable"), answer.text
        assert adapter_id in problem["detail"]
        (error,) = problem["errors"]
        assert error["pointer"] == "/adapters/0/id"
        assert case.refused in error["message"]
        return
    assert answer.json()["state"] == "succeeded", answer.text
    merged = answer.json()["result"]["report"]["total"]
    assert merged["relative_error"] < 1e-6
