"""Adapters as llama.cpp has them, over HTTP: written for it, and taken in from it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load, save
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]}
SIDES = {"self_attn.q_proj": (32, 24), "self_attn.k_proj": (16, 24), "mlp.down_proj": (24, 40)}
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}


def peft_files(config: dict[str, Any] | None = None, path: str = "model.layers.3") -> list[Any]:
    """A PEFT adapter in which one module has another rank, and so another scaling."""
    random, tensors = np.random.default_rng(0), {}
    for position, (name, (d_out, d_in)) in enumerate(SIDES.items()):
        rank, stem = 2 + 2 * (position == 1), f"base_model.model.{path}.{name}"
        tensors[f"{stem}.lora_A.weight"] = random.standard_normal((rank, d_in)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = random.standard_normal((d_out, rank)).astype(np.float32)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"k_proj": 4}}
    fields |= {"target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": "CAUSAL_LM"} | (config or {})
    return [
        ("file", ("adapter_model.safetensors", save(tensors))),
        ("file", ("adapter_config.json", json.dumps(fields).encode())),
    ]


def with_base(files: list[Any], config: dict[str, Any] = HEADS) -> list[Any]:
    return [*files, ("file", ("config.json", json.dumps(config).encode()))]


def expected(files: list[Any]) -> dict[str, Any]:
    tensors, found = load(files[0][1][1]), {}
    for name in SIDES:
        stem = f"base_model.model.model.layers.3.{name}"
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        found[name] = 3 / len(a) ** 0.5 * b.astype(np.float64) @ a  # rsLoRA
    return found


def applied(content: bytes, folder: Path) -> dict[str, Any]:
    """ΔW as llama.cpp applies it, its rows turned back by transformers' own reader of GGUF files."""
    path, undo, found = folder / "x.gguf", LlamaTensorProcessor(HEADS), {}
    path.write_bytes(content)
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    tensors = {item.name: gguf.quants.dequantize(item.data, item.tensor_type) for item in reader.tensors}
    for name, short in NAMES.items():
        stem = f"blk.3.{short}.weight"
        a, b = tensors.pop(f"{stem}.lora_a"), tensors.pop(f"{stem}.lora_b")
        product = fields["adapter.lora.alpha"] / b.shape[1] * b.astype(np.float64) @ a
        found[name] = undo.process(product, stem).weights
    assert not tensors
    return found


def near(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, delta in first.items():
        assert np.linalg.norm(delta - second[name]) <= tolerance * np.linalg.norm(delta), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_an_adapter_goes_out_and_comes_back(server: Any, tmp_path: Path, dtype: str, tolerance: float) -> None:
    files = peft_files()
    sent = server.upload(with_base(files)).json()
    url = f"/adapters/{sent['id']}/download"
    answer = server.client.get(url, params={"format": "gguf", "dtype": dtype})
    assert answer.status_code == 200, answer.text
    assert len(answer.content) == int(answer.headers["content-length"])
    assert '.gguf"' in answer.headers["content-disposition"]
    near(expected(files), applied(answer.content, tmp_path), tolerance)
    part = server.client.get(url, params={"format": "gguf", "dtype": dtype}, headers={"Range": "bytes=100-999"})
    assert part.content == answer.content[100:1000]
    # and back: taken in, written once more, it is the same file
    back = server.upload(with_base([("file", ("again.gguf", answer.content))]))
    assert back.status_code == 201, back.text
    assert (back.json()["name"], back.json()["format"]) == ("again", "peft")
    again = server.client.get(f"/adapters/{back.json()['id']}/download", params={"format": "gguf"})
    near(applied(answer.content, tmp_path), applied(again.content, tmp_path), 1e-6)


@pytest.mark.parametrize("wanted", [{}, {"dtype": "float16"}, {"rank": 2}])
def test_a_peft_directory_does_not_hold_the_base_models_configuration(server: Any, wanted: dict[str, Any]) -> None:
    """With it `AutoModel.from_pretrained` takes the directory for a model, and finds no weights of one."""
    sent = server.upload(with_base(peft_files())).json()
    assert "config.json" in {file["path"] for file in sent["files"]}
    answer = server.client.get(f"/adapters/{sent['id']}/download", params=wanted)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {Path(name).name for name in archive.namelist()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_smaller_rank(server: Any, tmp_path: Path) -> None:
    files = peft_files()
    sent = server.upload(with_base(files)).json()
    answer = server.client.get(f"/adapters/{sent['id']}/download", params={"format": "gguf", "rank": 2})
    found, whole = applied(answer.content, tmp_path), expected(files)
    gone = sum(np.linalg.norm(whole[name] - found[name]) ** 2 for name in whole)
    ratio = (gone / sum(np.linalg.norm(delta) ** 2 for delta in whole.values())) ** 0.5
    assert ratio == pytest.approx(float(answer.headers["rankwise-relative-error"]), rel=1e-2)
    assert 0 < ratio < 1


@pytest.mark.parametrize(
    ("files", "base", "words"),
    [
        (peft_files(), None, "Send config.json of the base model along"),
        (peft_files(), {**HEADS, "architectures": ["MambaForCausalLM"]}, "the base model is a MambaForCausalLM"),
        (peft_files(), {**HEADS, "num_attention_heads": 5}, "not those of 5 heads"),
        (peft_files({"lora_alpha": 1e-50}), HEADS, "which float32 can not hold"),
        (peft_files(path="encoder.layer.3"), HEADS, "has no module 'encoder.layer.3"),
    ],
)
def test_what_can_not_be_written_is_refused_with_the_reason(server: Any, files: Any, base: Any, words: str) -> None:
    sent = server.upload(files if base is None else with_base(files, base)).json()
    answer = server.client.get(f"/adapters/{sent['id']}/download", params={"format": "gguf"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/query/format"
    assert words in answer.text
    found = server.client.get(f"/adapters/{sent['id']}/compatibility", params={"engine": "llama.cpp"}).json()
    assert not found["loads"]


def test_compatibility_is_in_step_with_the_writer(server: Any) -> None:
    sent = server.upload(with_base(peft_files())).json()
    found = server.client.get(f"/adapters/{sent['id']}/compatibility", params={"engine": "llama.cpp"}).json()
    assert (found["loads"], [item["rule"] for item in found["findings"]]) == (True, ["llama-cpp-gguf"])
    assert "format=gguf" in found["findings"][0]["remedy"]


def test_a_registered_base_model_tells_its_heads(serve: Any, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(HEADS | {"model_type": "llama"}))
    weights = {f"model.layers.3.{name}.weight": np.zeros(sides, np.float32) for name, sides in SIDES.items()}
    (folder / "model.safetensors").write_bytes(save(weights))
    server = serve(model_roots=(tmp_path / "models",))
    model = server.client.post("/models", json={"path": str(folder)})
    assert model.status_code == 201, model.text
    files = peft_files()
    sent = server.upload(files, {"base_model": model.json()["id"]}).json()
    answer = server.client.get(f"/adapters/{sent['id']}/download", params={"format": "gguf"})
    near(expected(files), applied(answer.content, tmp_path), 1e-6)
    back = server.upload([("file", ("x.gguf", answer.content))], {"base_model": model.json()["id"]})
    assert back.status_code == 201, back.text
    refused = server.upload([("file", ("x.gguf", answer.content))])
    assert refused.status_code == 422
    assert "config.json" in refused.json()["detail"]
