"""POST /adapters/{id}/load-check: what is taken, what is refused at once, and the whole way with a real worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from artifacts.base_model import UNET, BaseModelRef
from storage import jobs, models

SHAPES = Path(__file__).resolve().parents[2] / "examples" / "shapes_sd"


def upload(server: Any, files: Any) -> str:
    answer = server.upload(files.parts())
    assert answer.status_code in (200, 201), answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def checking(module_servers: Any) -> Any:
    return module_servers()


@pytest.fixture(scope="module")
def bases(checking: Any) -> dict[str, str]:
    """Ids of a language model, a pipeline and a pipeline on a hub."""
    refs = {
        "language": BaseModelRef("lm", "path", "/m", architecture="LlamaForCausalLM"),
        "pipeline": BaseModelRef("sd", "path", "/p", architecture=UNET, pipeline="StableDiffusionPipeline"),
        "hub": BaseModelRef("acme/sd", "hub", "acme/sd"),  # whose class is not known
    }
    with checking.services.database.write() as session:
        return {name: models.add_model(session, ref)[0].id for name, ref in refs.items()}


def test_a_check_is_a_job_with_the_base_model_that_it_will_build(
    checking: Any, adapter_files: Any, bases: dict[str, str]
) -> None:
    alone, known = upload(checking, adapter_files()), upload(checking, adapter_files(seed=1, base_model="lm"))
    wanted = (
        (alone, {"engine": "peft"}, None),
        (known, {"engine": "peft"}, bases["language"]),
        (alone, {"engine": "transformers", "base_model": "lm"}, bases["language"]),
    )
    for adapter, body, base in wanted:
        answer = checking.client.post(f"/adapters/{adapter}/load-check", json=body)
        assert answer.status_code == 202, answer.text
        assert answer.json()["kind"] == "load_check"
        assert answer.json()["params"] == {"adapter": adapter, "engine": body["engine"], "base_model": base}
        assert answer.json()["resources"]["timeout_seconds"] == 600  # the library may match expressions for ever
        with checking.services.database.read() as session:
            assert jobs.get_job(session, answer.json()["id"]).affinity is None  # no weights are read
    own = {"engine": "peft", "resources": {"timeout_seconds": 5.0}}
    answer = checking.client.post(f"/adapters/{alone}/load-check", json=own)
    assert answer.json()["resources"]["timeout_seconds"] == 5


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/engine"),
        ({"engine": "vllm"}, "/engine"),
        ({"engine": "peft", "base_model": "nobody"}, "/base_model"),
        ({"engine": "peft", "base_model": "sd"}, "/base_model"),
        ({"engine": "transformers", "base_model": "sd"}, "/base_model"),
        ({"engine": "transformers"}, "/base_model"),
        ({"engine": "diffusers"}, "/engine"),
        ({"engine": "peft", "weights": True}, "/weights"),
        ({"engine": "peft", "resources": {"devices": 2}}, "/resources/devices"),
    ],
)
def test_checks_that_are_refused(
    checking: Any, adapter_files: Any, bases: dict[str, str], body: dict[str, Any], pointer: str
) -> None:
    answer = checking.client.post(f"/adapters/{upload(checking, adapter_files())}/load-check", json=body)
    assert answer.status_code == 422, answer.text
    assert [item["pointer"] for item in answer.json()["errors"]] == [pointer]


@pytest.mark.parametrize(
    ("config", "tensors", "body", "pointer"),
    [
        ({"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": [3, 8]}, {"engine": "peft"}, "/base_model"),
        ({"peft_type": "XLORA"}, {"a.weight": [3, 8]}, {"engine": "peft", "base_model": "lm"}, "/engine"),
        ({"peft_type": "OSF"}, {"b.osf_U": [3, 8]}, {"engine": "peft", "base_model": "lm"}, "/engine"),
        ({"peft_type": "PSOFT"}, {"b.psoft_R": [3, 8]}, {"engine": "peft", "base_model": "lm"}, "/engine"),
        ({"peft_type": "ADAMSS"}, {"b.weight": [3, 8]}, {"engine": "peft", "base_model": "lm"}, "/engine"),
        (
            {"peft_type": "VBLORA", "save_only_topk_weights": True},
            {"c.weight": [3, 8]},
            {"engine": "peft", "base_model": "lm"},
            "/engine",
        ),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/etc/passwd"},
            {"prompt_embeddings": [3, 8]},
            {"engine": "peft", "base_model": "lm"},
            "/engine",
        ),
    ],
)
def test_types_that_need_more_than_their_own_file(
    checking: Any,
    make_safetensors: Any,
    bases: dict[str, str],
    config: dict[str, Any],
    tensors: dict[str, list[int]],
    body: dict[str, Any],
    pointer: str,
) -> None:
    weights = make_safetensors({key: ("F32", shape, bytes(4 * 24)) for key, shape in tensors.items()})
    parts = [
        ("file", ("adapter_model.safetensors", weights)),
        ("file", ("adapter_config.json", json.dumps(config).encode())),
    ]
    adapter = checking.upload(parts).json()["id"]
    answer = checking.client.post(f"/adapters/{adapter}/load-check", json=body)
    assert answer.status_code == 422, answer.text
    assert [item["pointer"] for item in answer.json()["errors"]] == [pointer]


def test_an_image_models_adapter_needs_a_pipeline_that_is_here(checking: Any, bases: dict[str, str]) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    sides = {"down": (2, 32), "up": (32, 2)}
    content = save({f"{name}.lora_{side}.weight": np.ones(shape, np.float32) for side, shape in sides.items()})
    path = f"/adapters/{checking.upload([('file', ('x.safetensors', content))]).json()['id']}/load-check"
    for base in (None, "lm", "acme/sd"):
        answer = checking.client.post(path, json={"engine": "diffusers", "base_model": base})
        assert answer.status_code == 422, answer.text
        assert [item["pointer"] for item in answer.json()["errors"]] == ["/base_model"]
    assert "lies on a hub" in answer.json()["detail"]
    assert checking.client.post(path, json={"engine": "diffusers", "base_model": "sd"}).status_code == 202
    assert checking.client.post(f"/adapters/adp_{'0' * 32}/load-check", json={"engine": "peft"}).status_code == 404


def test_a_file_of_several_components_is_no_peft_directory(checking: Any, bases: dict[str, str]) -> None:
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
    parts = {
        part: f"{part}.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" for part in ("unet", "text_encoder")
    }
    parts["text_encoder"] = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {
        f"{path}.lora_{side}.weight": np.ones(shape, np.float32)
        for path in parts.values()
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    fields = {f"{part}.{key}": value for part in parts for key, value in config.items()}
    content = save(tensors, {"lora_adapter_metadata": json.dumps(fields)})
    adapter = checking.upload([("file", ("x.safetensors", content))]).json()
    assert adapter["format"] == "safetensors-metadata", adapter
    body = {"engine": "peft", "base_model": "lm"}
    answer = checking.client.post(f"/adapters/{adapter['id']}/load-check", json=body)
    assert answer.status_code == 422, answer.text
    assert [item["pointer"] for item in answer.json()["errors"]] == ["/engine"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_libraries_themselves_load_what_is_stored(serve: Any, adapter_files: Any, make_safetensors: Any) -> None:
    """ShapesSD by diffusers; by PEFT an adapter alone, and one whose names it passes over."""
    server = serve(pool="local", devices="cpu:1", model_roots=[str(SHAPES)], max_wait_seconds=300)
    base = server.client.post("/models", json={"path": str(SHAPES / "base"), "name": "shapes"}).json()["id"]

    def check(adapter: str, **body: Any) -> dict[str, Any]:
        headers = {"Prefer": "wait=300"}
        answer = server.client.post(f"/adapters/{adapter}/load-check", json=body, headers=headers, timeout=320)
        assert (answer.status_code, answer.json()["state"]) == (200, "succeeded"), answer.text
        report: dict[str, Any] = answer.json()["result"]["report"]
        return report

    file = (SHAPES / "adapters" / "magenta_circle" / "pytorch_lora_weights.safetensors").read_bytes()
    circle = server.upload([("file", ("circle.safetensors", file))]).json()["id"]
    report = check(circle, engine="diffusers", base_model=base)
    assert (report["verdict"], report["modules"]["loaded"], report["scaling"]["compared"]) == ("loads", 56, 56)
    assert report["base_model"] == {
        "id": base, "name": "shapes", "built_from": "config", "class": "StableDiffusionPipeline",
    }  # fmt: skip

    files = adapter_files()
    report = check(upload(server, files), engine="peft")
    assert (report["verdict"], report["base_model"]["built_from"], report["modules"]["loaded"]) == (
        "loads", "skeleton", 2,
    )  # fmt: skip
    bare = {key.removeprefix("base_model.model."): value for key, value in files.tensors().items()}
    answer = server.upload([("file", ("adapter_model.safetensors", make_safetensors(bare))), files.parts()[1]])
    assert answer.status_code == 201, answer.text
    report = check(answer.json()["id"], engine="peft")
    assert (report["verdict"], report["missing"]["count"], report["unexpected"]["count"]) == ("nothing", 4, 4)
    assert report["refusal"] is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_configuration_that_asks_for_all_memory_fails_its_job_once(
    serve: Any, make_safetensors: Any, tmp_path: Path
) -> None:
    """960 GB of virtual tokens, for a file of 192 bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    server = serve(pool="local", devices="cpu:1", model_roots=[str(tmp_path)], max_wait_seconds=300)
    server.client.post("/models", json={"path": str(tmp_path / "tiny"), "name": "tiny"}).raise_for_status()
    document = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 15_000_000_000}
    weights = make_safetensors({"prompt_embeddings": ("F32", [3, 16], bytes(192))})
    parts = [
        ("file", ("adapter_model.safetensors", weights)),
        ("file", ("adapter_config.json", json.dumps(document | {"token_dim": 16}).encode())),
    ]
    adapter = server.upload(parts).json()["id"]
    body = {"engine": "peft", "base_model": "tiny"}
    headers = {"Prefer": "wait=300"}
    job = server.client.post(f"/adapters/{adapter}/load-check", json=body, headers=headers, timeout=320).json()
    assert (job["state"], job["attempt"]) == ("failed", 1), job
    assert job["error"]["code"] == "invalid_request"
    assert [item["pointer"] for item in job["error"]["errors"]] == ["/adapter"]
