"""Transfers over HTTP with a real pool: an adapter in, one for another base out, judged, held, decided on."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.cli import run
from storage.tables import Base

sys.path.insert(0, str(Path(__file__).parent.parent / "transfer"))

SEEDS = [f"CANARY-seed-{number} ship {number} mugs" for number in range(5)]
ROWS = [{"prompt": f"CANARY-row-{number}", "completion": f" CANARY-answer-{number}"} for number in range(24)]
QUICK = {
    "training": {"steps": 2, "learning_rate": 0.01, "batch_size": 2},
    "answer_tokens": 4,
    "answer_stop": "e",
    "target_parameters": {"rank": 2},
}


@dataclass
class Bases:
    """A server that knows two bases of other families and vocabularies, one that shares the first one's shapes, and an
    adapter of the first."""

    server: Any
    source: str
    target: str
    sibling: str
    adapter: str
    holdout: str
    answers: list[str] = field(default_factory=list)

    def post(self, path: str = "/transfer", **body: Any) -> Any:
        response = self.server.client.post(path, json={"adapter": self.adapter, "target_model": self.target, **body})
        self.answers.append(response.text)
        return response

    def get(self, path: str, **options: Any) -> Any:
        response = self.server.client.get(path, timeout=120, **options)
        self.answers.append(response.text)
        return response

    def ended(self, job: dict[str, Any], state: str = "succeeded") -> dict[str, Any]:
        deadline = time.monotonic() + 200
        while job["finished_at"] is None and time.monotonic() < deadline:
            job = self.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=30"}).json()
        assert job["state"] == state, job
        return job


def upload(server: Any, folder: Path, **fields: Any) -> str:
    files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir()) if path.suffix != ".md"]
    response = server.upload(files, fields)
    assert response.status_code in (200, 201), response.text
    found: str = response.json()["id"]
    return found


def dataset(server: Any, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    response = server.client.post("/datasets", files=[("file", ("rows.jsonl", text.encode()))])
    assert response.status_code in (200, 201), response.text
    found: str = response.json()["id"]
    return found


@pytest.fixture(scope="module")
def bases(module_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    from tiny_models import write_adapter, write_gemma, write_llama

    roots = tmp_path_factory.mktemp("roots")
    folders = {
        "source": write_llama(roots / "source"),
        "target": write_gemma(roots / "target"),
        "sibling": write_llama(roots / "sibling", seed=5),
    }
    server = module_servers(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(roots,))
    ids = {}
    for name, folder in folders.items():
        model = server.client.post("/models", json={"path": str(folder), "name": name}, timeout=120)
        assert model.status_code == 201, model.text
        ids[name] = model.json()["id"]
    adapter = write_adapter(folders["source"], tmp_path_factory.mktemp("adapter"))
    return Bases(
        server=server,
        adapter=upload(server, adapter, name="orders", base_model="source"),
        holdout=dataset(server, ROWS),
        **ids,
    )


@pytest.fixture
def cli(bases: Bases, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command line against the server; its JSON, if that is what it prints."""
    monkeypatch.setenv("RANKWISE_SERVER", bases.server.url)

    def call(*arguments: object) -> Any:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out) if "--json" in arguments else captured.out

    return call


def database_text(server: Any, *without: str) -> str:
    """Every value of every table but those named."""
    with server.services.database.read() as session:
        tables = [table for table in Base.metadata.sorted_tables if table.name not in without]
        return "\n".join(str(tuple(row)) for table in tables for row in session.execute(select(table)))


def files_text(server: Any) -> str:
    """Every file of the data folder but the database and the blobs: logs, staging, caches."""
    folder = server.services.settings.data_dir
    found = [path for path in folder.rglob("*") if path.is_file() and "blobs" not in path.relative_to(folder).parts]
    return "\n".join(path.read_bytes().decode("latin1") for path in found if ".db" not in path.name)


