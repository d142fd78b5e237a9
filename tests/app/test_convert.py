"""POST /adapters/{id}/convert: what is taken and what is refused when it is submitted."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.base_model import BaseModelRef
from artifacts.quantised_base import METHOD
from storage import models


def upload(
    server: Any, files: Any, make_safetensors: Any, kind: str, names: dict[str, list[int]], **config: Any
) -> str:
    """An adapter of PEFT's of another type, with tensors of these shapes in every module."""
    tensors = {}
    for path in files.modules:
        for name, shape in names.items():
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            tensors[f"base_model.model.{path}.{name}"] = ("F32", shape, files.numbers(count, len(name)))
    files.config = {"peft_type": kind, **config}
    response = server.upload([("file", ("adapter_model.safetensors", make_safetensors(tensors))), files.parts()[1]])
    assert response.status_code == 201, response.text
    found: str = response.json()["id"]
    return found


LOHA = {"hada_w1_a": [6, 2], "hada_w1_b": [2, 8], "hada_w2_a": [6, 2], "hada_w2_b": [2, 8]}
VERA = {"vera_lambda_b": [6], "vera_lambda_d": [4]}


def test_a_conversion_is_a_job_and_the_refused_merge_names_it(
    server: Any, adapter_files: Any, make_safetensors: Any
) -> None:
    adapter = upload(server, adapter_files(), make_safetensors, "LOHA", LOHA, alpha=4)
    merge = server.client.post("/merge", json={"adapters": [{"id": adapter}], "method": "cat"})
    assert (merge.status_code, merge.json()["code"]) == (422, "not_mergeable")
    assert "/convert" in merge.json()["hint"]
    response = server.client.post(f"/adapters/{adapter}/convert", json={"to": "lora"})
    assert response.status_code == 202, response.text
    job = response.json()
    assert job["kind"] == "convert"
    unset = dict.fromkeys(("rank", "max_error", "base_model", "dtype", "name"))
    assert job["params"] == {"to": "lora", "adapter": adapter, **unset}


def test_a_base_model_that_is_named_must_be_there(server: Any, adapter_files: Any, make_safetensors: Any) -> None:
    adapter = upload(server, adapter_files(), make_safetensors, "LOHA", LOHA, alpha=4)
    path, body = f"/adapters/{adapter}/convert", {"to": "lora", "base_model": "here"}
    response = server.client.post(path, json=body)
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/base_model")
    with server.services.database.write() as session:
        known = models.add_model(session, BaseModelRef("here", "path", "/m"))[0].id
    response = server.client.post(path, json=body)
    assert (response.status_code, response.json()["params"]["base_model"]) == (202, known)


def test_a_vera_needs_the_layers_of_its_base(server: Any, adapter_files: Any, make_safetensors: Any) -> None:
    adapter = upload(server, adapter_files(), make_safetensors, "VERA", VERA)
    path = f"/adapters/{adapter}/convert"
    unknown = server.client.post(path, json={"to": "lora"})
    assert unknown.status_code == 422
    assert unknown.json()["errors"][0]["pointer"] == "/base_model"
    ref = BaseModelRef("acme/tiny-llm", "hub", "acme/tiny-llm")
    with server.services.database.write() as session:
        models.add_model(session, ref)
        known = models.add_model(session, BaseModelRef("here", "path", "/m", fingerprint=(("a", 1, 1),)))[0].id
    bare = server.client.post(path, json={"to": "lora"})
    assert (bare.status_code, bare.json()["code"]) == (422, "merge_refused")
    assert "not known" in bare.json()["detail"]
    named = server.client.post(path, json={"to": "lora", "base_model": "here"})
    assert (named.status_code, named.json()["params"]["base_model"]) == (202, known)


LAYERS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"


def test_a_file_of_lycoris_needs_weights_when_one_of_its_modules_does(
    server: Any, adapter_files: Any, make_safetensors: Any
) -> None:
    numbers = adapter_files().numbers
    full = {f"{LAYERS}q.diff": ("F32", [320, 320], numbers(320 * 320, 1))}
    pair = {f"{LAYERS}k.lora_{end}.weight": ("F32", shape, numbers(640, 1)) for end, shape in
            (("down", [2, 320]), ("up", [320, 2]))}  # fmt: skip
    ia3 = {f"{LAYERS}v.weight": ("F32", [320], numbers(320, 1)), f"{LAYERS}v.on_input": ("F32", [], numbers(1, 1))}
    found = {}
    for name, tensors in (("full", full), ("mixed", full | pair), ("weights", pair | ia3)):
        response = server.upload([("file", ("x.safetensors", make_safetensors(tensors)))])
        assert response.status_code == 201, response.text
        found[name] = (f"/adapters/{response.json()['id']}/convert", response.json()["method"])
    assert [method for _, method in found.values()] == ["full", "lycoris", "lycoris"]
    for name in ("full", "mixed"):
        response = server.client.post(found[name][0], json={"to": "lora", "rank": 8})
        assert (response.status_code, response.json().get("params", {}).get("base_model")) == (202, None)
    unknown = server.client.post(found["weights"][0], json={"to": "lora", "rank": 8})
    assert (unknown.status_code, unknown.json()["errors"][0]["pointer"]) == (422, "/base_model")
    ref = BaseModelRef("sd", "path", "/sd", architecture="UNet2DConditionModel", pipeline="StableDiffusionPipeline")
    with server.services.database.write() as session:
        known = models.add_model(session, ref)[0].id
    response = server.client.post(found["weights"][0], json={"to": "lora", "rank": 8, "base_model": "sd"})
    assert (response.status_code, response.json()["params"]["base_model"]) == (202, known)


