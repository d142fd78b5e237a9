"""POST /compose-image without a pool: what is refused when it is submitted, and what becomes a job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "compose"))

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def kitchen(module_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server without a pool, a tiny pipeline and two LoRAs."""
    import diffusers
    from toy_pipelines import write_diffusers_lora, write_sd

    folder = tmp_path_factory.mktemp("kitchen")
    base = write_sd(folder / "roots" / "tiny-sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    server = module_servers(model_roots=(base.parent,))
    model = server.client.post("/models", json={"path": str(base)}, timeout=60).json()["id"]
    ids = []
    for seed, name in ((1, "first"), (2, "second")):
        file = write_diffusers_lora(folder / name, pipeline, seed, text=name == "second")
        data = (file / "pytorch_lora_weights.safetensors").read_bytes()
        ids.append(server.upload([("file", ("lora.safetensors", data))], {"name": name}).json()["id"])
    return server, model, ids


def body_of(kitchen: Any, **changes: Any) -> dict[str, Any]:
    _, model, (first, second) = kitchen
    return {
        "base_model": model,
        "concepts": [
            {"adapter": first, "trigger": "sks", "noun": "circle"},
            {"adapter": second, "trigger": "zwx", "noun": "square"},
        ],
        "prompt": "a circle and a square",
        "steps": 4,
        **changes,
    }


def refused(kitchen: Any, body: dict[str, Any], path: str = "/compose-image") -> tuple[dict[str, Any], set[str]]:
    answer = kitchen[0].client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert problem["detail"]
    return problem, {item["pointer"] for item in problem["errors"]}


def test_a_scene_becomes_a_job_that_knows_its_base_model(kitchen: Any) -> None:
    server, model, ids = kitchen
    answer = server.client.post("/compose-image", json=body_of(kitchen, base_model="tiny-sd"))
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["kind"], job["state"]) == ("compose", "queued")
    assert job["params"]["method"] == "clora"
    assert job["params"]["concepts"][1] == {"adapter": ids[1], "trigger": "zwx", "noun": "square", "weight": 1.0}
    with server.services.database.read() as session:
        from storage import jobs

        assert jobs.get_job(session, job["id"]).affinity == model
    assert server.client.get(f"/jobs/{job['id']}/preview").status_code == 404


def test_prompts_that_are_too_long_are_refused_before_there_is_a_job(kitchen: Any) -> None:
    client = kitchen[0].client
    jobs = client.get("/jobs?limit=200").json()["items"]
    problem, pointers = refused(kitchen, body_of(kitchen, prompt="a circle and a square and a " + "red " * 12))
    assert (problem["code"], pointers) == ("compose_refused", {"/prompt"})
    assert "would be cut off" in problem["detail"] + problem["hint"]
    _, pointers = refused(kitchen, body_of(kitchen, negative_prompt="and a " * 12, method="merge"))
    assert pointers == {"/negative_prompt"}
    words = ["a circle and a square", "a sks circle and a square", "a circle and a zwx square and " + "a " * 12]
    fine, long = {"method": "merge"}, {"method": "clora", "parameters": {"branch_prompts": words}}
    body = body_of(kitchen, methods=[fine, long])
    _, pointers = refused(kitchen, body, "/compose-image/compare")
    assert pointers == {"/methods/1/parameters/branch_prompts/2"}
    assert client.get("/jobs?limit=200").json()["items"] == jobs


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"base_model": "nowhere"}, "/base_model"),
        ({"prompt": "a circle and a triangle"}, "/concepts/1/noun"),
        ({"prompt": "sks and a circle and a square"}, "/concepts/0/trigger"),
        ({"method": "magic"}, "/method"),
        ({"parameters": {"temperature": 0}}, "/parameters/temperature"),
        ({"parameters": {"iterative_steps": [3]}}, "/parameters/iterative_steps"),
        ({"parameters": {"max_iter_to_alter": 5}}, "/parameters/max_iter_to_alter"),
        ({"steps": 0}, "/steps"),
        ({"steps": True}, "/steps"),
        ({"seed": 0.5}, "/seed"),
        ({"width": 5000}, "/width"),
        ({"width": 33}, "/width"),
        ({"parameters": {"map_grid": 8}}, "/parameters/map_grid"),
        ({"styles": [{"adapter": "adp_" + "f" * 32, "weight": 3.0}]}, "/styles/0/weight"),
        ({"styles": [{"adapter": "adp_" + "f" * 32}]}, "/styles/0/adapter"),
        ({"precision": "int8"}, "/precision"),
        ({"preview_every": 0}, "/preview_every"),
        ({"resources": {"devices": 2}}, "/resources/devices"),
        ({"tempo": 1}, "/tempo"),
    ],
)
def test_what_can_not_work_is_refused_where_it_stands(kitchen: Any, changes: dict[str, Any], pointer: str) -> None:
    _, pointers = refused(kitchen, body_of(kitchen, **changes))
    assert pointer in pointers


def test_too_few_concepts_unknown_adapters_and_equal_nouns(kitchen: Any) -> None:
    body = body_of(kitchen)
    problem, pointers = refused(kitchen, {**body, "concepts": body["concepts"][:1]})
    assert pointers == {"/concepts"}
    assert "take the method merge" in problem["detail"]
    gone = {**body["concepts"][1], "adapter": "adp_" + "f" * 32}
    problem, pointers = refused(kitchen, {**body, "concepts": [body["concepts"][0], gone]})
    assert (problem["code"], pointers) == ("invalid_request", {"/concepts/1/adapter"})
    twin = {**body["concepts"][1], "noun": "circle"}
    refused(kitchen, {**body, "concepts": [body["concepts"][0], twin], "prompt": "a circle"})


