"""Adapters that stock diffusers itself saved: what is read must be what its models have in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.formats.writing import subject_of
from artifacts.intake import inspect

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WEIGHTS = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PATTERNS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn2.to_k": 1}}


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )


def trained(**fields: Any) -> Any:
    """A UNet whose LoRA has random factors."""
    torch.manual_seed(0)
    model = unet()
    model.add_adapter(
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": False} | fields)
    )
    return model


def deltas(model: nn.Module) -> dict[str, Tensor]:
    layers = [(path, layer) for path, layer in model.named_modules() if hasattr(layer, "get_delta_weight")]
    return {f"unet.{path}": layer.get_delta_weight("default").detach() for path, layer in layers}  # type: ignore[operator]


def check(folder: Path, expected: dict[str, Tensor]) -> None:
    ours = Adapter.open(folder / WEIGHTS)
    assert ours.keys() == expected.keys()
    for path, found in ours.items():
        delta = (found.scaling * found.B @ found.A).reshape(expected[path].shape)
        torch.testing.assert_close(delta, expected[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        PATTERNS,
        {"use_rslora": True, **PATTERNS},
        {"target_modules": r".*attn1\.to_q|.*ff\.net\.2"},
    ],
)
def test_with_the_configuration_in_the_metadata(tmp_path: Path, fields: dict[str, Any], old: bool) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    model = trained(**fields)
    state = get_peft_model_state_dict(model)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(state) if old else state,
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    check(tmp_path, deltas(model))


def test_without_metadata_where_alpha_is_the_rank(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    model = trained(lora_alpha=4)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(model))
    check(tmp_path, deltas(model))


def test_under_the_names_of_kohya(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model = trained(target_modules=[*ATTENTION, "conv1", "proj_in"], lora_alpha=4)
    state = convert_state_dict_to_kohya(
        {f"unet.{key}": value for key, value in get_peft_model_state_dict(model).items()}
    )
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / WEIGHTS)
    check(tmp_path, deltas(model))


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "rank_pattern": {"to_q": 2}}, {"use_dora": True}])
@pytest.mark.parametrize(("make", "component"), [(unet, "unet"), (flux, "transformer")])
def test_of_one_model_whose_paths_name_no_component(
    tmp_path: Path, make: Any, component: str, fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    saved, loaded = make(), make()
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": False} | fields
    saved.add_adapter(LoraConfig(**lora))
    saved.save_lora_adapter(tmp_path)
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS)
    manifest = inspect(tmp_path / WEIGHTS)
    assert (manifest.format, manifest.mergeable) == ("safetensors-metadata", not fields.get("use_dora"))
    assert {key.use for key in manifest.keys} == {"used"} | ({"kept"} if fields.get("use_dora") else set())
    assert manifest.report.facts.architecture == {"unet": "sdxl", "transformer": "flux"}[component]
    layers = {path: layer for path, layer in loaded.named_modules() if hasattr(layer, "get_delta_weight")}
    check(tmp_path, {path: layer.get_delta_weight("default_0").detach() for path, layer in layers.items()})
    if manifest.mergeable:
        parts = subject_of(manifest, "diffusers", None).parts()
        assert parts.keys() == {component}
