"""A federated training whose rounds are opened by hand: what its own process would do, with no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save

from artifacts.content import file_sha256
from artifacts.manifest import FileEntry
from storage import claims, federations
from storage.blob_rows import reserve_blobs
from storage.checkpoints import record_checkpoint
from storage.federations import Asked
from train.checkpoints import pack

ROWS = [{"prompt": f"{number} + 1 =", "completion": str(number + 1)} for number in range(20)]
START = {
    "x.lora_A.weight": np.ones((2, 3), "<f4"),
    "x.lora_B.weight": np.zeros((4, 2), "<f4"),
    "y.lora_A.weight": np.ones((2, 5), "<f4"),
    "y.lora_B.weight": np.zeros((3, 2), "<f4"),
}
TRAINED = {name: value for name, value in START.items() if ".lora_B." in name}


def update(value: float = 0.5, **changes: Any) -> bytes:
    """What a client gives back; None takes a tensor away."""
    tensors = {name: np.full_like(start, value) for name, start in TRAINED.items()} | changes
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


class RemoteTraining:
    """A training of remote clients, at a server without a pool."""

    def __init__(self, server: Any, folder: Path, headers: dict[str, str] | None = None) -> None:
        self.server, self.folder, self.http = server, folder, server.client
        self.headers = headers or {}
        self.attempt = 0
        self.id = ""

    def submit(self, keys: tuple[str | None, ...] = (None, None), **parameters: Any) -> httpx.Response:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        files = [("file", ("server.jsonl", text.encode()))]
        dataset = self.http.post("/datasets", files=files, headers=self.headers).json()["id"]
        model = self.http.post("/models", json={"hub_id": "acme/tiny"}, headers=self.headers).json()["id"]
        clients = [
            {"remote": {"name": f"site-{number}", "key": key, "max_rows": 1000}} for number, key in enumerate(keys)
        ]
        body = {
            "method": "ffa-lora",
            "base_model": model,
            "dataset": dataset,
            "parameters": {"rank": 2, "clients": clients, "rounds": 2, "max_update_norm": 50.0} | parameters,
            "training": {"batch_size": 4},
        }
        answer: httpx.Response = self.http.post("/train", json=body, headers=self.headers)
        if answer.status_code == 202:
            self.id = answer.json()["id"]
        return answer

    def open_round(self, round_: int = 0, seconds: float = 600.0, clients: int = 2) -> None:
        """As the training's process does: keep the state, ask the clients, wait."""
        database, blobs = self.server.services.database, self.server.services.blobs
        with database.write() as session:
            claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60.0)
        assert claim is not None
        assert claim.job_id == self.id
        state = self.folder / f"{self.id}-{round_}"
        state.mkdir()
        (state / "adapter_model.safetensors").write_bytes(save(START))
        (state / "run.json").write_text("{}")
        archive = pack(state, self.folder / f"{self.id}-{round_}.tar")
        entry = FileEntry("checkpoint.tar", file_sha256(archive), archive.stat().st_size, "application/x-tar")
        with database.write() as session:
            reserve_blobs(session, [entry])
        blobs.put_file(archive, entry.sha256)
        with database.write() as session:
            record_checkpoint(session, self.id, claim.attempt, step=round_, sha256=entry.sha256, size=entry.size)

        def before(session: Any) -> None:
            asked = [Asked(number, None) for number in range(clients)]
            federations.open_round(session, self.id, round_, asked, seconds=seconds, affinity=None)

        with database.write() as session:
            federations.suspend(session, self.id, claim.attempt, before=before, message="at work", fraction=0.5)

    def path(self, client: int = 0, round_: int = 1) -> str:
        return f"/jobs/{self.id}/clients/{client}/rounds/{round_}"

    def give(
        self,
        content: bytes | None = None,
        client: int = 0,
        round_: int = 1,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> httpx.Response:
        form = {"rows": "40", **fields}
        files = None if content is None else [("file", ("update.safetensors", content))]
        # A form without a file is multipart all the same.
        parts = [(name, (None, str(value))) for name, value in form.items() if value is not None]
        answer: httpx.Response = self.http.put(
            f"{self.path(client, round_)}/update", files=[*parts, *(files or [])], headers=headers or self.headers
        )
        return answer

    def task(self, client: int = 0, headers: dict[str, str] | None = None) -> dict[str, Any]:
        answer = self.http.get(f"/jobs/{self.id}/clients/{client}", headers=headers or self.headers)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found