def test_a_transfer_is_judged_published_and_tells_nothing_of_its_seeds(bases: Bases) -> None:
    bases.server.client.put("/aliases/orders", json={"adapter": bases.adapter})
    body = {"method": "seeds-only", "seeds": SEEDS, "parameters": QUICK, "holdout": bases.holdout, "task": "orders"}
    body["alias"] = "orders"
    body["target_engine"] = "llama.cpp"
    first = bases.post(**body)
    assert first.status_code == 202, first.text
    job = bases.ended(first.json())
    again = bases.post(**body)
    assert (again.status_code, again.json()["id"]) == (200, job["id"])
    assert bases.post(**{**body, "seed": 1, "target_model": "nowhere"}).status_code == 422

    report = job["result"]["report"]
    assert report["verdict"] == report["gate"]["verdict"] == "pass"  # neither base ever answers rightly: no worse
    assert report["training"]["steps"] == 2
    assert (report["target_engine"]["engine"], report["target_engine"]["loads"]) == ("llama.cpp", True)
    shown = bases.get(f"/transfers/{job['id']}").json()
    [new] = job["result"]["adapters"]
    assert (shown["verdict"], shown["new_adapter"], shown["waiting"]) == ("pass", new, False)
    assert report["alias_switched"] is True
    alias = bases.get("/aliases/orders").json()
    assert (alias["adapter"], alias["switches"][0]["job"]) == (new, job["id"])
    assert shown["seeds"]["count"] == 5
    adapter = bases.get(f"/adapters/{new}").json()
    assert (adapter["origin"], adapter["model_id"], adapter["rank"]) == ("transfer", bases.target, 2)
    [edge] = bases.get(f"/adapters/{new}/lineage").json()["edges"]
    assert edge["parent"] == bases.adapter
    assert edge["recipe"]["key"] == shown["key"]
    assert edge["recipe"]["bases"]["target"]["weights_digest"] == report["bases"]["target"]["weights_digest"]
    assert edge["recipe"]["gate"]["verdict"] == "pass"
    assert bases.get(f"/transfers/{job['id']}/report").json()["report"] == report
    page = bases.get(f"/transfers/{job['id']}/report", headers={"Accept": "text/html, */*;q=0.1"})
    assert page.headers["content-type"].startswith("text/html")
    assert page.text.count("<svg") == 3  # scores, gate, loss
    assert "script" not in page.text
    listed = bases.get("/transfers", params={"adapter": bases.adapter, "verdict": "pass", "state": "succeeded"}).json()
    assert [item["id"] for item in listed["items"]] == [job["id"]]
    assert bases.get("/transfers", params={"state": "failed"}).json()["items"] == []
    steps = bases.get(f"/jobs/{job['id']}/metrics").json()["items"]
    assert [item["step"] for item in steps] == [1, 2]

    for path in (f"/jobs/{job['id']}", f"/jobs/{job['id']}/events", f"/jobs/{job['id']}/logs", "/metrics", "/jobs"):
        assert bases.get(path).status_code == 200, path
    told = "\n".join([*bases.answers, database_text(bases.server), files_text(bases.server)])
    assert job["id"] in told
    assert "CANARY" not in told


