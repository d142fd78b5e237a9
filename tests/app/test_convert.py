"""POST /adapters/{id}/convert: what is taken and what is refused when it is submitted."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.base_model import BaseModelRef
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
    assert job["params"] == {"to": "lora", "rank": None, "base_model": None, "name": None, "adapter": adapter}


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


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({}, "/to"), ({"to": "loha"}, "/to"), ({"to": "lora", "rank": 0}, "/rank"), ({"to": "lora", "k": 1}, "/k")],
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
