"""What is refused, where it stands, and what is only warned of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.errors import ComposeRefused, CompositionDiverged, FormatUnknown, PickleRefused, RequestInvalid
from compose.engine import compose
from compose.request import Concept, Style
from compose.validation import validate

WEIGHTS = "pytorch_lora_weights.safetensors"


def pointers(error: RequestInvalid) -> set[str]:
    return {item.pointer for item in error.errors}


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"steps": 0}, "/steps"),
        ({"steps": 1001}, "/steps"),
        ({"seed": 2**63}, "/seed"),
        ({"width": 0}, "/width"),
        ({"parameters": {"temperature": 0}}, "/parameters/temperature"),
        ({"parameters": {"temperature": 11}}, "/parameters/temperature"),
        ({"parameters": {"step_size": -1}}, "/parameters/step_size"),
        ({"parameters": {"step_size": float("nan")}}, "/parameters/step_size"),
        ({"parameters": {"step_size": 1001}}, "/parameters/step_size"),
        ({"parameters": {"mask_threshold": 1.0}}, "/parameters/mask_threshold"),
        ({"parameters": {"guidance_scale": 31}}, "/parameters/guidance_scale"),
        ({"parameters": {"iterative_repeats": 101}}, "/parameters/iterative_repeats"),
        ({"parameters": {"iterative_steps": [2]}}, "/parameters/iterative_steps"),
        ({"parameters": {"iterative_steps": [1, 1]}}, "/parameters/iterative_steps"),
        ({"parameters": {"max_iter_to_alter": 5}}, "/parameters/max_iter_to_alter"),
        ({"parameters": {"apply_mask_after": 5}}, "/parameters/apply_mask_after"),
        ({"parameters": {"branch_prompts": ["a circle and a square"] * 2}}, "/parameters/branch_prompts"),
        ({"parameters": {"nonsense": 1}}, "/parameters/nonsense"),
        ({"prompt": "a circle"}, "/concepts/1/noun"),
        ({"styles": (Style(Path("x"), "x", 2.5),)}, "/styles/0/weight"),
        ({"styles": (Style(Path("x"), "x", -0.1),)}, "/styles/0/weight"),
        ({"method": "nonsense"}, "/method"),
    ],
)
def test_numbers_and_words_are_refused_before_anything_is_loaded(sd: Any, changes: Any, pointer: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        validate(sd.request(**changes))
    assert pointer in pointers(refused.value)


@pytest.mark.parametrize("method", ["clora", "clora_mask_only", "composite", "switch"])
def test_one_concept_is_too_few_and_nine_are_too_many(sd: Any, method: str) -> None:
    request = sd.request(method=method)
    with pytest.raises(ComposeRefused, match="take the method merge") as refused:
        validate(replace(request, concepts=request.concepts[:1]))
    assert pointers(refused.value) == {"/concepts"}
    many = tuple(replace(request.concepts[0], noun=f"n{index}") for index in range(9))
    with pytest.raises(ComposeRefused, match="at most 8"):
        validate(replace(request, concepts=many))
    if method != "merge":
        validate(replace(request, method="merge", concepts=request.concepts[:1]))


def test_equal_nouns_and_few_steps_are_warned_of(sd: Any) -> None:
    request = sd.request(prompt="a circle and a circle")
    twins = tuple(replace(item, noun="circle") for item in request.concepts)
    found = validate(replace(request, concepts=twins))
    assert any("come out as one" in item for item in found.warnings)
    assert any("refinement steps 0, 10, 20" in item for item in found.warnings)
    with pytest.raises(ComposeRefused, match="could not be told apart"):
        validate(replace(request, concepts=twins, prompt="a circle"))


def test_a_scene_of_two_equal_nouns_runs(sd: Any, pipelines: Any) -> None:
    request = sd.request(prompt="a circle and a circle", steps=2, method="clora_mask_only")
    twins = tuple(replace(item, noun="circle") for item in request.concepts)
    found = compose(replace(request, concepts=twins), pipelines)
    assert set(found.masks) == {"circle", "circle 2"}
    given = {"branch_prompts": ["a circle and a circle"] * 3}
    with pytest.raises(ComposeRefused, match="do not tell which is which"):
        compose(replace(request, concepts=twins, parameters=given), pipelines)


@pytest.mark.parametrize(("side", "value"), [("width", 34), ("height", 30)])
def test_sizes_that_do_not_divide_are_refused(sd: Any, pipelines: Any, side: str, value: int) -> None:
    with pytest.raises(ComposeRefused, match="no multiple of 4") as refused:
        compose(sd.request(**{side: value}), pipelines)
    assert pointers(refused.value) == {f"/{side}"}


def test_more_steps_than_the_model_knows_are_refused(sd: Any, pipelines: Any) -> None:
    with pytest.raises(ComposeRefused, match="go beyond the 1000") as refused:
        compose(sd.request(method="merge", steps=1000), pipelines)
    assert pointers(refused.value) == {"/steps"}


def test_prompts_that_are_too_long_are_refused(sd: Any, pipelines: Any) -> None:
    long = "a circle and a square " + "and a " * 8
    for method in ("merge", "clora"):
        with pytest.raises(ComposeRefused, match="takes 16"):
            compose(sd.request(method=method, prompt=long), pipelines)
    with pytest.raises(ComposeRefused, match="takes 16") as refused:
        compose(sd.request(negative_prompt="and a " * 9), pipelines)
    assert pointers(refused.value) == {"/negative_prompt"}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_samplers_of_second_order_are_refused_and_those_with_a_memory_warned_of(sd: Any, pipelines: Any) -> None:
    from diffusers import HeunDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler

    loaded = pipelines.get(sd.base)
    stored = loaded.pipeline.scheduler
    quick = {"scheduler": "pipeline", "iterative_steps": [], "step_size": 0.1}
    try:
        loaded.pipeline.scheduler = HeunDiscreteScheduler.from_config(stored.config)
        with pytest.raises(ComposeRefused, match="calls the model 2 times a step") as refused:
            compose(sd.request(parameters=quick), pipelines)
        assert pointers(refused.value) == {"/parameters/scheduler"}
        for kind in (PNDMScheduler, UniPCMultistepScheduler):
            loaded.pipeline.scheduler = kind.from_config(stored.config, skip_prk_steps=True)
            report = compose(sd.request(parameters=quick), pipelines).report
            assert any("goes on from predictions of earlier steps" in item for item in report["warnings"])
            assert report["scheduler"] == kind.__name__
        loaded.pipeline.scheduler = type(stored).from_config(stored.config, prediction_type="sample")
        with pytest.raises(ComposeRefused, match="predicts 'sample'"):
            compose(sd.request(method="merge"), pipelines)
    finally:
        loaded.pipeline.scheduler = stored


def test_a_gradient_that_is_not_finite_stops_and_names_the_step(
    sd: Any, pipelines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compose.latent_update import Gradient
    from compose.methods.clora import Clora

    real = Clora._gradient
    count = [0]

    def broken(self: Any, timestep: torch.Tensor, latents: torch.Tensor) -> Gradient:
        count[0] += 1
        found = real(self, timestep, latents)
        return Gradient(found.loss, found.value * float("nan")) if count[0] == 2 else found

    monkeypatch.setattr(Clora, "_gradient", broken)
    with pytest.raises(CompositionDiverged, match="in step 1"):
        compose(sd.request(parameters={"iterative_steps": []}), pipelines)


def test_adapters_that_are_gone_pickles_or_several_are_refused(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    def having(path: Path) -> Any:
        request = sd.request()
        return replace(request, concepts=(replace(request.concepts[0], adapter=path), request.concepts[1]))

    with pytest.raises(ComposeRefused, match="not there any more") as refused:
        compose(having(tmp_path / "gone"), pipelines)
    assert pointers(refused.value) == {"/concepts/0/adapter"}
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(PickleRefused):
        compose(having(pickled), pipelines)
    with pytest.raises(PickleRefused):
        compose(having(pickled / "adapter_model.bin"), pipelines)
    several = tmp_path / "several"
    several.mkdir()
    for name in ("one", "two"):
        shutil.copy(sd.first / WEIGHTS, several / f"{name}.safetensors")
    with pytest.raises(FormatUnknown, match="2 safetensors files"):
        compose(having(several), pipelines)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_adapters_that_can_not_be_switched_are_refused(
    sd: Any, pipelines: Any, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sd.peft, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ComposeRefused, match=message):
        compose(sd.request(method="merge", concepts=(Concept(folder, "odd", "sks", "circle"),)), pipelines)


def test_an_adapter_that_matches_nothing_or_only_in_part_is_refused(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    tensors = load_file(sd.peft / "adapter_model.safetensors")
    strange = {key.replace("attn2", "attn9").replace("attn1", "attn8"): value for key, value in tensors.items()}
    some = {key.replace("mid_block", "middle_block"): value for key, value in tensors.items()}
    for index, (state, message) in enumerate(((strange, "matches no module"), (some, "modules of the adapter"))):
        folder = tmp_path / str(index)
        shutil.copytree(sd.peft, folder)
        save_file(state, folder / "adapter_model.safetensors")
        with pytest.raises(ComposeRefused, match=message) as refused:
            compose(sd.request(method="merge", concepts=(Concept(folder, "odd", "sks", "circle"),)), pipelines)
        assert pointers(refused.value) == {"/concepts/0/adapter"}


def test_a_file_without_a_configuration_loads_by_its_own_alphas(sd: Any, pipelines: Any, tmp_path: Path) -> None:
    """Old files of kohya's trainer: names with underscores, alpha beside the factors."""
    state = {}
    for key, value in load_file(sd.first / WEIGHTS).items():
        path, _, rest = key.removeprefix("unet.").rpartition(".lora_")
        name = "lora_unet_" + path.replace(".", "_")
        state[f"{name}.{'lora_down' if rest.startswith('A') else 'lora_up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(state, tmp_path / "kohya.safetensors")
    request = sd.request(method="merge", concepts=(Concept(sd.first, "first", "sks", "circle"),), steps=2)
    kohya = replace(request, concepts=(Concept(tmp_path / "kohya.safetensors", "kohya", "sks", "circle"),))
    assert compose(kohya, pipelines).image.tobytes() == compose(request, pipelines).image.tobytes()


def test_folders_that_are_no_such_pipeline_are_refused(tmp_path: Path, sd: Any, pipelines: Any) -> None:
    with pytest.raises(ComposeRefused, match="no folder of a diffusers pipeline") as refused:
        compose(sd.request(base=tmp_path), pipelines)
    assert pointers(refused.value) == {"/base_model"}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ComposeRefused, match="is a FluxPipeline"):
        compose(sd.request(base=tmp_path), pipelines)
    broken = tmp_path / "broken"
    shutil.copytree(sd.base, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ComposeRefused, match="can not be loaded"):
        compose(sd.request(base=broken), pipelines)
