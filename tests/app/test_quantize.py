"""POST /models/{id}/quantize: what is taken, what is refused at once, and what a packed base can not do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from artifacts.base_model import BaseModelRef
from artifacts.quantised_base import METHOD
from storage import models

LAYER = "model.layers.0.self_attn.q_proj"
BASE = BaseModelRef(
    name="acme/tiny-llm",
    source="path",
    location="/models/tiny",
    architecture="LlamaForCausalLM",
    weights_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    fingerprint=((LAYER, 64, 96),),
)
PACKED = {
    "quant_method": METHOD,
    "codebook": "nf-v1",
    "rank": 8,
    "layers": {LAYER: {"shape": [64, 96], "format": [4, 8, "bfloat16", 16, 16]}},
}


def register(server: Any, **changes: Any) -> str:
    with server.services.database.write() as session:
        return models.add_model(session, replace(BASE, **changes))[0].id


def test_a_quantisation_is_a_job(server: Any) -> None:
    model = register(server)
    body = {"parameters": {"rank": 16, "budget_bits": 2.75}, "name": "small"}
    response = server.client.post(f"/models/{model}/quantize", json=body)
    assert response.status_code == 202, response.text
    job = response.json()
    assert (job["kind"], job["params"]["model"], job["params"]["name"]) == ("quantize", model, "small")
    assert (job["params"]["parameters"]["budget_bits"], job["params"]["parameters"]["seed"]) == (2.75, 0)
    assert server.client.get(f"/models/{model}").json()["quantisation"] is None


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a hub model": ({"source": "hub", "location": "acme/tiny-llm"}, {}, "/model"),
    "a pipeline": ({"pipeline": "StableDiffusionPipeline"}, {}, "/model"),
    "a quantised model": ({"quantisation": PACKED}, {}, "/model"),
    "a budget below all formats": ({}, {"budget_bits": 1.5}, "/parameters/budget_bits"),
    "a budget and a preset": ({}, {"budget_bits": 3, "preset": "nf4"}, "/parameters"),
    "an unknown option": ({}, {"bits": 4}, "/parameters/bits"),
    "a block of another size": ({}, {"grid": {"blocks": [48]}}, "/parameters/grid/blocks/0"),
    "a layer that is not there": ({}, {"target_modules": ["q_prj"]}, "/parameters/target_modules/0"),
    "a rank of the whole": ({}, {"rank": 64, "target_modules": ["q_proj"]}, "/parameters/rank"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_quantised_is_refused_at_once(server: Any, name: str) -> None:
    changes, parameters, pointer = REFUSED[name]
    model = register(server, **changes)
    response = server.client.post(f"/models/{model}/quantize", json={"parameters": parameters})
    assert response.status_code == 422, response.text
    assert response.json()["errors"][0]["pointer"] == pointer
    assert server.rows()["jobs"] == 0


def test_a_fisher_needs_a_dataset_that_is_there(server: Any) -> None:
    model = register(server)
    fisher = {"dataset": "dat_" + "0" * 32}
    unknown = server.client.post(f"/models/{model}/quantize", json={"fisher": fisher})
    assert (unknown.status_code, unknown.json()["errors"][0]["pointer"]) == (422, "/fisher/dataset")
    odd = server.client.post(f"/models/{model}/quantize", json={"fisher": fisher | {"heuristic": "none"}})
    assert (odd.status_code, odd.json()["errors"][0]["pointer"]) == (422, "/fisher/heuristic")


def test_a_model_that_is_not_there_is_404(server: Any) -> None:
    assert server.client.post(f"/models/mdl_{'0' * 32}/quantize", json={}).status_code == 404


def test_a_packed_base_says_so_and_is_no_base_of_other_methods(server: Any) -> None:
    register(server, quantisation=PACKED)
    listed = server.client.get("/models").json()["items"][0]
    assert listed["quantisation"] == {"quant_method": METHOD, "codebook": "nf-v1", "rank": 8, "layers": 1}
    training = {"base_model": BASE.name, "dataset": "dat_" + "0" * 32, "method": "lora"}
    refused = server.client.post("/train/estimate", json=training)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/base_model")
    assert "packed" in refused.json()["detail"]


def test_nothing_is_merged_into_quantised_weights(server: Any, two_adapters: list[str]) -> None:
    model = register(server, quantisation=PACKED)
    body = {"adapters": [{"id": two_adapters[0]}], "method": "cat", "output": "base", "base_model": model}
    refused = server.client.post("/merge", json=body)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/base_model")
    assert "quantised" in refused.json()["detail"]
