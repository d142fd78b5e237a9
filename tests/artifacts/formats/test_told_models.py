"""Written files tell their model. The trap: FLUX.1 and FLUX.2 have layers of one name and the same sides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from artifacts.formats.architectures import architecture, hint_of, specified
from artifacts.formats.writers import WRITERS
from artifacts.formats.writing import Plan, subject_of
from artifacts.layout import AdapterLayout, understand
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo
from scripts.formats_report import CorpusValues
from tests.artifacts.formats.test_writers import manifest_of, read_back

LAST = "time_guidance_embed.{}_embedder.linear_2"


def adapter(name: str, paths: tuple[str, ...], narrower: int = 1) -> AdapterLayout:
    """An adapter of these modules with diffusers' names, of a model whose sides are all divided by `narrower`."""
    known = architecture(name)
    tensors: dict[str, Any] = {}
    for path in paths:
        d_out, d_in = (side // narrower for side in known.modules[path])
        for key, shape in ((f"{path}.lora_A.weight", (4, d_in)), (f"{path}.lora_B.weight", (d_out, 4))):
            tensors[f"transformer.{key}"] = TensorInfo(f"transformer.{key}", "F32", shape, 0, 0)
    return understand(SafetensorsHeader(tensors, {}, 0, 0), CorpusValues({}), None, Path("x"), Path("y"))


def planned(found: AdapterLayout, form: str) -> Plan:
    return WRITERS[form].plan(subject_of(manifest_of(found), form, None))


@pytest.mark.parametrize("form", ["kohya", "comfy"])
@pytest.mark.parametrize(
    ("name", "paths", "narrower"),
    [
        ("flux2-klein-4b", (LAST.format("timestep"), LAST.format("guidance")), 1),
        ("flux2", (LAST.format("timestep"),), 64),
        ("flux2", ("single_transformer_blocks.9.attn.to_qkv_mlp_proj", "transformer_blocks.2.ff.linear_out"), 64),
        ("flux2-klein-9b", ("single_transformer_blocks.13.attn.to_out",), 1),
        ("flux", ("time_text_embed.timestep_embedder.linear_2",), 1),
    ],
)
def test_modules_of_two_models_of_one_name_read_back_as_what_they_are(
    form: str, name: str, paths: tuple[str, ...], narrower: int
) -> None:
    plan = planned(adapter(name, paths, narrower), form)
    assert {module.path for module in read_back(plan, form).modules} == {f"transformer.{path}" for path in paths}


def test_without_its_metadata_the_file_is_one_of_flux_1() -> None:
    plan = planned(adapter("flux2-klein-4b", (LAST.format("timestep"),)), "kohya")
    (module,) = read_back(dataclasses.replace(plan, metadata={}), "kohya").modules
    assert module.path == "transformer.time_text_embed.timestep_embedder.linear_2"


@pytest.mark.parametrize(
    ("text", "hint"), [("Flux.1-dev/lora", "flux"), ("flux-1-schnell", "flux"), ("Flux.2-klein-9b/lora", "flux2")]
)
def test_names_of_trainers_are_told_apart(text: str, hint: str) -> None:
    assert hint_of({"modelspec.architecture": text}) == hint


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd35-large", "flux", "flux2-klein-4b", "wan-14b-i2v", "z-image"])
def test_what_is_written_is_a_hint_at_the_model(name: str) -> None:
    hint = hint_of(specified(architecture(name)))
    assert hint is not None
    assert name.startswith(hint)


def test_motion_modules_beside_other_layers_are_one_layout() -> None:
    """diffusers writes both below the same component."""
    known = architecture("animatediff")
    paths = [
        next(path for path in known.modules if mark in path)
        for mark in (
            "motion_modules.0.transformer_blocks.0.attn1.to_q",
            ".attentions.0.transformer_blocks.0.attn1.to_q",
        )
    ]
    tensors: dict[str, Any] = {}
    for path in paths:
        d_out, d_in = known.modules[path]
        for key, shape in ((f"unet.{path}.lora_A.weight", (4, d_in)), (f"unet.{path}.lora_B.weight", (d_out, 4))):
            tensors[key] = TensorInfo(key, "F32", shape, 0, 0)
    found = understand(SafetensorsHeader(tensors, {}, 0, 0), CorpusValues({}), None, Path("x"), Path("y"))
    assert {module.path for module in found.modules} == {f"unet.{path}" for path in paths}
    assert found.facts.architecture == "animatediff"
