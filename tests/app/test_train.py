"""POST /train: what is accepted, what is refused and where it points; estimates, series and pictures."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from training_server import LAYERS, upload

from storage import models
from storage.job_metrics import Point, record_metrics
from train.catalog import METHODS


def test_a_training_is_queued_once_under_a_key(training: Any) -> None:
    server, body = training
    first = server.client.post("/train", json=body, headers={"Idempotency-Key": "one"})
    assert first.status_code == 202, first.text
    job = first.json()
    assert (job["kind"], job["state"]) == ("train", "queued")
    assert first.headers["location"] == f"/jobs/{job['id']}"
    assert job["params"]["method"] == "lora"
    assert job["params"]["training"]["batch_size"] == 8
    again = server.client.post("/train", json=body, headers={"Idempotency-Key": "one"})
    assert (again.status_code, again.json()["id"]) == (202, job["id"])
    other = server.client.post("/train", json={**body, "seed": 9}, headers={"Idempotency-Key": "one"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


def test_a_base_model_may_be_named_and_a_task_written_out(training: Any) -> None:
    server, body = training
    task = {"type": "causal-lm", "max_length": 32, "overlong": "drop"}
    response = server.client.post("/train", json={**body, "base_model": "tiny", "task": task})
    assert response.status_code == 202, response.text


def test_rows_are_grouped_by_a_column_that_every_row_has(training: Any) -> None:
    server, body = training
    response = server.client.post("/train", json={**body, "evaluation": {"group_column": "prompt"}})
    assert response.status_code == 202, response.text
    holes = upload(server, [{"prompt": "a", "completion": "b", "task": task} for task in ("x", None, 1.5)])
    refused = server.client.post("/train", json={**body, "dataset": holes, "evaluation": {"group_column": "task"}})
    assert refused.status_code == 422
    assert "missing or null in 1 rows" in refused.json()["errors"][0]["message"]


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"method": "lara"}, "/method", "must be one of"),
        ({"method": "gradnormlorp", "parameters": {"mode": "full"}}, "/parameters/proj_rank", "mode full needs it"),
        ({"parameters": {"rank": 0}}, "/parameters/rank", "greater than or equal to 1"),
        ({"parameters": {"rank": 9}}, "/parameters/rank", "rank 9 is above 8, the smaller side of model.layers.0"),
        ({"parameters": {"ranks": 4}}, "/parameters/ranks", "ranks"),
        (
            {"parameters": {"target_modules": ["q_proj", "qproj"]}},
            "/parameters/target_modules/1",
            "no linear layer is called 'qproj'; did you mean 'q_proj'?",
        ),
        (
            {"parameters": {"target_modules": ["q_proj", "embed_tokens"]}},
            "/parameters/target_modules",
            "model.embed_tokens is an embedding and no linear layer",
        ),
        (
            {"method": "bone", "parameters": {"variant": "bat_col", "rank": 8}},
            "/parameters/rank",
            "8 does not divide 12 of model.layers.0.mlp.up_proj",
        ),
        (
            {"method": "lora-sb", "parameters": {"rank": 4, "samples": 21}},
            "/parameters/samples",
            "21 samples were asked for, of at most 20 training rows",
        ),
        (
            {"method": "flexora", "parameters": {"rank": 4, "validation_rows": 20}},
            "/parameters/validation_rows",
            "20 rows can not be held out of 20",
        ),
        (
            {"method": "increlora", "parameters": {"target_rank": 2, "interval": 2}, "training": {"epochs": 2}},
            "/parameters/interval",
            "would be at step 6, beyond the training of 6 steps",
        ),
        (
            {"method": "smora", "parameters": {"rank": 4}},
            "/parameters/active_rank",
            "8 are more than the rank, 4",
        ),
        (
            {"method": "smora", "parameters": {"rank": 8, "fold": "per_task"}},
            "/parameters/fold",
            "evaluation.group_column has to name the tasks",
        ),
        ({"target_engine": "tensorrt"}, "/target_engine", "vllm"),
        ({"target_engine": "kohya"}, "/task", "kohya runs image models"),
        ({"target_engine": "vllm", "method": "dora"}, "/method", "vLLM does not apply DoRA (rule plain-lora, https"),
        (
            {"target_engine": "llama.cpp", "method": "bone", "parameters": {"rank": 4, "variant": "bat_row"}},
            "/method",
            "",
        ),
        ({"target_engine": "peft", "method": "bone", "parameters": {"rank": 4, "variant": "bat_row"}}, "/method", ""),
        (
            {"target_engine": "transformers", "method": "prompt-tuning", "parameters": {}},
            "/method",
            "rule transformers-prompt-learning",
        ),
        ({"base_model": "nobody/nothing"}, "/base_model", "there is no base model 'nobody/nothing'"),
        ({"dataset": "dat_" + "0" * 32}, "/dataset", "there is no dataset"),
        ({"dataset": "adp_" + "0" * 32}, "/dataset", "pattern"),
        ({"task": "classification"}, "/task", "causal-lm"),
        ({"training": {"steps": 3, "epochs": 1}}, "/training", "give steps or epochs, not both"),
        ({"training": {"learning_rate": 0}}, "/training/learning_rate", "greater than 0"),
        ({"training": {"speed": 3}}, "/training/speed", "Extra inputs"),
        ({"evaluation": {"validation_fraction": 0.6}}, "/evaluation/validation_fraction", "less than or equal to 0.5"),
        ({"seed": -1}, "/seed", "greater than or equal to 0"),
        ({"resources": {"devices": 2}}, "/resources/devices", "no server of the pool is alive"),
        (
            {"training": {"early_stopping": {}}, "evaluation": {"validation_fraction": 0}},
            "/training/early_stopping",
            "needs validation rows",
        ),
        (
            {"training": {"early_stopping": {"metric": "exact_match"}}},
            "/training/early_stopping/metric",
            "exact_match needs evaluation.exact_match",
        ),
        (
            {"task": "token-classification", "training": {"early_stopping": {"metric": "perplexity"}}},
            "/training/early_stopping/metric",
            "token-classification measures loss, accuracy, macro_f1, mcc, not perplexity",
        ),
        (
            {"task": "text-to-image", "training": {"early_stopping": {"metric": "accuracy"}}},
            "/training/early_stopping/metric",
            "text-to-image measures loss, not accuracy",
        ),
        ({"training": {"early_stopping": {"metric": "rouge"}}}, "/training/early_stopping/metric", "'macro_f1'"),
        (
            {"task": "sequence-classification", "evaluation": {"exact_match": True}},
            "/evaluation/exact_match",
            "sequence-classification measures loss, accuracy, macro_f1, mcc",
        ),
        (
            {"evaluation": {"group_column": "topic"}},
            "/evaluation/group_column",
            "has no column 'topic'; it has prompt, completion",
        ),
        (
            {"task": "text-to-image", "evaluation": {"group_column": "prompt"}},
            "/evaluation/group_column",
            "images have no columns",
        ),
        ({"training": {"early_stopping": {"patience": 0}}}, "/training/early_stopping/patience", "greater than or"),
    ],
)
def test_what_can_not_be_trained_is_refused_where_it_is_wrong(
    training: Any, changes: dict[str, Any], pointer: str, words: str
) -> None:
    server, body = training
    response = server.client.post("/train", json={**body, **changes})
    assert response.status_code == 422, response.text
    findings = {item["pointer"]: item["message"] for item in response.json()["errors"]}
    near = [message for found, message in findings.items() if found.startswith(pointer)]
    assert near, findings
    assert any(words in message for message in near), findings
    assert server.client.get("/jobs").json()["items"] == []


def test_the_layers_of_the_base_model_are_listed_when_one_is_not_there(training: Any) -> None:
    server, body = training
    response = server.client.post("/train", json={**body, "parameters": {"target_modules": ["query"]}})
    assert "q_proj, up_proj" in response.json()["hint"]


def test_a_dataset_without_what_the_task_needs_is_refused(training: Any) -> None:
    server, body = training
    unfit = upload(server, [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    response = server.client.post("/train", json={**body, "dataset": unfit})
    assert response.status_code == 422
    assert "there is no column `completion`" in response.json()["detail"] or "`prompt`" in response.json()["detail"]
    named = {"type": "causal-lm", "prompt_column": "question", "completion_column": "answer"}
    accepted = server.client.post("/train", json={**body, "dataset": unfit, "task": named})
    assert accepted.status_code == 202, accepted.text


def test_a_dataset_that_a_training_waits_for_can_not_be_deleted(training: Any) -> None:
    server, body = training
    assert server.client.post("/train", json=body).status_code == 202
    response = server.client.delete(f"/datasets/{body['dataset']}")
    assert (response.status_code, response.json()["code"]) == (409, "state_conflict")


def test_an_estimate_counts_the_trainable_parameters(training: Any) -> None:
    server, body = training
    response = server.client.post("/train/estimate", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["trainable_parameters"] == 4 * (8 + 8) + 4 * (12 + 8)
    assert found["optimizer_bytes"] == 8 * found["trainable_parameters"]
    assert found["base_bytes"] == 4 * sum(out * in_ for out, in_ in LAYERS.values())
    assert found["floor_bytes"] < found["peak_bytes"]
    half = server.client.post("/train/estimate", json={**body, "training": {"precision": "bfloat16"}}).json()
    assert half["base_bytes"] * 2 == found["base_bytes"]
    assert server.client.get("/jobs").json()["items"] == []


def test_the_rows_of_a_batch_are_shared_out_evenly_or_not_at_all(training: Any) -> None:
    server, body = training
    one, two = (
        server.client.post("/train/estimate", json={**body, "resources": {"devices": devices}}).json()
        for devices in (1, 2)
    )
    assert two["activation_bytes"] * 2 == one["activation_bytes"]
    assert two["floor_bytes"] == one["floor_bytes"]
    response = server.client.post("/train/estimate", json={**body, "resources": {"devices": 3}})
    assert response.status_code == 422
    (finding,) = response.json()["errors"]
    assert finding["pointer"] == "/training/batch_size"
    assert finding["message"] == "8 rows can not be shared out evenly among 3 devices"


def test_the_series_and_the_curve_of_a_job(training: Any, fake_pool: Any) -> None:
    server, body = training
    job_id = server.client.post("/train", json=body).json()["id"]
    assert server.client.get(f"/jobs/{job_id}/metrics").json() == {"items": [], "next_step": None}
    empty = ElementTree.fromstring(server.client.get(f"/jobs/{job_id}/loss-curve").text)
    assert "no step has been measured yet" in "".join(empty.itertext())
    claimed = fake_pool(server).claim()
    points = [Point(step, {"loss": 3.0 / step, "learning_rate": 0.1}) for step in range(1, 8)]
    with server.services.database.write() as session:
        record_metrics(session, *claimed, points)
        record_metrics(session, *claimed, [Point(2, {"loss": 1.25})])
    first = server.client.get(f"/jobs/{job_id}/metrics", params={"limit": 4}).json()
    assert [item["step"] for item in first["items"]] == [1, 2, 3, 4]
    assert first["items"][1]["numbers"] == {"loss": 1.25}
    rest = server.client.get(f"/jobs/{job_id}/metrics", params={"after": first["next_step"]}).json()
    assert ([item["step"] for item in rest["items"]], rest["next_step"]) == ([5, 6, 7], None)
    response = server.client.get(f"/jobs/{job_id}/loss-curve")
    assert response.headers["content-type"].startswith("image/svg+xml")
    lines = [item for item in ElementTree.fromstring(response.text).iter() if item.tag.endswith("polyline")]
    assert [len(str(line.get("points")).split()) for line in lines] == [7, 7]
    missing = server.client.get(f"/jobs/job_{'0' * 32}/metrics")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


@pytest.fixture
def continued(training: Any, adapter_files: Any) -> Any:
    """(server, body, upload of an adapter with other fields)."""
    server, body = training
    modules = tuple(path for path in LAYERS if "embed" not in path)

    def add(**changes: Any) -> str:
        files = adapter_files(**{"rank": 4, "d_in": 8, "d_out": 8, "modules": modules[:1]} | changes)
        response = server.upload(files.parts(), {"base_model": changes.get("base_model", body["base_model"])})
        assert response.status_code == 201, response.text
        found: str = response.json()["id"]
        return found

    return server, body | {"parameters": {}}, add


def test_a_training_goes_on_from_a_stored_adapter(continued: Any) -> None:
    server, body, add = continued
    adapter = add()
    for wanted in (adapter, {"adapter": adapter, "minimum_compatibility": "weights"}):
        response = server.client.post("/train", json={**body, "continue_from": wanted})
        assert response.status_code == 202, response.text
        assert response.json()["params"]["continue_from"] == (
            wanted if isinstance(wanted, str) else {"adapter": adapter, "minimum_compatibility": "weights"}
        )
    # the adapter has one of the two layers: what is trained follows it
    found = server.client.post("/train/estimate", json={**body, "continue_from": adapter}).json()
    assert found["trainable_parameters"] == 4 * (8 + 8)


@pytest.mark.parametrize(
    ("source", "changes", "pointer", "words"),
    [
        ({}, {"parameters": {"rank": 2}}, "/parameters/rank", "rank is 2, but the adapter has 4"),
        ({}, {"parameters": {"target_modules": ["up_proj"]}}, "/continue_from", "adapts no such layer"),
        ({}, {"method": "pissa"}, "/continue_from", "method pissa always starts anew"),
        ({}, {"method": "dora"}, "/continue_from", "it is of type lora; method dora goes on from dora"),
        (
            {"d_in": 6, "base_model": "acme/tiny"},
            {},
            "/continue_from",
            "made for a weight of 8×6, the layer has 8×8",
        ),
        ({"base_model": "acme/other-llm"}, {}, "/continue_from", "made for the base model acme/other-llm"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_when_the_training_is_submitted(
    continued: Any, source: dict[str, Any], changes: dict[str, Any], pointer: str, words: str
) -> None:
    server, body, add = continued
    response = server.client.post("/train", json={**body, **changes, "continue_from": add(**source)})
    assert response.status_code == 422, response.text
    findings = [(item["pointer"], item["message"]) for item in response.json()["errors"]]
    assert any(at == pointer and words in message for at, message in findings), findings
    assert server.client.get("/jobs").json()["items"] == []


def test_an_adapter_that_is_not_there_is_no_start(continued: Any) -> None:
    server, body, add = continued
    gone = add()
    assert server.client.delete(f"/adapters/{gone}").status_code == 204
    for adapter in (gone, "adp_" + "0" * 32):
        response = server.client.post("/train", json={**body, "continue_from": adapter})
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/continue_from")


def test_the_menu_has_the_training_methods(training: Any) -> None:
    server, _ = training
    listed = {item["name"] for item in server.client.get("/methods").json()["items"] if item["kind"] == "train"}
    assert listed == set(METHODS)
    for name in METHODS:
        found = server.client.get(f"/methods/train/{name}").json()
        assert found["capabilities"]["exports"]
        assert all(field["description"] for field in found["parameters_schema"]["properties"].values())
    assert server.client.get("/methods/train/lego").status_code == 404


def test_only_keys_that_may_run_jobs_train(serve: Any) -> None:
    server = serve(api_keys="on")
    assert server.client.post("/train", json={}).status_code == 401


@pytest.fixture
def add_pipeline(training: Any, tmp_path: Path, make_safetensors: Any) -> Callable[[str], str]:
    """Registers the folder of a diffusers pipeline of this class; returns the model's id."""
    server, _ = training

    def add(kind: str) -> str:
        unet = tmp_path / "roots" / kind / "unet"
        unet.mkdir(parents=True)
        (unet.parent / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
        weights = {"mid_block.attn.to_q.weight": ("F32", [8, 8], kind.encode()[:16] * 16)}
        (unet / "diffusion_pytorch_model.safetensors").write_bytes(make_safetensors(weights))
        response = server.client.post("/models", json={"path": str(unet.parent)})
        assert (response.status_code, response.json()["pipeline"]) == (201, kind), response.text
        found: str = response.json()["id"]
        return found

    return add


@pytest.mark.parametrize(
    ("kind", "task", "words"),
    [
        (
            "StableDiffusionXLPipeline",
            "text-to-image",
            "is a StableDiffusionXLPipeline; text-to-image trains a StableDiffusionPipeline",
        ),
        (None, "text-to-image", "is a LlamaForCausalLM; text-to-image trains a StableDiffusionPipeline"),
        ("StableDiffusionPipeline", "causal-lm", "is a StableDiffusionPipeline; causal-lm trains a model of transform"),
    ],
)
def test_a_base_model_of_another_kind_than_the_task_trains_is_refused(
    training: Any, add_pipeline: Callable[[str], str], kind: str | None, task: str, words: str
) -> None:
    server, body = training
    changes = {"task": task, "parameters": {}, "base_model": body["base_model"] if kind is None else add_pipeline(kind)}
    for path in ("/train", "/train/estimate"):
        response = server.client.post(path, json={**body, **changes})
        assert response.status_code == 422, response.text
        (error,) = response.json()["errors"]
        assert error["pointer"] == "/base_model"
        assert words in error["message"]
    assert server.client.get("/jobs").json()["items"] == []


@pytest.mark.parametrize("known", [True, False])
def test_a_pipeline_that_can_be_trained_or_is_not_known_is_no_fault(
    training: Any, add_pipeline: Callable[[str], str], known: bool
) -> None:
    """Of one that was registered before the class was looked at, the job finds out; here the dataset is no images."""
    server, body = training
    base = add_pipeline("StableDiffusionPipeline" if known else "StableDiffusionXLPipeline")
    if not known:
        with server.services.database.write() as session:
            models.get_model(session, base).pipeline = None
    response = server.client.post("/train", json={**body, "task": "text-to-image", "base_model": base})
    assert [item["pointer"] for item in response.json()["errors"]] == ["/dataset"], response.text


def test_images_serve_no_task_of_texts(training: Any) -> None:
    server, body = training
    picture, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(picture, "PNG")
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("one.png", picture.getvalue())
        files.writestr("metadata.jsonl", json.dumps({"file_name": "one.png", "text": "a red square"}) + "\n")
    dataset = server.client.post("/datasets", files=[("file", ("red.zip", archive.getvalue()))])
    assert (dataset.status_code, dataset.json()["format"]) == (201, "images"), dataset.text
    response = server.client.post("/train", json={**body, "dataset": dataset.json()["id"]})
    (error,) = response.json()["errors"]
    assert (response.status_code, error["pointer"]) == (422, "/dataset")
    assert "is a zip of images: it can not serve causal-lm" in error["message"]