def test_what_a_lora_would_lose_is_told_before_the_work(
    server: Any, adapter_files: Any, make_safetensors: Any, two_adapters: list[str]
) -> None:
    numbers = adapter_files().numbers
    tensors = {f"{LAYERS}q.lokr_w1": ("F32", [4, 4], numbers(16, 1)),
               f"{LAYERS}q.lokr_w2": ("F32", [80, 80], numbers(6400, 2)),
               f"{LAYERS}q.scalar": ("F32", [1], numbers(1, 3))}  # fmt: skip
    adapter = server.upload([("file", ("x.safetensors", make_safetensors(tensors)))]).json()["id"]
    refused = server.client.post(f"/adapters/{adapter}/convert", json={"to": "lora"})
    assert (refused.status_code, refused.json()["code"]) == (422, "merge_refused")
    assert refused.json()["errors"][0]["pointer"] == "/adapter"
    assert f"{LAYERS}q.scalar" in refused.json()["detail"]
    body = {"adapters": [{"id": two_adapters[0]}, {"id": adapter}], "method": "cat", "convert": True}
    refused = server.client.post("/merge", json=body)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/adapters/1/id")


LQ_LORA = {"lora_A": [2, 8], "lora_B": [6, 2], "start_A": [2, 8], "start_B": [6, 2]}
LAYER = "model.layers.0.self_attn.q_proj"
PACKED = {
    "quant_method": METHOD,
    "codebook": "nf-v1",
    "rank": 2,
    "layers": {LAYER: {"shape": [16, 16], "format": [4, 8, "bfloat16", 16, 16]}},
}


@pytest.mark.parametrize("to", ["unpacked_lora", "merged"])
def test_what_was_trained_beside_packed_weights_becomes_a_model_with_those(
    server: Any, adapter_files: Any, make_safetensors: Any, to: str
) -> None:
    adapter = upload(server, adapter_files(), make_safetensors, "RANKWISE_LQ_LORA", LQ_LORA, r=2, lora_alpha=2)
    path = f"/adapters/{adapter}/convert"
    with server.services.database.write() as session:
        dense = models.add_model(session, BaseModelRef("dense", "path", "/dense", fingerprint=((LAYER, 16, 16),)))[0].id
        packed = models.add_model(session, BaseModelRef("packed", "path", "/packed", quantisation=PACKED))[0].id
    refused = {
        "no base model": ({}, "/base_model", "belongs to no registered model"),
        "a dense one": ({"base_model": dense}, "/base_model", "are not packed"),
        "a rank": ({"base_model": packed, "rank": 2}, "/rank", "keeps the rank"),
        "an error": ({"base_model": packed, "max_error": 0.1}, "/max_error", "loses nothing"),
        "an unknown dtype": ({"base_model": packed, "dtype": "int8"}, "/dtype", "should be"),
    }
    for name, (body, pointer, words) in refused.items():
        problem = server.client.post(path, json={"to": to, **body}).json()
        assert (problem["status"], problem["errors"][0]["pointer"]) == (422, pointer), name
        assert words in problem["errors"][0]["message"], name
    taken = server.client.post(path, json={"to": to, "base_model": "packed", "dtype": "bfloat16"})
    assert (taken.status_code, taken.json()["params"]["base_model"]) == (202, packed)


def test_other_adapters_do_not_become_models(server: Any, adapter_files: Any, make_safetensors: Any) -> None:
    adapter = upload(server, adapter_files(), make_safetensors, "LOHA", LOHA, alpha=4)
    for body, pointer in (({"to": "merged"}, "/to"), ({"to": "lora", "dtype": "float16"}, "/dtype")):
        refused = server.client.post(f"/adapters/{adapter}/convert", json=body)
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, pointer)
    assert server.rows()["jobs"] == 0


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({}, "/to"), ({"to": "loha"}, "/to"), ({"to": "lora", "rank": 0}, "/rank"), ({"to": "lora", "k": 1}, "/k")]
    + [({"to": "lora", "max_error": value}, "/max_error") for value in (-0.1, 1.5, "0.1")],
)
def test_bodies_that_are_refused(server: Any, two_adapters: list[str], body: dict[str, Any], pointer: str) -> None:
    response = server.client.post(f"/adapters/{two_adapters[0]}/convert", json=body)
    assert response.status_code == 422
    assert pointer in [item["pointer"] for item in response.json()["errors"]]


def test_a_lora_is_one_already_and_nothing_is_not_found(server: Any, two_adapters: list[str]) -> None:
    response = server.client.post(f"/adapters/{two_adapters[0]}/convert", json={"to": "lora"})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/adapter")
    assert "takes as it is" in response.json()["detail"]
    assert server.client.post(f"/adapters/adp_{'f' * 32}/convert", json={"to": "lora"}).status_code == 404


def test_a_merge_that_converts_takes_what_can_be_converted(
    server: Any, adapter_files: Any, make_safetensors: Any, two_adapters: list[str]
) -> None:
    loha = upload(server, adapter_files(), make_safetensors, "LOHA", LOHA, alpha=4)
    vera = upload(server, adapter_files(), make_safetensors, "VERA", VERA)
    body = {"adapters": [{"id": two_adapters[0]}, {"id": loha}], "method": "cat"}
    assert server.client.post("/merge", json=body).json()["code"] == "not_mergeable"
    response = server.client.post("/merge", json={**body, "convert": True})
    assert response.status_code == 202, response.text
    assert response.json()["params"]["convert"] is True
    refused = server.client.post("/merge", json={"adapters": [{"id": loha}, {"id": vera}], "convert": True})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/adapters/1/id")
