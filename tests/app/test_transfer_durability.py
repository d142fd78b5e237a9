"""Transfers over HTTP that are killed, or starve: the same bytes in the end, and nothing told on the way."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from app.server_process import ServerProcess
from artifacts import intake
from storage import transferables
from storage.blobs import BlobStore
from storage.database import Database
from storage.tables import Base, JobCheckpointRow
from storage.transferables import Transferable

sys.path.insert(0, str(Path(__file__).parent.parent / "transfer"))

CONFIDENTIAL = {"sealed_inputs", "transferables"}
"""The tables that nobody but a worker reads."""


@dataclass
class Service:
    """A server on a data folder, what it knows, and every answer that it gave."""

    folder: Path
    roots: Path
    answers: list[str] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    client: Any = None
    process: Any = None

    @contextmanager
    def up(self) -> Iterator[Service]:
        self.folder.mkdir(exist_ok=True)
        log = self.folder / f"server-{len(list(self.folder.glob('server-*')))}.log"
        settings = {"MODEL_ROOTS": str(self.roots), "DEVICES": "cpu:1", "LOG_LEVEL": "debug", "POOL": "local"}
        with ServerProcess(self.folder / "data", settings, log) as process:
            hooks = {"response": [self._remember]}
            with httpx.Client(base_url=process.url, timeout=120, trust_env=False, event_hooks=hooks) as client:
                self.client, self.process = client, process
                yield self

    def _remember(self, response: httpx.Response) -> None:
        response.read()
        self.answers.append(response.text)

    @property
    def database(self) -> Database:
        return Database(f"sqlite:///{self.folder / 'data' / 'rankwise.db'}")

    def made(self, response: httpx.Response, name: str) -> str:
        assert response.status_code in (200, 201), response.text
        self.ids[name] = response.json()["id"]
        return self.ids[name]

    def fill(self, pair: Any) -> None:
        """Both bases, the teacher with what it keeps, a holdout, and the data that the teacher was trained on."""
        from tiny_models import order
        from transfers import FORM, SEEDS

        from transfer.filters.discriminator import DiscriminatorRecipe

        for name, path in (("source", pair.source), ("target", pair.target)):
            self.made(self.client.post("/models", json={"path": str(path), "name": name}), name)
        files = [("file", (path.name, path.read_bytes())) for path in pair.teacher.iterdir() if path.suffix != ".md"]
        adapter = self.made(self.client.post("/adapters", files=files, data={"base_model": "source"}), "adapter")
        for name, numbers in (("holdout", range(46, 70)), ("data", range(45))):
            rows = [dict(zip(("prompt", "completion"), order(number), strict=True)) for number in numbers]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self.made(self.client.post("/datasets", files=[("file", (f"{name}.jsonl", text.encode()))]), name)
        found = intake.inspect(pair.discriminator, base_model="source")
        blobs = BlobStore(f"file://{self.folder / 'data' / 'blobs'}")
        for entry in found.files:
            blobs.put_file(pair.discriminator / entry.path, entry.sha256)
        model = self.client.get(f"/models/{self.ids['source']}").json()
        kept = Transferable(
            seeds=SEEDS,
            task="orders",
            prompt_format=FORM.model_dump(mode="json"),
            size=45,
            recipe=DiscriminatorRecipe(task="orders").model_dump(mode="json"),
            files=found.files,
            discriminator_digest=found.identity_digest,
            discriminator_base={name: model[name] for name in ("weights_digest", "tokenizer_digest")},
            auc=0.9,
            settings={},
        )
        with self.database.write() as session:
            transferables.add(session, adapter, kept)

    def submit(self, **changes: Any) -> httpx.Response:
        from transfers import PARAMETERS

        parameters = {**PARAMETERS, **changes.pop("parameters", {})}
        body = {
            "adapter": self.ids["adapter"],
            "target_model": "target",
            "parameters": parameters,
            "holdout": self.ids["holdout"],
            "gate": {"epsilon": 1.0},  # so few steps teach too little
            **changes,
        }
        return self.client.post("/transfer", json=body)

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/jobs/{job_id}").json()
        return found

    def ended(self, job_id: str, seconds: float = 400) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        job = self.job(job_id)
        while job["finished_at"] is None and time.monotonic() < deadline:
            job = self.client.get(f"/jobs/{job_id}", headers={"Prefer": "wait=20"}).json()
        assert job["finished_at"] is not None, job
        return job

    def reached(self, job_id: str, pattern: str, attempt: int) -> None:
        """Wait until an attempt from that one on runs, and its progress says what is looked for."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            job = self.job(job_id)
            assert job["finished_at"] is None, job
            runs = job["state"] == "running" and job["attempt"] >= attempt
            if runs and re.search(pattern, job["progress"]["message"]):
                return
            time.sleep(0.02)
        raise AssertionError(f"never reached {pattern}: {job}")

    def kill_worker(self) -> None:
        [server] = self.client.get("/workers").json()["items"]
        [slot] = server["slots"]
        os.kill(slot["pid"], signal.SIGKILL)

    def weights(self, job: dict[str, Any]) -> str:
        """The digest of what the transfer made."""
        [adapter] = job["result"]["adapters"]
        found: str = self.client.get(f"/adapters/{adapter}").json()["weights_digest"]
        return found

    def told(self) -> str:
        """All that anybody but a worker can see."""
        tables = [table for table in Base.metadata.sorted_tables if table.name not in CONFIDENTIAL]
        with self.database.read() as session:
            rows = [str(tuple(row)) for table in tables for row in session.execute(select(table))]
        logs = [path.read_text(errors="replace") for path in self.folder.glob("server-*.log")]
        return "\n".join([*self.answers, *rows, *logs])

    def scores(self, job_id: str) -> list[float]:
        """What the discriminator said, from the stage outputs that are kept of an unfinished job."""
        with self.database.read() as session:
            row = session.get(JobCheckpointRow, job_id)
            assert row is not None
            digest = row.sha256
        [path] = (self.folder / "data" / "blobs").rglob(digest)
        found: list[float] = []
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
            units = {
                member.name: json.load(archive.extractfile(member))  # type: ignore[arg-type]
                for member in archive
                if "/units/filter" in member.name
            }
            for unit in units.values():
                text = archive.extractfile(f"stages/objects/{unit['output']}")
                assert text is not None
                found += [float(number) for number in re.findall(rb"-?\d+\.\d{6,}", text.read())]
        return found


