"""The whole way over HTTP with a real pool: two LoRAs in diffusers' format in, an image with its evidence out."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "compose"))

SHAPES = Path(__file__).resolve().parents[2] / "examples" / "shapes_sd"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def kitchen(module_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with a pool of one slot, a tiny pipeline registered and two LoRAs uploaded."""
    import diffusers
    from toy_pipelines import write_diffusers_lora, write_sd

    folder = tmp_path_factory.mktemp("kitchen")
    base = write_sd(folder / "roots" / "tiny-sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    server = module_servers(pool="local", devices="cpu:1", max_wait_seconds=200, model_roots=(base.parent, SHAPES))
    model = server.client.post("/models", json={"path": str(base)}, timeout=60)
    assert model.status_code == 201, model.text
    ids = []
    for seed, name in ((1, "first"), (2, "second")):
        file = write_diffusers_lora(folder / name, pipeline, seed) / "pytorch_lora_weights.safetensors"
        answer = server.upload([("file", (file.name, file.read_bytes()))], {"name": name})
        assert answer.status_code == 201, answer.text
        ids.append(answer.json()["id"])
    return server, model.json()["id"], ids


def body_of(kitchen: Any, **changes: Any) -> dict[str, Any]:
    _, model, (first, second) = kitchen
    return {
        "base_model": model,
        "concepts": [
            {"adapter": first, "trigger": "sks", "noun": "circle"},
            {"adapter": second, "trigger": "zwx", "noun": "square", "weight": 0.5},
        ],
        "prompt": "a circle and a square",
        "steps": 4,
        "seed": 3,
        "width": 32,
        "height": 32,
        **changes,
    }


def composed(kitchen: Any, path: str = "/compose-image", **changes: Any) -> dict[str, Any]:
    client = kitchen[0].client
    answer = client.post(path, json=body_of(kitchen, **changes), headers={"Prefer": "wait=200"}, timeout=220)
    job: dict[str, Any] = answer.json()
    assert job.get("state") == "succeeded", json.dumps(job, indent=1)
    assert answer.headers["Preference-Applied"] == "wait"
    return job


def open_png(data: bytes) -> Any:
    from PIL import Image

    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def test_an_image_with_masks_recipe_and_report_and_the_same_again(kitchen: Any) -> None:
    server, model, (first, _) = kitchen
    job = composed(kitchen, parameters={"step_size": 0.5, "iterative_steps": []})
    (image_id,) = job["result"]["images"]
    assert job["result"]["report"]["updates"]
    shown = server.client.get(f"/images/{image_id}").json()
    assert (shown["job_id"], shown["method"], shown["model_id"]) == (job["id"], "clora", model)
    assert (shown["width"], shown["height"], shown["seed"], shown["label"]) == (32, 32, 3, "clora")
    assert shown["report"] == job["result"]["report"]
    masks = [file for file in shown["files"] if file["role"] == "mask"]
    assert {file["details"]["concept"] for file in masks} == {"circle", "square"}
    for file in shown["files"]:
        answer = server.client.get(file["link"])
        assert (answer.status_code, answer.headers["content-type"]) == (200, file["media_type"])
        assert len(answer.content) == file["size"]
        if file["media_type"] == "image/png":
            assert open_png(answer.content).size == (32, 32)

    answer = server.client.get(f"/images/{image_id}", headers={"Accept": "image/png"})
    assert answer.headers["vary"] == "Accept"
    picture = open_png(answer.content)
    recipe = json.loads(picture.info["rankwise"])
    assert recipe == shown["recipe"]
    assert recipe["concepts"][0]["adapter"]["id"] == first
    assert (recipe["parameters"]["step_size"], recipe["concepts"][1]["weight"]) == (0.5, 0.5)
    known = server.client.get(shown["link"], headers={"If-None-Match": answer.headers["etag"]})
    assert known.status_code == 304

    again = composed(kitchen, parameters={"step_size": 0.5, "iterative_steps": []})
    other = server.client.get(f"/images/{again['result']['images'][0]}", headers={"Accept": "image/png"})
    assert other.content == answer.content, "the same seed gives the same bytes"
    different = composed(kitchen, seed=4, parameters={"step_size": 0.5, "iterative_steps": []})
    third = server.client.get(f"/images/{different['result']['images'][0]}", headers={"Accept": "image/png"})
    assert open_png(third.content).tobytes() != picture.tobytes()


def test_the_image_itself_is_the_answer_for_who_asks_for_it(kitchen: Any) -> None:
    client = kitchen[0].client
    headers = {"Accept": "image/png", "Prefer": "wait=200"}
    answer = client.post("/compose-image", json=body_of(kitchen, method="merge"), headers=headers, timeout=220)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png"), answer.text
    assert answer.headers["Content-Location"].startswith("/images/img_")
    assert answer.headers["Location"].startswith("/jobs/job_")
    assert open_png(answer.content).size == (32, 32)
    at_once = client.post("/compose-image", json=body_of(kitchen, method="merge"), headers={"Accept": "image/png"})
    assert (at_once.status_code, at_once.json()["state"]) == (202, "queued"), "without waiting it is a job"
    # the concepts' tokens are looked for by the worker
    wrong = body_of(kitchen, method="clora", parameters={"branch_prompts": ["a circle and a square"] * 3})
    refused = client.post("/compose-image", json=wrong, headers=headers, timeout=220)
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json")
    assert refused.json()["code"] == "compose_refused"


def test_previews_are_told_while_the_image_is_made(kitchen: Any) -> None:
    client = kitchen[0].client
    job = client.post("/compose-image", json=body_of(kitchen, method="merge", steps=900, preview_every=1)).json()
    seen, event = None, ""
    with client.stream("GET", f"/jobs/{job['id']}/events", timeout=120) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            if event == "preview" and line.startswith("data: "):
                told = json.loads(line.removeprefix("data: "))
                seen = client.get(told["link"])
                break
    assert seen is not None
    assert (seen.status_code, seen.headers["content-type"]) == (200, "image/jpeg")
    assert open_png(seen.content).size == (32, 32)
    assert client.post(f"/jobs/{job['id']}/cancel").status_code == 200
    ended = client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=60"}, timeout=90).json()
    assert ended["state"] == "cancelled"
    assert ended["progress"]["step"] < 900


def test_images_are_listed_and_deleted(kitchen: Any) -> None:
    client = kitchen[0].client
    job = composed(kitchen, method="switch")
    (image_id,) = job["result"]["images"]
    listed = client.get("/images", params={"job_id": job["id"]}).json()["items"]
    assert [item["id"] for item in listed] == [image_id]
    assert client.get("/images", params={"limit": 1}).json()["items"][0]["id"] == image_id
    assert client.delete(f"/images/{image_id}").status_code == 204
    assert client.get(f"/images/{image_id}").status_code == 404
    assert client.get(f"/images/{image_id}/files/image.png").status_code == 404
    assert client.delete(f"/images/{image_id}").status_code == 404
    assert client.get("/images", params={"job_id": job["id"]}).json()["items"] == []


def test_an_adapter_that_was_deleted_while_the_job_waited_fails_it_by_name(kitchen: Any, tmp_path: Path) -> None:
    import diffusers
    from toy_pipelines import write_diffusers_lora, write_sd

    client = kitchen[0].client
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(write_sd(tmp_path / "base"), safety_checker=None)
    file = write_diffusers_lora(tmp_path / "doomed", pipeline, 9) / "pytorch_lora_weights.safetensors"
    doomed = kitchen[0].upload([("file", (file.name, file.read_bytes()))], {"name": "doomed"}).json()["id"]
    blocking = client.post("/compose-image", json=body_of(kitchen, method="merge", steps=900, preview_every=1)).json()
    body = body_of(kitchen)
    body["concepts"][1]["adapter"] = doomed
    job = client.post("/compose-image", json=body).json()
    assert client.delete(f"/adapters/{doomed}").status_code == 204
    client.post(f"/jobs/{blocking['id']}/cancel")
    deadline = time.monotonic() + 120
    while job["finished_at"] is None and time.monotonic() < deadline:
        job = client.get(f"/jobs/{job['id']}", headers={"Prefer": "wait=60"}, timeout=90).json()
    assert (job["state"], job["error"]["code"]) == ("failed", "not_found")
    assert job["error"]["errors"][0]["pointer"] == "/concepts/1/adapter"


def test_methods_are_compared_on_one_sheet_from_the_same_noise(kitchen: Any) -> None:
    client = kitchen[0].client
    methods = [
        {"method": "merge"},
        {"method": "clora_mask_only", "label": "masks"},
        {"method": "merge", "parameters": {"guidance_scale": 1}},
    ]
    job = composed(kitchen, "/compose-image/compare", methods=methods)
    found = [client.get(f"/images/{image_id}").json() for image_id in job["result"]["images"]]
    assert [(item["label"], item["method"]) for item in found] == [
        ("sheet", None), ("merge", "merge"), ("masks", "clora_mask_only"), ("merge 2", "merge"),
    ]  # fmt: skip
    assert [item["label"] for item in job["result"]["report"]["variants"]] == ["merge", "masks", "merge 2"]
    assert found[2]["report"]["coverage"]
    assert found[0]["recipe"]["sheet_of"][0] == {"label": "merge", "recipe": found[1]["recipe"]}
    pictures = [open_png(client.get(item["link"]).content).convert("RGB") for item in found]
    sheet, alone = pictures[0], composed(kitchen, method="merge")["result"]["images"][0]
    same = open_png(client.get(f"/images/{alone}/files/image.png").content)
    assert pictures[1].tobytes() == same.tobytes(), "as the method makes it alone from that seed"
    for number, picture in enumerate(pictures[1:]):
        x = 8 + number * 40
        place = (x, sheet.height - 40, x + 32, sheet.height - 8)
        assert sheet.crop(place).tobytes() == picture.tobytes()


def test_two_real_concepts_appear_in_one_image_over_http(kitchen: Any) -> None:
    """ShapesSD: from the upload of two LoRAs, as diffusers saves them, to a picture that has both."""
    import yaml

    from examples.shapes_sd.scorer import GREEN_SQUARE, MAGENTA_CIRCLE, score, to_array

    server = kitchen[0]
    registered = server.client.post("/models", json={"path": str(SHAPES / "base"), "name": "shapes"}, timeout=60)
    assert registered.status_code == 201, registered.text
    body = yaml.safe_load((SHAPES / "scene.yaml").read_text())
    body["base_model"] = "shapes"
    for concept in body["concepts"]:
        file = SHAPES / concept["adapter"] / "pytorch_lora_weights.safetensors"
        concept["adapter"] = server.upload([("file", (file.name, file.read_bytes()))]).json()["id"]
    headers = {"Accept": "image/png", "Prefer": "wait=200"}
    answer = server.client.post("/compose-image", json=body, headers=headers, timeout=220)
    assert answer.status_code == 200, answer.text
    found = score(to_array(open_png(answer.content)), MAGENTA_CIRCLE, GREEN_SQUARE)
    assert found.both, found
    report = server.client.get(answer.headers["Content-Location"]).json()["report"]
    assert report["concept_lost"] == []
    assert report["updates"][-1]["before"] < report["updates"][0]["before"]
