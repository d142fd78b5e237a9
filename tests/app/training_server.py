"""A server with a base model and a dataset, on which trainings can be submitted; its weights are never loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LAYERS = {
    "model.embed_tokens": (32, 8),
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.mlp.up_proj": (12, 8),
}
ROWS = [{"prompt": f"{number} and one is ", "completion": str(number + 1)} for number in range(20)]


@pytest.fixture
def training(serve: Any, tmp_path: Path, make_safetensors: Any) -> Any:
    """A server with a base model and a dataset; returns (server, body of a training)."""
    return training_server(serve, tmp_path, make_safetensors)


def training_server(serve: Any, tmp_path: Path, make_safetensors: Any) -> tuple[Any, dict[str, Any]]:
    """As the fixture, for one that lives as long as others."""
    folder = tmp_path / "roots" / "tiny"
    folder.mkdir(parents=True)
    weights = {f"{path}.weight": ("F32", [out, in_], b"\1" * 4 * out * in_) for path, (out, in_) in LAYERS.items()}
    (folder / "model.safetensors").write_bytes(make_safetensors(weights))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    server = serve(model_roots=(folder.parent,))
    model = server.client.post("/models", json={"path": str(folder), "name": "tiny"})
    assert model.status_code == 201, model.text
    dataset = upload(server, ROWS)
    return server, {"base_model": model.json()["id"], "dataset": dataset, "parameters": {"rank": 4}}


def upload(server: Any, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    response = server.client.post("/datasets", files=[("file", ("rows.jsonl", text.encode()))])
    assert response.status_code == 201, response.text
    found: str = response.json()["id"]
    return found