def test_base_models_that_are_no_pipelines_or_were_removed(kitchen: Any) -> None:
    from artifacts.base_model import BaseModelRef
    from storage import models, retirement

    server = kitchen[0]
    with server.services.database.write() as session:
        llama = BaseModelRef("a-llama", "path", "/nowhere", architecture="LlamaForCausalLM")
        models.add_model(session, llama)
        hub = BaseModelRef("org/on-the-hub", "hub", "org/on-the-hub")
        models.add_model(session, hub)
    problem, pointers = refused(kitchen, body_of(kitchen, base_model="a-llama"))
    assert (problem["code"], pointers) == ("compose_refused", {"/base_model"})
    assert "LlamaForCausalLM" in problem["detail"]
    unknown = server.client.post("/compose-image", json=body_of(kitchen, base_model="org/on-the-hub"))
    assert unknown.status_code == 202, "of which nothing is known: the worker will see"
    server.client.post(f"/jobs/{unknown.json()['id']}/cancel")  # else it would keep the base model
    with server.services.database.write() as session:
        from storage import database

        row = models.get_model(session, "org/on-the-hub")
        retirement.update_model(session, row.id, removed_at=database.now(session))
    problem, pointers = refused(kitchen, body_of(kitchen, base_model="org/on-the-hub"))
    assert pointers == {"/base_model"}
    assert "was removed" in problem["detail"]


@pytest.mark.parametrize(
    ("modules", "d_in", "words"),
    [
        (("model.layers.0.self_attn.q_proj",), 16, "matches no module of the base model"),
        ((LAYER,), 768, "matches no module of the base model"),
        ((LAYER, "mid_block.attentions.7.proj_in"), 16, "1 of 2 modules"),
    ],
)
def test_adapters_of_another_family_are_refused(
    kitchen: Any, adapter_files: Any, modules: tuple[str, ...], d_in: int, words: str
) -> None:
    files = adapter_files(modules=modules, d_in=d_in, d_out=32, seed=len(words) + d_in)
    stranger = kitchen[0].upload(files.parts(), {"name": "stranger"}).json()["id"]
    body = body_of(kitchen)
    body["concepts"][0]["adapter"] = stranger
    problem, pointers = refused(kitchen, body)
    assert problem["code"] == "compose_refused"
    assert words in problem["detail"]
    assert pointers == {"/concepts/0/adapter"}


def test_an_image_that_no_memory_holds_is_refused(kitchen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from app import compose_inputs

    monkeypatch.setattr(compose_inputs, "memory_of_all", lambda *_: 3_000_000)
    assert kitchen[0].client.post("/compose-image", json=body_of(kitchen)).status_code == 202
    problem, pointers = refused(kitchen, body_of(kitchen, width=512, height=512))
    assert (problem["code"], pointers) == ("compose_refused", {"/width"})
    assert "this machine has" in problem["detail"]


def test_a_comparison_points_to_the_method_that_is_wrong(kitchen: Any) -> None:
    body = body_of(kitchen, methods=[{"method": "merge"}, {"method": "clora", "parameters": {"temperature": 0}}])
    _, pointers = refused(kitchen, body, "/compose-image/compare")
    assert pointers == {"/methods/1/parameters/temperature"}
    _, pointers = refused(kitchen, {**body, "methods": [{"method": "merge"}]}, "/compose-image/compare")
    assert pointers == {"/methods"}
    fine = {"method": "clora", "parameters": {"map_grid": 8}}
    _, pointers = refused(kitchen, {**body, "methods": [{"method": "merge"}, fine]}, "/compose-image/compare")
    assert pointers == {"/methods/1/parameters/map_grid"}
    _, pointers = refused(
        kitchen, {**body, "methods": [{"method": "merge"}] * 2, "prompt": "a"}, "/compose-image/compare"
    )
    assert "/concepts/0/noun" in pointers
    fusing = {**body, "methods": [{"method": "merge"}, {"method": "gradient_fusion"}]}
    _, pointers = refused(kitchen, fusing, "/compose-image/compare")
    assert pointers == {"/methods/1/method"}, "there is no picture of an adapter"
    alone = body_of(kitchen, method="gradient_fusion", name="both")
    assert kitchen[0].client.post("/compose-image", json=alone).status_code == 202
    good = kitchen[0].client.post(
        "/compose-image/compare", json={**body, "methods": [{"method": "merge"}, {"method": "clora"}]}
    )
    assert (good.status_code, good.json()["kind"]) == (202, "compare")


def test_a_repeated_call_with_its_key_makes_one_job_and_a_schedule_can_fire_it(kitchen: Any) -> None:
    client = kitchen[0].client
    answers = [
        client.post("/compose-image", json=body_of(kitchen), headers={"Idempotency-Key": "one"}) for _ in range(2)
    ]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    schedule = {
        "name": "nightly picture",
        "trigger": {"cron": "0 3 * * *", "timezone": "UTC"},
        "job": {"kind": "compose", "params": body_of(kitchen)},
    }
    made = client.post("/schedules", json=schedule)
    assert made.status_code == 201, made.text


def test_the_menu_has_every_method_with_its_parameters(kitchen: Any) -> None:
    client = kitchen[0].client
    found = client.get("/methods/compose/clora").json()
    assert found["parameters_schema"]["properties"]["temperature"]["default"] == 0.5
    assert found["when"]
    document = client.get("/openapi.json").json()
    options = document["components"]["schemas"]["ComposeRequest"]["properties"]["parameters"]["anyOf"]
    assert {"$ref": "#/components/schemas/CloraOptions"} in json.loads(json.dumps(options))
