"""Which engines load an adapter: what is refused before anybody tries, and what would silently be another adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def upload(server: Any, adapter_files: Any, config: dict[str, Any], **options: Any) -> str:
    files = adapter_files(config=config, **options)
    parts = [
        ("file", ("adapter_model.safetensors", files.weights())),
        ("file", ("adapter_config.json", files.config_json())),
    ]
    answer = server.upload(parts)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def ask(server: Any, adapter: str, engine: str) -> dict[str, Any]:
    answer = server.client.get(f"/adapters/{adapter}/compatibility", params={"engine": engine})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["engine"] == engine
    assert all(item["source"] and item["message"] for item in found["findings"])
    assert found["loads"] == all(item["level"] == "needs" for item in found["findings"])
    return found


def rules(found: dict[str, Any]) -> dict[str, str]:
    return {item["rule"]: item["level"] for item in found["findings"]}


def test_a_plain_adapter_of_a_language_model(server: Any, adapter_files: Any) -> None:
    plain = upload(server, adapter_files, {})
    for engine in ("vllm", "peft", "transformers"):
        assert ask(server, plain, engine) == {"engine": engine, "loads": True, "findings": []}
    assert rules(ask(server, plain, "llama.cpp")) == {"llama-cpp-gguf": "needs"}
    for engine in ("kohya", "comfy", "diffusers"):
        assert rules(ask(server, plain, engine)) == {f"{engine}-names": "refuses"}


def test_a_scaling_that_an_engine_does_not_read_is_told(server: Any, adapter_files: Any) -> None:
    stabilised = upload(server, adapter_files, {"use_rslora": True})
    found = ask(server, stabilised, "llama.cpp")
    assert rules(found)["llama-cpp-alpha"] == "changes"
    assert not found["loads"]
    assert ask(server, stabilised, "vllm")["loads"]


def test_what_vllm_refuses_is_refused_here(server: Any, adapter_files: Any) -> None:
    saved = upload(server, adapter_files, {"modules_to_save": ["lm_head"]})
    assert rules(ask(server, saved, "vllm"))["vllm-modules-to-save"] == "refuses"
    assert ask(server, saved, "peft")["loads"]
    biased = upload(server, adapter_files, {"bias": "lora_only"})
    assert rules(ask(server, biased, "vllm"))["vllm-bias"] == "refuses"
    large = upload(server, adapter_files, {}, rank=20)
    found = ask(server, large, "vllm")
    assert (found["loads"], rules(found)) == (True, {"vllm-max-lora-rank": "needs"})
    assert "--max-lora-rank 32" in found["findings"][0]["message"]
    larger = upload(server, adapter_files, {}, rank=513)
    assert rules(ask(server, larger, "vllm")) == {"vllm-rank": "refuses"}
    uneven = upload(server, adapter_files, {"alpha_pattern": {"q_proj": 3}})
    assert rules(ask(server, uneven, "vllm")) == {"vllm-patterns": "needs"}
    assert rules(ask(server, uneven, "llama.cpp"))["llama-cpp-alpha"] == "changes"


def test_transformers_does_less_than_peft(server: Any, adapter_files: Any, make_safetensors: Any) -> None:
    files = adapter_files(config={"use_dora": True})
    tensors = files.tensors()
    for key, (_, shape, _) in list(tensors.items()):
        if "lora_B" in key:
            name = key.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[name] = ("F32", shape[:1], np.ones(shape[0], np.float32).tobytes())
    parts = [("file", ("adapter_model.safetensors", make_safetensors(tensors))), files.parts()[1]]
    decomposed = server.upload(parts).json()["id"]
    assert ask(server, decomposed, "peft")["findings"] == []
    assert rules(ask(server, decomposed, "transformers")) == {"transformers-dora": "changes"}
    called = upload(server, adapter_files, {"alora_invocation_tokens": [1]})
    assert rules(ask(server, called, "transformers")) == {"transformers-alora": "changes"}
    for kind, rule in (("VERA", "transformers-shared-state"), ("CARTRIDGE", "transformers-prompt-learning")):
        weights = make_safetensors({f"base_model.{kind.lower()}_A": ("F32", [2, 3], bytes(24))})
        config = f'{{"peft_type": "{kind}"}}'.encode()
        parts = [("file", ("adapter_model.safetensors", weights)), ("file", ("adapter_config.json", config))]
        adapter = server.upload(parts).json()["id"]
        assert rules(ask(server, adapter, "transformers")) == {rule: "refuses"}
        assert ask(server, adapter, "peft")["loads"]


def test_names_that_libraries_pass_over(server: Any, adapter_files: Any, make_safetensors: Any) -> None:
    plain = adapter_files()

    def renamed(old: str, new: str) -> str:
        tensors = {key.replace(old, new): value for key, value in plain.tensors().items()}
        parts = [("file", ("adapter_model.safetensors", make_safetensors(tensors))), plain.parts()[1]]
        return str(server.upload(parts).json()["id"])

    bare = renamed("base_model.model.", "")
    assert rules(ask(server, bare, "peft")) == {"peft-names": "changes"}
    assert ask(server, bare, "transformers")["loads"]
    wrapped = renamed("base_model.model.", "base_model.model._orig_mod.")
    named = renamed("lora_A.", "lora_A.default.")
    assert ask(server, named, "peft")["loads"]
    for adapter in (wrapped, named):
        assert rules(ask(server, adapter, "transformers")) == {"transformers-names": "changes"}
    assert "_orig_mod" in ask(server, wrapped, "peft")["findings"][0]["message"]


def test_a_stored_file_of_diffusers_is_given_as_it_is(server: Any) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

    def stored(stem: str = layer, down: str = "lora_A", up: str = "lora_B", **more: Any) -> str:
        tensors = {f"{stem}.{down}.weight": np.ones((2, 320), np.float32)}
        tensors |= {f"{stem}.{up}.weight": np.ones((320, 2), np.float32)}
        tensors |= {f"{stem}.{name}": value for name, value in more.items()}
        return str(server.upload([("file", ("x.safetensors", save(tensors)))]).json()["id"])

    assert ask(server, stored(), "diffusers") == {"engine": "diffusers", "loads": True, "findings": []}
    magnitude = np.ones(320, np.float32)
    assert ask(server, stored(lora_magnitude_vector=magnitude), "diffusers")["findings"] == []
    assert rules(ask(server, stored(dora_scale=magnitude), "diffusers")) == {"diffusers-names": "refuses"}
    for other in (stored(f"module.{layer}"), stored(down="lora_down", up="lora_up")):
        found = ask(server, other, "diffusers")
        assert (found["loads"], rules(found)) == (True, {"diffusers-format": "needs"})
        assert found["findings"][0]["remedy"] == "Download it with format=diffusers."


def test_another_type_of_adapter(server: Any) -> None:
    factors = {"lokr_w1": (4, 4), "lokr_w2": (8, 8)}
    content = save({f"{UNET}.{name}": np.ones(shape, np.float32) for name, shape in factors.items()})
    adapter = server.upload([("file", ("x.safetensors", content))]).json()["id"]
    for engine in ("vllm", "diffusers", "peft", "transformers", "kohya", "comfy", "llama.cpp"):
        found = ask(server, adapter, engine)
        assert not found["loads"]
    assert "lokr" in str(ask(server, adapter, "kohya"))


def test_an_adapter_of_an_image_model(server: Any) -> None:
    tensors = {f"{UNET}.lora_down.weight": np.ones((2, 32), np.float32)}
    tensors[f"{UNET}.lora_up.weight"] = np.ones((32, 2), np.float32)
    adapter = server.upload([("file", ("x.safetensors", save(tensors)))]).json()["id"]
    assert ask(server, adapter, "kohya") == {"engine": "kohya", "loads": True, "findings": []}
    for engine, rule in (("comfy", "comfy-format"), ("diffusers", "diffusers-format"), ("peft", "peft-format")):
        assert rules(ask(server, adapter, engine)) == {rule: "needs"}
    assert rules(ask(server, adapter, "vllm"))["language-model"] == "refuses"


@pytest.mark.parametrize("engine", ["", "vLLM", "tensorrt"])
def test_an_unknown_engine(server: Any, engine: str) -> None:
    answer = server.client.get(f"/adapters/adp_{'0' * 32}/compatibility", params={"engine": engine})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/query/engine"
