"""What configuration files tell of a pipeline agrees with what the loaded one is, and refuses the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import ComposeRefused
from compose.catalog import parse_parameters
from compose.pipeline_facts import SECOND_ORDER, PipelineFacts


def changed(sd: Any, folder: Path, file: str, **fields: Any) -> Path:
    """A copy of the pipeline with other values in one of its configuration files."""
    shutil.copytree(sd.base, folder)
    document = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(document | fields))
    return folder


def test_the_files_say_what_the_loaded_pipeline_is(toys: Any, pipelines: Any) -> None:
    facts, loaded = PipelineFacts.read(toys.base), pipelines.get(toys.base)
    assert facts.kind == type(loaded.pipeline).__name__
    assert facts.vae_factor == loaded.vae_factor
    assert facts.native == (loaded.unet.config.sample_size,) * 2
    assert (facts.scheduler, facts.prediction) == ("DDIMScheduler", "epsilon")


@pytest.mark.parametrize(
    "parts",
    [
        {"block_out_channels": (8,) * 4},
        {
            "block_out_channels": (8,) * 3,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2},
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
        },
    ],
)
def test_the_grids_are_those_of_the_layers(parts: dict[str, Any]) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    from compose.attention_maps import map_layers
    from compose.pipeline_facts import _grids

    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "layers_per_block": 1}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**small, "attention_head_dim": 4, **parts})
    assert _grids(dict(unet.config)) == tuple(sorted({layer.factor for layer in map_layers(unet)}))


@pytest.mark.parametrize("method", ["merge", "clora"])
def test_sizes_are_refused_as_the_engine_refuses_them(sd: Any, pipelines: Any, method: str) -> None:
    from compose.engine import compose

    facts = PipelineFacts.read(sd.base)
    options = parse_parameters(method, {})
    for width in (32, 34, 36):
        request = sd.request(method=method, width=width, steps=1)
        refusals = []
        for check in (partial(facts.check, request, options), partial(compose, request, pipelines)):
            try:
                check()
            except ComposeRefused as error:
                refusals.append((error.detail, error.errors))
        assert len(refusals) in (0, 2)
        assert len(set(refusals)) <= 1


def test_a_grid_that_is_not_there_is_refused(sd: Any) -> None:
    with pytest.raises(ComposeRefused, match="8 times coarser") as refused:
        PipelineFacts.read(sd.base).check(sd.request(), parse_parameters("clora", {"map_grid": 8}))
    assert [item.pointer for item in refused.value.errors] == ["/parameters/map_grid"]


@pytest.mark.parametrize(
    ("fields", "parameters", "words"),
    [
        ({"_class_name": "HeunDiscreteScheduler"}, {"scheduler": "pipeline"}, "calls the model twice a step"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}, "flow matching"),
        ({"prediction_type": "sample"}, {}, "predicts 'sample'"),
    ],
)
def test_samplers_that_will_not_do(
    sd: Any, tmp_path: Path, fields: dict[str, Any], parameters: dict[str, Any], words: str
) -> None:
    facts = PipelineFacts.read(changed(sd, tmp_path / "base", "scheduler/scheduler_config.json", **fields))
    with pytest.raises(ComposeRefused, match=words) as refused:
        facts.check(sd.request(), parse_parameters("merge", parameters))
    assert [item.pointer for item in refused.value.errors] == ["/parameters/scheduler"]
    if parameters:
        facts.check(sd.request(), parse_parameters("merge", {}))


def test_the_samplers_of_second_order_are_those_of_diffusers() -> None:
    from importlib.util import find_spec

    spec = find_spec("diffusers.schedulers")
    assert spec is not None
    assert spec.submodule_search_locations
    found = set()
    for file in Path(spec.submodule_search_locations[0]).glob("scheduling_*.py"):
        text = file.read_text(encoding="utf-8")
        if "\n    order = 2\n" in text and "FlowMatch" not in text:
            named = {name for name in SECOND_ORDER if f"class {name}(" in text}
            assert named, file.name
            found |= named
    assert found == set(SECOND_ORDER)


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
        ("unet/config.json", {"in_channels": 9}, "an inpainting model"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "consistency model"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "more than text and a time"),
    ],
)
def test_other_pipelines_are_refused(sd: Any, tmp_path: Path, file: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ComposeRefused, match=words) as refused:
        PipelineFacts.read(changed(sd, tmp_path / "base", file, **fields))
    assert [item.pointer for item in refused.value.errors] == ["/base_model"]
    with pytest.raises(ComposeRefused, match="is no folder of a diffusers pipeline"):
        PipelineFacts.read(tmp_path)


def test_the_facts_need_no_torch() -> None:
    code = "import sys, compose.pipeline_facts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