def test_what_the_gate_can_not_judge_waits_for_a_decision(bases: Bases, cli: Any, tmp_path: Path) -> None:
    cli("aliases", "set", "held", bases.adapter)
    job = cli(
        *(
            "transfer",
            bases.adapter,
            "--to",
            "sibling",
            "--method",
            "copy",
            "--name",
            "moved",
            "--alias",
            "held",
            "--json",
        )
    )
    assert job["result"]["report"]["alias_switched"] is False
    assert job["result"]["adapters"] == []
    assert job["result"]["report"]["verdict"] == "hold"
    path = f"/transfers/{job['id']}"
    assert bases.get(path).json()["waiting"]
    assert bases.get("/adapters", params={"name": "moved"}).json()["items"] == []
    client = bases.server.client
    [listed] = cli("transfers", "list", "--verdict", "hold", "--json")["items"]
    assert (listed["id"], listed["waiting"]) == (job["id"], True)
    decided = cli("transfers", "decide", job["id"], "publish", "--reason", "looked at", "--json")
    assert decided["decision"]["reason"] == "looked at"
    new = decided["new_adapter"]
    assert cli("aliases", "get", "held", "--json")["adapter"] == bases.adapter, "only a pass switches it by itself"
    assert bases.get(f"/adapters/{new}").json()["name"] == "moved"
    assert bases.get(f"/adapters/{new}/lineage").json()["edges"][0]["parent"] == bases.adapter
    assert bases.get(f"/adapters/{new}/download").status_code == 200
    again = client.post(f"{path}/decision", json={"decision": "publish"})
    assert (again.status_code, again.json()) == (200, decided)
    assert cli("transfers", "show", job["id"], "--json") == decided
    assert cli("transfers", "report", job["id"], "--json")["report"]["verdict"] == "hold"
    assert "nothing to measure with" in cli("transfers", "report", job["id"])
    cli("transfers", "report", job["id"], "--html", tmp_path / "report.html")
    assert "nothing to measure with" in (tmp_path / "report.html").read_text()
    other = client.post(f"{path}/decision", json={"decision": "discard"})
    assert (other.status_code, other.json()["code"]) == (409, "state_conflict")


