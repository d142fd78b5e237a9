"""The job kind "merge" with `convert`: an adapter of another type is made a plain LoRA on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts import intake
from artifacts.errors import NotMergeable, RequestInvalid
from merge.engine import MergeRun
from storage import adapters
from storage.blobs import BlobStore

PATH = "base_model.model.model.layers.0.self_attn.q_proj"
D_OUT, D_IN = 10, 12


def store(pool: Any, folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **config}))
    manifest = intake.inspect(folder)
    for entry in manifest.files:
        BlobStore(pool.settings().blob_url).put_file(folder / entry.path, entry.sha256)
    with pool.database.write() as session:
        return adapters.add_adapter(session, manifest, name=folder.name)[0].id


def test_a_loha_is_part_of_a_sum(pool: Any, run_here: Any, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    A, B = random(3, D_IN), random(D_OUT, 3)
    lora = store(
        pool,
        tmp_path / "lora",
        {f"{PATH}.lora_A.weight": A, f"{PATH}.lora_B.weight": B},
        {"peft_type": "LORA", "r": 3, "lora_alpha": 3},
    )
    w = {"w1_a": random(D_OUT, 2), "w1_b": random(2, D_IN), "w2_a": random(D_OUT, 2), "w2_b": random(2, D_IN)}
    loha = store(
        pool,
        tmp_path / "loha",
        {f"{PATH}.hada_{name}": tensor for name, tensor in w.items()},
        {"peft_type": "LOHA", "r": 2, "alpha": 4},
    )
    wanted = {
        "adapters": [{"id": lora}, {"id": loha, "weight": 0.5}],
        "method": "cat",
        "parameters": {"output_dtype": "float32"},
    }
    with pytest.raises(NotMergeable):
        run_here("merge", **wanted)
    result = run_here("merge", **wanted, convert=True)
    (conversion,) = result["report"]["conversions"]
    assert (conversion["adapter"], conversion["from"], conversion["exact"]) == (loha, "loha", True)
    (merged,) = result["adapters"]
    with pool.database.read() as session:
        row = adapters.get_adapter(session, merged)
        (weights,) = [file for file in row.files if file.path.endswith(".safetensors")]
        edges = adapters.lineage(session, merged).edges
        digests = {key: adapters.get_adapter(session, key).weights_digest for key in (lora, loha)}
    assert {edge.parent_id for edge in edges} == {lora, loha}
    assert edges[0].recipe["convert"] is True
    assert {item["id"]: item["weights_digest"] for item in edges[0].recipe["adapters"]} == digests
    found = load_file(BlobStore(pool.settings().blob_url).materialize(weights.sha256, tmp_path))
    scaling = row.alpha / row.rank
    delta = scaling * found[f"{PATH}.lora_B.weight"].double() @ found[f"{PATH}.lora_A.weight"].double()
    D = {name: tensor.double() for name, tensor in w.items()}
    expected = B.double() @ A.double() + 0.5 * 2.0 * (D["w1_a"] @ D["w1_b"]) * (D["w2_a"] @ D["w2_b"])
    assert float((delta - expected).norm() / expected.norm()) < 1e-5


def test_what_the_engine_would_not_load_is_known_once_it_is_converted(
    pool: Any, run_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = store(
        pool,
        tmp_path / "lora",
        {f"{PATH}.lora_A.weight": torch.ones(511, D_IN), f"{PATH}.lora_B.weight": torch.ones(D_OUT, 511)},
        {"peft_type": "LORA", "r": 511, "lora_alpha": 3},
    )
    w = {"w1_a": (D_OUT, 2), "w1_b": (2, D_IN), "w2_a": (D_OUT, 2), "w2_b": (2, D_IN)}
    loha = store(
        pool,
        tmp_path / "loha",
        {f"{PATH}.hada_{name}": torch.ones(*shape) for name, shape in w.items()},
        {"peft_type": "LOHA", "r": 2, "alpha": 4},
    )
    wanted = {"adapters": [{"id": lora}, {"id": loha}], "method": "cat", "convert": True, "target_engine": "vllm"}
    monkeypatch.setattr(MergeRun, "write", lambda *_: pytest.fail("it was merged"))
    with pytest.raises(RequestInvalid, match="vllm would not load the result") as caught:
        run_here("merge", **wanted)
    assert [item.pointer for item in caught.value.errors] == ["/parameters/rank"]