def look_everywhere(service: Service, job_id: str) -> None:
    """Read all there is of a job."""
    for path in (f"/jobs/{job_id}", f"/jobs/{job_id}/logs", f"/jobs/{job_id}/metrics", f"/jobs/{job_id}/attempts"):
        service.client.get(path)
    for attempt in range(1, service.job(job_id)["attempt"] + 1):
        service.client.get(f"/jobs/{job_id}/logs", params={"attempt": attempt})
    for path in (
        f"/jobs/{job_id}/events",
        f"/transfers/{job_id}",
        f"/transfers/{job_id}/report",
        "/transfers",
        "/metrics",
    ):
        service.client.get(path)
    service.client.get(f"/transfers/{job_id}/report", headers={"Accept": "text/html"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_transfers_end_with_the_same_bytes_and_tell_nothing(tmp_path: Path) -> None:
    from tiny_models import order
    from transfers import make_pair

    pair = make_pair(tmp_path / "roots")
    whole = Service(tmp_path / "whole", tmp_path / "roots")
    slowly = {"training": {"steps": 400, "learning_rate": 0.01, "batch_size": 4, "checkpoint_steps": 10}}
    with whole.up():
        whole.fill(pair)
        expected = whole.ended(whole.submit(parameters=slowly).json()["id"])
        assert expected["state"] == "succeeded", expected
        weights = whole.weights(expected)

    service = Service(tmp_path / "killed", tmp_path / "roots")
    kills = 0
    with service.up():
        service.fill(pair)
        # The training data is gone: nothing of it is needed.
        assert service.client.delete(f"/datasets/{service.ids['data']}").status_code == 204
        job_id = service.submit(parameters=slowly).json()["id"]
        for kills, pattern in enumerate(("generate|filter", "label|train|step", "train|step"), 1):
            service.reached(job_id, pattern, kills)
            service.kill_worker()
        service.reached(job_id, "train|step|evaluate", kills + 1)
        scores = service.scores(job_id)
        os.kill(service.process.pid, signal.SIGKILL)
    with service.up():
        again = service.submit(parameters=slowly)
        assert (again.status_code, again.json()["id"]) == (200, job_id)
        job = service.ended(job_id)
        assert job["state"] == "succeeded", job
        assert job["attempt"] >= kills + 2
        assert service.weights(job) == weights
        same = ("inputs", "labels", "leaks", "data", "likeness", "evaluation", "gate")
        report = job["result"]["report"]
        assert {name: report[name] for name in same} == {name: expected["result"]["report"][name] for name in same}
        look_everywhere(service, job_id)

        starved = service.submit(parameters={"threshold": 1e6, "max_candidates": 32}).json()["id"]
        failed = service.ended(starved)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "transfer_starved")
        look_everywhere(service, starved)
        told = service.told()
    assert told.count("checkpoint_fetched") >= kills, "attempts began anew instead of going on"
    assert len(scores) > 10
    assert not [score for score in scores if str(score)[:8] in told]
    assert job_id in told
    for number in range(72):
        assert order(number)[0] not in told