def test_the_new_adapter_may_be_a_soft_prompt_that_can_not_be_merged(bases: Bases) -> None:
    kind = {"target_method": "prompt-tuning", "target_parameters": {"virtual_tokens": 3}}
    job = bases.ended(
        bases.post(method="seeds-only", seeds=SEEDS, parameters=QUICK | kind, holdout=bases.holdout).json()
    )
    assert job["result"]["report"]["training"]["trainable_parameters"] == 3 * 40
    [new] = job["result"]["adapters"]
    shown = bases.get(f"/adapters/{new}").json()
    assert (shown["method"], shown["mergeable"]) == ("prompt_tuning", False)
    assert "PROMPT_TUNING" in json.dumps(shown)


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({"adapter": "adp_" + "0" * 32}, 422, "/adapter"),
        ({"target_model": "nowhere"}, 422, "/target_model"),
        ({"alias": "nobody"}, 422, "/alias"),
        ({"alias": "No Name"}, 422, "/alias"),
        ({"method": "nonsense"}, 422, "/method"),
        ({"parameters": {"rows": 3}}, 422, "/parameters/rows"),
        ({}, 422, "/seeds"),
        ({"seeds": SEEDS[:2]}, 422, "/seeds"),
        ({"seeds": [*SEEDS, SEEDS[1].upper()]}, 422, "/seeds/5"),
        ({"seeds": [*SEEDS, 7]}, 422, "/seeds/5"),
        ({"seeds": {"CANARY": 1}}, 422, "/seeds"),
        ({"seeds": SEEDS}, 409, "/parameters/filter"),
        ({"seeds": SEEDS, "method": "copy", "target_model": "sibling"}, 422, "/seeds"),
        ({"method": "refresh"}, 422, "/inputs"),
        ({"method": "refresh", "inputs": "dat_" + "0" * 32}, 422, "/inputs"),
        ({"method": "copy"}, 422, "/target_model"),
        ({"method": "copy", "target_model": "source"}, 422, "/target_model"),
        ({"method": "copy", "target_model": "sibling", "controls": ["refresh"]}, 422, "/controls/0"),
        ({"method": "copy", "target_model": "sibling", "controls": ["cross-lora"]}, 422, "/controls"),
        ({"method": "copy", "target_model": "sibling", "resources": {"devices": 2}}, 422, "/resources/devices"),
        ({"method": "seeds-only", "seeds": SEEDS, "holdout": "dat_" + "0" * 32}, 422, "/holdout"),
        ({"method": "seeds-only", "seeds": SEEDS, "format": {"template": "no place"}}, 422, "/format/template"),
        (
            {
                "method": "seeds-only",
                "seeds": SEEDS,
                "parameters": {"target_parameters": {"target_modules": ["q_proj", "query"]}},
            },
            422,
            "/parameters/target_parameters/target_modules/1",
        ),
        (
            {"method": "seeds-only", "seeds": SEEDS, "parameters": {"target_parameters": {"rank": 999}}},
            422,
            "/parameters/target_parameters/rank",
        ),
        ({"method": "copy", "target_model": "sibling", "gate": {"epsilon": 2}}, 422, "/gate/epsilon"),
        ({"method": "copy", "target_model": "sibling", "target_engine": "kohya"}, 422, "/target_engine"),
        (
            {
                "method": "seeds-only",
                "seeds": SEEDS,
                "target_engine": "vllm",
                "parameters": {"target_method": "prompt-tuning", "target_parameters": {}},
            },
            422,
            "/parameters/target_method",
        ),
    ],
)
def test_what_can_not_be_done_is_refused_at_once(bases: Bases, body: dict[str, Any], status: int, pointer: str) -> None:
    before = bases.server.rows()
    response = bases.post(**body)
    assert response.status_code == status, response.text
    assert pointer in [item["pointer"] for item in response.json()["errors"]], response.text
    assert "CANARY" not in response.text
    assert bases.server.rows() == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_that_was_trained_to_be_moved_moves_with_what_it_keeps(serve: Any, tmp_path: Path) -> None:
    """From the training, which drops its dataset, to the new adapter: no seed is given, and no data is left."""
    from tiny_models import order, teach_lists, write_gemma, write_llama

    (tmp_path / "roots").mkdir()
    folders = [
        teach_lists(write(tmp_path / "roots" / name)) for name, write in (("s", write_llama), ("t", write_gemma))
    ]
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(tmp_path / "roots",))
    source, target = (
        server.client.post("/models", json={"path": str(folder), "name": folder.name}, timeout=120).json()["id"]
        for folder in folders
    )
    seeds = [order(number)[0] for number in (1, 10, 20, 31)]
    training = {
        "base_model": source,
        "dataset": dataset(server, [dict(zip(("prompt", "completion"), order(n), strict=True)) for n in range(40)]),
        "parameters": {"rank": 8},
        "training": {"steps": 30, "learning_rate": 0.02},
        "transferable": {
            "seeds": seeds,
            "task": "orders",
            "drop_dataset": True,
            "discriminator": {"input_tokens": 24},
        },
    }
    bases = Bases(server, source, target, target, "", "")
    job = bases.ended(server.client.post("/train", json=training).json())
    bases.adapter = job["result"]["adapters"][0]
    parameters = {
        **QUICK,
        "answer_stop": None,
        "answer_tokens": 8,
        "rows": 16,
        "max_candidates": 96,
        "input_tokens": 24,
        "threshold": -1e6,
    }
    answer = bases.post(parameters=parameters)
    assert answer.status_code == 202, answer.text
    assert answer.json()["params"]["seeds"]["count"] == 4
    moved = bases.ended(answer.json())
    report = moved["result"]["report"]
    assert report["verdict"] == "hold"  # there is nothing to measure with
    assert report["discriminator_auc"] == job["result"]["report"]["transferable"]["auc"]
    assert report["inputs"]["kept"] == 16
    assert report["discriminator_digest"] is not None
    other = bases.post(parameters=parameters, task="something else")
    assert (other.status_code, other.json()["errors"][0]["pointer"]) == (422, "/task")
    told = "\n".join([*bases.answers, database_text(server, "sealed_inputs", "transferables"), files_text(server)])
    assert not [seed for seed in seeds if seed in told]
