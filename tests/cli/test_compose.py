"""`rankwise compose`: an image of files here with no service, by the service, and what a scene gets wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "compose"))

SCENE: dict[str, Any] = {
    "base_model": "tiny-sd",
    "concepts": [
        {"adapter": "first", "trigger": "sks", "noun": "circle"},
        {"adapter": "second/pytorch_lora_weights.safetensors", "trigger": "zwx", "noun": "square"},
    ],
    "prompt": "a circle and a square",
    "method": "clora_mask_only",
    "steps": 2,
    "width": 32,
    "height": 32,
}


@pytest.fixture(scope="session")
def folder(model_roots: Path) -> Path:
    """A tiny pipeline and two LoRAs side by side."""
    import diffusers
    from toy_pipelines import write_diffusers_lora, write_sd

    base = write_sd(model_roots / "tiny-sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    write_diffusers_lora(model_roots / "first", pipeline, 1)
    write_diffusers_lora(model_roots / "second", pipeline, 2)
    return model_roots


def write_scene(folder: Path, **changes: Any) -> Path:
    path = folder / "scene.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in (SCENE | changes).items() if value is not None}))
    return path


def test_an_image_of_files_is_made_here_with_its_evidence(cli: Any, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    from compose.recipe import read_recipe

    result = cli("compose", write_scene(folder), "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    report = result.json["report"]
    assert (report["method"], report["steps"], report["precision"]) == ("clora_mask_only", 2, "float32")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"image.png", "overlay.png", "composition_report.json", "mask-1-circle-step-0.png"} <= written
    assert json.loads((tmp_path / "out" / "composition_report.json").read_text()) == report
    recipe = read_recipe(tmp_path / "out" / "image.png")
    assert recipe is not None
    assert [item["adapter"]["name"] for item in recipe["concepts"]] == ["first", "pytorch_lora_weights.safetensors"]
    with Image.open(tmp_path / "out" / "image.png") as picture:
        assert picture.size == (32, 32)

    alone = cli("compose", write_scene(folder), "-o", tmp_path / "image.png")
    assert alone.code == 0, alone.err
    assert (tmp_path / "image.png").read_bytes() == (tmp_path / "out" / "image.png").read_bytes()
    for words in ("composition report: clora_mask_only", "share of the image", "circle"):
        assert words in alone.out
    again = cli("compose", write_scene(folder), "-o", tmp_path / "image.png")
    assert (again.code, "is there already" in again.err) == (1, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "clara"}, "no composition method 'clara'"),
        ({"prompt": "a circle"}, "square"),
        ({"steps": 0}, "/steps"),
        ({"speed": 3}, "/speed"),
        ({"concepts": [{"adapter": "nowhere", "noun": "circle"}]}, "/concepts/0/adapter"),
        ({"precision": "float16"}, "float16 needs a GPU"),
        ({"methods": [{"method": "merge"}, {"method": "clora"}], "method": None}, "compared by the service"),
    ],
)
def test_a_wrong_scene_leaves_nothing_behind(
    cli: Any, folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    result = cli("compose", write_scene(folder, **changes), "-o", tmp_path / "out")
    assert result.code == 1
    assert words in result.err
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_files_are_fused_into_one(cli: Any, folder: Path, tmp_path: Path) -> None:
    changes = {"method": "gradient_fusion", "parameters": {"samples": 1}}
    result = cli("compose", write_scene(folder, **changes), "-o", tmp_path / "fused", "--json")
    assert result.code == 0, result.err
    written = {path.name for path in (tmp_path / "fused").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "composition_report.json"}
    wrong = cli("compose", write_scene(folder, **changes), "-o", tmp_path / "fused.png")
    assert (wrong.code, "yields an adapter" in wrong.err) == (1, True)


def test_an_image_of_files_needs_a_place(cli: Any, folder: Path) -> None:
    for options in ([], ["-o", "x.png", "--no-wait"]):
        assert cli("compose", write_scene(folder), *options).code == 2


@pytest.mark.timeout(300)
def test_the_service_makes_images_of_uploaded_files_and_compares_methods(
    cli: Any, remote: str, folder: Path, tmp_path: Path
) -> None:
    registered = cli("models", "add", folder / "tiny-sd", "--name", "served-sd", "--json")
    assert registered.code == 0, registered.err
    methods = [{"method": "merge"}, {"method": "switch", "parameters": {"switch_steps": 1}}]
    scene = write_scene(folder, base_model="served-sd", method=None, methods=methods)
    result = cli("compose", scene, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "comparison" in result.out
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert found == ["0-sheet/image.png", "1-merge/image.png", "2-switch/image.png"]
    sheet = cli("compose", scene, "-o", tmp_path / "sheet.png", "--json")
    assert sheet.code == 0, sheet.err
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "out" / "0-sheet" / "image.png").read_bytes()
